"""The `classical` captioner: measures the pixels under each mask and says what it measured in plain English.

It needs no weights and never guesses: what a region is comes from the annotation; without one it is named by
its shape.
"""

from __future__ import annotations

import re
import zlib
from typing import Annotated, Any, NamedTuple

from msgspec import Meta

from ....schemas.records import ImageRecord
from ..options import BackendOptions, read_options
from .appearance import Appearance, measure_region

VERSION = "1"

_CAPITALS = {"tv": "TV", "suv": "SUV", "cd": "CD", "french": "French", "american": "American"}
_MASS = frozenset(
    "broccoli cardboard dirt food fruit grass gravel paper sand snow water bread rice cheese pasta luggage "
    "lettuce garlic asparagus corn sushi soap steak toiletry french soccer tape tissue".split()
) | {"ice cream", "toilet paper", "table tennis", "tennis", "canned", "candy"}
_UNIQUE = frozenset({"sky", "sea"})  # there is one of it: "the sky"
_SINGULAR_IN_S = frozenset(
    "bus grass gas glass lens tennis canvas compass dress cactus asparagus french".split()
)
_PLURAL = frozenset({"people", "men", "women", "children", "skis"})
_VOWEL_SOUND = re.compile(r"(?!uni|use|eu|one\b|u\b)[aeiou]|hour|honest|suv\b|x-ray", re.IGNORECASE)

_FRACTIONS = [
    (0.93, "nearly all"),
    (0.80, "most"),
    (0.71, "about three quarters"),
    (0.59, "about two thirds"),
    (0.45, "about half"),
    (0.29, "about a third"),
    (0.225, "about a quarter"),
    (0.165, "about a fifth"),
    (0.135, "about a seventh"),
    (0.085, "about a tenth"),
    (0.042, "about a twentieth"),
]
_NUMBERS = ["no", "one", "two", "three", "four", "five"]
_SURFACES = [(0.5, "busy, detailed"), (0.22, "textured"), (0.05, "lightly textured")]


class ClassicalOptions(BackendOptions, frozen=True):
    """The options of `classical`.

    Attributes:
        max_pixels: photos with more pixels are refused.
    """

    max_pixels: Annotated[int, Meta(ge=1)] = 200_000_000


class ClassicalCaptioner:
    """Describes regions by measured color, size, shape, surface and place. Deterministic; keeps no state.

    Args:
        options: see `ClassicalOptions`.

    Raises:
        ConfigError: an option is wrong.
    """

    version = VERSION

    def __init__(self, **options: Any):
        self.options = read_options(ClassicalOptions, options, "captioner.options")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Version of the wording and the measurements, and the OpenCV release they are made with."""
        read_options(ClassicalOptions, options, "captioner.options")
        import cv2

        return {"version": VERSION, "opencv": ".".join(cv2.__version__.split(".")[:2])}

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        """One caption per live region, in the order of `image.live()`; None for an empty mask.

        Raises:
            BadRecord: a photo cannot be read.
        """
        from ...io.photos import read_pixels

        captions: list[list[str | None]] = []
        for image in images:
            regions = image.live()
            pixels = read_pixels(image, self.options.max_pixels) if regions else None
            row: list[str | None] = []
            for region in regions:
                assert pixels is not None and region.rle is not None, "a live region has a mask"
                seen = measure_region(pixels, region.rle)
                choice = zlib.crc32(f"{image.key}/{region.id}".encode())
                row.append(None if seen is None else describe_appearance(seen, region.category, choice))
            captions.append(row)
        return captions


class Noun(NamedTuple):
    """How a category is spoken of: its words, whether it is plural, and its article ("a", "the" or none)."""

    text: str
    plural: bool
    article: str


def noun_for(category: str | None) -> Noun:
    """The noun phrase of a plain category name; "object" if there is none.

    >>> noun_for("cabinet/shelf").text
    'cabinet or shelf'
    """
    text = " ".join((category or "").lower().replace("/", " or ").split()) or "object"
    text = text.removeprefix("other ")
    head = re.split(r" (?:with|of|in|on|or) ", text)[0].split()[-1]
    plural = head in _PLURAL or (
        head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in _SINGULAR_IN_S
    )
    article = "the" if text in _UNIQUE else "" if plural or text in _MASS or head in _MASS else "a"
    return Noun(" ".join(_CAPITALS.get(word, word) for word in text.split()), plural, article)


def describe_appearance(seen: Appearance, category: str | None, choice: int = 0) -> str:
    """Two to four sentences about one region.

    Args:
        seen: what was measured.
        category: plain category name, or None.
        choice: any number; picks between equivalent wordings, so that captions do not all read alike.
    """
    noun = noun_for(category or shape_noun(seen))
    words = [*filter(None, [_size(seen)]), *_adjectives(seen)]
    start = _with_article(" ".join([", ".join(words), _color_words(seen), noun.text]).strip(), noun)
    outline, surface, place = _outline_words(seen), _surface_words(seen), _place(seen)
    contrast = _contrast_words(seen, noun)
    if not outline or choice % 3 == 1:
        first = f"{start} with {_article(surface)} surface {place}."
        if outline:
            shape = f"{_have(noun)} {_article(outline)} shape"
            rest = [[shape, _fills(seen, noun)], [_color_clause(seen, noun), contrast]]
        else:
            rest = [[_color_clause(seen, noun), _fills(seen, noun)], [contrast]]
    elif choice % 3 == 0:
        first = f"{start} with {_article(outline)} outline {place}."
        rest = [[_color_clause(seen, noun), _fills(seen, noun)], [_surface_clause(seen, noun), contrast]]
    else:
        first = f"{start} {place}, with {_article(outline)} outline."
        rest = [[_surface_clause(seen, noun), contrast], [_color_clause(seen, noun), _fills(seen, noun)]]
    details = [_sentence(clauses, noun) for clauses in [*rest, _parts(seen, noun)]]
    return " ".join([first, *filter(None, details)])


def shape_noun(seen: Appearance) -> str:
    """What a region without a category is called: its shape, which is measured; never a guess."""
    if seen.elongation >= 4 and seen.pieces == 1:
        return "strip"
    outline = _outline_words(seen)
    return {"round": "disc", "oval": "disc", "square": "block", "rectangular": "block"}.get(outline, "patch")


def _sentence(clauses: list[str], noun: Noun) -> str:
    """Clauses that share the subject "it", as one sentence; "" if all are empty."""
    full = [clause for clause in clauses if clause]
    joint = (
        ", and " if full and " and " in full[0] else " and "
    )  # "half red and a third white, and fills ..."
    return f"{'They' if noun.plural else 'It'} {joint.join(full)}." if full else ""


def _article(phrase: str) -> str:
    return f"{'an' if _VOWEL_SOUND.match(phrase) else 'a'} {phrase}"


def _with_article(phrase: str, noun: Noun) -> str:
    if noun.article == "a":
        phrase = _article(phrase)
    elif noun.article:
        phrase = f"{noun.article} {phrase}"
    return phrase[0].upper() + phrase[1:]


def _be(noun: Noun) -> str:
    return "are" if noun.plural else "is"


def _have(noun: Noun) -> str:
    return "have" if noun.plural else "has"


def _verb(noun: Noun, stem: str) -> str:
    return stem if noun.plural else stem + ("es" if stem.endswith("ch") else "s")


def _share(share: float) -> str:
    """A share of the photo or of the region, in words."""
    for least, words in _FRACTIONS:
        if share >= least:
            return words
    return f"about {_NUMBERS[round(share * 100)]} percent" if share >= 0.0075 else "less than one percent"


def _size(seen: Appearance) -> str:
    """Size against the photo; nothing for the middle sizes, where a word would say nothing."""
    if seen.image_share < 0.0015:
        return "tiny"
    if seen.image_share < 0.012:
        return "small"
    return "large" if seen.image_share >= 0.25 else ""


def _adjectives(seen: Appearance) -> list[str]:
    """How the region lies and how long it is, from its second moments; nothing where the photo cuts it."""
    if min(seen.span) > 0.8 or seen.elongation < 1.5 or seen.pieces > 3:
        return []
    level = min(seen.angle, 180 - seen.angle)
    turn = "upright" if level >= 65 else "horizontal" if level <= 25 else "slanting"
    if seen.elongation >= 4:
        return ["long", "narrow", turn]
    return [turn, "elongated"] if seen.elongation >= 2.2 else [turn]


def _outline_words(seen: Appearance) -> str:
    """The outline, by solidity, roundness and how well a turned rectangle fits; "" if the photo cuts it."""
    if len(seen.borders) >= 3:
        return ""
    if seen.pieces == 1 and seen.rectangularity > 0.9:
        return "square" if seen.elongation < 1.15 else "rectangular"
    if seen.pieces == 1 and seen.solidity > 0.93 and seen.roundness > 0.7 and len(seen.borders) < 2:
        return "round" if seen.elongation < 1.25 else "oval" if seen.elongation < 2.5 else "slim, rounded"
    if seen.solidity > 0.88:
        return "compact, simple"
    if seen.solidity > 0.75:
        return "slightly irregular"
    return "irregular" if seen.solidity > 0.5 else "very irregular"


def _surface_words(seen: Appearance) -> str:
    if _stripes(seen):
        return "lined"
    for least, words in _SURFACES:
        if seen.edge_share >= least:
            return words
    return "smooth"


def _surface_clause(seen: Appearance, noun: Noun) -> str:
    stripes = _stripes(seen)
    if stripes:
        return f"{_have(noun)} lines that run {stripes}"
    return f"{_verb(noun, 'look')} {_surface_words(seen).replace(', ', ' and ')}"


def _stripes(seen: Appearance) -> str:
    """Direction in which lines run over the surface; "" unless the gradients agree and change sign often."""
    if seen.coherence < 0.5 or seen.crossings < 6 or seen.edge_share < 0.1:
        return ""
    level = min(seen.stripe_angle, 180 - seen.stripe_angle)
    return "up and down" if level >= 65 else "across" if level <= 25 else "diagonally"


def _color_words(seen: Appearance) -> str:
    """One color, or two if the second covers a fifth."""
    first, *others = seen.colors
    return f"{first.name} and {others[0].name}" if others and others[0].share >= 0.2 else first.name


def _color_clause(seen: Appearance, noun: Noun) -> str:
    """Shares of the colors: what the one or two colors at the start of the caption leave open."""
    first, *others = seen.colors
    if first.share >= 0.93:
        return f"{_be(noun)} {first.name} almost all over"
    if others and others[0].share >= 0.2:
        shown = [color for color in others[:2] if color.share >= 0.12]
        parts = [f"{_share(color.share).removeprefix('about ')} {color.name}" for color in shown]
        return f"{_be(noun)} {_listed([f'{_share(first.share)} {first.name}', *parts])}"
    names = [color.name for color in others if color.share >= 0.06][:2]
    if not names:
        return f"{_be(noun)} mainly {first.name}"
    much = "patches" if others[0].share >= 0.1 else "traces"
    return f"{_be(noun)} mostly {first.name} with {much} of {' and '.join(names)}"


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _fills(seen: Appearance, noun: Noun) -> str:
    verb = "fill" if seen.image_share >= 0.042 else "take"
    return f"{_verb(noun, verb)}{' up' * (verb == 'take')} {_share(seen.image_share)} of the picture"


def _contrast_words(seen: Appearance, noun: Noun) -> str:
    if seen.contrast is None or 9 <= seen.contrast < 25:
        return ""
    if seen.contrast < 9:
        return (
            f"hardly {_verb(noun, 'differ')} in colour from {'their' if noun.plural else 'its'} surroundings"
        )
    return f"{_verb(noun, 'stand')} out clearly from {'their' if noun.plural else 'its'} surroundings"


def _parts(seen: Appearance, noun: Noun) -> list[str]:
    """Clauses on pieces, holes and the photo's edges, two at most."""
    said = []
    if seen.pieces > 1:
        number = _NUMBERS[seen.pieces] if seen.pieces <= 5 else "many"
        said.append(f"{_be(noun)} seen in {number} separate pieces")
    if seen.holes:
        said.append(f"{_have(noun)} {'an opening' if seen.holes == 1 else 'openings'} inside the outline")
    if 0 < len(seen.borders) < 3 and min(seen.span) < 0.95:
        edges = f"{_listed(seen.borders)} edge{'s' * (len(seen.borders) > 1)}"
        said.append(f"{_verb(noun, 'reach')} the {edges}")
    return said[:2]


def _place(seen: Appearance) -> str:
    """Where in the photo, on a grid of three by three, or how far it stretches."""
    wide, high = seen.span
    x, y = seen.center
    if wide > 0.8 and high > 0.8:
        return "filling the photo" if seen.image_share > 0.6 else "stretching over most of the photo"
    column = "left" if x < 0.36 else "right" if x > 0.64 else ""
    row = "top" if y < 0.36 else "bottom" if y > 0.64 else ""
    if wide > 0.8:
        return f"across the {row or 'middle'} of the photo"
    if high > 0.8:
        return f"over the full height of the photo, {f'on the {column}' if column else 'in the middle'}"
    if row and column:
        return f"in the {row} {column} of the photo"
    if not row and not column:
        return "in the centre of the photo"
    return f"on the {column} of the photo" if column else f"at the {row} of the photo"
