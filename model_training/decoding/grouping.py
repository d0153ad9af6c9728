"""Regions of photos in groups that share a sequence, laid out as the model reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...schemas.errors import ConfigError
from .region_forms import Boxes, to_masks, to_pixels

if TYPE_CHECKING:
    from ..model.batch import Example
    from ..model.processor import PerceptionDLMProcessor

Prompt = str | Sequence[str | None] | None
"""What all regions of a photo are asked, or what each of them is; None asks what the model was trained on."""


class Grouping(NamedTuple):
    """How regions are laid out.

    Attributes:
        max_new_tokens: slots of a region.
        prompt: what the regions of photos that have no prompt of their own are asked.
        boxes: what four numbers mean.
        regions_per_call: the most regions of a group; None for as many as the model has region prompts.
        fill_groups: fill each group before the next one begins, instead of splitting evenly.
    """

    max_new_tokens: int
    prompt: Prompt = None
    boxes: Boxes = "xyxy"
    regions_per_call: int | None = None
    fill_groups: bool = False


class Outline(NamedTuple):
    """A photo whose groups follow: how many regions and groups it has."""

    num_regions: int
    num_groups: int


class Group(NamedTuple):
    """Regions that share a sequence: the number of their photo, their numbers in it, and the sequence."""

    photo: int
    regions: list[int]
    example: Example


def lay_out_photos(
    processor: PerceptionDLMProcessor, photos: Iterable[Any], how: Grouping
) -> Iterator[Outline | Group]:
    """For each photo its outline, and then its groups.

    Args:
        processor: of the model.
        photos: (photo, masks) or (photo, masks, prompt), as `RegionCaptioner.caption` takes them.
        how: how regions are laid out.

    Raises:
        ConfigError: a photo or a region cannot be used; the message says its number.
    """
    for number, given in enumerate(photos):
        photo, masks, prompt = _checked(given, number, how.prompt)
        pixels = to_pixels(photo, f"photo {number}")
        dense = to_masks(masks, pixels.shape[:2], how.boxes)
        prompts = _prompts(prompt, len(dense), number)
        for text in set(prompts) - {None}:
            processor.check_instruction(text or "")
        parts = list(_parts(prompts, processor.config.num_prompts, how))
        yield Outline(len(dense), len(parts))
        for text, regions in parts:
            own = [dense[region] for region in regions]
            example = processor.make_example(pixels, own, how.max_new_tokens, instruction=text)
            yield Group(number, regions, example)


def _parts(prompts: list[str | None], most: int, how: Grouping) -> Iterator[tuple[str | None, list[int]]]:
    """The groups of regions with the same prompt, evenly large unless they are to be filled."""
    most = min(most, how.regions_per_call or most)
    for prompt in dict.fromkeys(prompts):
        same = np.flatnonzero([each == prompt for each in prompts])
        cuts = list(range(most, len(same), most)) if how.fill_groups else -(-len(same) // most)
        for part in np.array_split(same, cuts):
            yield prompt, part.tolist()


def _checked(given: Any, number: int, prompt: Prompt) -> tuple[Any, Any, Prompt]:
    """A photo, its regions and its prompt."""
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise ConfigError(f"photo {number}: a {type(given).__name__}; give (photo, masks) for each photo")
    return given[0], given[1], given[2] if len(given) == 3 else prompt


def _prompts(prompt: Prompt, num_regions: int, number: int) -> list[str | None]:
    """What each region of a photo is asked."""
    if prompt is None or isinstance(prompt, str):
        return [prompt] * num_regions
    if not isinstance(prompt, Sequence) or not all(each is None or isinstance(each, str) for each in prompt):
        raise ConfigError("prompt: give a text, or a list with a text (or None) for each region")
    if len(prompt) != num_regions:
        raise ConfigError(
            f"prompt: {len(prompt)} texts for the {num_regions} regions of photo {number}; give one for each"
        )
    return list(prompt)
