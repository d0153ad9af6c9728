"""Captions of any number of regions of any number of photos, in the caller's order."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...pipeline.io import weights
from ...pipeline.io.photos import to_rgb
from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError
from ..model import tiling
from .mask_arrays import to_bool_mask

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL.Image import Image
    from torch import Tensor

    from ..model.batch import Example
    from ..model.perceptiondlm import PerceptionDLM
    from ..model.processor import PerceptionDLMProcessor
    from .sampler import DecodeState

DTYPES = ("auto", "float32", "bfloat16", "float16")


class RegionCaptions(NamedTuple):
    """The captions of one photo's regions, and what they cost.

    Attributes:
        captions: one for each mask, in the caller's order.
        forwards: forward passes of the language model, summed over the photo's groups of regions.
        tokens: tokens that were decoded, `max_new_tokens` for each region.
        seconds: this photo's share of the time that its batches took.
        agreement: share of tokens equal to those of a decode without a cache, where `compare` asks for it.
    """

    captions: list[str]
    forwards: int
    tokens: int
    seconds: float
    agreement: float | None = None


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
        self.model, self.processor = model, processor

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
            raise ConfigError(
                f"{error.name} is not installed; install the models' packages: `make models` in a clone, or "
                "`pip install 'paracaption[models]'`"
            ) from error
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

    def with_instruction(self, instruction: str) -> RegionCaptioner:
        """This captioner, asked something else than its layout says. The model is shared."""
        processor = copy.copy(self.processor)
        processor.layout = dataclasses.replace(self.processor.layout, instruction=instruction)
        return RegionCaptioner(self.model, processor)

    def caption(
        self,
        photo: np.ndarray | Image,
        masks: Sequence[ArrayLike],
        options: DecodeOptions | None = None,
        *,
        regions_per_call: int | None = None,
        **fields: Any,
    ) -> list[str]:
        """Describe regions of one photo.

        Args:
            photo: (height, width, 3) uint8 RGB, or a Pillow image of any mode but F. It is taken as it
                is stored: an EXIF rotation is not applied, since the masks would not follow it.
            masks: one for each region, (height, width) of the photo's size: bool, or 0 and one other value.
                Floats from 0 to 1 are probabilities, and count above 0.5; floats with negative ones are
                logits, and count above 0. There may be any number of masks, they may overlap, and none may
                be empty.
            options: how captions are decoded; by default as `DecodeOptions()` says.
            regions_per_call: the most regions that share a sequence. By default as many as the model has
                region prompts; 1 describes them one after the other, none seeing another. More regions are
                split into groups of about equal size.
            fields: single fields of `DecodeOptions` that differ from `options`, such as `max_new_tokens=64`.

        Returns:
            One caption for each mask, in the order of the masks.

        Raises:
            ConfigError: the photo is not RGB; a mask is empty, has another size, or holds values that can be
                read in two ways, and the message says its number; or an option is unknown, or does not suit
                the model.
        """
        [found] = self.caption_photos([(photo, masks)], options, regions_per_call=regions_per_call, **fields)
        return found.captions

    def caption_photos(
        self,
        photos: Iterable[tuple[np.ndarray | Image, Sequence[ArrayLike]]],
        options: DecodeOptions | None = None,
        *,
        batch_size: int = 8,
        regions_per_call: int | None = None,
        fill_groups: bool = False,
        **fields: Any,
    ) -> list[RegionCaptions]:
        """Describe regions of many photos, with the cost of each.

        Groups of regions share batches across photos. Captions do not depend on what else is in a batch.

        Args:
            photos: (photo, masks) as `caption` takes them. They are read one after the other, and only those
                of one batch are in memory at once.
            options: how captions are decoded; by default as `DecodeOptions()` says.
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
        results: list[RegionCaptions] = []
        waiting: list[_Group] = []
        for number, (photo, masks) in enumerate(photos):
            results.append(RegionCaptions([""] * len(masks), 0, 0, 0.0))
            for group in self._groups(number, photo, masks, options, regions_per_call, fill_groups):
                waiting.append(group)
                if len(waiting) == batch_size:
                    self._decode(waiting, options, results)
                    waiting = []
        if waiting:
            self._decode(waiting, options, results)
        return results

    def caption_steps(
        self,
        photo: np.ndarray | Image,
        masks: Sequence[ArrayLike],
        options: DecodeOptions | None = None,
        *,
        regions_per_call: int | None = None,
        **fields: Any,
    ) -> Iterator[Snapshot]:
        """Describe regions of one photo, and show how the captions come to be.

        Args:
            photo: as for `caption`, as all that follows.
            masks: one for each region.
            options: how captions are decoded.
            regions_per_call: the most regions that share a sequence.
            fields: single fields of `DecodeOptions` that differ from `options`.

        Yields:
            All captions before the first step and after every one. The last are what `caption` returns.

        Raises:
            ConfigError: as `caption`, at once.
        """
        options = _decode_options(options, fields)
        groups = list(self._groups(0, photo, masks, options, regions_per_call))
        return self._snapshots(groups, options)

    def _groups(
        self,
        number: int,
        photo: np.ndarray | Image,
        masks: Sequence[ArrayLike],
        options: DecodeOptions,
        regions_per_call: int | None,
        fill_groups: bool = False,
    ) -> Iterator[_Group]:
        """A photo's regions in groups that fit into a sequence, evenly unless groups are to be filled."""
        if regions_per_call is not None and regions_per_call < 1:
            raise ConfigError(f"regions_per_call: {regions_per_call}; give at least 1")
        pixels = _pixels(photo, number)
        dense = [to_bool_mask(mask, index) for index, mask in enumerate(masks)]
        tiling.check_masks(dense, pixels.shape[:2], len(dense))
        most = min(self.model.config.num_prompts, regions_per_call or self.model.config.num_prompts)
        everything, num_groups = np.arange(len(dense)), -(-len(dense) // most)
        cuts = list(range(most, len(dense), most)) if fill_groups else num_groups
        for part in np.array_split(everything, cuts) if num_groups else ():
            regions = part.tolist()
            chosen = [dense[region] for region in regions]
            yield _Group(number, regions, self.processor.make_example(pixels, chosen, options.max_new_tokens))

    def _decode(self, groups: list[_Group], options: DecodeOptions, results: list[RegionCaptions]) -> None:
        """Decode one batch, and put captions and costs into their photos' results."""
        from ..model.batch import collate
        from .sampler import decode_batch

        start = time.perf_counter()
        decoded = decode_batch(self.model, collate([group.example for group in groups]), options)
        seconds = (time.perf_counter() - start) / len(groups)
        for row, group in enumerate(groups):
            result, tokens = results[group.photo], len(group.regions) * options.max_new_tokens
            captions = self._read(group, decoded.tokens_BNS[row])
            for region, caption in zip(group.regions, captions, strict=True):
                result.captions[region] = caption
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

    def _read(self, group: _Group, tokens_NS: Tensor) -> list[str]:
        return self.processor.read_captions(tokens_NS[: len(group.regions)].numpy(), group.example.order)

    def _snapshots(self, groups: list[_Group], options: DecodeOptions) -> Iterator[Snapshot]:
        from ..model.batch import collate
        from .sampler import decode_steps

        if groups:
            batch = collate([group.example for group in groups])
            for state in decode_steps(self.model, batch, options):
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


def _pixels(photo: Any, number: int) -> np.ndarray:
    """A caller's photo as (H, W, 3) uint8 RGB."""
    from PIL import Image

    give = "give (H, W, 3) uint8 RGB, or an image that Pillow has opened"
    if isinstance(photo, Image.Image):
        if photo.mode == "F":
            raise ConfigError(f"photo {number}: floats (mode F), whose range is not known; {give}")
        return np.asarray(to_rgb(photo))
    if not isinstance(photo, np.ndarray):
        raise ConfigError(f"photo {number}: a {type(photo).__name__}; {give}")
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
        raise ConfigError(f"photo {number}: {photo.shape} {photo.dtype}; {give}")
    return photo


def _decode_options(options: DecodeOptions | None, fields: dict[str, Any]) -> DecodeOptions:
    options = options or DecodeOptions()
    return DecodeOptions.checked({**options.model_dump(exclude_unset=True), **fields}) if fields else options
