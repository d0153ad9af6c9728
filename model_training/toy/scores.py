"""Scores of a model's captions of a toy world: how many say the truth, and what the others get wrong.

photos = list(iter_photo_regions("out/toy/heldout/corpus"))
scores = score_captioner(captioner, photos, DecodeOptions(max_new_tokens=12, steps=12))
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from ...schemas.decoding import DecodeOptions
from ..decoding.read_regions import PhotoRegions
from ..decoding.region_captioner import RegionCaptioner
from . import world


class ToyScores(NamedTuple):
    """The scores of all regions of some photos.

    Attributes:
        regions: number of regions.
        exact: share of captions that say the whole truth and nothing else.
        exact_small: the same share of the captions of small things; 0 if there are none.
        wrong: share of captions that have an attribute wrong, by attribute.
        leaked: share of all attributes that are wrong and would be right for another region in the image.
        leaked_by_chance: the share to expect if wrong attributes were drawn at random from all wrong values.
        forwards: forward passes of the language model per image.
        seconds: seconds per image, on the device that the captioner ran on.
        predicted: the captions, a list per photo.
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


def compare_decoding(
    captioner: RegionCaptioner, photos: list[PhotoRegions], options: DecodeOptions
) -> dict[str, ToyScores]:
    """Score the same regions decoded in "parallel", as many as the model can at once, and "one by one"."""
    return {
        "parallel": score_captioner(captioner, photos, options),
        "one by one": score_captioner(captioner, photos, options, 1),
    }


def score_captioner(
    captioner: RegionCaptioner,
    photos: list[PhotoRegions],
    options: DecodeOptions,
    regions_per_call: int | None = None,
) -> ToyScores:
    """Caption every region of some photos, and compare with the truth, which is the regions' own captions.

    Args:
        captioner: the model to score.
        photos: photos of a toy world's corpus.
        options: how captions are decoded.
        regions_per_call: regions captioned together; 1 captions them one by one, None as many as possible.
    """
    inputs = ((photo.pixels, photo.masks()) for photo in photos)
    captioned = captioner.caption_photos(inputs, options, regions_per_call=regions_per_call)
    wrong: Counter[str] = Counter()
    small: list[bool] = []
    regions = exact = leaked = attributes = 0
    by_chance = 0.0
    for photo, found in zip(photos, captioned, strict=True):
        truths = [region.caption for region in photo.regions]
        for number, caption in enumerate(found.captions):
            score = world.score_caption(caption, truths[number], truths[:number] + truths[number + 1 :])
            regions, exact = regions + 1, exact + score.exact
            small += [score.exact] if " small " in truths[number] else []
            leaked, by_chance = leaked + len(score.leaked), by_chance + score.by_chance
            attributes += sum(map(bool, world.parse_caption(truths[number]) or ()))
            wrong.update(score.wrong)
    return ToyScores(
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
