"""Measures what captioning costs: latency against regions, parallel and one by one, and against options.

Every row carries everything that it depends on: forwards, tokens per forward, seconds, batch, cache,
threshold, device and versions. Seconds are those of whole images (vision tower, projector, language model)
without reading files. Each measurement is repeated, and the fastest counts; all of them take turns, so that
other load on the machine slows all alike.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from ...pipeline.io import files
from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError
from ...schemas.evaluation import ProfileConfig
from ..decoding.buckets import choose_cache
from ..decoding.read_regions import iter_photo_regions
from ..decoding.region_captioner import RegionCaptioner, RegionCaptions

ROWS, TABLE, PLOT = "profile.json", "profile.md", "profile.png"

Photo = tuple[np.ndarray, list[np.ndarray]]
"""Pixels (H, W, 3) uint8 and masks (H, W) bool."""


class Row(NamedTuple):
    """A measurement. The names are those of profile.json.

    Attributes:
        study: what was varied: "regions", "parallelism", "length", "steps", "threshold", "cache", "batch".
        mode: "parallel", "sequential", or the number of regions in a sequence.
        regions: number of regions in an image.
        together: number of regions in one sequence, at most.
        strategy, steps, cache: options of the decoder.
        length: `max_new_tokens` of the decoder.
        threshold: threshold of the decoder; None for a strategy without one.
        batch: number of sequences decoded at once.
        images: number of images that were captioned.
        forwards: forward passes of the language model per image.
        tokens_per_forward: tokens decoded by one forward pass.
        seconds: time per image.
        tokens_per_s: tokens decoded per second.
        same: share of captions that equal those of the study's first row with the same number of regions.
        device, dtype, torch: device, type of the computation, and version of torch.
    """

    study: str
    mode: str
    regions: int
    together: int
    strategy: str
    length: int
    steps: int
    threshold: float | None
    cache: str
    batch: int
    images: int
    forwards: float
    tokens_per_forward: float
    seconds: float
    tokens_per_s: float
    same: float
    device: str
    dtype: str
    torch: str


def measure_costs(
    model: str | Path,
    config: ProfileConfig,
    out: Path,
    device: str = "auto",
    dtype: str = "auto",
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure the cost of captioning, and write table, plot and rows to a folder.

    Args:
        model: folder of a saved model.
        config: what is varied.
        out: folder of the results; created if need be.
        device: see `RegionCaptioner.load`.
        dtype: see `RegionCaptioner.load`.
        report: called with each row once it has been measured.

    Raises:
        ConfigError: there is no such model or corpus, or an option does not suit the model.
    """
    profiler = _Profiler(RegionCaptioner.load(model, device, dtype), config)
    cases = list(profiler.cases())
    for _ in range(config.repeats):
        for case in cases:
            profiler.measure(case)
    rows = []
    for case in cases:
        profiler.measure(case)
        rows.append(profiler.row(case))
        if report:
            report(rows[-1])
    out.mkdir(parents=True, exist_ok=True)
    content = {
        ROWS: msgspec.json.encode([row._asdict() for row in rows]),
        TABLE: markdown_table(rows).encode(),
    }
    for name, data in content.items():
        with files.write_atomic(out / name) as file:
            file.write(data)
    plot_costs(rows, out / PLOT)
    return rows


@dataclass
class _Case:
    """What is measured, named as in `Row`, and what was found. The warm-up comes first and has no seconds."""

    study: str
    mode: str
    count: int
    together: int
    batch: int
    options: DecodeOptions
    found: list[RegionCaptions] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class _Profiler:
    def __init__(self, captioner: RegionCaptioner, config: ProfileConfig):
        import torch

        self.captioner, self.model = captioner, captioner.model
        self.config = config
        photos = islice(iter_photo_regions(config.corpus), config.images)
        self.photos: list[Photo] = [(photo.pixels, photo.masks()) for photo in photos]
        self.most = self.model.config.num_prompts
        self.length, self.steps = config.max_new_tokens[0], min(config.max_new_tokens[0], max(config.steps))
        kind = self.model.device.type
        name = torch.cuda.get_device_name(self.model.device) if kind == "cuda" else f"cpu, {_processor()}"
        threads = "" if kind == "cuda" else f", {torch.get_num_threads()} threads"
        self.about = (name + threads, str(self.model.dtype).removeprefix("torch."), str(torch.__version__))
        self.first: dict[tuple[str, int], list[str]] = {}

    def cases(self) -> Iterator[_Case]:
        """Everything that is measured, study by study."""
        config = self.config
        for count in config.regions:
            yield self._case("regions", "parallel", count, self.most)
            yield self._case("regions", "sequential", count, 1)
        for together in range(1, min(self.most, config.load) + 1):
            yield self._case("parallelism", str(together), config.load, together)
        for length in config.max_new_tokens:
            given = {"max_new_tokens": length, "steps": length}
            yield self._case("length", "parallel", config.load, self.most, **given)
        for steps in config.steps:
            if steps <= max(config.max_new_tokens):
                given = {"max_new_tokens": max(config.max_new_tokens), "steps": steps}
                yield self._case("steps", "parallel", config.load, self.most, **given)
        for threshold in config.thresholds:
            options = {"strategy": "threshold", "threshold": threshold}
            yield self._case("threshold", "parallel", config.load, self.most, **options)
        for cache in ("none", "exact" if self.model.layout.isolate_prefix else "approximate"):
            yield self._case("cache", "parallel", config.load, self.most, cache=cache)
        for batch in config.batches:
            yield self._case("batch", "parallel", config.load, self.most, batch=batch)

    def _case(self, study: str, mode: str, count: int, together: int, batch: int = 1, **given: Any) -> _Case:
        options = DecodeOptions(**{"max_new_tokens": self.length, "steps": self.steps, **given})
        return _Case(study, mode, count, together, batch, options)

    def measure(self, case: _Case) -> None:
        """Caption all photos once. The first time is a warm-up, which is not timed."""
        photos = [_with_regions(photo, case.count) for photo in self.photos]
        self._wait()
        start = time.perf_counter()
        found = self.captioner.caption_photos(
            photos, case.options, batch_size=case.batch, regions_per_call=case.together
        )
        self._wait()
        if case.found:
            case.seconds.append(time.perf_counter() - start)
        case.found = found

    def row(self, case: _Case) -> Row:
        """The result of a case, with the fastest of its times."""
        options, images, seconds = case.options, len(self.photos), min(case.seconds)
        captions = [caption for each in case.found for caption in each.captions]
        before = self.first.setdefault((case.study, case.count), captions)
        forwards = sum(each.forwards for each in case.found)
        tokens = sum(each.tokens for each in case.found)
        return Row(
            case.study,
            case.mode,
            case.count,
            min(case.count, case.together),
            options.strategy,
            options.max_new_tokens,
            options.steps,
            options.threshold if options.strategy == "threshold" else None,
            choose_cache(self.model, options),
            case.batch,
            images,
            forwards / images,
            tokens / forwards,
            seconds / images,
            tokens / seconds,
            sum(a == b for a, b in zip(captions, before, strict=True)) / len(captions),
            *self.about,
        )

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def _with_regions(photo: Photo, count: int) -> Photo:
    """The photo with `count` regions: its own, and tiles of a grid where it has fewer."""
    pixels, masks = photo
    height, width = pixels.shape[:2]
    side = int(np.ceil(np.sqrt(count)))
    found = masks[:count]
    for number in range(count - len(found)):
        row, column = divmod(number, side)
        tile = np.zeros((height, width), bool)
        tile[
            row * height // side : (row + 1) * height // side,
            column * width // side : (column + 1) * width // side,
        ] = True
        found = [*found, tile]
    return pixels, found


def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()


_COLUMNS = {
    "study": "{}",
    "mode": "{}",
    "regions": "{}",
    "together": "{}",
    "strategy": "{}",
    "length": "{}",
    "steps": "{}",
    "threshold": "{}",
    "cache": "{}",
    "batch": "{}",
    "forwards": "{:.1f}",
    "tokens_per_forward": "{:.2f}",
    "seconds": "{:.4f}",
    "tokens_per_s": "{:,.0f}",
    "same": "{:.0%}",
    "device": "{}",
    "dtype": "{}",
    "torch": "{}",
}


def markdown_table(rows: list[Row]) -> str:
    """All rows as a Markdown table."""
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in _COLUMNS)} |", "| --- " * len(_COLUMNS) + "|"]
    for row in rows:
        values = row._asdict()
        cells = ["" if values[name] is None else form.format(values[name]) for name, form in _COLUMNS.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_costs(rows: list[Row], path: Path) -> None:
    """Plot latency against regions, tokens/s against parallelism, and latency against steps, as in the paper.

    Raises:
        ConfigError: there are no rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ConfigError("no rows; measure before you plot")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    colors = {"parallel": "#0072b2", "sequential": "#d55e00"}
    for mode, color in colors.items():
        some = [row for row in rows if row.study == "regions" and row.mode == mode]
        axes[0].plot([r.regions for r in some], [r.seconds for r in some], "o-", color=color, label=mode)
    axes[0].set(xlabel="regions of an image", ylabel="seconds an image")
    axes[0].legend(frameon=False)
    some = [row for row in rows if row.study == "parallelism"]
    axes[1].plot([r.together for r in some], [r.tokens_per_s for r in some], "o-", color="#009e73")
    axes[1].set(xlabel=f"of {some[0].regions} regions, decoded together" if some else "", ylabel="tokens/s")
    some = [row for row in rows if row.study in ("steps", "threshold")]
    for study, color in (("steps", "#0072b2"), ("threshold", "#cc79a7")):
        part = sorted((r.tokens_per_forward, r.seconds) for r in some if r.study == study)
        axes[2].plot([x for x, _ in part], [y for _, y in part], "o-", color=color, label=study)
    axes[2].set(xlabel="tokens a forward", ylabel="seconds an image")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[:2]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{rows[0].device}, {rows[0].dtype}, torch {rows[0].torch}", fontsize=9)
    with files.write_atomic(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
