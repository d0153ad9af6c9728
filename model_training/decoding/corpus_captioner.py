"""The `perceptiondlm` captioner of a build: a trained model describes the regions of the next corpus.

The pipeline never imports this module. Its registry names the class by its path, and loads it in the worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from msgspec import Meta

from ...filters import rle
from ...pipeline.io import photos, tensor_files, weights
from ...pipeline.models.batching import Batches
from ...pipeline.models.options import BackendOptions, read_options
from ...pipeline.models.protocols import Caption, Checked
from ...schemas.decoding import AUTO_CACHE, DecodeOptions
from ...schemas.errors import BadRecord
from ...schemas.records import ImageRecord, Region
from .fitting import caption_each
from .region_captioner import RegionCaptioner, check_saved_model

VERSION = "1"
"""Of everything between the pixels and the text; part of the evidence digest."""

_SAME_ANSWERS = {"compare"}
"""Decode options that change no caption and no confidence."""

_Positive = Annotated[int, Meta(ge=1)]
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def meaning_of_auto(model: str, decoding: DecodeOptions) -> dict[str, str]:
    """What `cache: auto` is for a saved model, for its identity; empty where no caption depends on it."""
    if decoding.cache != "auto" or isolates_prefix(model):
        return {}
    every = decoding.refresh_every or AUTO_CACHE["refresh_every"]
    return {"auto": repr(AUTO_CACHE | {"refresh_every": every})}


def isolates_prefix(model: str | Path) -> bool:
    """Whether the layout of a saved model isolates the prefix. The model is not loaded."""
    config = weights.read_json(Path(model) / "config.json")
    changes = config.get("layout_options") or {}
    return changes.get("isolate_prefix", config.get("layout") != "reference")


class ModelOptions(BackendOptions, frozen=True):
    """What a `perceptiondlm` takes in a build and in an evaluation.

    Attributes:
        model: folder of a saved model.
        device, dtype: see `RegionCaptioner.load`.
        regions_per_call: the most regions that are captioned together; 1 captions them one by one, None
            takes as many as the model can.
        batch_size: sequences that are decoded at once, each with up to `regions_per_call` regions of one
            image. It is halved when memory runs out.
        decode: fields of `schemas.decoding.DecodeOptions`.
    """

    model: str
    device: str = "auto"
    dtype: _Dtype = "auto"
    regions_per_call: _Positive | None = None
    batch_size: _Positive = 8
    decode: dict[str, Any] = {}

    def check(self, where: str) -> None:
        DecodeOptions.checked(self.decode, f"{where}.decode")

    def decoding(self) -> DecodeOptions:
        """How captions are decoded.

        Raises:
            ConfigError: `decode` has an unknown option or a wrong value.
        """
        return DecodeOptions.checked(self.decode, "captioner.options.decode")

    def load_model(self) -> RegionCaptioner:
        """Open the model on its device.

        Raises:
            ConfigError: see `RegionCaptioner.load`.
        """
        return RegionCaptioner.load(self.model, self.device, self.dtype)


class CorpusOptions(ModelOptions, frozen=True):
    """What it takes in a build besides.

    Attributes:
        prompt: what the regions are asked; None asks what the model was trained with.
        max_pixels: larger photos are refused.
    """

    prompt: str | None = None
    max_pixels: _Positive = 200_000_000


class _Sequence(NamedTuple):
    """Regions of one image that are captioned together; `places` are their positions in `image.live()`."""

    image: ImageRecord
    places: list[int]


_Read: TypeAlias = tuple[tuple[_Sequence, BadRecord | None], np.ndarray, list[np.ndarray]]
"""A sequence and why its photo cannot be read, if so; the photo's pixels, and the sequence's masks."""


class PerceptionDLMCaptioner:
    """Describes regions with a PerceptionDLM, many of an image in one denoising, images side by side.

    Regions of an image are split into groups of about equal size, as `RegionCaptioner` does. Captions do not
    depend on what else is in a batch, so neither `batch_size` nor running out of memory changes any.

    Args:
        options: see `ModelOptions` and `CorpusOptions`; `model` is needed.

    Raises:
        ConfigError: an option is wrong, the folder holds no such model, or the device cannot be used.
    """

    version = VERSION

    def __init__(self, **options: Any):
        self.options = _read(options)
        self.decoding = self.options.decoding()
        self.captioner = self.options.load_model()
        if self.options.prompt is not None:
            self.captioner.processor.check_instruction(self.options.prompt)
        most = self.captioner.model.config.num_prompts
        self.regions_per_call = min(most, self.options.regions_per_call or most)
        self._batches = Batches(self.options.batch_size, "perceptiondlm: sequences of regions")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """The model's digest, the prompt, which regions share a sequence, and how captions are decoded."""
        given = _read(options)
        check_saved_model(Path(given.model))
        decode = {name: repr(value) for name, value in given.decoding().stored().items()}
        return {
            "version": VERSION,
            "weights": weights.identity(given.model),
            "prompt": "the model's"
            if given.prompt is None
            else hashlib.sha256(given.prompt.encode()).hexdigest()[:16],
            "regions_per_call": str(given.regions_per_call or "the model's"),
            "dtype": given.dtype,
            **{name: value for name, value in sorted(decode.items()) if name not in _SAME_ANSWERS},
            **meaning_of_auto(given.model, given.decoding()),
        }

    @classmethod
    def check(cls, **options: Any) -> Checked:
        """Everything that can be wrong with options and files, without loading the weights."""
        given = _read(options)
        folder = Path(given.model)
        check_saved_model(folder)
        from ..model.saved import read_model_config

        config = read_model_config(folder)
        vision, text = config.vision, config.text
        what = (
            f"PerceptionDLM: vision {vision.num_hidden_layers} x {vision.hidden_size}, language model "
            f"{text.num_hidden_layers} x {text.hidden_size}, up to {config.num_prompts} regions at once"
        )
        num_bytes = sum(each.num_bytes for each in tensor_files.list_tensors(folder).values())
        return Checked(what, num_bytes)

    def caption(self, images: list[ImageRecord]) -> list[list[Caption | BadRecord | None]]:
        """A caption with its confidence for each live region, in the order of `image.live()`.

        A mask without pixels has none, and each region of an image whose photo cannot be read has the reason.

        Raises:
            OutOfMemory: one sequence does not fit.
            StageFailed: the model computes NaN.
            ConfigError: a caption and its image are longer than the model's positions.
        """
        found: list[list[Caption | BadRecord | None]] = [[None] * len(image.live()) for image in images]
        answers = {image.key: own for image, own in zip(images, found, strict=True)}
        sequences = [each for image in images for each in self._sequences(image)]
        done = caption_each(
            self.captioner,
            sequences,
            self._reader(),
            self._batches,
            self.decoding,
            prompt=self.options.prompt,
            regions_per_call=self.regions_per_call,
        )
        for (sequence, error), each in done:
            captions = map(Caption, each.captions, each.confidences)
            for place in sequence.places:
                answers[sequence.image.key][place] = next(captions) if error is None else error
        return found

    def _sequences(self, image: ImageRecord) -> list[_Sequence]:
        """The image's regions in groups that fit into a sequence, evenly large."""
        asked = [place for place, region in enumerate(image.live()) if region.rle and region.area]
        count = -(-len(asked) // self.regions_per_call)
        return [_Sequence(image, part.tolist()) for part in np.array_split(asked, count)] if asked else []

    def _reader(self) -> Callable[[_Sequence], _Read]:
        """What reads the photo of a sequence, once for all sequences of a photo that follow each other."""
        last: list[tuple[ImageRecord, np.ndarray | BadRecord]] = []

        def read(sequence: _Sequence) -> _Read:
            image, pixels = last[0] if last else (None, None)
            if image is not sequence.image or pixels is None:
                pixels = _pixels(sequence.image, self.options.max_pixels)
                last[:] = [(sequence.image, pixels)]
            if isinstance(pixels, BadRecord):
                return (sequence, pixels), np.zeros((1, 1, 3), np.uint8), []
            live = sequence.image.live()
            return (sequence, None), pixels, [_mask(live[place]) for place in sequence.places]

        return read


def _read(options: dict[str, Any]) -> CorpusOptions:
    return read_options(CorpusOptions, options, "captioner.options")


def _pixels(image: ImageRecord, max_pixels: int) -> np.ndarray | BadRecord:
    try:
        return photos.read_pixels(image, max_pixels)
    except BadRecord as error:
        return error


def _mask(region: Region) -> np.ndarray:
    assert region.rle is not None
    return rle.decode(region.rle).astype(bool)
