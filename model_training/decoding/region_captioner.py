"""Captions of any number of regions of any number of photos, in the caller's order."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from ...pipeline.io import weights
from ...pipeline.io.packages import how_to_install_extra
from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError
from .region_forms import Boxes, to_masks, to_pixels

if TYPE_CHECKING:
    from os import PathLike

    from PIL.Image import Image
    from torch import Tensor

    from ..model.batch import Example
    from ..model.perceptiondlm import PerceptionDLM
    from ..model.processor import PerceptionDLMProcessor
    from .sampler import DecodeState

Photo: TypeAlias = "str | PathLike[str] | bytes | np.ndarray | Image | Tensor"
"""A photo in one of the forms of `region_forms`."""

Prompt: TypeAlias = str | Sequence[str | None] | None
"""What all regions of a photo are asked, or what each of them is; None asks what the model was trained on."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


class RegionCaptions(NamedTuple):
    """The captions of one photo's regions, and what they cost.

    Attributes:
        captions: one for each mask, in the caller's order.
        forwards: forward passes of the language model, summed over the photo's groups of regions.
        tokens: tokens that were decoded, `max_new_tokens` for each region.
        seconds: this photo's share of the time that its batches took.
        agreement: share of tokens equal to those of a decode without a cache, where `compare` asks for it.
        confidences: how sure the model is of each caption, 0 to 1: the geometric mean of the probabilities of
            its tokens, the one that ends it included.
    """

    captions: list[str]
    forwards: int
    tokens: int
    seconds: float
    agreement: float | None = None
    confidences: list[float] = []


class Slot(NamedTuple):
    """The place of one token in a caption that is being decoded.

    Attributes:
        text: the token as text; None while it is masked.
        token: its id.
        confidence: probability of the latest prediction for this place; NaN before the first one.
    """

    text: str | None
    token: int
    confidence: float


class Snapshot(NamedTuple):
    """The captions of a photo between two decoding steps.

    Attributes:
        forwards: forward passes of the language model so far, of the group that has had most.
        slots: for each region, in the caller's order, its tokens.
        captions: the captions as they read now, without what is still masked.
    """

    forwards: int
    slots: list[list[Slot]]
    captions: list[str]


class _Group(NamedTuple):
    """Regions that share a sequence: the number of their photo, their numbers in it, and the sequence."""

    photo: int
    regions: list[int]
    example: Example


class _Asked(NamedTuple):
    """A photo as a caller gave it, with its regions and how they are captioned."""

    photo: Photo
    masks: Iterable[Any]
    prompt: Prompt
    boxes: Boxes
    regions_per_call: int | None
    fill_groups: bool = False


class RegionCaptioner:
    """Describes regions of photos with a PerceptionDLM: all regions of a photo at once.

        captioner = RegionCaptioner.load("out/run/model")
        captions = captioner.caption(photo, masks)

    How captions are decoded can be chosen in every call, with `DecodeOptions` or with fields of it:

        captioner.caption(photo, masks, strategy="threshold", threshold=0.95, max_new_tokens=64)

    Attributes:
        model: the network, in eval mode and on its device.
        processor: lays out photos and masks for this network, and turns its tokens into text.
    """

    def __init__(self, model: PerceptionDLM, processor: PerceptionDLMProcessor):
        from .sampler import Decoder

        self.model, self.processor = model, processor
        self._decoder = Decoder(model)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", dtype: str = "auto") -> RegionCaptioner:
        """Open a saved model.

        Args:
            folder: what training, `paracaption models convert` or `save_pretrained` wrote.
            device: a device of torch, such as "cuda:1" or "cpu". "auto" takes a GPU where there is one.
            dtype: the type that the model computes in: "float32", "bfloat16" or "float16". "auto" takes
                bfloat16 on a GPU and float32 elsewhere.

        Raises:
            ConfigError: the folder holds no such model or lacks weights of it, the device or the type cannot
                be used, or torch is not installed.
        """
        check_saved_model(Path(folder))
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: unknown type {dtype!r}; choose one of {', '.join(DTYPES)}")
        try:
            import torch
            from transformers.utils import logging

            from ..model.processor import PerceptionDLMProcessor
            from ..model.saved import load_model, read_model_config, refusing
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed; {how_to_install_extra('models')}") from error
        logging.disable_progress_bar()
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            place = torch.device(chosen)
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"device: {chosen!r} cannot be used ({why}); choose another one") from error
        if dtype == "auto":
            dtype = "bfloat16" if place.type == "cuda" else "float32"
        with refusing(Path(folder)):
            config = read_model_config(Path(folder))
            processor = PerceptionDLMProcessor.from_pretrained(folder, config=config)
            model = load_model(Path(folder), config, dtype=getattr(torch, dtype))
        model.to(place)  # pyright: ignore[reportArgumentType] - transformers' decorator hides the argument
        return cls(model.eval(), processor)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "auto", dtype: str = "auto"
    ) -> RegionCaptioner:
        """The same as `load`, under the name that transformers gives it. Nothing is downloaded."""
        return cls.load(folder, device, dtype)

    def with_instruction(self, instruction: str) -> RegionCaptioner:
        """This captioner, asked something else than its layout says. The model is shared."""
        processor = copy.copy(self.processor)
        processor.layout = dataclasses.replace(self.processor.layout, instruction=instruction)
        return RegionCaptioner(self.model, processor)

    def caption(
        self,
        photo: Photo,
        masks: Iterable[Any],
        options: DecodeOptions | None = None,
        *,
        prompt: Prompt = None,
        boxes: Boxes = "xyxy",
        regions_per_call: int | None = None,
        **fields: Any,
    ) -> list[str]:
        """Describe regions of one photo.

        Args:
            photo: the path of an image file or its bytes, (height, width, 3) uint8 RGB, a Pillow image of any
                mode but F, or a tensor (3, height, width). It is taken as it is stored: an EXIF rotation is
                not applied, since the masks would not follow it. URLs are not fetched.
            masks: the regions, each of them a mask of the photo's size (an array, a tensor, a Pillow image,
                or the path of a mask image), a COCO RLE, COCO polygons, or a box. A mask is bool, or has 0
                and one other value. Floats from 0 to 1 are probabilities, and count above 0.5; floats with
                negative ones are logits, and count above 0. There may be up to 2,000 regions, they may
                overlap, and none may be empty.
            options: how captions are decoded; by default as `DecodeOptions()` says.
            prompt: what the regions are asked, or a list with what each of them is asked; None is the
                sentence that the model was trained with. Regions with different prompts do not share a
                sequence.
            boxes: what four numbers mean, in pixels: "xyxy" (x1, y1, x2, y2, exclusive at the far edge) or
                "xywh" (x, y, width, height).
            regions_per_call: the most regions that share a sequence. By default as many as the model has
                region prompts; 1 describes them one after the other, none seeing another. More regions are
                split into groups of about equal size.
            fields: single fields of `DecodeOptions` that differ from `options`, such as `max_new_tokens=64`.

        Returns:
            One caption for each mask, in the order of the masks.

        Raises:
            ConfigError: the photo cannot be read or is not RGB; a region cannot be read, is empty, has
                another size, or holds values that can be read in two ways, and the message says its number;
                or an option is unknown, out of range, or does not suit the model.
        """
        [found] = self.caption_photos(
            [(photo, masks)],
            options,
            prompt=prompt,
            boxes=boxes,
            regions_per_call=regions_per_call,
            **fields,
        )
        return found.captions

    def caption_photos(
        self,
        photos: Iterable[tuple[Photo, Iterable[Any]] | tuple[Photo, Iterable[Any], Prompt]],
        options: DecodeOptions | None = None,
        *,
        prompt: Prompt = None,
        boxes: Boxes = "xyxy",
        batch_size: int = 8,
        regions_per_call: int | None = None,
        fill_groups: bool = False,
        **fields: Any,
    ) -> list[RegionCaptions]:
        """Describe regions of many photos, with the cost of each.

        Groups of regions share batches across photos. Captions do not depend on what else is in a batch.

        Args:
            photos: (photo, masks) or (photo, masks, prompt) as `caption` takes them. They are read one after
                the other, and only those of one batch are in memory at once.
            options: how captions are decoded; by default as `DecodeOptions()` says.
            prompt: what the regions of photos that have no prompt of their own are asked.
            boxes: as for `caption`.
            batch_size: groups that are decoded at once. More need more memory, and are faster on a GPU.
            regions_per_call: as for `caption`.
            fill_groups: fill each group before the next one begins, as the released code does (7 regions in 6
                and 1), instead of splitting evenly (4 and 3).
            fields: single fields of `DecodeOptions` that differ from `options`.

        Returns:
            One result for each photo, in the order of the photos.

        Raises:
            ConfigError: as `caption`.
        """
        options = _decode_options(options, fields)
        check_count("batch_size", batch_size or 0)
        check_count("regions_per_call", regions_per_call)
        results: list[RegionCaptions] = []
        waiting: list[_Group] = []
        for number, given in enumerate(photos):
            asked = _Asked(*_checked_pair(given, number, prompt), boxes, regions_per_call, fill_groups)
            groups, num_regions = self._groups(number, asked, options)
            results.append(RegionCaptions([""] * num_regions, 0, 0, 0.0, confidences=[0.0] * num_regions))
            for group in groups:
                waiting.append(group)
                if len(waiting) == batch_size:
                    self._decode(waiting, options, results)
                    waiting = []
        if waiting:
            self._decode(waiting, options, results)
        return results

    def caption_steps(
        self,
        photo: Photo,
        masks: Iterable[Any],
        options: DecodeOptions | None = None,
        *,
        prompt: Prompt = None,
        boxes: Boxes = "xyxy",
        regions_per_call: int | None = None,
        **fields: Any,
    ) -> Iterator[Snapshot]:
        """Describe regions of one photo, and show how the captions come to be.

        Args:
            photo: as for `caption`, as all that follows.
            masks: one for each region.
            options: how captions are decoded.
            prompt: what the regions are asked, or each of them.
            boxes: what four numbers mean.
            regions_per_call: the most regions that share a sequence.
            fields: single fields of `DecodeOptions` that differ from `options`.

        Yields:
            All captions before the first step and after every one. The last are what `caption` returns.

        Raises:
            ConfigError: as `caption`, at once.
        """
        options = _decode_options(options, fields)
        check_count("regions_per_call", regions_per_call)
        groups, _ = self._groups(0, _Asked(photo, masks, prompt, boxes, regions_per_call), options)
        return self._snapshots(list(groups), options)

    def _groups(self, number: int, asked: _Asked, options: DecodeOptions) -> tuple[Iterator[_Group], int]:
        """A photo's regions in groups that fit into a sequence, and how many regions there are."""
        pixels = to_pixels(asked.photo, f"photo {number}")
        dense = to_masks(asked.masks, pixels.shape[:2], asked.boxes)
        prompts = _prompts(asked.prompt, len(dense), number)
        for prompt in set(prompts) - {None}:
            self.processor.check_instruction(prompt or "")
        return self._made_groups(number, asked, pixels, dense, prompts, options), len(dense)

    def _made_groups(
        self,
        number: int,
        asked: _Asked,
        pixels: np.ndarray,
        dense: list[np.ndarray],
        prompts: list[str | None],
        options: DecodeOptions,
    ) -> Iterator[_Group]:
        """The groups of regions with the same prompt, evenly large unless groups are to be filled."""
        most = min(self.model.config.num_prompts, asked.regions_per_call or self.model.config.num_prompts)
        for prompt in dict.fromkeys(prompts):
            same = np.flatnonzero([each == prompt for each in prompts])
            cuts = list(range(most, len(same), most)) if asked.fill_groups else -(-len(same) // most)
            for part in np.array_split(same, cuts):
                regions = part.tolist()
                example = self.processor.make_example(
                    pixels,
                    [dense[region] for region in regions],
                    options.max_new_tokens,
                    instruction=prompt,
                )
                yield _Group(number, regions, example)

    def _decode(self, groups: list[_Group], options: DecodeOptions, results: list[RegionCaptions]) -> None:
        """Decode one batch, and put captions and costs into their photos' results."""
        from ..model.batch import collate

        start = time.perf_counter()
        decoded = self._decoder.decode(collate([group.example for group in groups]), options)
        seconds = (time.perf_counter() - start) / len(groups)
        for row, group in enumerate(groups):
            result, tokens = results[group.photo], len(group.regions) * options.max_new_tokens
            captions = self._read(group, decoded.tokens_BNS[row])
            for region, caption in zip(group.regions, captions, strict=True):
                result.captions[region] = caption
            for place, number in enumerate(group.example.order):
                parts = (decoded.tokens_BNS[row, place], decoded.confidence_BNS[row, place])
                result.confidences[group.regions[number]] = self._confidence(
                    *(each.numpy() for each in parts)
                )
            agreement = None
            if decoded.agreement_B is not None:
                before = (result.agreement or 0.0) * result.tokens
                agreement = (before + float(decoded.agreement_B[row]) * tokens) / (result.tokens + tokens)
            results[group.photo] = result._replace(
                forwards=result.forwards + int(decoded.forwards_B[row]),
                tokens=result.tokens + tokens,
                seconds=result.seconds + seconds,
                agreement=agreement,
            )

    def _confidence(self, tokens_S: np.ndarray, confidence_S: np.ndarray) -> float:
        """The geometric mean over a caption and its end; over all of it if it has no end."""
        ends = np.flatnonzero(tokens_S == self.model.config.eot_token_id)
        said_K = confidence_S[: ends[0] + 1] if len(ends) else confidence_S
        return float(np.exp(np.log(np.maximum(said_K, np.finfo(np.float64).tiny)).mean()))

    def _read(self, group: _Group, tokens_NS: Tensor) -> list[str]:
        return self.processor.read_captions(tokens_NS[: len(group.regions)].numpy(), group.example.order)

    def _snapshots(self, groups: list[_Group], options: DecodeOptions) -> Iterator[Snapshot]:
        from ..model.batch import collate

        if groups:
            batch = collate([group.example for group in groups])
            for state in self._decoder.steps(batch, options):
                yield self._snapshot(groups, state)

    def _snapshot(self, groups: list[_Group], state: DecodeState) -> Snapshot:
        total = sum(len(group.regions) for group in groups)
        slots: list[list[Slot]] = [[] for _ in range(total)]
        captions = [""] * total
        for row, group in enumerate(groups):
            read = self._read(group, state.tokens_BNS[row])
            for region, caption in zip(group.regions, read, strict=True):
                captions[region] = caption
            for place, number in enumerate(group.example.order):
                parts = (state.tokens_BNS, state.open_BNS, state.confidence_BNS)
                rows = zip(*(part[row, place].tolist() for part in parts), strict=True)
                slots[group.regions[number]] = [
                    Slot(None if masked else self.processor.tokenizer.decode([token]), token, confidence)
                    for token, masked, confidence in rows
                ]
        return Snapshot(int(state.forwards_B.max()), slots, captions)


def check_saved_model(folder: Path) -> None:
    """Refuse a folder that does not hold a saved PerceptionDLM. Looks at files only; needs no torch.

    Raises:
        ConfigError: a file is missing, or the config is not that of a PerceptionDLM.
    """
    config = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; download it first, or correct the path (none is fetched by name)"
        )
    if not config.is_file():
        raise ConfigError(f"{config}: no such file; give a folder that `paracaption models convert` wrote")
    kind = weights.read_json(config).get("model_type")
    if kind != "perceptiondlm":
        raise ConfigError(
            f"{config}: a model of type {kind!r}, not 'perceptiondlm'; convert a published model with "
            "`paracaption models convert`"
        )
    weights.safetensors_files(folder)
    weights.refuse_code(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder / 'tokenizer.json'}: no such file; save the model again")


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError for a number that is neither None nor at least 1."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1
    ):
        raise ConfigError(f"{name}: {value!r}; give at least 1" + ", a whole number" * (not _is_int(value)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _checked_pair(given: Any, number: int, prompt: Prompt) -> tuple[Any, Any, Prompt]:
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


def _decode_options(options: DecodeOptions | None, fields: dict[str, Any]) -> DecodeOptions:
    if options is not None and not isinstance(options, DecodeOptions):
        raise ConfigError(
            f"options: a {type(options).__name__}; give `DecodeOptions(...)`, or its fields by their names"
        )
    options = options or DecodeOptions()
    return DecodeOptions.checked({**options.model_dump(exclude_unset=True), **fields}) if fields else options
