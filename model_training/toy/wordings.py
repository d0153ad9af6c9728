"""Captions of 25 to 30 tokens that can be worded in many ways, and whose words depend on each other.

    this is a red large striped circle near the left and the top, nearer to the top than to the bottom and it
    is not dotted but striped

A thing has hundreds of right captions. Its adjectives come in any order, and so do the two words for its
place. One clause denies or contrasts any of the adjectives, the other compares two opposite sides, and either
comes first. So a model cannot know a word before it knows others, and words that are chosen without each
other contradict: "a large large circle", "not dotted but dotted", "nearer to the top than to the right".

    caption = draw_wording(facts, generator)
    read_wording(caption) == facts
    judge_wording("a large large circle ...", caption) == "malformed"
"""

from __future__ import annotations

import itertools
import re
from typing import Literal, NamedTuple, get_args

import numpy as np

from .scenes import PLACES
from .shapes import COLORS, SHAPES, SIZES, TEXTURES

MOST_TOKENS = 30
"""Tokens of the longest caption with the toy's tokenizer, for which a word and a comma are one token each."""

ROWS, COLUMNS = ("top", "center", "bottom"), ("left", "middle", "right")

WORDING_WORDS = tuple(
    sorted(
        {"this", "is", "a", "near", "the", "and", "it", "not", "but", "nearer", "farther", "from", "to"}
        | {"than", "as", *ROWS, *COLUMNS}
    )
)
"""The words of these captions besides the names of sizes, textures, colors and shapes."""


class Facts(NamedTuple):
    """What is true of a thing: how it looks, and in which third of the image it is, down and across."""

    size: str
    texture: str
    colour: str
    shape: str
    row: str
    column: str


WordingVerdict = Literal["right", "untrue", "contradictory", "malformed"]
"""What a caption is worth: it says the whole truth; it is one that could be true of another thing; its parts
contradict each other; or it is none of the world's captions."""

VERDICTS: tuple[WordingVerdict, ...] = get_args(WordingVerdict)

_ADJECTIVES = {"size": SIZES, "texture": TEXTURES, "colour": tuple(COLORS)}
_KIND = {value: name for name, values in _ADJECTIVES.items() for value in values}
_VOWELS = tuple("aeiou")
_OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def facts_of(size: str, texture: str, colour: str, shape: str, place: str) -> Facts:
    """The facts of a thing whose place is one of `PLACES`."""
    row, column = next((r, line.index(place)) for r, line in enumerate(PLACES) if place in line)
    return Facts(size, texture, colour, shape, ROWS[row], COLUMNS[column])


def draw_wording(facts: Facts, rng: np.random.Generator, textures: tuple[str, ...] = TEXTURES) -> str:
    """One of the right captions of a thing, each of its choices being as likely as the others.

    Args:
        facts: what is true of the thing.
        rng: draws the choices.
        textures: those that occur in the world, which a caption may deny.
    """
    opening = ("", "this is ")[rng.integers(2)]
    adjectives = " ".join(rng.permutation(facts[:3]))
    opening += "an" if adjectives.startswith(_VOWELS) else "a"
    place = " and the ".join(rng.permutation(facts[4:]))
    clauses = [_contrast(facts, rng, textures), _comparison(facts, rng)]
    clauses = [clauses[number] for number in rng.permutation(2)]
    return f"{opening} {adjectives} {facts.shape} near the {place}, {' and '.join(clauses)}"


def _contrast(facts: Facts, rng: np.random.Generator, textures: tuple[str, ...]) -> str:
    name = tuple(_ADJECTIVES)[rng.integers(3)]
    true = getattr(facts, name)
    others = [value for value in (textures if name == "texture" else _ADJECTIVES[name]) if value != true]
    false = others[rng.integers(len(others))]
    forms = (f"it is {true}, not {false}", f"it is not {false} but {true}", f"it is not {false}")
    return forms[rng.integers(3)]


def _comparison(facts: Facts, rng: np.random.Generator) -> str:
    sides = [side for side in facts[4:] if side in _OPPOSITE]
    if not sides:
        one, other = rng.permutation((ROWS, COLUMNS)[rng.integers(2)][::2])
        return f"as near to the {one} as to the {other}"
    near = sides[rng.integers(len(sides))]
    far = _OPPOSITE[near]
    forms = (f"nearer to the {near} than to the {far}", f"farther from the {far} than from the {near}")
    return forms[rng.integers(2)]


def _any(*names: str) -> str:
    values = itertools.chain.from_iterable((_ADJECTIVES | {"shape": SHAPES})[name] for name in names)
    return f"({'|'.join(values)})"


_WORD, _PLACE = _any(*_ADJECTIVES), f"({'|'.join((*ROWS, *COLUMNS))})"
_SIDE = f"({'|'.join(_OPPOSITE)})"
_CAPTION = re.compile(
    rf"(?:this is )?an? {_WORD} {_WORD} {_WORD} {_any('shape')} near the {_PLACE} and the {_PLACE}, (.+)"
)
_CONTRASTS = [
    re.compile(rf"it is (?P<true>{_WORD}), not (?P<false>{_WORD})"),
    re.compile(rf"it is not (?P<false>{_WORD}) but (?P<true>{_WORD})"),
    re.compile(rf"it is not (?P<false>{_WORD})"),
]
_COMPARISONS = [
    re.compile(rf"nearer to the (?P<near>{_SIDE}) than to the (?P<far>{_SIDE})"),
    re.compile(rf"farther from the (?P<far>{_SIDE}) than from the (?P<near>{_SIDE})"),
    re.compile(rf"as near to the (?P<one>{_SIDE}) as to the (?P<other>{_SIDE})"),
]


class _Claims(NamedTuple):
    facts: Facts
    contrast: dict[str, str]
    comparison: dict[str, str]


def _read_claims(caption: str) -> _Claims | None:
    """What a caption claims, whether it makes sense or not; None if it has not the form of a caption."""
    found = _CAPTION.fullmatch(caption.strip())
    if not found or (" an " in f" {caption[:11]}") != found[1].startswith(_VOWELS):
        return None
    *adjectives, shape, one, other, rest = found.groups()
    named = {_KIND[word]: word for word in adjectives}
    rows, columns = ([word for word in (one, other) if word in words] for words in (ROWS, COLUMNS))
    clauses = _read_clauses(rest)
    if len(named) < 3 or len(rows) != 1 or clauses is None:  # an adjective or an axis twice, another left out
        return None
    size, texture, colour = (named[name] for name in _ADJECTIVES)
    return _Claims(Facts(size, texture, colour, shape, rows[0], columns[0]), *clauses)


def _read_clauses(rest: str) -> tuple[dict[str, str], dict[str, str]] | None:
    for contrast, comparison in itertools.product(_CONTRASTS, _COMPARISONS):
        for first, second in ((contrast, comparison), (comparison, contrast)):
            if found := re.fullmatch(f"{first.pattern} and {second.pattern}", rest):
                claims, others = (
                    {name: found[name] for name in each.groupindex} for each in (contrast, comparison)
                )
                return claims, others
    return None


def _is_consistent(claims: _Claims) -> bool:
    facts, contrast, comparison = claims
    false = contrast["false"]
    named = getattr(facts, _KIND[false])
    sound = false != named and contrast.get("true", named) == named
    if "one" in comparison:
        one, other = comparison["one"], comparison["other"]
        in_middle = (facts.row, facts.column) == (ROWS[1], COLUMNS[1])
        return sound and in_middle and _OPPOSITE[one] == other
    near, far = comparison["near"], comparison["far"]
    return sound and near in facts[4:] and _OPPOSITE[near] == far


def read_wording(caption: str) -> Facts | None:
    """The facts that a caption states; None if it contradicts itself or is none of the world's captions."""
    claims = _read_claims(caption)
    return claims.facts if claims and _is_consistent(claims) else None


def judge_wording(predicted: str, truth: str) -> WordingVerdict:
    """Compare a caption with the truth. All right wordings are equally right.

    Args:
        predicted: any text.
        truth: a right caption of the same thing, in any wording.

    Raises:
        ValueError: the true caption cannot be read.
    """
    facts = read_wording(truth)
    if facts is None:
        raise ValueError(f"{truth!r} is not a true caption of a world with many wordings; give such a corpus")
    claims = _read_claims(predicted)
    if claims is None:
        return "malformed"
    if not _is_consistent(claims):
        return "contradictory"
    return "right" if claims.facts == facts else "untrue"
