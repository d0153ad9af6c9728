"""Who is examined: PerceptionDLM in every way of decoding, the pipeline's captioners, a file of predictions.

No captioner sees a region's class name: it is what the first question asks about.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from ...pipeline.io import photos, weights
from ...pipeline.models import registry
from ...pipeline.models.options import BackendOptions, read_options
from ...schemas.config import Backend, Limits
from ...schemas.decoding import DecodeOptions
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.records import Blob, ImageRecord, Region
from ..decoding.region_captioner import RegionCaptioner, check_saved_model
from .annotations import BenchImage

PERCEPTIONDLM, PREDICTIONS = "perceptiondlm", "predictions"


class Captions(NamedTuple):
    """What an image's regions were called, and at what price.

    Attributes:
        texts: in the order of the regions; None where there is none.
        seconds: for the image, reading it not counted.
        forwards, tokens: of the language model, and slots filled; 0 where nobody counts them.
        problems: why there is no text, by the region's key.
    """

    texts: list[str | None]
    seconds: float = 0.0
    forwards: int = 0
    tokens: int = 0
    problems: dict[str, str] = {}


class BenchCaptioner(Protocol):
    """Describes the regions of one image after another.

    Attributes:
        needs_photos: whether it looks at them.
    """

    needs_photos: bool

    def caption(self, image: BenchImage) -> Captions:
        """Of all regions of an image.

        Raises:
            ConfigError: the photo is missing or not the annotation's.
        """
        ...


class ModelOptions(BackendOptions, frozen=True):
    """The options of `perceptiondlm`.

    Attributes:
        model: folder of a saved model.
        device, dtype: as `RegionCaptioner.load` takes them.
        regions_per_call: captioned together; 1: one by one; None: the most that the model can.
        decode: how captions are decoded, see `schemas.decoding.DecodeOptions`.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    regions_per_call: int | None = None
    decode: dict[str, Any] = {}

    def decoding(self) -> DecodeOptions:
        """What `decode` says.

        Raises:
            ConfigError: it has an unknown option, or a wrong one.
        """
        return DecodeOptions.checked(self.decode, "captioner.options.decode")

    def load(self) -> RegionCaptioner:
        """The model on its device.

        Raises:
            ConfigError: as `RegionCaptioner.load`.
        """
        return RegionCaptioner.load(self.model, self.device, self.dtype)


class PredictionOptions(BackendOptions, frozen=True):
    """The options of `predictions`: `path` of a JSON {key: caption}, as the original's scripts write it."""

    path: str


def identity(backend: Backend) -> dict[str, str]:
    """What a captioner's answers depend on, without loading it.

    Raises:
        ConfigError: no such captioner, or an option is wrong.
    """
    if backend.name == PERCEPTIONDLM:
        given = model_options(backend)
        options = given.decoding().stored()
        # A number counts as it was written: since release 0.1, `temperature: 1` and `1.0` are two identities.
        options |= {name: value for name, value in given.decode.items() if name in options}
        shown = {name: str(value) for name, value in options.items() if name != "compare"}
        check_saved_model(Path(given.model))
        together = {"regions_per_call": str(given.regions_per_call)}
        return {"name": backend.name, "weights": weights.identity(given.model), **together, **shown}
    if backend.name == PREDICTIONS:
        path = Path(_read(PredictionOptions, backend).path)
        if not path.is_file():
            raise ConfigError(f"captioner.options.path: {path}: no such file")
        return {"name": backend.name, "predictions": weights.identity(path)}
    kind = registry.find_backend("captioner", backend)
    if hasattr(kind, "identity"):
        return {"name": backend.name, **kind.identity(**backend.options)}
    return {"name": backend.name, **{name: str(value) for name, value in backend.options.items()}}


def model_options(backend: Backend) -> ModelOptions:
    """The options of a `perceptiondlm`.

    Raises:
        ConfigError: one is unknown or wrong.
    """
    return _read(ModelOptions, backend)


def load(backend: Backend) -> BenchCaptioner:
    """Build a captioner.

    Raises:
        ConfigError: no such captioner, or an option is wrong.
    """
    if backend.name == PERCEPTIONDLM:
        return _Model(model_options(backend))
    if backend.name == PREDICTIONS:
        return _Predictions(_read(PredictionOptions, backend))
    return _Pipeline(registry.load_backend("captioner", backend))


class _Model:
    needs_photos = True

    def __init__(self, options: ModelOptions):
        self.options = options
        self.captioner = options.load()

    def caption(self, image: BenchImage) -> Captions:
        inputs = [(image.pixels(), [region.dense() for region in image.regions])]
        (found,) = self.captioner.caption_photos(
            inputs, self.options.decoding(), regions_per_call=self.options.regions_per_call
        )
        return Captions([*found.captions], found.seconds, found.forwards, found.tokens)


class _Pipeline:
    needs_photos = True

    def __init__(self, captioner: Any):
        self.captioner = captioner

    def caption(self, image: BenchImage) -> Captions:
        blob = Blob(image.photo)
        image.pixels()  # a photo that is missing or another one's is said before the model is asked
        header = photos.probe(blob, Limits().max_pixels)
        regions = [
            Region(number, region.mask.rle, region.mask.bbox, region.mask.area)
            for number, region in enumerate(image.regions)
        ]
        height, width = image.size
        record = ImageRecord("image", "benchmark", blob, width, height, header.format, image.name, regions)
        start = time.perf_counter()
        try:
            (answers,) = self.captioner.caption([record])
        except BadRecord as error:
            answers = [error] * len(regions)
        seconds = time.perf_counter() - start
        pairs = list(zip(image.regions, answers, strict=True))
        problems = {region.key: str(answer) for region, answer in pairs if isinstance(answer, BadRecord)}
        return Captions(
            [None if isinstance(answer, BadRecord) else answer or "" for _, answer in pairs],
            seconds,
            problems=problems,
        )


class _Predictions:
    needs_photos = False

    def __init__(self, options: PredictionOptions):
        self.path = Path(options.path)
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{self.path}: no JSON of captions by key ({error}); mend it") from error
        self.captions = {key: text for key, text in found.items() if isinstance(text, str)}

    def caption(self, image: BenchImage) -> Captions:
        texts = [self.captions.get(region.key) for region in image.regions]
        absent = {
            region.key: f"{self.path}: no caption for it"
            for region, text in zip(image.regions, texts, strict=True)
            if text is None
        }
        return Captions(texts, problems=absent)


def _read(kind: Any, backend: Backend) -> Any:
    return read_options(kind, backend.options, "captioner.options")
