"""From an image and its masks to what the model reads, and from its tokens to captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from ...schemas.errors import ConfigError
from . import published_layout, tiling
from .attention import HIDDEN, SHARED
from .batch import Example
from .config import PerceptionDLMConfig

HEAD = (
    "<|start_header_id|>system<|end_header_id|>\nYou are a helpful assistant.<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n"
)
MAX_INSTRUCTION = 1_024
"""Most tokens of what the user says after the regions."""

ANSWER = "<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n"


class PerceptionDLMProcessor(ProcessorMixin):
    """Lays out images for a model, and reads its captions; it knows the model's config and tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PerceptionDLMConfig, **_: Any):
        self.config = config
        self.layout = config.resolved_layout()
        super().__init__(tokenizer)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PerceptionDLMProcessor:
        """The processor of a model, given its folder or its name on a hub."""
        from transformers import AutoTokenizer

        from .tokenizer import load_tokenizer

        options = {key: value for key, value in options.items() if not key.startswith("_")}
        options.pop("trust_remote_code", None)  # whatever was asked for, no code of the model is run
        config = options.pop("config", None) or PerceptionDLMConfig.from_pretrained(
            path, trust_remote_code=False, **options
        )
        if Path(path).is_dir():
            return cls(load_tokenizer(Path(path)), config)
        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options), config)

    def save_pretrained(self, path: str | Path, push_to_hub: bool = False, **options: Any) -> list[str]:
        """Write tokenizer and config, from which `from_pretrained` makes the processor again."""
        self.config.save_pretrained(path)
        return list(self.tokenizer.save_pretrained(path, push_to_hub=push_to_hub, **options))

    def make_example(
        self,
        pixels: np.ndarray | Image.Image,
        masks: Sequence[np.ndarray | tiling.MaskRuns],
        captions: Sequence[Sequence[int]] | int,
        prompts: Sequence[int] | None = None,
        instruction: str | None = None,
    ) -> Example:
        """Lay out one image with its regions as a sequence.

        Args:
            pixels: (H, W, 3) uint8 RGB or a Pillow image in RGB, as it is stored. An EXIF rotation would turn
                it away from its masks.
            masks: one for each region, (H, W) bool or its runs. None is empty, and there are at most
                `num_prompts`.
            captions: the tokens of each region's caption without the one that closes it, or how many tokens
                to leave masked in each caption.
            prompts: the prompt that marks the largest region, the second largest, ...; by default 0, 1, ...
            instruction: what the user says after the regions; by default what the layout has.

        Raises:
            ConfigError: there are too many masks, one is empty or not of the image's size, or not every mask
                has a caption and a prompt of its own.
        """
        config = self.config
        width, height = pixels.size if isinstance(pixels, Image.Image) else pixels.shape[1::-1]
        tiling.check_masks(masks, (height, width), config.num_prompts)
        grid = tiling.tile_grid(width, height, config.tile_px, config.max_tiles)
        order = tiling.sort_by_area(masks)
        prompts = list(range(len(masks)) if prompts is None else prompts)
        if len(set(prompts)) != len(masks) or not set(prompts) <= set(range(config.num_prompts)):
            raise ConfigError(
                f"prompts {prompts}: give each of the {len(masks)} masks another number from 0 to "
                f"{config.num_prompts - 1}"
            )
        if not isinstance(captions, int) and len(captions) != len(masks):
            raise ConfigError(
                f"{len(captions)} captions for {len(masks)} masks; give one caption for each mask"
            )
        active = np.zeros((tiling.num_views(grid), config.num_prompts, config.patches_per_side**2), bool)
        for place, number in enumerate(order):
            prompt = prompts[place]
            active[:, prompt] |= tiling.active_patches(
                masks[number], prompt, config.tile_px, config.patch_px, grid, self.layout
            )
        texts = (
            [[config.mask_token_id] * captions for _ in order]
            if isinstance(captions, int)
            else ([list(captions[number]) for number in order])
        )
        prefix = self.make_prefix(tiling.num_views(grid), len(masks), instruction)
        return Example(
            views=tiling.cut_image(pixels, config.tile_px, grid),
            prompts=active,
            grid=grid,
            boxes=[tiling.mask_box(masks[number], self.layout.inclusive_boxes) for number in order],
            order=order,
            prefix=prefix,
            captions=self.make_captions(texts, prefix.shape[1]),
        )

    def check_instruction(self, text: str) -> None:
        """Refuse a question that the model cannot be asked.

        Raises:
            ConfigError: it is blank, is too long, or holds a special token, with which the sequence would
                mean something else.
        """
        if not text.strip():
            raise ConfigError("prompt: a blank text; leave it out, or say what the regions are asked")
        ids = self.check_text(text, "prompt")
        if len(ids) > MAX_INSTRUCTION:
            raise ConfigError(f"prompt: {len(ids):,} tokens; shorten it to {MAX_INSTRUCTION:,} at most")

    def check_text(self, text: str, name: str) -> list[int]:
        """The tokens of a text, which messages call `name`. It may be empty, and of any length.

        Raises:
            ConfigError: it holds a special token, with which the sequence would mean something else.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(f"{name}: half a surrogate pair, which is not text; correct it")
        ids = self.tokenize(text)
        if found := sorted(({*self.tokenizer.all_special_ids} | self._marks()) & {*ids}):
            token = self.tokenizer.decode([found[0]])
            raise ConfigError(f"{name}: it holds {token!r}, a token of the model's own; leave it out")
        return ids

    def _marks(self) -> set[int]:
        config = self.config
        alone = (config.image_token_id, config.mask_token_id, config.eot_token_id)
        marks = (*alone, *(config.region_token_ids or ()), *(config.caption_token_ids or ()))
        return {each for each in marks if each is not None}

    def make_prefix(self, views: int, regions: int, instruction: str | None = None) -> np.ndarray:
        """Ids, positions and region codes of all tokens before the captions of an image, (3, L)."""
        config, layout = self.config, self.layout
        instruction = layout.instruction if instruction is None else instruction
        ids = list(_fixed(self.tokenizer, f"{HEAD}<img>"))
        ids += [self._id("image")] * (views * config.tokens_per_tile)
        ids += _fixed(self.tokenizer, "</img>")
        codes = [SHARED] * len(ids)
        for region in range(regions):
            ids += [self._ids("region", region)] * config.replay_tokens + [self._id("newline")]
            between = region < regions - 1 and layout.hidden_newlines
            codes += [1 + region] * config.replay_tokens + [HIDDEN if between else SHARED]
        ids += _fixed(self.tokenizer, f"{instruction}{ANSWER}")
        codes += [SHARED] * (len(ids) - len(codes))
        return np.array([ids, range(len(ids)), codes], np.int64)

    def make_captions(self, texts: Sequence[Sequence[int]], start: int) -> np.ndarray:
        """Ids, positions and region codes of the captions' blocks, (3, L); the first starts at `start`."""
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

    def read_captions(self, tokens_RS: np.ndarray, order: Sequence[int]) -> list[str]:
        """The text of decoded captions, in the caller's order.

        A caption ends at the first eot of its block. If the layout's `cut` is "answer", it ends at the first
        eot of the whole answer, so that all captions after that are empty. Special tokens are left out.

        Args:
            tokens_RS: (regions, tokens of a caption), in the order of the sequence.
            order: the example's `order`.
        """
        captions = [""] * len(order)
        for row, number in zip(np.asarray(tokens_RS).tolist(), order, strict=True):
            ended = self.config.eot_token_id in row
            text = row[: row.index(self.config.eot_token_id)] if ended else row
            captions[number] = self.tokenizer.decode(text, skip_special_tokens=True).strip()
            if ended and self.layout.cut == "answer":
                break
        return captions

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are recognized."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _id(self, what: str) -> int:
        return getattr(self.config, f"{what}_token_id")

    def _ids(self, what: str, region: int) -> int:
        return getattr(self.config, f"{what}_token_ids")[region]


@lru_cache(maxsize=64)
def _fixed(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text that every example has. A call of the tokenizer costs as much as a mask."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


AutoProcessor.register(PerceptionDLMConfig, PerceptionDLMProcessor)
published_layout.register()
