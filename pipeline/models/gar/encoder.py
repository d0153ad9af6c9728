"""From images to prompts: every photo is read, cut and encoded once, then only what each mask touches.

Tiles do not see each other in the vision tower and the mask's embedding has no bias, so a tile without a mask
pixel has exactly the features of the photo without a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....filters import rle
from ....schemas.errors import StageFailed
from ....schemas.records import ImageRecord, Region
from ...io.photos import read_pixels
from ...io.transfers import download, upload
from ..batching import Batches
from . import image as cutting
from .checkpoint import GarConfig
from .prompt import PROMPT, Prompts
from .roi_align import Box, replay
from .vision import Vision

KeyedPrompt = tuple[tuple[int, int], Tensor]
"""A region's key, and its prompt (tokens, H)."""


class Photo:
    """A photo on its way.

    Attributes:
        grid: tiles across and down.
        tiles: (1 + tiles, 3, T, T) uint8, the thumbnail first.
        plain: features (side * side, H) of the tiles encoded without a mask so far, by tile.
    """

    def __init__(self, pixels: np.ndarray, config: GarConfig):
        height, width = pixels.shape[:2]
        self.grid = cutting.tile_grid(width, height, config.tile_px, config.max_tiles)
        self.tiles = cutting.cut_photo(pixels, config.tile_px, self.grid)
        self.plain: dict[int, Tensor] = {}


class Work(NamedTuple):
    """Tiles of one photo to encode: those that a region's mask touches, or some without a mask.

    Attributes:
        photo: whose tiles.
        key: the region's, None for tiles without a mask.
        tiles: their numbers, ascending.
        masks: (len(tiles), T, T) bool; None without.
        box: the region's, as `image.box_of` gives it.
    """

    photo: Photo
    key: tuple[int, int] | None
    tiles: list[int]
    masks: Tensor | None = None
    box: Box = (0.0, 0.0, 0.0, 0.0)


class Counts(NamedTuple):
    """What was done since the start.

    Attributes:
        regions: given a prompt.
        tiles: encoded.
        tiles_one_by_one: that would have been encoded with all of a photo's tiles for each region.
    """

    regions: int = 0
    tiles: int = 0
    tiles_one_by_one: int = 0


class Encoder:
    """Makes the prompts of regions.

    Args:
        config: of the checkpoint.
        prompts: its tokenizer.
        vision: its vision side.
        embed: (V, H) the language model's embedding, where `vision` is.
        tiles_per_batch: tiles encoded at once, of as many regions and photos as it takes.
        mask_resample: "nearest" or "bicubic".
        max_pixels: photos above this number of pixels are refused.
        prompt: number of the prompt token that stands for the region.
    """

    def __init__(
        self,
        config: GarConfig,
        prompts: Prompts,
        vision: Vision,
        embed: Tensor,
        tiles_per_batch: int = 32,
        mask_resample: str = "nearest",
        max_pixels: int = 200_000_000,
        prompt: int = PROMPT,
    ):
        self.config, self.prompts, self.vision, self.embed = config, prompts, vision, embed
        self.mask_resample, self.max_pixels, self.prompt = mask_resample, max_pixels, prompt
        self.batches = Batches(tiles_per_batch, "captioner: tiles in the vision tower")
        self.counts = Counts()

    def prepare(
        self, images: Iterable[ImageRecord], wanted: Callable[[ImageRecord, Region], bool] = lambda *_: True
    ) -> Iterator[Work]:
        """What there is to encode, in order; touches no model, so it may run ahead in a thread of its own.

        Tiles without a mask come right before the first region that does not touch them. An empty mask has
        no work.

        Args:
            images: a region's key is (place of the image here, place of the region among the live ones).
            wanted: whether a region is.

        Raises:
            BadRecord: a photo cannot be read.
        """
        for number, record in enumerate(images):
            photo = None
            planned: set[int] = set()
            for place, region in enumerate(record.live()):
                assert region.rle is not None, "a live region has a mask"
                if not wanted(record, region):
                    continue
                mask = rle.decode(region.rle)
                if not mask.any():
                    continue
                if photo is None:
                    photo = Photo(read_pixels(record, self.max_pixels), self.config)
                masks = cutting.cut_mask(
                    mask,
                    self.config.tile_px,
                    photo.grid,
                    self.mask_resample,
                    self.prompt,
                    self.config.prompt_numbers,
                )
                touched = masks.flatten(1).any(1).nonzero().flatten().tolist()
                missing = sorted(set(range(len(masks))) - set(touched) - planned)
                if missing:
                    planned.update(missing)
                    yield Work(photo, None, missing)
                yield Work(photo, (number, place), touched, masks[touched], cutting.box_of(mask))

    def run(self, works: Iterable[Work]) -> Iterator[KeyedPrompt]:
        """(key, prompt (tokens, H) in host memory) of every region, in order.

        A batch waits for the device once, at its end.

        Raises:
            OutOfMemory: one tile alone does not fit.
            StageFailed: a prompt is not finite.
        """
        for pack in self._packs(works):
            yield from self._fetch(self._prompts(pack))

    def _prompts(self, pack: list[Work]) -> list[KeyedPrompt]:
        """(key, prompt) of every region of a pack, on the device, whose work may not be done yet."""
        features = self._encode(pack)
        start = 0
        prompts: list[KeyedPrompt] = []
        regions: list[tuple[Work, Tensor]] = []
        for work in pack:
            own = features[start : start + len(work.tiles)]
            start += len(work.tiles)
            if work.key is None:  # copied: a view would keep the whole pack's features
                work.photo.plain.update({tile: own[i].clone() for i, tile in enumerate(work.tiles)})
                continue
            if regions and regions[0][0].photo is not work.photo:
                prompts += self._write(regions)
                regions = []
            regions.append((work, own))
        return prompts + self._write(regions) if regions else prompts

    def _fetch(self, prompts: list[KeyedPrompt]) -> Iterator[KeyedPrompt]:
        """The prompts in host memory, for one wait."""
        if not prompts:
            return
        finite = torch.stack([prompt.isfinite().all() for _, prompt in prompts])
        finite, *arrived = download([finite, *(prompt for _, prompt in prompts)])
        for (key, prompt), copy, is_finite in zip(prompts, arrived, finite.tolist(), strict=True):
            if not is_finite:
                raise StageFailed(
                    f"gar ({self.config.folder}): the features of a region are NaN or infinite, in "
                    f"{copy.dtype}; set captioner.options.dtype to bfloat16 or float32, or download the "
                    "checkpoint again"
                )
            yield key, copy if copy is prompt else copy.clone()

    def _packs(self, works: Iterable[Work]) -> Iterator[list[Work]]:
        """Works that fill a batch together."""
        pack: list[Work] = []
        num_tiles = 0
        for work in works:
            if pack and num_tiles + len(work.tiles) > self.batches.size:
                yield pack
                pack, num_tiles = [], 0
            pack.append(work)
            num_tiles += len(work.tiles)
        if pack:
            yield pack

    def _encode(self, pack: list[Work]) -> Tensor:
        """(all tiles of the pack, side * side, H)."""
        tiles = torch.cat([work.photo.tiles[work.tiles] for work in pack])
        blank = tiles.shape[-2:]
        parts = [
            work.masks if work.masks is not None else torch.zeros(len(work.tiles), *blank, dtype=torch.bool)
            for work in pack
        ]
        masks = torch.cat(parts)

        def encode(batch) -> list[Tensor]:
            rows = slice(batch[0], batch[-1] + 1)
            return list(self.vision(tiles[rows], masks[rows]).unbind())

        features = self.batches.run(range(len(tiles)), encode)
        self._count(tiles=len(tiles))
        if not features:
            return self.embed.new_zeros(0, self.config.side**2, self.config.hidden)
        return torch.stack(features)

    @torch.inference_mode()
    def _write(self, regions: list[tuple[Work, Tensor]]) -> list[KeyedPrompt]:
        """The prompts of several regions of one photo."""
        photo = regions[0][0].photo
        num_tiles = len(photo.tiles)
        layout = self.prompts.write(num_tiles, self.prompt)
        all_tiles = [self._features(work, own) for work, own in regions]
        boxes = [work.box for work, _ in regions]
        crops = replay([tiles[1:] for tiles in all_tiles], photo.grid, boxes, self.config.side)
        ids = upload(torch.tensor(layout.ids), self.embed.device)
        (image, image_end), (crop, crop_end) = layout.image, layout.crop
        head, middle, tail = (
            self.embed[ids[:image]],
            self.embed[ids[image_end:crop]],
            self.embed[ids[crop_end:]],
        )
        prompts: list[KeyedPrompt] = []
        for (work, _), tiles, replayed in zip(regions, all_tiles, crops, strict=True):
            assert work.key is not None
            prompts.append((work.key, torch.cat([head, tiles.flatten(0, 1), middle, replayed, tail])))
            self._count(regions=1, tiles_one_by_one=num_tiles)
        return prompts

    def _features(self, work: Work, own: Tensor) -> Tensor:
        """(1 + tiles, side * side, H): the region's own tiles, the photo's plain ones elsewhere."""
        mine = dict(zip(work.tiles, own, strict=True))
        plain = work.photo.plain
        return torch.stack(
            [mine[tile] if tile in mine else plain[tile] for tile in range(len(work.photo.tiles))]
        )

    def _count(self, **more: int) -> None:
        counts = self.counts._asdict()
        self.counts = Counts(**{name: counts[name] + more.get(name, 0) for name in counts})
