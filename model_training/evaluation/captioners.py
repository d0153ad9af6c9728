"""The captioners that a benchmark measures: PerceptionDLM, the captioners of `build`, a file of predictions.

No captioner sees a region's class name, since the first question asks about it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...pipeline.io import photos, weights
from ...pipeline.models import answers, registry
from ...pipeline.models.batching import Batches
from ...pipeline.models.options import read_options
from ...schemas.config import Backend, Limits
from ...schemas.errors import BadRecord
from ...schemas.evaluation import Bench
from ...schemas.reasons import Reason
from ...schemas.records import Blob, ImageRecord, Region
from ..decoding.corpus_captioner import ModelOptions, meaning_of_auto
from ..decoding.fitting import caption_each
from ..decoding.region_captioner import check_saved_model
from .annotations import BenchImage, read_benchmark
from .predictions import PredictionOptions, check_keys, read_predictions

PERCEPTIONDLM, PREDICTIONS = "perceptiondlm", "predictions"

EARLY_ASKED = {"prompt": "Describe each masked region in detail.", "grouping": "even"}
"""How early releases asked a `perceptiondlm`, which did not note it."""


class Captions(NamedTuple):
    """The captions of one image's regions, and what they cost.

    Attributes:
        texts: captions in the order of the regions; None where there is none.
        seconds: time for the image, without reading it; its share where images are described side by side.
        forwards: forward passes of the language model; 0 if the captioner does not count them.
        tokens: tokens that were decoded; 0 if the captioner does not count them.
        problems: for each region without a caption, by its key, the reason.
    """

    texts: list[str | None]
    seconds: float = 0.0
    forwards: int = 0
    tokens: int = 0
    problems: dict[str, str] = {}


class BenchCaptioner(Protocol):
    """A captioner that a benchmark measures.

    Attributes:
        needs_photos: whether it reads the photos.
    """

    needs_photos: bool

    def caption(self, images: Iterable[BenchImage]) -> Iterator[Captions]:
        """Describe all regions of each image, in the order of the images.

        Raises:
            ConfigError: a photo is missing or does not have the annotation's size.
        """
        ...


def identity(backend: Backend) -> dict[str, str]:
    """Everything that a captioner's captions depend on. The captioner is not loaded.

    Raises:
        ConfigError: there is no such captioner, or an option is wrong.
    """
    if backend.name == PERCEPTIONDLM:
        given = model_options(backend)
        options = given.decoding().stored()
        # A number counts as it was written: since release 0.1, `temperature: 1` and `1.0` are two identities.
        options |= {
            name: value for name, value in given.decode.items() if name in options and value is not None
        }
        shown = {name: str(value) for name, value in options.items() if name != "compare"}
        check_saved_model(Path(given.model))
        shown |= meaning_of_auto(given.model, given.decoding())
        together = {"regions_per_call": str(given.regions_per_call)}
        together |= {} if given.dtype == "auto" else {"dtype": given.dtype}  # release 0.1 noted none
        return {"name": backend.name, "weights": weights.identity(given.model), **together, **shown}
    if backend.name == PREDICTIONS:
        return {"name": backend.name, **prediction_options(backend).identity()}
    kind = registry.find_backend("captioner", backend)
    if hasattr(kind, "identity"):
        return {"name": backend.name, **kind.identity(**backend.options)}
    return {"name": backend.name, **{name: str(value) for name, value in backend.options.items()}}


def model_options(backend: Backend) -> ModelOptions:
    """Check the options of a `perceptiondlm`.

    Raises:
        ConfigError: an option is unknown or wrong.
    """
    return _read_options(ModelOptions, backend)


def prediction_options(backend: Backend) -> PredictionOptions:
    """Check the options of `predictions`.

    Raises:
        ConfigError: an option is unknown or wrong.
    """
    return _read_options(PredictionOptions, backend)


def how_asked(backend: Backend, bench: Bench) -> dict[str, str]:
    """What a `perceptiondlm` is asked and which regions it captions together; empty for other captioners.

    `DLC-Bench` is published one region at a time, so `published` groups there have one region.
    """
    return {"prompt": bench.prompt, "grouping": bench.grouping} if backend.name == PERCEPTIONDLM else {}


def load_captioner(backend: Backend, bench: Bench) -> BenchCaptioner:
    """Build the captioner that a configuration names, to be asked as a benchmark says.

    Raises:
        ConfigError: there is no such captioner, or an option is wrong.
    """
    if backend.name == PERCEPTIONDLM:
        return _PerceptionDLM(model_options(backend), bench)
    if backend.name == PREDICTIONS:
        return _Predictions(prediction_options(backend), bench)
    return _BuildCaptioner(registry.load_backend("captioner", backend))


class _PerceptionDLM:
    needs_photos = True

    def __init__(self, options: ModelOptions, bench: Bench):
        self.options = options
        self.captioner = options.load_model().with_instruction(bench.prompt)
        self.batches = Batches(options.batch_size, "perceptiondlm: sequences of regions")
        self.fill_groups = bench.grouping == "published"
        self.regions_per_call = options.regions_per_call
        if self.fill_groups and bench.kind == "dlc":
            self.regions_per_call = 1

    def caption(self, images: Iterable[BenchImage]) -> Iterator[Captions]:
        for _, found in caption_each(
            self.captioner,
            [*images],
            lambda image: (None, image.pixels(), [region.dense() for region in image.regions]),
            self.batches,
            self.options.decoding(),
            regions_per_call=self.regions_per_call,
            fill_groups=self.fill_groups,
        ):
            yield Captions([*found.captions], found.seconds, found.forwards, found.tokens)


class _BuildCaptioner:
    needs_photos = True

    def __init__(self, captioner: Any):
        self.captioner = captioner

    def caption(self, images: Iterable[BenchImage]) -> Iterator[Captions]:
        return map(self._caption, images)

    def _caption(self, image: BenchImage) -> Captions:
        record = image_record(image)
        start = time.perf_counter()
        try:
            given = self.captioner.caption([record])
        except BadRecord as error:
            given = [[error] * len(image.regions)]
        seconds = time.perf_counter() - start
        pairs = list(zip(image.regions, _clean(given, len(image.regions)), strict=True))
        problems = {region.key: str(answer) for region, answer in pairs if isinstance(answer, BadRecord)}
        return Captions(
            [None if isinstance(answer, BadRecord) else answer or "" for _, answer in pairs],
            seconds,
            problems=problems,
        )


def image_record(image: BenchImage) -> ImageRecord:
    """A benchmark's image as the captioners of `build` get images. Its regions have no class name.

    Raises:
        ConfigError: the photo is missing or does not have the annotation's size.
    """
    blob = Blob(image.photo)
    image.pixels()  # a missing photo or one of another size is an error before the model is asked
    header = photos.probe(blob, Limits().max_pixels)
    regions = [
        Region(number, region.mask.rle, region.mask.bbox, region.mask.area)
        for number, region in enumerate(image.regions)
    ]
    height, width = image.size
    return ImageRecord("image", "benchmark", blob, width, height, header.format, image.name, regions)


def _clean(given: Any, count: int) -> list[str | BadRecord | None]:
    """A captioner's answers about one image's regions, as `build` takes them."""
    try:
        images = answers.listed(given, 1, "answers")
        captions = answers.listed(images[0], count, "captions") if len(images) == 1 else []
        if len(captions) != count:
            raise ValueError(
                f"asked about {count} regions of 1 image, answered {len(captions)} of {len(images)}"
            )
    except (TypeError, ValueError) as error:
        return [BadRecord(Reason.MODEL_ERROR, str(error))] * count
    return list(map(answers.caption, captions))


class _Predictions:
    needs_photos = False

    def __init__(self, options: PredictionOptions, bench: Bench):
        self.path, self.captions = options.path, read_predictions(options)
        benchmark = read_benchmark(bench.folder, bench.kind, bench.photos)
        check_keys(self.captions, [region.key for region in benchmark.regions()], options)

    def caption(self, images: Iterable[BenchImage]) -> Iterator[Captions]:
        return map(self._caption, images)

    def _caption(self, image: BenchImage) -> Captions:
        texts = [self.captions.get(region.key) for region in image.regions]
        absent = {
            region.key: f"{self.path}: no caption for it"
            for region, text in zip(image.regions, texts, strict=True)
            if text is None
        }
        return Captions(texts, problems=absent)


def _read_options(kind: Any, backend: Backend) -> Any:
    return read_options(kind, backend.options, "captioner.options")
