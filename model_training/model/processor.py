"""From an image and its masks to what the model reads, and from its tokens to captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from ...schemas.errors import ConfigError
from . import tiling
from .attention import HIDDEN, PADDING, SHARED, Structure, join
from .config import PerceptionDLMConfig
from .perceptiondlm import Images, Tokens

SPECIAL = ("<IMG_CONTEXT>", "<img>", "</img>", *(f"<|Mask_Cap_{i}|>" for i in range(16)))
"""Tokens that the model adds to LLaDA's, in this order."""

HEAD = (
    "<|start_header_id|>system<|end_header_id|>\nYou are a helpful assistant.<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n"
)
ANSWER = "<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n"


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


class PerceptionDLMProcessor(ProcessorMixin):
    """Makes examples and batches, and reads captions. All it knows is the model's config and tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PerceptionDLMConfig, **_: Any):
        self.config = config
        self.layout = config.resolved_layout()
        super().__init__(tokenizer)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PerceptionDLMProcessor:
        """Of a model's folder, or of its name on a hub."""
        from transformers import AutoTokenizer

        options = {key: value for key, value in options.items() if not key.startswith("_")}
        config = options.pop("config", None) or PerceptionDLMConfig.from_pretrained(path, **options)
        return cls(AutoTokenizer.from_pretrained(path, **options), config)

    def save_pretrained(self, path: str | Path, push_to_hub: bool = False, **options: Any) -> list[str]:
        """Write tokenizer and config, from which `from_pretrained` makes it again."""
        self.config.save_pretrained(path)
        return list(self.tokenizer.save_pretrained(path, push_to_hub=push_to_hub, **options))

    def example(
        self,
        pixels: np.ndarray | Image.Image,
        masks: Sequence[np.ndarray | tiling.Runs],
        captions: Sequence[Sequence[int]] | int,
        prompts: Sequence[int] | None = None,
    ) -> Example:
        """Lay out one image.

        Args:
            pixels: (H, W, 3) uint8 RGB or a Pillow image in RGB, as stored (an EXIF rotation would turn it
                away from its masks).
            masks: of its regions, (H, W) bool or their runs, none empty, at most `num_prompts`.
            captions: the tokens of each mask's caption without what closes it, or a number of slots to fill.
            prompts: which prompt marks the largest region, the second largest, ...; default 0, 1, ...

        Raises:
            ConfigError: too many regions, an empty mask, or one of another size than the image; not a caption
                and a prompt of its own for each.
        """
        config, tower = self.config, self.config.vision_config
        width, height = pixels.size if isinstance(pixels, Image.Image) else pixels.shape[1::-1]
        check_masks(masks, (height, width), config.num_prompts)
        grid = tiling.tile_grid(width, height, tower.image_size, config.max_tiles)
        order = tiling.by_area(masks)
        prompts = list(range(len(masks)) if prompts is None else prompts)
        if len(set(prompts)) != len(masks) or not set(prompts) <= set(range(config.num_prompts)):
            raise ConfigError(
                f"prompts {prompts}: give each of {len(masks)} masks its own below {config.num_prompts}"
            )
        if not isinstance(captions, int) and len(captions) != len(masks):
            raise ConfigError(f"{len(captions)} captions for {len(masks)} masks")
        active = np.zeros((tiling.num_views(grid), config.num_prompts, config.patches_per_side**2), bool)
        for place, number in enumerate(order):
            prompt = prompts[place]
            active[:, prompt] |= tiling.active_patches(
                masks[number], prompt, tower.image_size, tower.patch_size, grid, self.layout
            )
        texts = (
            [[config.mask_token_id] * captions for _ in order]
            if isinstance(captions, int)
            else ([list(captions[number]) for number in order])
        )
        prefix = self.prefix(tiling.num_views(grid), len(masks))
        return Example(
            views=tiling.cut_image(pixels, tower.image_size, grid),
            prompts=active,
            grid=grid,
            boxes=[tiling.box_of(masks[number], self.layout.inclusive_boxes) for number in order],
            order=order,
            prefix=prefix,
            captions=self.blocks(texts, prefix.shape[1]),
        )

    def prefix(self, views: int, regions: int) -> np.ndarray:
        """(3, L): ids, positions and region codes of all that comes before the captions of an image."""
        config, layout = self.config, self.layout
        ids = list(_fixed(self.tokenizer, f"{HEAD}<img>"))
        ids += [self._id("image")] * (views * config.tokens_per_tile)
        ids += _fixed(self.tokenizer, "</img>")
        codes = [SHARED] * len(ids)
        for region in range(regions):
            ids += [self._ids("region", region)] * config.replay_tokens + [self._id("newline")]
            between = region < regions - 1 and layout.hidden_newlines
            codes += [1 + region] * config.replay_tokens + [HIDDEN if between else SHARED]
        ids += _fixed(self.tokenizer, f"{layout.instruction}{ANSWER}")
        codes += [SHARED] * (len(ids) - len(codes))
        return np.array([ids, range(len(ids)), codes], np.int64)

    def blocks(self, texts: Sequence[Sequence[int]], start: int) -> np.ndarray:
        """(3, L): ids, positions and region codes of the captions' blocks; the first starts at `start`."""
        ids: list[int] = []
        positions: list[int] = []
        codes: list[int] = []
        for region, text in enumerate(texts):
            newline = self.layout.block_end == "newline" and region < len(texts) - 1
            block = [self._ids("caption", region), *text, self._id("newline" if newline else "eot")]
            first = start if self.layout.restart_positions else start + len(ids)
            ids += block
            positions += range(first, first + len(block))
            codes += [1 + region] * len(block)
        return np.array([ids, positions, codes], np.int64)

    def read(self, tokens_RS: np.ndarray, order: Sequence[int]) -> list[str]:
        """The captions in an example's filled slots, in the caller's order.

        A caption ends at the first eot of its block; with the layout's `cut` "answer", at the first of the
        whole answer, so that captions after it are empty. Special tokens within a caption are left out.

        Args:
            tokens_RS: (n, slots), in the order of the sequence.
            order: the example's.
        """
        captions = [""] * len(order)
        for row, number in zip(np.asarray(tokens_RS).tolist(), order, strict=True):
            ended = self.config.eot_token_id in row
            text = row[: row.index(self.config.eot_token_id)] if ended else row
            captions[number] = self.tokenizer.decode(text, skip_special_tokens=True).strip()
            if ended and self.layout.cut == "answer":
                break
        return captions

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, special ones in it included."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _id(self, what: str) -> int:
        return getattr(self.config, f"{what}_token_id")

    def _ids(self, what: str, region: int) -> int:
        return getattr(self.config, f"{what}_token_ids")[region]


@lru_cache(maxsize=64)
def _fixed(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokens of a text that every example has: a call of a tokenizer costs as much as a mask."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


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


def check_masks(masks: Sequence[np.ndarray | tiling.Runs], size: tuple[int, int], most: int) -> None:
    """Raise ConfigError for the first mask that cannot be captioned, by its number, or for too many."""
    if len(masks) > most:
        raise ConfigError(f"{len(masks)} masks, but the model has {most} region prompts: make groups of them")
    for number, mask in enumerate(masks):
        if mask.shape != size:
            shown = "x".join(map(str, reversed(mask.shape)))
            raise ConfigError(
                f"mask {number} is {shown}, the image {size[1]}x{size[0]}: scale the mask to the image"
            )
        if not mask.any():
            raise ConfigError(f"mask {number} is empty: there is nothing to caption; leave it out")


AutoProcessor.register(PerceptionDLMConfig, PerceptionDLMProcessor)
