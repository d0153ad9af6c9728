"""Which captions are fit to learn from: prose, about the region, of fair length, and not looping.

`clean` goes through `RULES` in order and stops at the first that objects. Each rule is a small function from
the caption, read once, to a detail for the ledger or None. All are linear in the caption's length, whatever
it holds: single passes over the words, and patterns whose repetitions are bounded or cannot be retried.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from ..schemas.config import Text
from ..schemas.reasons import Reason
from .verdict import Verdict


class Token(NamedTuple):
    """A word, folded, with its place in the text."""

    word: str
    start: int
    end: int


class Prose(NamedTuple):
    """A caption, read once.

    Attributes:
        text: without surrounding white space.
        tokens: its words: runs of letters or digits; in scripts without word breaks each character.
        words: the tokens' words.
        sentences: the words of each sentence that has any.
        copies: phrases that occurred before, see `Copy`.
        repeat_share: share of the 4-grams that occurred before, 0 if there are none.
    """

    text: str
    tokens: list[Token]
    words: list[str]
    sentences: list[list[str]]
    copies: list[Copy]
    repeat_share: float


class Copy(NamedTuple):
    """A stretch of at least 4 words that equals the stretch `lag` words before, as long as it goes on.

    Attributes:
        start: number of its first word.
        words: its length; if not less than `lag`, a phrase of `lag` words stands there back to back.
        lag: distance to the latest earlier occurrence, hence the loop's period.
    """

    start: int
    words: int
    lag: int


_GRAM = 4
_UNBROKEN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana, Han: no spaces between words
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e00-\u0eff"  # no \w for Python
_LETTER = rf"(?:[^\W_{_UNBROKEN}]|[{_MARKS}])"
_WORD = re.compile(rf"[{_UNBROKEN}]|{_LETTER}+(?:['\u2019]{_LETTER}+)*")
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"'”\u2019)\]]|$)|[。\uff01\uff1f।\n]")


def clean(caption: str, config: Text, confidence: float | None = None) -> Verdict:
    """Keep a caption that a model may learn to imitate.

    Args:
        caption: the captioner's text; any string, of any length and language.
        config: thresholds.
        confidence: how sure the captioner is of it, 0 to 1; None if it does not say.

    Returns:
        The first rule's objection, or keep; always with the scores `num_words` and `repeat_share`.
    """
    prose = read(caption)
    scores = {"num_words": float(len(prose.words)), "repeat_share": prose.repeat_share}
    for reason, rule in RULES:
        detail = rule(prose, config)
        if detail is not None:
            return Verdict(reason, detail, scores)
    return Verdict(*_unsure(confidence, config.min_confidence), scores)


def read(caption: str) -> Prose:
    """Cut a caption into words and sentences and find what repeats in it."""
    text = caption.strip()
    tokens = [
        Token(match[0].casefold().replace("\u2019", "'"), *match.span()) for match in _WORD.finditer(text)
    ]
    words = [token.word for token in tokens]
    copies, num_repeated = _find_copies(words)
    share = num_repeated / max(len(words) - _GRAM + 1, 1)
    return Prose(text, tokens, words, _sentences(text, tokens), copies, share)


def _find_copies(words: list[str]) -> tuple[list[Copy], int]:
    """Follow each 4-gram to its latest earlier occurrence: as long as the distance stays, it is one copy.

    Of a loop the latest occurrence is one period before, so that loops of any period are found in one pass.
    """
    latest: dict[tuple[str, ...], int] = {}
    copies: list[Copy] = []
    num_repeated = 0
    for start in range(len(words) - _GRAM + 1):
        gram = tuple(words[start : start + _GRAM])
        before = latest.get(gram)
        latest[gram] = start
        if before is None:
            continue
        num_repeated += 1
        last = copies[-1] if copies else None
        if last and last.lag == start - before and last.start + last.words == start + _GRAM - 1:
            copies[-1] = last._replace(words=last.words + 1)
        else:
            copies.append(Copy(start, _GRAM, start - before))
    return copies, num_repeated


def _sentences(text: str, tokens: list[Token]) -> list[list[str]]:
    sentences: list[list[str]] = [[]]
    ends = _SENTENCE_END.finditer(text)
    end = next(ends, None)
    for token in tokens:
        while end and end.start() < token.start:
            sentences.append([])
            end = next(ends, None)
        sentences[-1].append(token.word)
    return [sentence for sentence in sentences if sentence]


# The rules. Each: what it finds, or None.


def empty(prose: Prose, config: Text) -> str | None:
    """Nothing but white space."""
    return None if prose.text else "empty"


_MARKUP = re.compile(
    r"<\|.{0,40}?\|>"  # <|im_end|>, <|mdm_mask|>
    r"|</?[A-Za-z][A-Za-z0-9_]{0,20}(?:\s[^<>]{0,200})?/?>"  # <s>, </p>, <unk>, <image>, <a href="...">
    r"|\[/?(?:INST|MASK|PAD|UNK|CLS|SEP|BOS|EOS)\]"
    r"|```|\*\*\w|__\w[^_]{0,80}__|^#{1,6}\s|\]\(https?:"  # Markdown
    r"|&(?:amp|lt|gt|quot|nbsp|#\d{1,6});"
    r"|^[ \t]{0,8}(?:user|assistant|system|human|caption|description|answer|output|response)\s?:"
    r"|###\s?\w"
    r"|\\u[0-9a-f]{4}|\\n\b|\\(?:frac|begin|end|text|mathbf|mathrm)\b",
    re.IGNORECASE | re.MULTILINE,
)
_BROKEN = re.compile(
    r"\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ud800-\udfff]"  # undecodable, control, private
    r"|â€|Ã[\x80-\xbf]|Â[\xa0-\xbf]|ï»¿"  # UTF-8 read as Latin-1
)
_CODE = re.compile(
    r"^\s*[\[{].*[\]}]\s*\Z"  # JSON, a list
    r"|\{\s?[\"'][\w ]{1,40}[\"']\s?:"  # {"caption":
    r"|\b(?:def|function|class)\s\w{1,40}\s?\([^()]{0,200}\)\s?[:{]"
    r"|\b(?:import|from)\s[\w.]{1,80}\simport\b|=>\s?\{|==\s?\w|#include\s?<"
    r"|\[\s?-?\d{0,5}\.?\d{1,8}(?:\s?,\s?-?\d{0,5}\.?\d{1,8}){3}\s?\]",  # a box's coordinates
    re.DOTALL,
)
_BLOB = re.compile(r"[A-Za-z0-9+/=]{40,}")
_SAME_LETTER = re.compile(r"([^\W\d_])\1{9}", re.IGNORECASE)


def junk(prose: Prose, config: Text) -> str | None:
    """Not prose: markup, a model's special tokens, broken encoding, code, binary as text, mostly symbols."""
    for name, pattern in (("markup", _MARKUP), ("broken text", _BROKEN), ("code", _CODE), ("blob", _BLOB)):
        if found := pattern.search(prose.text):
            return f"{name}: {_quote(found[0])}"
    if found := _SAME_LETTER.search(prose.text):
        return f"one letter over and over: {_quote(found[0])}"
    num_letters = sum(t.end - t.start for t in prose.tokens) - sum(map(str.isdigit, prose.text))
    num_visible = len(prose.text) - sum(map(str.isspace, prose.text))
    share = num_letters / num_visible
    if share < config.min_letter_share:
        return f"share of letters {share:.2f}, at least {config.min_letter_share:g} needed"
    return None


_QUOTED = re.compile(r'"[^"]{0,400}"|“[^“”]{0,400}”')
_SEE = (
    r"(?:see|view|access|open|load|process|analy[sz]e|describe|provide|help|assist|identify|determine|tell|fulfill?"
    r"|comply|generate|answer|interpret|recogni[sz]e|display|discern|make out|offer|complete|create|do that)"
)
_REFUSAL = re.compile(
    rf"\bi(?:'m| am) (?:so |very |really )?sorry\b|^sorry\b|^unfortunately\b|\b(?:i|my) apolog"
    rf"|\bi (?:can't|cannot|can not|couldn't|could not|won't|will not|am unable|am not able)\b"
    rf"|\bi'm (?:unable|not able)\b|\bi (?:do not|don't) (?:have|see|know)\b"
    r"|\bas an? (?:ai\b|(?:[a-z]{1,12} ){0,3}(?:language|vision|text-based) model\b)"
    r"|\bi(?:'m| am) (?:just |only )?an? (?:ai|assistant|language|large language)\b"
    r"|^the (?:image|picture|photo|region|area|object|mask)\b[^.]{0,30}"
    rf"\btoo (?:\w{{1,12}} ){{1,3}}to {_SEE}\b"
    rf"|^(?:it is |it's )?(?:not possible|impossible|difficult|hard|unable|cannot|can't|not able) to {_SEE}\b"
    rf"|\b(?:unable|not possible|impossible) to {_SEE}\b[^.]{{0,60}}\b(?:image|region|picture|photo)"
    rf"|^(?:unable|cannot|can't) (?:to )?{_SEE}\b"
    r"|\bno (?:image|picture|photo|visual|region|mask)s? (?:was|were|is|are|has been|have been)? ?"
    r"(?:provided|attached|uploaded|given)\b"
    r"|\b(?:please|could you|can you) (?:please |kindly )?"
    r"(?:provide|upload|share|attach|send|clarify|specify|try)\b"
)


def refusal(prose: Prose, config: Text) -> str | None:
    """The model talks of itself instead of the region. What the caption only quotes does not count."""
    text = " ".join(prose.text.casefold().replace("\u2019", "'").split())
    unquoted = _QUOTED.sub('""', text)
    if len(_WORD.findall(unquoted)) < 3:
        unquoted = text.strip('"“” ')
    found = _REFUSAL.search(unquoted)
    return _quote(found[0]) if found else None


def too_short(prose: Prose, config: Text) -> str | None:
    """Fewer words or characters than the least."""
    return _shorter(len(prose.words), config.min_words, "words") or _shorter(
        len(prose.text), config.min_chars, "characters"
    )


_CHAT = re.compile(
    r"(?:sure|certainly|of course|absolutely|okay|ok|great)\s?[,!.:]"
    r"|(?:here is|here's|here are|below is|the following is) (?:a|an|the|your|some) "
    r"(?:\w{1,15},? ){0,4}(?:caption|description|answer|summary)",
    re.IGNORECASE,
)
_FUNCTION_WORDS = """
    a an the this that these those it its it's there here which what who whose of in on at to from by with
    within without as for into onto over under above below behind between and or but also not no is are was
    were be being been has have had do does can could may might will would some any one ones other another we
    you i they their his her he she him them our your
"""
_SAID_OF_ALL = """
    image images picture pictures photo photos photograph photographs photographic scene view frame region
    regions area areas mask masks masked section portion part parts object objects thing things item items
    something element elements entity subject content contents kind type sort piece show shows showing shown
    depict depicts depicting depicted display displays displaying displayed contain contains containing
    contained feature features featuring featured present presents presented include includes including
    included see sees seen seeing visible appear appears appearing seem seems look looks looking capture
    captures captured illustrate illustrates illustrated represent represents represented describe describes
    described description caption highlight highlights highlighted marked outlined located placed positioned
    given specific certain various several center centre middle foreground background main
"""
_EMPTY_WORDS = frozenset((_FUNCTION_WORDS + _SAID_OF_ALL).split())


def boilerplate(prose: Prose, config: Text) -> str | None:
    """Words without content ("The image shows an object."), or chat around an answer ("Sure! Here is")."""
    if found := _CHAT.match(prose.text):
        return _quote(found[0])
    content = {word for word in prose.words if word not in _EMPTY_WORDS}
    return _shorter(len(content), config.min_content_words, "words with content")


def repeats(prose: Prose, config: Text) -> str | None:
    """Says again what it said: repeated 4-grams, a phrase back to back, a copied phrase, a sentence twice."""
    if prose.repeat_share > config.max_repeat_share:
        return (
            f"share of repeated 4-grams {prose.repeat_share:.3f}, at most {config.max_repeat_share:g} allowed"
        )
    for copy in prose.copies:
        again = copy.words // copy.lag  # complete copies, back to back, after the first
        phrase = " ".join(prose.words[copy.start : copy.start + min(copy.lag, copy.words)])
        if again >= config.max_phrase_loops or (again and copy.lag > config.max_loop_words):
            return f"a phrase {again + 1} times back to back: {_quote(phrase)}"
        if copy.words > config.max_copied_words:
            return (
                f"{copy.words} copied words in a row, at most {config.max_copied_words} allowed: "
                f"{_quote(phrase)}"
            )
    return _same_word(prose.words, config) or _same_sentence(prose, config)


def _same_word(words: list[str], config: Text) -> str | None:
    """One word back to back; too short for 4-grams to see."""
    times = 1
    for before, word in pairwise(words):
        times = times + 1 if word == before else 1
        if times > config.max_phrase_loops and not word.isdigit():
            return f"a word more than {config.max_phrase_loops} times back to back: {_quote(word)}"
    return None


_SENTENCE_WORDS = 4  # shorter ones ("It is red.") may recur; back to back they are a phrase loop


def _same_sentence(prose: Prose, config: Text) -> str | None:
    times = Counter(tuple(sentence) for sentence in prose.sentences if len(sentence) >= _SENTENCE_WORDS)
    for sentence, count in times.items():
        if count > config.max_same_sentence:
            return f"{count} times the sentence {_quote(' '.join(sentence))}"
    if len(prose.sentences) > 1 and not re.search(r"[.!?。\uff01\uff1f।]\W{0,3}\Z", prose.text[-4:]):
        last = tuple(prose.sentences[-1])  # cut off: it counts as the sentence that it begins
        if len(last) >= _SENTENCE_WORDS + 1 and any(sentence[: len(last)] == last for sentence in times):
            begun = sum(n for sentence, n in times.items() if sentence[: len(last)] == last)
            if begun > config.max_same_sentence:
                return f"{begun} times the sentence that begins {_quote(' '.join(last))}"
    return None


_NEVER_TWICE = frozenset(
    "a an the of to with and or at its for from into as this these are was were you your their his".split()
)
_TWO_MARKS = re.compile(r"[,;]\s?[,;]|(?<!\.)\.\.(?!\.)|[,;]\s?\.(?![.\w])")


def doubled(prose: Prose, config: Text) -> str | None:
    """Words and marks set twice ("the the", ",,", "to.."): how a diffusion model's decoding fails."""
    found = [match[0] for match in _TWO_MARKS.finditer(prose.text)]
    pairs = [
        token.word
        for before, token in pairwise(prose.tokens)
        if token.word == before.word and prose.text[before.end : token.start].isspace()
    ]
    found += [word for word in pairs if word in _NEVER_TWICE]
    if len(found) > config.max_doubled:
        return (
            f"{len(found)} doubled words or marks, at most {config.max_doubled} allowed: {_quote(found[0])}"
        )
    named = [word for word in pairs if word not in _NEVER_TWICE and word.isalpha()]
    if len(set(named)) > config.max_doubled + 1:  # one may be a name: "New York New York", "a pom pom"
        return f"{len(set(named))} words doubled: {_quote(' '.join(sorted(set(named))))}"
    return None


_PART = re.compile(
    rf"(?P<word>{_WORD.pattern})|(?P<comma>[,;、\uff0c\uff1b•|])|(?P<end>{_SENTENCE_END.pattern})"
)
_BREAKS = ",;、\uff0c\uff1b•|.!?。\uff01\uff1f\n"  # with n of what ends an item there are at most n + 1 items
_ITEM_WORDS = 8  # a list's items are short; a clause between commas is not
_UNITS = """
    first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth
    fifteenth sixteenth seventeenth eighteenth nineteenth
"""
_ORDINALS = {word: number for number, word in enumerate(_UNITS.split(), 1)}
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS_VALUE = {word: 10 * number for number, word in enumerate(_TENS.split(), 2)}
_ORDINALS |= {word[:-1] + "ieth": value for word, value in _TENS_VALUE.items()}


def enumerates(prose: Prose, config: Text) -> str | None:
    """A runaway list: of short items, of sentences that begin alike, or of numbers that count up."""
    breaks = sum(map(prose.text.count, _BREAKS)) + prose.words.count("and") + prose.words.count("or")
    longest = max(
        _longest_list(prose.text) if breaks >= config.max_list_items else 0, _longest_count(prose.words)
    )
    if longest > config.max_list_items:
        return f"a list of {longest} items, at most {config.max_list_items} allowed"
    return None


def _longest_list(text: str) -> int:
    """The most short items in a row. A list ends with its sentence, unless the next one begins alike."""
    longest = run = 0
    item: list[str] = []
    opening: tuple[str, ...] = ()
    begins = True

    def close() -> None:
        nonlocal run, longest, opening, begins, item
        if not item:
            return
        if begins:
            run = run if tuple(item[:2]) == opening else 0
            opening, begins = tuple(item[:2]), False
        run = run + 1 if len(item) <= _ITEM_WORDS else 0
        longest = max(longest, run)
        item = []

    for part in _PART.finditer(text):
        word = part["word"]
        if word and word.casefold() not in ("and", "or"):
            item.append(word.casefold())
            continue
        close()
        begins = begins or part["end"] is not None
    close()
    return longest


def _longest_count(words: list[str]) -> int:
    """The most numbers or ordinals that follow each other by one: "first ... second ... third"."""
    longest = run = 0
    expected: int | None = None
    tens = 0
    for word in words:
        if word in _TENS_VALUE:
            tens = _TENS_VALUE[word]
            continue
        value = _number(word, tens)
        tens = 0
        if value is None:
            continue
        run = run + 1 if value == expected else 1
        longest = max(longest, run)
        expected = value + 1
    return longest


def _number(word: str, tens: int) -> int | None:
    if word in _ORDINALS:
        return tens + _ORDINALS[word]
    digits = word[:-2] if word[-2:] in ("st", "nd", "rd", "th") else word
    return int(digits) if digits.isdecimal() and len(digits) <= 4 else None


def too_long(prose: Prose, config: Text) -> str | None:
    """More words or characters than the most."""
    return _longer(len(prose.words), config.max_words, "words") or _longer(
        len(prose.text), config.max_chars, "characters"
    )


RULES: tuple[tuple[Reason, Callable[[Prose, Text], str | None]], ...] = (
    (Reason.TEXT_TOO_SHORT, empty),
    (Reason.TEXT_JUNK, junk),
    (Reason.TEXT_REFUSAL, refusal),
    (Reason.TEXT_TOO_SHORT, too_short),
    (Reason.TEXT_REPEATS, repeats),
    (Reason.TEXT_REPEATS, doubled),
    (Reason.TEXT_ENUMERATES, enumerates),
    (Reason.TEXT_BOILERPLATE, boilerplate),
    (Reason.TEXT_TOO_LONG, too_long),
)
"""In the order in which they are asked. Loops come before what they also are: empty of content, too long."""


def _unsure(confidence: float | None, least: float | None) -> tuple[Reason | None, str]:
    """The last objection: the caption reads well, but its captioner doubts it."""
    if confidence is None or least is None or confidence >= least:
        return None, ""
    return Reason.TEXT_UNSURE, f"confidence {confidence:.3f}, at least {least:g} needed"


def _shorter(count: int, least: int, unit: str) -> str | None:
    return f"{count} {unit}, at least {least} needed" if count < least else None


def _longer(count: int, most: int, unit: str) -> str | None:
    return f"{count} {unit}, at most {most} allowed" if count > most else None


def _quote(text: str) -> str:
    """For a detail: printable, and no longer than a person wants to read."""
    return ascii(text[:60])
