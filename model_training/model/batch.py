"""What the network reads: images and tokens of one batch, and how examples are put side by side in it.

Shape suffixes: N views (tiles and thumbnails of all images), S side of a view in pixels, P region prompts, Q
patches of a view, I images, R regions, B batch, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import PADDING, SHARED, Structure, join


class Example(NamedTuple):
    """One image with at most `num_prompts` regions, as a sequence; n regions, T views, L tokens.

    Attributes:
        views: (T, 3, S, S) uint8.
        prompts: (T, P, Q) bool.
        grid: tiles across and down.
        boxes: n boxes as shares of the image.
        order: for each place in the sequence, the caller's number of its region.
        prefix: (ids, positions, region codes) of all that comes before the captions.
        captions: the same of the captions, all blocks one after the other.
    """

    views: np.ndarray
    prompts: np.ndarray
    grid: tuple[int, int]
    boxes: list[tuple[float, float, float, float]]
    order: list[int]
    prefix: np.ndarray
    captions: np.ndarray


class Images(NamedTuple):
    """What a batch shows.

    Attributes:
        views_N3SS: uint8 RGB, image after image, each with its tiles row by row and then its thumbnail.
        prompts_NPQ: bool, which patch of which view belongs to the region that has which prompt.
        grids_I2: int64 on the CPU, tiles across and down.
        boxes_R4: float32, (x1, y1, x2, y2) of the regions as shares of their image, image after image.
        image_R: int64, each region's image.
    """

    views_N3SS: Tensor
    prompts_NPQ: Tensor
    grids_I2: Tensor
    boxes_R4: Tensor
    image_R: Tensor

    def to(self, device: torch.device | str) -> Images:
        """On a device, but for the grids, which shapes are made of."""
        return Images(
            *(part if name == "grids_I2" else part.to(device) for name, part in self._asdict().items())
        )


class Tokens(NamedTuple):
    """What a batch says; all (B, L).

    Attributes:
        ids_BL: int64; of image and replay, the tokens that stand for them.
        position_BL: int64.
        structure: who may attend to whom.
    """

    ids_BL: Tensor
    position_BL: Tensor
    structure: Structure

    def to(self, device: torch.device | str) -> Tokens:
        """On a device."""
        moved = Structure(*(field.to(device) for field in self.structure))
        return Tokens(self.ids_BL.to(device), self.position_BL.to(device), moved)


class Batch(NamedTuple):
    """Examples side by side: all prefixes padded to one length, then all captions padded to one.

    Attributes:
        images: what they show.
        prefix: tokens before the captions.
        captions: tokens of the captions.
    """

    images: Images
    prefix: Tokens
    captions: Tokens

    def to(self, device: torch.device | str) -> Batch:
        """On a device."""
        return Batch(*(part.to(device) for part in self))

    def tokens(self) -> Tokens:
        """Both parts, one after the other."""
        return join_tokens(self.prefix, self.captions)


def collate(examples: Sequence[Example]) -> Batch:
    """A batch, one example a row."""
    prefix = _pad([example.prefix for example in examples], caption=False)
    captions = _pad([example.captions for example in examples], caption=True)
    return Batch(images_of(examples), prefix, captions)


def images_of(examples: Sequence[Example]) -> Images:
    """What examples show, one after the other."""
    owners = [i for i, example in enumerate(examples) for _ in example.boxes]
    boxes = [box for example in examples for box in example.boxes]
    views = [example.views for example in examples]
    return Images(
        views_N3SS=torch.from_numpy(views[0] if len(views) == 1 else np.concatenate(views)),
        prompts_NPQ=torch.from_numpy(np.concatenate([example.prompts for example in examples])),
        grids_I2=torch.tensor([example.grid for example in examples]),
        boxes_R4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        image_R=torch.tensor(owners, dtype=torch.int64),
    )


def pack(examples: Sequence[Example]) -> tuple[Images, Tokens]:
    """The same in one row without padding."""
    parts = [np.concatenate([example.prefix, example.captions], axis=1) for example in examples]
    ids, positions, codes = torch.from_numpy(np.concatenate(parts, axis=1))[:, None].unbind()
    sample = torch.cat([torch.full((part.shape[1],), i) for i, part in enumerate(parts)])[None]
    caption = torch.cat(
        [
            torch.arange(part.shape[1]) >= example.prefix.shape[1]
            for part, example in zip(parts, examples, strict=True)
        ]
    )[None]
    return images_of(examples), Tokens(ids, positions, Structure(sample, codes, caption))


def join_tokens(*parts: Tokens) -> Tokens:
    """One after the other in each row."""
    fields = [torch.cat([getattr(part, name) for part in parts], 1) for name in ("ids_BL", "position_BL")]
    return Tokens(*fields, join(*(part.structure for part in parts)))


def _pad(parts: Sequence[np.ndarray], caption: bool) -> Tokens:
    """Examples' (3, L) parts, one a row, filled up on the right with tokens that only see each other."""
    shape = (len(parts), max(part.shape[1] for part in parts))
    ids, positions, codes, sample = (np.full(shape, fill, np.int64) for fill in (0, 0, SHARED, PADDING))
    for row, part in enumerate(parts):
        here = (row, slice(part.shape[1]))
        ids[here], positions[here], codes[here] = part
        sample[here] = row
    structure = Structure(*map(torch.from_numpy, (sample, codes, (sample != PADDING) & caption)))
    return Tokens(torch.from_numpy(ids), torch.from_numpy(positions), structure)
