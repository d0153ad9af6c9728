"""Finds what an English caption is about: the noun phrases that are its subjects, without a parser.

The rules rest on how captions are built: a determiner, adjectives, a noun, then a preposition, a verb or a
relative clause. They fail on sentences that begin otherwise; then the phrase is empty or odd, never an error.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_WORD = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*|[.,;:!?()\"]")

_IS_A = re.compile(r"\b(?:is|are|be|was|were) (?:likely |probably |actually )?(?:an?|the|two|part of) ")

_LEMMAS = {
    "glasses": "glasses", "eyeglasses": "eyeglasses", "sunglasses": "sunglasses", "skis": "ski",
    "leaves": "leaf", "stairs": "stairs", "people": "people", "men": "man", "women": "woman",
    "clothes": "clothes", "pants": "pants", "binoculars": "binoculars", "blinds": "blind",
    "goggles": "goggles", "spectacles": "spectacles", "taxi": "taxi", "headphones": "headphones",
    "bus": "bus", "shears": "shears", "clippers": "clippers", "tongs": "tongs", "pliers": "pliers",
    "dice": "die", "gas": "gas", "buildings": "building", "building": "building", "trousers": "trousers",
    "jeans": "jeans", "shorts": "shorts", "bowtie": "bow tie", "tyre": "tire", "gray": "grey",
    "doughnut": "donut", "doughnuts": "donut",
}  # fmt: skip
"""Where the lemma list says "glass", "leave" or "build", and spellings that mean the same."""

_DETERMINERS = frozenset(
    "a an the this that these those one two three four five six seven eight nine ten several some many "
    "few both numerous various multiple another each every any its his her their our my your single".split()
)
_PREPOSITIONS = frozenset(
    "of with in on at by from near under over above below against behind beside between among amongst "
    "inside outside into onto upon through across along around beneath underneath toward towards to for "
    "without within during alongside atop amid next before after like as via facing".split()
)
_BREAKS = frozenset(
    "which who whom whose that where when while but or nor because although though if so than then it "
    "he she they we i you is are was were be been being am has have had having do does did can could "
    "may might must shall should will would not also appears appear seems seem stands stand sits sit "
    "features feature shows show wears wear holds hold lies lie rests rest hangs hang looks look "
    "consists consist includes include contains contain displays display depicts depict exhibits "
    "exhibit occupies covers fills reads takes runs leans faces extends stretches showcases boasts "
    "comes belongs serves reaches captures there here now sorry i'm".split()
)
_VERBS_ING = frozenset(
    "wearing holding featuring showing displaying carrying riding eating using playing having "
    "containing including covering surrounding depicting revealing showcasing reflecting resembling "
    "exhibiting forming facing looking extending transitioning exposing creating giving emitting "
    "suggesting indicating making allowing supporting leading pulling pushing reading drinking watching "
    "throwing catching hitting swinging consisting".split()
)
_ADJECTIVES = frozenset(
    "black white grey red blue green yellow orange brown pink purple beige tan teal olive maroon navy "
    "golden silver gold cream turquoise violet lavender magenta khaki dark light bright pale deep vivid "
    "vibrant dull clear big small large tiny huge tall short long thin thick wide narrow slim slender "
    "high low flat round square oval curved straight plain smooth rough soft hard firm old young new "
    "modern vintage rustic wooden plastic glossy shiny matte fluffy furry curly wavy bushy sturdy dirty "
    "clean empty full open upright horizontal vertical diagonal slanting elongated busy detailed plush "
    "sleek crisp fresh ripe sandy grassy rocky snowy dry wet cloudy sunny hazy robust stout broad "
    "compact single double fine coarse dense heavy left right top bottom front rear upper lower main "
    "human adult other same different lush ornate intricate prominent distinct visible partial male "
    "female".split()
)
_ADJECTIVE_ENDINGS = (
    "ish", "ous", "ful", "less", "ical", "ular", "able", "ible", "like", "shaped", "colored", "coloured",
    "style", "sized", "toned", "patterned", "most", "ed",
)  # fmt: skip
_PARTITIVES = frozenset(
    "piece slice wedge pair group set bunch part portion section bit chunk segment fragment close-up "
    "closeup view side row stack pile collection series cluster scoop strip sheet sliver half quarter "
    "number lot variety kind type herd flock assortment array patch area expanse corner edge end tip "
    "top bottom back front rear base surface interior exterior image picture photo photograph shot "
    "illustration drawing depiction crop region layer ball roll loaf stalk sprig head body leg tail ear "
    "floret stick block lump handful mass glimpse model replica".split()
)
_CONTAINERS = frozenset(
    "bowl plate cup glass box basket bag tray can jar pot bottle vase field bed carton".split()
)
_DEPICTIONS = frozenset(
    "image picture photo photograph scene illustration drawing depiction view region segment crop".split()
)
_HOLLOW = frozenset("unit device fixture item system assembly".split())
"""Heads that say nothing when a named thing stands before them: an air conditioner unit."""


class Phrase(NamedTuple):
    """A noun phrase.

    Attributes:
        words: lemmas of its nouns and adjectives in order; the last one is the head. Empty if none was found.
        of: lemmas of the phrase after "of", head last; empty if there is none.
    """

    words: tuple[str, ...]
    of: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """The head noun, or ""."""
        return self.words[-1] if self.words else ""


@functools.lru_cache(maxsize=100_000)
def lemma(word: str) -> str:
    """Dictionary form of a lower-case noun; unknown words are returned as they are."""
    if word in _LEMMAS:
        return _LEMMAS[word]
    if word.endswith("ing") or not word.isalpha():  # "building", "cutting": nouns here, verbs to a lemma list
        return word[:-1] if word.endswith("s") and "-" in word and not word.endswith("ss") else word
    import simplemma

    found = simplemma.lemmatize(word, lang="en").lower()
    if word.endswith("ed") or (word.endswith("er") and not found.endswith("er")):
        return word  # "red", "slanted", "roller": not the verb, and no comparative
    return _LEMMAS.get(found, found)


@functools.lru_cache(maxsize=100_000)
def is_english(word: str) -> bool:
    """Whether the lemma list knows the word, or all parts of a hyphenated one."""
    import simplemma

    return all(simplemma.is_known(part, lang="en") for part in word.split("-"))


def lemmas(text: str) -> tuple[str, ...]:
    """Lemmas of all words of a text, punctuation left out."""
    return tuple(lemma(token) for token in tokens(text) if token[0].isalnum())


def tokens(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return _WORD.findall(text.lower().replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"'))


def subject(text: str) -> Phrase:
    """The noun phrase that a caption is about.

    "The image shows a cat" is about the cat, "There is a cat" too; "A slice of apple" is `slice` of `apple`.
    """
    found, rest = _phrase(_opened(tokens(text)))
    target = found.of if found.of and found.head in _DEPICTIONS else found.words
    if target and target[-1] in _DEPICTIONS and rest and _shows(rest[0]):
        shown, _ = _phrase(rest[1:])
        return shown if shown.words else found
    return found


def later_subjects(text: str) -> list[Phrase]:
    """Subjects of the sentences after the first, pronouns left out."""
    return [found for part in _sentences(text)[1:] if (found := subject(part)).words]


def predicates(text: str) -> list[Phrase]:
    """What the first sentence says its subject is: the phrase after "is a", "are", "appears to be a"."""
    words = next(iter(_sentences(text)), "")
    found = []
    for match in _IS_A.finditer(words.lower()):
        phrase, _ = _phrase(tokens(words[match.end() :]))
        if phrase.words:
            found.append(phrase)
    return found


def is_partitive(word: str) -> bool:
    """Whether "X of Y" with this X is about Y: a slice of apple, a pair of skis, the tip of a ski."""
    return word in _PARTITIVES


def is_depiction(word: str) -> bool:
    """Whether it is a picture of something: then "X of Y" is a picture as well as a Y."""
    return word in _DEPICTIONS


def is_container(word: str) -> bool:
    """Whether "X of Y" with this X is about either: a bowl of fruit."""
    return word in _CONTAINERS


def is_hollow(word: str) -> bool:
    """Whether a head says nothing besides the noun before it: an air conditioner unit."""
    return word in _HOLLOW


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?;])\s+", text.strip()) if part]


def _shows(word: str) -> bool:
    return word in {
        "shows",
        "show",
        "depicts",
        "features",
        "contains",
        "captures",
        "displays",
        "showing",
        "is",
        "has",
    }


def _opened(words: list[str]) -> list[str]:
    """Words after an opening that names nothing: "there is", "this is", "it shows", "In the foreground,"."""
    if words and words[0] in _PREPOSITIONS and "," in words:
        words = words[words.index(",") + 1 :]
    if len(words) > 2 and words[0] in {"there", "this", "it", "these", "here", "they"}:
        if words[1] in {"is", "are", "shows", "appears"}:
            return words[2:]
    return words


def _phrase(words: list[str]) -> tuple[Phrase, list[str]]:
    """The first noun phrase of `words`, and what follows it."""
    start = 0
    while start < len(words) and (words[start] in _DETERMINERS or not words[start][0].isalnum()):
        start += 1
    found: list[str] = []
    index = start
    while index < len(words):
        word, after = words[index], words[index + 1] if index + 1 < len(words) else "."
        if word in {",", "and"}:
            if not _goes_on(found, words[index + 1 :]):
                break
        elif not word[0].isalnum() or _ends(word, after, found):
            break
        elif word in _DETERMINERS and found:
            break
        elif not word.endswith("ly") or word in {
            "butterfly",
            "family",
            "lily",
            "jelly",
            "fly",
            "trolley",
            "dolly",
        }:
            found.append(word)
        index += 1
    rest = words[index:]
    nouns = _owner([lemma(word.removesuffix("'s")) if not word.endswith("'s") else word for word in found])
    if rest and rest[0] == "of" and nouns:
        inner, rest = _phrase(rest[1:])
        return Phrase(tuple(nouns), inner.of if is_partitive(inner.head) and inner.of else inner.words), rest
    return Phrase(tuple(nouns)), rest


def _owner(words: list[str]) -> list[str]:
    """Cut a phrase after its owner: the words "brown dog's head" are about the brown dog."""
    for index in range(len(words) - 1, -1, -1):
        if words[index].endswith("'s"):
            return [*words[:index], lemma(words[index][:-2])]
    return words


def _goes_on(found: list[str], after: list[str]) -> bool:
    """Whether a comma or "and" joins adjectives of one phrase rather than ending it."""
    if not found:
        return True
    upcoming = next((word for word in after if word not in {",", "and"}), ".")
    closed = upcoming in _DETERMINERS or upcoming in _PREPOSITIONS or upcoming in _BREAKS
    if closed or not upcoming[0].isalnum() or upcoming in _VERBS_ING:
        return False
    return is_adjective(found[-1])


def _ends(word: str, after: str, found: list[str]) -> bool:
    """Whether the phrase is over before `word`."""
    named = any(not is_adjective(noun) for noun in found)
    if word in _PREPOSITIONS or (
        word in _BREAKS and (found or word not in {"display", "look", "rest", "stand"})
    ):
        return True
    if word in _VERBS_ING:
        return named
    follows = after in _PREPOSITIONS or after in _DETERMINERS or after in _BREAKS or not after[0].isalnum()
    if (
        word.endswith("ing")
        and named
        and (after in _PREPOSITIONS or after in _DETERMINERS or after.endswith("ly"))
    ):
        return True
    return word.endswith("ed") and named and (follows or after[0].isdigit()) and len(word) > 4


def is_adjective(word: str) -> bool:
    """Whether a lower-case word is more likely an adjective than a noun, by a list and by its ending."""
    return (
        lemma(word) in _ADJECTIVES
        or word in _ADJECTIVES
        or (
            "-" in word
            and word.rsplit("-")[-1].endswith(("ed", "shaped", "style", "like", "sized", "old", "al"))
        )
        or (
            word.endswith(_ADJECTIVE_ENDINGS)
            and word not in {"bed", "shed", "seed", "table", "vegetable", "dish"}
        )
    )
