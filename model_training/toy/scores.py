"""What a model's captions of a toy world's corpus are worth: how many say the truth, and what the rest says.

photos = list(iter_photo_regions("out/toy/heldout/corpus"))
marks = examine(captioner, photos, DecodeOptions(max_new_tokens=12, steps=12))
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from ...schemas.decoding import DecodeOptions
from ..decoding.read_regions import PhotoRegions
from ..decoding.region_captioner import RegionCaptioner
from . import world


class Marks(NamedTuple):
    """Of all regions of some scenes.

    Attributes:
        regions: how many there were.
        exact: share of captions that say the whole truth and nothing else.
        exact_small: the same of small things; 0 if there are none.
        wrong: for each attribute, the share of captions that have it wrong.
        leaked: share of all attributes that are wrong here and right for another region of the image.
        leaked_by_chance: what that share would be if wrong attributes were drawn from all wrong values.
        forwards: passes of the language model, an image.
        seconds: an image, on whatever it ran on.
        predicted: the captions, one list a scene.
    """

    regions: int
    exact: float
    exact_small: float
    wrong: dict[str, float]
    leaked: float
    leaked_by_chance: float
    forwards: float
    seconds: float
    predicted: list[list[str]]


def compare(
    captioner: RegionCaptioner, photos: list[PhotoRegions], options: DecodeOptions
) -> dict[str, Marks]:
    """The marks of the same regions decoded "parallel", as many as the model can, and "one by one"."""
    return {
        "parallel": examine(captioner, photos, options),
        "one by one": examine(captioner, photos, options, 1),
    }


def examine(
    captioner: RegionCaptioner,
    photos: list[PhotoRegions],
    options: DecodeOptions,
    regions_per_call: int | None = None,
) -> Marks:
    """Caption every region of the photos and compare with the truth, which is their regions' captions.

    Args:
        captioner: the model.
        photos: of a toy world's corpus.
        options: how captions are decoded.
        regions_per_call: 1 captions one by one.
    """
    inputs = ((photo.pixels, [region.dense() for region in photo.regions]) for photo in photos)
    captioned = captioner.caption_photos(inputs, options, regions_per_call=regions_per_call)
    wrong: Counter[str] = Counter()
    small: list[bool] = []
    regions = exact = leaked = attributes = 0
    by_chance = 0.0
    for photo, found in zip(photos, captioned, strict=True):
        truths = [region.caption for region in photo.regions]
        for number, caption in enumerate(found.captions):
            score = world.score(caption, truths[number], truths[:number] + truths[number + 1 :])
            regions, exact = regions + 1, exact + score.exact
            small += [score.exact] if " small " in truths[number] else []
            leaked, by_chance = leaked + len(score.leaked), by_chance + score.by_chance
            attributes += sum(map(bool, world.parse(truths[number]) or ()))
            wrong.update(score.wrong)
    return Marks(
        regions=regions,
        exact=exact / regions,
        exact_small=sum(small) / max(1, len(small)),
        wrong={name: wrong[name] / regions for name in world.VALUES if wrong[name]},
        leaked=leaked / attributes,
        leaked_by_chance=by_chance / attributes,
        forwards=sum(found.forwards for found in captioned) / len(photos),
        seconds=sum(found.seconds for found in captioned) / len(photos),
        predicted=[found.captions for found in captioned],
    )
