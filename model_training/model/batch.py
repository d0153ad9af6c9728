"""What the network reads: an example is one image as a sequence, a batch is many of them side by side.

Shape suffixes: N views (tiles and thumbnails of all images), S side of a view in pixels, P region prompts, Q
patches of a view, I images, R regions, B batch, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import PADDING, SHARED, TokenRoles, join_roles
from .placement import upload


class Example(NamedTuple):
    """One image with at most `num_prompts` regions, as a sequence; n regions, T views, L tokens.

    Attributes:
        views: (T, 3, S, S) uint8 RGB: the tiles row by row, then the thumbnail if there is more than one
            tile.
        prompts: (T, P, Q) bool, which patches belong to the region that has which prompt.
        grid: tiles across and down; None for text without an image.
        boxes: (x1, y1, x2, y2) of each region as shares of the image's width and height.
        order: for each region in the order of the sequence, its number in the caller's order.
        prefix: (3, L) int64: ids, positions and region codes of all tokens before the captions.
        captions: (3, L) int64: the same of the captions, all blocks one after the other.
        more_grids: the grids of further images without regions, whose views follow those of the first.
    """

    views: np.ndarray
    prompts: np.ndarray
    grid: tuple[int, int] | None
    boxes: list[tuple[float, float, float, float]]
    order: list[int]
    prefix: np.ndarray
    captions: np.ndarray
    more_grids: tuple[tuple[int, int], ...] = ()

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The grids of all its images."""
        return [*([self.grid] if self.grid is not None else []), *self.more_grids]

    def without_images(self) -> Example:
        """The same without views and prompts, which are most of its bytes."""
        return self._replace(views=self.views[:0].copy(), prompts=self.prompts[:0].copy())


class Images(NamedTuple):
    """The images of a batch, and where their regions are.

    Attributes:
        views_N3SS: uint8 RGB, image after image, each with its tiles row by row and then its thumbnail.
        prompts_NPQ: bool, which patches of which view belong to the region that has which prompt.
        grids_I2: int64 on the CPU, tiles across and down.
        boxes_R4: float32, (x1, y1, x2, y2) of the regions as shares of their image, image after image.
        image_R: int64 on the CPU, the image of each region.
    """

    views_N3SS: Tensor
    prompts_NPQ: Tensor
    grids_I2: Tensor
    boxes_R4: Tensor
    image_R: Tensor

    def to(self, device: torch.device | str) -> Images:
        """A copy on a device. What decides about shapes stays on the CPU."""
        stay = ("grids_I2", "image_R")
        return Images(
            *(part if name in stay else upload(part, device) for name, part in self._asdict().items())
        )


class Tokens(NamedTuple):
    """The sequences of a batch.

    Attributes:
        ids_BL: int64; placeholders where features of the image or replayed features stand.
        position_BL: int64.
        roles: what each token is, from which attention follows.
    """

    ids_BL: Tensor
    position_BL: Tensor
    roles: TokenRoles

    def to(self, device: torch.device | str) -> Tokens:
        """A copy on a device."""
        sample_BL, region_BL, caption_BL = (upload(field, device) for field in self.roles)
        roles = TokenRoles(sample_BL, region_BL, caption_BL)
        return Tokens(upload(self.ids_BL, device), upload(self.position_BL, device), roles)


class Batch(NamedTuple):
    """Examples side by side: all prefixes padded to one length, then all captions padded to one length.

    Attributes:
        images: the images.
        prefix: the tokens before the captions.
        captions: the tokens of the captions.
    """

    images: Images
    prefix: Tokens
    captions: Tokens

    def to(self, device: torch.device | str) -> Batch:
        """A copy on a device."""
        return Batch(self.images.to(device), self.prefix.to(device), self.captions.to(device))

    def tokens(self) -> Tokens:
        """The whole sequences: prefix, then captions."""
        return Tokens(
            torch.cat([self.prefix.ids_BL, self.captions.ids_BL], dim=1),
            torch.cat([self.prefix.position_BL, self.captions.position_BL], dim=1),
            join_roles(self.prefix.roles, self.captions.roles),
        )


def collate(examples: Sequence[Example]) -> Batch:
    """A batch with one example in each row."""
    return Batch(collate_images(examples), *collate_tokens(examples))


def collate_tokens(examples: Sequence[Example]) -> tuple[Tokens, Tokens]:
    """The prefixes and the captions of examples, one in each row."""
    prefix = _pad([example.prefix for example in examples], caption=False)
    return prefix, _pad([example.captions for example in examples], caption=True)


def collate_images(examples: Sequence[Example]) -> Images:
    """The images of examples, one after the other."""
    firsts = accumulate((len(example.grids) for example in examples), initial=0)
    owners = [first for first, example in zip(firsts, examples, strict=False) for _ in example.boxes]
    boxes = [box for example in examples for box in example.boxes]
    views = [example.views for example in examples]
    return Images(
        views_N3SS=torch.from_numpy(views[0] if len(views) == 1 else np.concatenate(views)),
        prompts_NPQ=torch.from_numpy(np.concatenate([example.prompts for example in examples])),
        grids_I2=torch.tensor(
            [grid for example in examples for grid in example.grids], dtype=torch.int64
        ).reshape(-1, 2),
        boxes_R4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        image_R=torch.tensor(owners, dtype=torch.int64),
    )


def pack(examples: Sequence[Example]) -> tuple[Images, Tokens]:
    """The images and tokens of examples, all in one row without padding."""
    parts = [np.concatenate([example.prefix, example.captions], axis=1) for example in examples]
    ids, positions, codes = torch.from_numpy(np.concatenate(parts, axis=1))[:, None].unbind()
    sample = torch.cat([torch.full((part.shape[1],), i) for i, part in enumerate(parts)])[None]
    caption = torch.cat(
        [
            torch.arange(part.shape[1]) >= example.prefix.shape[1]
            for part, example in zip(parts, examples, strict=True)
        ]
    )[None]
    return collate_images(examples), Tokens(ids, positions, TokenRoles(sample, codes, caption))


def _pad(parts: Sequence[np.ndarray], caption: bool) -> Tokens:
    """Examples' (3, L) parts, one a row, filled up on the right with tokens that see each other alone."""
    shape = (len(parts), max(part.shape[1] for part in parts))
    ids, positions, codes, sample = (np.full(shape, fill, np.int64) for fill in (0, 0, SHARED, PADDING))
    for row, part in enumerate(parts):
        here = (row, slice(part.shape[1]))
        ids[here], positions[here], codes[here] = part
        sample[here] = row
    is_caption = torch.from_numpy((sample != PADDING) & caption)
    roles = TokenRoles(torch.from_numpy(sample), torch.from_numpy(codes), is_caption)
    return Tokens(torch.from_numpy(ids), torch.from_numpy(positions), roles)
