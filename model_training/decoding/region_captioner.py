"""Captions of any number of regions of any number of photos, in the caller's order."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from ...pipeline.io import weights
from ...pipeline.io.packages import how_to_install_extra
from ...pipeline.io.prefetch import ahead
from ...pipeline.models.batching import Batches, refusing_out_of_memory
from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError
from .grouping import Group, Grouping, Outline, Prompt, lay_out_photos
from .region_forms import Boxes
from .snapshots import Snapshot, join, of_groups

if TYPE_CHECKING:
    from os import PathLike

    import torch
    from PIL.Image import Image
    from torch import Tensor

    from ..model.batch import Example
    from ..model.perceptiondlm import PerceptionDLM
    from ..model.processor import PerceptionDLMProcessor
    from .stream import Finished

Photo: TypeAlias = "str | PathLike[str] | bytes | np.ndarray | Image | Tensor"
"""A photo in one of the forms of `region_forms`."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


class RegionCaptions(NamedTuple):
    """The captions of one photo's regions, and what they cost.

    Attributes:
        captions: one for each mask, in the caller's order.
        forwards: forward passes of the language model, summed over the photo's groups of regions.
        tokens: tokens that were decoded, `max_new_tokens` for each region.
        seconds: this photo's share of the time in which it was encoded and decoded.
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


@dataclass
class _Photo:
    """A photo that is captioned: what is known of it, and how many of its groups are not."""

    found: RegionCaptions
    num_left: int

    @classmethod
    def begin(cls, outline: Outline) -> _Photo:
        """One of which no group is captioned."""
        count = outline.num_regions
        nothing = RegionCaptions([""] * count, 0, 0, 0.0, confidences=[0.0] * count)
        return cls(nothing, outline.num_groups)


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
        place, dtype = resolve_place(device, dtype)
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
        """Describe regions of many photos, with the cost of each, see `iter_captions`.

        Args:
            photos: (photo, masks) or (photo, masks, prompt) as `caption` takes them.
            options: how captions are decoded; by default as `DecodeOptions()` says.
            prompt: as for `iter_captions`, as all that follows.
            boxes: what four numbers mean.
            batch_size: groups that are decoded at once.
            regions_per_call: the most regions that share a sequence.
            fill_groups: fill each group before the next one begins.
            fields: single fields of `DecodeOptions` that differ from `options`.

        Returns:
            One result for each photo, in the order of the photos.

        Raises:
            ConfigError: as `caption`.
        """
        how = Grouping(0, prompt, boxes, regions_per_call, fill_groups)
        return list(self._iter_captions(photos, _decode_options(options, fields), how, batch_size))

    def iter_captions(
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
    ) -> Iterator[RegionCaptions]:
        """Describe regions of any number of photos, and give the captions of each when it is its turn.

        Groups of regions are decoded side by side, and where one has ended, that of a later photo follows.
        Captions do not depend on what else is decoded.

        Args:
            photos: (photo, masks) or (photo, masks, prompt) as `caption` takes them; without masks, there are
                no captions. They are read in a thread, a few ahead, so that only a few are in memory.
            options: how captions are decoded; by default as `DecodeOptions()` says.
            prompt: what the regions of photos that have no prompt of their own are asked.
            boxes: as for `caption`.
            batch_size: groups that are decoded at once. More need more memory, and are faster on a GPU.
            regions_per_call: as for `caption`.
            fill_groups: fill each group before the next one begins, as the released code does (7 regions in 6
                and 1), instead of splitting evenly (4 and 3).
            fields: single fields of `DecodeOptions` that differ from `options`.

        Yields:
            One result for each photo, in the order of the photos.

        Raises:
            ConfigError: as `caption`; those that are about options, at once.
        """
        how = Grouping(0, prompt, boxes, regions_per_call, fill_groups)
        return self._iter_captions(photos, _decode_options(options, fields), how, batch_size)

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
            OutOfMemory: the regions do not fit, all of which are decoded at once.
        """
        options = _decode_options(options, fields)
        groups = self._groups(photo, masks, options, Grouping(0, prompt, boxes, regions_per_call))
        return self._snapshots(groups, options)

    def record_steps(
        self,
        photo: Photo,
        masks: Iterable[Any],
        options: DecodeOptions | None = None,
        *,
        prompt: Prompt = None,
        regions_per_call: int | None = None,
        batch_size: int = 8,
    ) -> list[Snapshot]:
        """All that `caption_steps` yields, with `batch_size` sequences at once; halved when memory runs out.

        Raises:
            ConfigError: as `caption`.
            OutOfMemory: one sequence does not fit.
        """
        options = _decode_options(options, {})
        check_count("batch_size", batch_size or 0)
        groups = self._groups(photo, masks, options, Grouping(0, prompt, "xyxy", regions_per_call))
        batches = Batches(batch_size, "steps: sequences of regions")
        found = batches.run(groups, lambda part: list(zip(*self._steps(part, options), strict=True)))
        most = max(map(len, found), default=0)
        return [join(groups, [shots[min(step, len(shots) - 1)] for shots in found]) for step in range(most)]

    def _groups(
        self, photo: Photo, masks: Iterable[Any], options: DecodeOptions, how: Grouping
    ) -> list[Group]:
        """The groups of one photo."""
        how = self._checked(options, how)
        laid_out = lay_out_photos(self.processor, [(photo, masks)], how)
        return [each for each in laid_out if isinstance(each, Group)]

    def _checked(self, options: DecodeOptions, how: Grouping) -> Grouping:
        """How regions are laid out for options, which suit the model.

        Raises:
            ConfigError: they do not, or `regions_per_call` is no number of regions.
        """
        from .buckets import choose_cache

        check_count("regions_per_call", how.regions_per_call)
        choose_cache(self.model, options)
        return how._replace(max_new_tokens=options.max_new_tokens)

    def _iter_captions(
        self, photos: Iterable[Any], options: DecodeOptions, how: Grouping, batch_size: int
    ) -> Iterator[RegionCaptions]:
        check_count("batch_size", batch_size or 0)
        how = self._checked(options, how)
        return self._decoded(lay_out_photos(self.processor, photos, how), options, batch_size)

    def _decoded(
        self, laid_out: Iterable[Outline | Group], options: DecodeOptions, batch_size: int
    ) -> Iterator[RegionCaptions]:
        """The captions of photos in their order, from groups that end in any order."""
        from .stream import decode_stream

        begun: deque[_Photo] = deque()
        groups: dict[int, tuple[_Photo, Group]] = {}
        has_more = True

        def sequences(items: Iterator[Outline | Group]) -> Iterator[tuple[Example, DecodeOptions]]:
            """Sequences up to a photo without regions whose turn it is: none is decoded then."""
            nonlocal has_more
            number = 0
            for item in items:
                if isinstance(item, Group):
                    groups[number] = begun[-1], item._replace(example=item.example.without_images())
                    yield item.example, options
                    number += 1
                else:
                    begun.append(_Photo.begin(item))
                    if not begun[0].num_left:
                        return
            has_more = False

        with closing(ahead(laid_out, batch_size)) as items:
            while has_more:
                for ended in decode_stream(self._decoder, sequences(items), batch_size):
                    photo, group = groups.pop(ended.number)
                    self._put(photo, group, ended)
                    while begun and not begun[0].num_left:
                        yield begun.popleft().found
                while begun:
                    yield begun.popleft().found

    def _put(self, photo: _Photo, group: Group, ended: Finished) -> None:
        """Put the captions and the cost of a group into the result of its photo."""
        found = photo.found
        captions = self._read(group, ended.tokens_NS)
        for region, caption in zip(group.regions, captions, strict=True):
            found.captions[region] = caption
        for place, number in enumerate(group.example.order):
            parts = (ended.tokens_NS[place], ended.confidence_NS[place])
            found.confidences[group.regions[number]] = self._confidence(*(each.numpy() for each in parts))
        tokens, agreement = ended.tokens_NS.numel(), None
        if ended.agreement is not None:
            before = (found.agreement or 0.0) * found.tokens
            agreement = (before + ended.agreement * tokens) / (found.tokens + tokens)
        photo.num_left -= 1
        photo.found = found._replace(
            forwards=found.forwards + ended.forwards,
            tokens=found.tokens + tokens,
            seconds=found.seconds + ended.seconds,
            agreement=agreement,
        )

    def _confidence(self, tokens_S: np.ndarray, confidence_S: np.ndarray) -> float:
        """The geometric mean over a caption and its end; over all of it if it has no end."""
        ends = np.flatnonzero(tokens_S == self.model.config.eot_token_id)
        said_K = confidence_S[: ends[0] + 1] if len(ends) else confidence_S
        return float(np.exp(np.log(np.maximum(said_K, np.finfo(np.float64).tiny)).mean()))

    def _read(self, group: Group, tokens_NS: Tensor) -> list[str]:
        return self.processor.read_captions(tokens_NS[: len(group.regions)].numpy(), group.example.order)

    def _steps(self, groups: Sequence[Group], options: DecodeOptions) -> Iterator[list[Snapshot]]:
        """What each of some groups has before the first step and after every one."""
        from ..model.batch import collate

        if groups:
            for state in self._decoder.steps(collate([group.example for group in groups]), options):
                yield of_groups(self.processor, groups, state)

    def _snapshots(self, groups: list[Group], options: DecodeOptions) -> Iterator[Snapshot]:
        advice = "caption fewer regions at once, lower `max_new_tokens`, or use a larger GPU"
        with refusing_out_of_memory(f"steps: {len(groups)} sequences of regions", advice):
            for shots in self._steps(groups, options):
                yield join(groups, shots)


def resolve_place(device: str, dtype: str) -> tuple[torch.device, str]:
    """The device and the type that "auto" means here, as `RegionCaptioner.load` takes them.

    Raises:
        ConfigError: the device cannot be used.
    """
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        place = torch.device(chosen)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"device: {chosen!r} cannot be used ({why}); choose another one") from error
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    return place, dtype


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


def _decode_options(options: DecodeOptions | None, fields: dict[str, Any]) -> DecodeOptions:
    if options is not None and not isinstance(options, DecodeOptions):
        raise ConfigError(
            f"options: a {type(options).__name__}; give `DecodeOptions(...)`, or its fields by their names"
        )
    options = options or DecodeOptions()
    return DecodeOptions.checked({**options.model_dump(exclude_unset=True), **fields}) if fields else options
