"""From photos, masks and captions to batches, and from filled slots back to captions. No model in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from model_training.attention import HIDDEN, SHARED
from model_training.batch import PADDING, Batch
from model_training.config import PerceptionDLMConfig
from model_training.tiles import box_of, choose_grid, cut_tiles, mark_patches, num_tiles
from schemas.errors import ConfigError

SYSTEM = "You are a helpful assistant."
HEADER, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
IMAGE, IMAGE_START, IMAGE_END, MASK = "<IMG_CONTEXT>", "<img>", "</img>", "<|mdm_mask|>"
REPLAY, CAPTION = "<|reserved_token_{}|>", "<|Mask_Cap_{}|>"
ADDED_TOKENS = [IMAGE, IMAGE_START, IMAGE_END, *(CAPTION.format(i) for i in range(16))]
"""What PerceptionDLM adds to LLaDA's tokenizer, in this order."""

NO_LABEL = -100
PLAIN = -1
"""Mask number, in `Batch.origins`, of an answer about the whole image."""


@dataclass(frozen=True)
class Item:
    """One sequence: an image and up to `num_prompts` of its regions. Positions count from 0.

    Attributes:
        pixels: T3SS uint8. prompts: TPK uint8, see `Batch`.
        grid: (columns, rows). boxes: N4.
        input_ids, region_ids, positions, labels: one entry a token; labels are None without captions.
        image_at, replay_at, slots: positions. slot_answers: for each slot, the answer it belongs to, from 0.
        origins: for each answer, (image, mask) as the caller numbered them.
    """

    pixels: NDArray[np.uint8]
    prompts: NDArray[np.uint8]
    grid: tuple[int, int]
    boxes: NDArray[np.float64]
    input_ids: NDArray[np.int64]
    region_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    image_at: NDArray[np.int64]
    replay_at: NDArray[np.int64]
    slots: NDArray[np.int64]
    slot_answers: NDArray[np.int64]
    origins: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.input_ids)


class PerceptionDLMProcessor(ProcessorMixin):
    """Builds batches for one model, in the layout of the model's config; it has no config of its own.

    Args:
        tokenizer: with the tokens of `ADDED_TOKENS` in it.
        config: the model's.

    Raises:
        ConfigError: the tokenizer lacks a token; names it.
    """

    attributes = ["tokenizer"]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PerceptionDLMConfig):
        self.tokenizer = tokenizer
        self.config = config
        self.chat_template = None
        needed = [HEADER, HEADER_END, EOT, MASK, IMAGE, IMAGE_START, IMAGE_END]
        needed += [name.format(i) for i in range(config.num_prompts) for name in (REPLAY, CAPTION)]
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise ConfigError(
                f"tokenizer: no {missing[0]}"
                + (f" and {len(missing) - 1} more" if missing[1:] else "")
                + "; "
                "convert the checkpoint with `paracaption models convert`, which adds what is missing"
            )
        self._ids = {token: vocabulary[token] for token in needed}

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> PerceptionDLMProcessor:  # pyright: ignore
        """From a model's folder or hub name: its config.json and its tokenizer."""
        config = PerceptionDLMConfig.from_pretrained(folder, **kwargs)
        return cls(PreTrainedTokenizerFast.from_pretrained(folder, **kwargs), config)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:  # pyright: ignore
        """Beside the model: the tokenizer; the layout is in the model's config.json, which is written too."""
        self.tokenizer.save_pretrained(folder)
        self.config.save_pretrained(folder)

    def __call__(  # pyright: ignore
        self,
        images: Sequence[Image.Image | np.ndarray],
        masks: Sequence[Sequence[np.ndarray]],
        captions: Sequence[Sequence[str]] | None = None,
        length: int | None = None,
        instruction: str | None = None,
    ) -> Batch:
        """A batch of images with their masks; a row per group of regions. See `items`."""
        items = [
            item
            for i, (image, of_image) in enumerate(zip(images, masks, strict=True))
            for item in self.items(
                image,
                of_image,
                captions and captions[i],
                length=length,
                instruction=instruction,
                image_index=i,
            )
        ]
        return self.collate([[item] for item in items])

    def items(
        self,
        image: Image.Image | np.ndarray,
        masks: Sequence[np.ndarray],
        captions: Sequence[str] | None = None,
        *,
        length: int | None = None,
        prompts: Sequence[int] | None = None,
        instruction: str | None = None,
        image_index: int = 0,
    ) -> list[Item]:
        """The sequences of one image: one, or several of even size if there are more regions than prompts.

        Args:
            image: the photo as it is displayed.
            masks: HW, nonzero inside. None of them: one answer about the whole image.
            captions: of each mask, for training; then there are labels. Without: slots to fill.
            length: slots per caption (default: the config's). With captions: these are padded to it with ends
                of text (`caption_end: each`); None: natural length.
            prompts: the region prompt of each mask of a group, by rank (largest first); default 0, 1, 2...
            instruction: default: the config's.
            image_index: what `origins` calls the image.

        Raises:
            ConfigError: a mask is empty or not of the image's size, a caption or the instruction holds a
                special token, or a caption is longer than `length`.
        """
        photo = image if isinstance(image, Image.Image) else Image.fromarray(image)
        regions = [np.asarray(mask) != 0 for mask in masks]
        for i, mask in enumerate(regions):
            if mask.shape != (photo.height, photo.width):
                raise ConfigError(
                    f"image {image_index}, mask {i}: {mask.shape[::-1]} pixels, the photo {photo.size}; "
                    "scale the mask (nearest) or turn the photo as its EXIF says"
                )
            if not mask.any():
                raise ConfigError(f"image {image_index}, mask {i}: empty; leave it out")
        if captions is not None and len(captions) != max(len(regions), 1):
            raise ConfigError(f"image {image_index}: {len(regions)} masks and {len(captions)} captions")
        grid = choose_grid(photo.width, photo.height, self.config.tile_px, self.config.max_tiles)
        pixels = cut_tiles(photo, grid, self.config.tile_px)
        num_groups = max(-(-len(regions) // self.config.num_prompts), 1)
        groups = []
        for members in np.array_split(np.arange(len(regions)), num_groups):
            areas = np.array([regions[i].sum() for i in members])
            ranked = members[np.argsort(areas, kind="stable")[::-1]]
            groups.append(
                self._item(
                    pixels,
                    grid,
                    [regions[i] for i in ranked],
                    [int(i) for i in ranked] or [PLAIN],
                    list(prompts or range(len(ranked))),
                    captions and [captions[max(i, 0)] for i in (ranked if len(ranked) else [0])],
                    length,
                    instruction or self.config.instruction,
                    image_index,
                )
            )
        return groups

    def collate(self, rows: Sequence[Sequence[Item]], multiple: int = 1) -> Batch:
        """Items to a batch. A row with several items is packed: they do not see each other.

        Args:
            rows: the items of each row.
            multiple: the length of the rows is a multiple of it.
        """
        length = max(sum(len(item) for item in row) for row in rows)
        length = -(-length // multiple) * multiple
        items = [item for row in rows for item in row]
        full = {
            "input_ids": np.full((len(rows), length), self._ids[EOT]),
            "region_ids": np.full((len(rows), length), SHARED),
            "documents": np.full((len(rows), length), PADDING),
            "positions": np.zeros((len(rows), length), np.int64),
            "labels": np.full((len(rows), length), NO_LABEL),
        }
        slots: list[list[NDArray]] = [[] for _ in rows]
        slot_regions: list[list[NDArray]] = [[] for _ in rows]
        image_at, replay_at, answers = [], [], 0
        for b, row in enumerate(rows):
            start = 0
            for document, item in enumerate(row):
                span = slice(start, start + len(item))
                full["documents"][b, span] = document
                for name in ("input_ids", "region_ids", "positions", "labels"):
                    if (value := getattr(item, name)) is not None:
                        full[name][b, span] = value
                image_at.append(b * length + start + item.image_at)
                replay_at.append(b * length + start + item.replay_at)
                slots[b].append(start + item.slots)
                slot_regions[b].append(answers + item.slot_answers)
                start, answers = start + len(item), answers + len(item.origins)
        return Batch(
            pixels_TCSS=torch.from_numpy(np.concatenate([item.pixels for item in items])),
            prompts_TPK=torch.from_numpy(np.concatenate([item.prompts for item in items])),
            grids=tuple(item.grid for item in items),
            regions=tuple(len(item.boxes) for item in items),
            boxes_N4=torch.from_numpy(np.concatenate([item.boxes for item in items])).float(),
            input_ids_BL=torch.from_numpy(full["input_ids"]),
            region_ids_BL=torch.from_numpy(full["region_ids"]),
            documents_BL=torch.from_numpy(full["documents"]),
            positions_BL=torch.from_numpy(full["positions"]),
            image_at_I=torch.from_numpy(np.concatenate(image_at)),
            replay_at_R=torch.from_numpy(np.concatenate(replay_at)),
            slots_BS=_ragged(slots),
            slot_regions_BS=_ragged(slot_regions),
            origins=tuple(origin for item in items for origin in item.origins),
            labels_BL=None if items[0].labels is None else torch.from_numpy(full["labels"]),
        )

    def captions(self, batch: Batch, filled_BS: Tensor, cut: str = "block") -> list[list[str]]:
        """Captions from filled slots: for each image, for each of its masks, in the caller's order.

        Args:
            batch: whose slots they are.
            filled_BS: token ids of `batch.slots_BS`.
            cut: `block`: a caption ends at its own first end of text. `answer`: as the reference's scripts
                have it, all captions after the first end of text in a row are empty too.
        """
        ids_BS, regions_BS = filled_BS.tolist(), batch.slot_regions_BS.tolist()
        images = 1 + max(image for image, _ in batch.origins)
        numbered: list[dict[int, str]] = [{} for _ in range(images)]
        for ids, regions in zip(ids_BS, regions_BS, strict=True):
            ended = False
            for region in dict.fromkeys(region for region in regions if region != PADDING):
                own = [i for i, r in zip(ids, regions, strict=True) if r == region]
                image, mask = batch.origins[region]
                numbered[image][mask] = "" if ended and cut == "answer" else self.text(own)
                ended = ended or self._ids[EOT] in own
        return [[texts[i] for i in sorted(texts)] for texts in numbered]

    def text(self, ids: Sequence[int]) -> str:
        """A caption's text: up to the first end of text, without special tokens."""
        ids = list(ids)
        if self._ids[EOT] in ids:
            ids = ids[: ids.index(self._ids[EOT])]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @cached_property
    def _markers(self) -> frozenset[int]:
        return frozenset(self._ids.values())

    def _encode(self, text: str) -> list[int]:
        """Token ids of plain text.

        Raises:
            ConfigError: the text holds one of the markers.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not self._markers.isdisjoint(ids):
            raise ConfigError(f"{text!r}: holds a special token of the model; remove it")
        return ids

    def _item(
        self,
        pixels: NDArray[np.uint8],
        grid: tuple[int, int],
        regions: list[NDArray[np.bool_]],
        numbers: list[int],
        prompts: list[int],
        captions: list[str] | None,
        length: int | None,
        instruction: str,
        image_index: int,
    ) -> Item:
        config = self.config
        marked = np.zeros((num_tiles(grid), config.grid, config.grid, config.num_prompts), np.uint8)
        for mask, prompt in zip(regions, prompts[: len(regions)], strict=True):
            marked[..., prompt] += mark_patches(
                mask,
                prompt,
                grid,
                config.tile_px,
                config.vision_config.patch_size,
                config.mask_resize,
                config.patch_rule,
            )
        text = _Text()
        self._prefix(text, num_tiles(grid), len(regions), instruction)
        origin = len(text.ids)
        for i in range(len(numbers)):
            self._block(text, i, len(regions), len(numbers), captions and captions[i], length)
        positions = np.arange(len(text.ids))
        region_ids = np.array(text.regions)
        if config.block_positions == "restart":
            for i in range(1, len(numbers) + 1):
                block = np.flatnonzero(region_ids == i)
                positions[block] = origin + np.arange(len(block))
        kinds = np.array(text.kinds)
        slots = np.flatnonzero(kinds == "slot")
        return Item(
            pixels=pixels,
            prompts=marked.reshape(len(marked), -1, config.num_prompts),
            grid=grid,
            boxes=np.array([box_of(mask, config.box_edges) for mask in regions]).reshape(-1, 4),
            input_ids=np.array(text.ids),
            region_ids=region_ids,
            positions=positions,
            labels=None if captions is None else np.where(np.array(text.labelled), text.ids, NO_LABEL),
            image_at=np.flatnonzero(kinds == "image"),
            replay_at=np.flatnonzero(kinds == "replay"),
            slots=slots,
            slot_answers=region_ids[slots] - 1,
            origins=tuple((image_index, number) for number in numbers),
        )

    def _prefix(self, text: _Text, tiles: int, num_regions: int, instruction: str) -> None:
        """Everything before the captions."""
        ids, config = self._ids, self.config
        text.add(self.tokenizer("")["input_ids"])
        self._turn(text, "system")
        text.add([*self._encode("\n" + SYSTEM), ids[EOT], *self._encode("\n")])
        self._turn(text, "user")
        text.add([*self._encode("\n"), ids[IMAGE_START]])
        text.add([ids[IMAGE]] * (tiles * config.tokens_per_tile), kind="image")
        text.add([ids[IMAGE_END]])
        between = HIDDEN if config.replay_newlines == "hidden" else SHARED
        for i in range(num_regions):
            if i:
                text.add(self._encode("\n"), between)
            text.add([ids[REPLAY.format(i)]] * config.replay_tokens, -(i + 1), "replay")
        text.add([*self._encode("\n" + instruction), ids[EOT], *self._encode("\n")])
        self._turn(text, "assistant")
        text.add(self._encode("\n"))

    def _turn(self, text: _Text, who: str) -> None:
        text.add([self._ids[HEADER], *self._encode(who), self._ids[HEADER_END]])

    def _block(
        self, text: _Text, i: int, num_regions: int, num_answers: int, caption: str | None, length: int | None
    ) -> None:
        """Answer i: its marker, its slots or its caption, its end."""
        each = self.config.caption_end == "each"
        last = i == num_answers - 1
        region = i + 1
        marker = [self._ids[CAPTION.format(i)]] if num_regions else []
        end = [self._ids[EOT]] if each or last else self._encode("\n")
        if caption is None:
            text.add(marker, region)
            text.add([self._ids[MASK]] * (length or self.config.caption_length), region, "slot")
            text.add(end, region)
            return
        written = self._encode(caption if each or last else caption + "\n")
        if length is not None:
            if len(written) > length:
                raise ConfigError(f"{caption!r}: {len(written)} tokens, longer than {length}")
            written += [self._ids[EOT]] * (length - len(written)) if each else []
        text.add(marker, region, labelled=not each)
        text.add(written, region, "slot", labelled=True)
        if each or last:
            text.add([self._ids[EOT]], region, labelled=True)


class _Text:
    """A sequence being put together: per token its id, region id, kind and whether it is to be predicted."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.regions: list[int] = []
        self.kinds: list[str] = []
        self.labelled: list[bool] = []

    def add(self, ids: list[int], region: int = SHARED, kind: str = "text", labelled: bool = False) -> None:
        self.ids += ids
        self.regions += [region] * len(ids)
        self.kinds += [kind] * len(ids)
        self.labelled += [labelled] * len(ids)


def _ragged(rows: list[list[NDArray]]) -> Tensor:
    joined = [torch.from_numpy(np.concatenate(row)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=PADDING)


AutoProcessor.register(PerceptionDLMConfig, PerceptionDLMProcessor, exist_ok=True)
