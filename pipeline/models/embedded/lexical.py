"""The `lexical` judge: compares the subject of a caption with a category by lemmas and a table of synonyms.

It reads words, not pictures: a caption that is wrong about the photo but names the category passes. Margins:

| margin | answer | because |
| --- | --- | --- |
| 1.0 | yes | the subject is the category, or a kind or part of it ("a slice of apple") |
| 0.75 | yes | the subject is said to be one ("the car is a white SUV"), or names a part ("a car window") |
| 0.5 | yes | the subject is a looser word ("glass" for wine glass), or a later sentence's subject is it |
| -0.5 | no | the category is mentioned, but something else is the subject |
| -1.0 | no | the category is not mentioned |
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any, NamedTuple

from ..options import BackendOptions, read_options
from ..protocols import Answer, Question
from . import phrases
from .phrases import Phrase

VERSION = "1"

_NOT_A_KIND = frozenset(
    {
        ("hot dog", "dog"),
        ("hot dog bun", "dog"),
        ("teddy bear", "bear"),
        ("stuffed bear", "bear"),
        ("toy bear", "bear"),
        ("sea lion", "lion"),
        ("guinea pig", "pig"),
    }
)
"""Compounds (subject, category) whose head noun misleads."""

_NOT_ALONE = frozenset({"dog", "cream", "machine", "product"})
"""Last words of categories that do not stand for the whole: nobody calls a hot dog a dog."""


class _Category(NamedTuple):
    """Lemma phrases that stand for a category: its own names, and other words for it and kinds of it."""

    names: frozenset[str]
    words: frozenset[str]


class LexicalOptions(BackendOptions, frozen=True):
    """`lexical` takes no options."""


class LexicalJudge:
    """Answers by rules on words. Deterministic; any text gets an answer, never an error."""

    version = VERSION

    def __init__(self, **options: Any):
        read_options(LexicalOptions, options, "judge.options")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Version of the rules, digest of the synonyms, and the release of the lemma list."""
        read_options(LexicalOptions, options, "judge.options")
        import hashlib
        from importlib.metadata import version

        table = hashlib.sha256(_table_text().encode()).hexdigest()[:16]
        return {"version": VERSION, "synonyms": table, "simplemma": version("simplemma")}

    def ask(self, questions: list[Question]) -> list[Answer]:
        """One answer per question, in order.

        Raises:
            ValueError: a question of a kind that is not known; a bug of the caller.
        """
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Answer:
        if question.kind == "extract":
            return Answer(core_category(question.caption))
        if question.kind != "verify":
            raise ValueError(f"question of kind {question.kind!r}; known are 'verify' and 'extract'")
        margin = describes(question.caption, question.category or "")
        return Answer("yes" if margin > 0 else "no", margin)


def describes(caption: str, category: str) -> float:
    """How far a caption's subject is the category, -1..1; see the table at the top of the file."""
    wanted = _category(category)
    if not wanted.names:
        return -1.0
    subject = phrases.subject(caption)
    margin = max(
        (_match(subject, wanted), *(0.75 * (_match(p, wanted) >= 1) for p in phrases.predicates(caption)))
    )
    if margin <= 0 and not _is_known(subject):
        later = max((_match(phrase, wanted) for phrase in phrases.later_subjects(caption)), default=0.0)
        margin = 0.5 if later >= 1 else 0.0
    if margin > 0:
        return margin
    text = f" {' '.join(phrases.lemmas(caption))} "
    return -0.5 if any(f" {name} " in text for name in wanted.names) else -1.0


def core_category(caption: str) -> str:
    """The category that a caption describes: the head of its subject, with the words that belong to it.

    Returns:
        A singular noun in lower case ("man", "air conditioner"), or "" if the subject is no English noun.
    """
    subject = phrases.subject(caption)
    words = subject.words
    if subject.of and (phrases.is_partitive(subject.head) or phrases.is_depiction(subject.head)):
        words = subject.of
    if len(words) > 1 and phrases.is_hollow(words[-1]):
        words = words[:-1]
    for length in (3, 2):
        compound = " ".join(words[-length:])
        if len(words) >= length and compound in _vocabulary():
            return compound
    head = words[-1] if words else ""
    if len(head) < 2 or not head.replace("-", "").isalpha():
        return ""
    noun = head in _vocabulary() or (phrases.is_english(head) and not phrases.is_adjective(head))
    return head if noun else ""


def _match(phrase: Phrase, wanted: _Category) -> float:
    """1.0 if the phrase is the category, 0.75 if it names a part of one, 0.5 for a looser word; else 0."""
    accepted = wanted.names | wanted.words
    for words in _readings(phrase):
        tails = [" ".join(words[start:]) for start in range(len(words))]
        misleads = any((tail, name) in _NOT_A_KIND for tail in tails for name in wanted.names)
        if not misleads and any(tail in accepted for tail in tails):
            return 1.0
    words = phrase.words
    if not (_is_person(phrase.head) and phrase.head not in accepted):
        for end in range(1, len(words)):
            if any(" ".join(words[start:end]) in wanted.names for start in range(end)):
                return 0.75
    last = {name.split()[-1] for name in wanted.names if " " in name} - _NOT_ALONE
    return 0.5 if phrase.head in last and not _is_compound(phrase) else 0.0


def _readings(phrase: Phrase) -> list[tuple[str, ...]]:
    """The word sequences that a phrase may be about."""
    if phrase.of and phrases.is_partitive(phrase.head) and not phrases.is_depiction(phrase.head):
        return [phrase.of]
    found = [phrase.words]
    if len(phrase.words) > 1 and phrases.is_hollow(phrase.head):
        found.append(phrase.words[:-1])
    if phrase.of and (phrases.is_depiction(phrase.head) or phrases.is_container(phrase.head)):
        found.append(phrase.of)
    return found


def _is_compound(phrase: Phrase) -> bool:
    """Whether the phrase ends in a compound of the table: "traffic light" is not just any light."""
    return any(
        " ".join(phrase.words[-length:]) in _vocabulary() for length in (2, 3) if len(phrase.words) >= length
    )


def _is_person(head: str) -> bool:
    person = _category("person")
    return head in person.names or head in person.words


def _is_known(phrase: Phrase) -> bool:
    return any(words and words[-1] in _vocabulary() for words in _readings(phrase))


@functools.lru_cache(maxsize=10_000)
def _category(category: str) -> _Category:
    """The category's names and words, as lemma phrases. "cabinet/shelf" and "cabinet or shelf" are either."""
    names = category.lower().replace(" or ", "/").split("/")
    own = frozenset(" ".join(phrases.lemmas(name.replace("-", " "))) for name in names) - {""}
    rows = [row for row in _rows() if row.names & own]
    return _Category(own.union(*(row.names for row in rows)), frozenset().union(*(row.words for row in rows)))


@functools.cache
def _rows() -> list[_Category]:
    rows = []
    for line in _table_text().splitlines():
        if line.strip() and not line.startswith("#"):
            left, _, right = line.partition(":")
            rows.append(_Category(_phrases(left), _phrases(right)))
    return rows


@functools.cache
def _vocabulary() -> frozenset[str]:
    """Every lemma phrase of the table."""
    return frozenset().union(*(row.names | row.words for row in _rows()))


def _phrases(text: str) -> frozenset[str]:
    return frozenset(" ".join(phrases.lemmas(part)) for part in text.split(",")) - {""}


def _table_text() -> str:
    return (
        resources.files("paracaption.pipeline.models.embedded")
        .joinpath("synonyms.txt")
        .read_text(encoding="utf-8")
    )
