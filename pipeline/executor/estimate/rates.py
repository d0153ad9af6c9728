"""What a region costs in each stage: measured from a pilot's events and files, kept in a small YAML file."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import msgspec
import numpy as np
import yaml

from ....schemas.errors import ConfigError
from ....schemas.records import Blob
from ...corpus import reader, writer
from ...corpus.events import Event, EventReader
from ...corpus.utilization import list_runs
from ...io import files, yaml_text
from ...io.location import Location, locate
from ...sources.protocols import SOURCE_STAGE

_BY_IMAGE = {SOURCE_STAGE, writer.WRITE_STAGE}
_MIN_UNITS = 8
_MIN_T = 3.0
"""A share per image is told apart from one per region only if the fit is this many standard errors sure."""


class StageRate(msgspec.Struct, forbid_unknown_fields=True):
    """What one stage costs one actor.

    Attributes:
        reach: the share of the source's regions that it works on.
        image_s: seconds per image.
        region_s: seconds per region that it works on.
        cpu_share: CPU seconds per second of the stage; above 1 if it uses several cores.
        load_s: seconds to load its model.
        first_s: how much longer an actor's first unit takes than the others, in seconds.
        busy_share: of the seconds of a stage that asks a model, the share inside calls of the model.
    """

    reach: float
    image_s: float
    region_s: float
    cpu_share: float = 0.0
    load_s: float = 0.0
    first_s: float = 0.0
    busy_share: float = 1.0

    def seconds(self, images: float, regions: float) -> float:
        """Seconds of one actor for this many images, whose source declares this many regions."""
        return self.image_s * images + self.region_s * self.reach * regions


class SubsetRates(msgspec.Struct, forbid_unknown_fields=True):
    """What a subset costs.

    Attributes:
        images, regions: how many were measured.
        kept: the share of the source's regions that end in the shards.
        launch_s: seconds from the start of the stream until the actors' processes are up, without the time
            to load models.
        shard_bytes_per_image: over all images.
        ledger_bytes_per_region, evidence_bytes_per_region: over the source's regions.
        stages: by name, in the recipe's order.
    """

    images: int
    regions: int
    kept: float
    launch_s: float
    shard_bytes_per_image: float
    ledger_bytes_per_region: float
    evidence_bytes_per_region: float
    stages: dict[str, StageRate]


class Rates(msgspec.Struct, forbid_unknown_fields=True):
    """The file of `estimate --rates`: seconds to start Ray, and each subset's rates."""

    ray_s: float
    subsets: dict[str, SubsetRates]
    version: int = 1


def measure_rates(out: str | Location) -> Rates:
    """Measure the rates of a pilot, over all runs into its folder.

    A stage that found its answers in the evidence was not asked, and that unit does not count for it.

    Raises:
        ConfigError: there are no events of a unit that was built.
    """
    out = locate(out)
    ray_s: list[float] = []
    subsets = {}
    built = reader.Corpus(out).subsets
    for subset, folders in list_runs(out).items():
        if subset not in built:  # its folder is gone since
            continue
        runs = [list(EventReader(folder).named()) for folder in folders]
        ray_s += [event.seconds for run in runs for _, event in run if event.what == "ray"]
        if any(event.what == "unit" and event.images for run in runs for _, event in run):
            subsets[subset] = _measure_subset(out, subset, runs)
    if not subsets:
        raise ConfigError(
            f"{out}/events: no events of a build; run a pilot with `paracaption build CONFIG --limit-images "
            "500 --set out=PILOT`, then give `--run PILOT`, or give measured seconds with --rates"
        )
    return Rates(_mean([seconds for seconds in ray_s if seconds > 0.5]), subsets)


def read_rates(path: str | Path) -> Rates:
    """Read rates as `format_rates` gives them, or as somebody wrote them by hand.

    Raises:
        ConfigError: there is no such file, or it does not hold rates; the message names the key.
    """
    try:
        return msgspec.convert(yaml_text.parse(files.read(Blob(str(path))).decode()), Rates)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; correct the path of --rates") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: not rates: {reason}; "
            "`paracaption estimate CONFIG --run OUT --write-rates` prints the form"
        ) from error


def format_rates(rates: Rates) -> str:
    """The rates as YAML, which `read_rates` reads."""
    return yaml.safe_dump(_rounded(msgspec.to_builtins(rates)), sort_keys=False)


class _Unit(msgspec.Struct):
    """One unit in one stage: its images, the regions worked on, seconds, of which CPU and inside the model.

    `first` says whether it was its actor's first.
    """

    images: float
    regions: int
    seconds: float
    cpu: float
    first: bool
    busy: float = 0.0


class _Tally:
    """Collects what the events of a subset's runs say of its stages."""

    def __init__(self) -> None:
        self.units: dict[str, list[_Unit]] = defaultdict(list)
        self.regions: dict[str, dict[str, int]] = defaultdict(dict)  # by stage, then by unit
        self.images: dict[str, int] = {}  # by unit
        self.load_s: dict[str, list[float]] = defaultdict(list)
        self.launch_s: list[float] = []

    def add_run(self, run: list[tuple[str, Event]], model_stages: set[str]) -> None:
        """Count the events of one run, each with the name of its worker."""
        met: set[tuple[str, str]] = set()
        begun_s = next((event.time_s for _, event in run if event.what == "begun"), None)
        ready_s: dict[str, float] = {}
        for worker, event in sorted(run, key=lambda item: item[1].time_s):
            if event.what == "started":
                self.load_s[event.stage].append(event.seconds)
            elif event.what == "ready" and begun_s is not None:
                ready_s.setdefault(event.stage, event.time_s - event.seconds - begun_s)
            elif event.what == "unit":
                self.regions[event.stage][event.unit] = event.regions
                self.images[event.unit] = event.images
                unit = _unit_of(event, event.stage in model_stages)
                if unit is not None:
                    unit.first = (worker, event.stage) not in met
                    met.add((worker, event.stage))
                    self.units[event.stage].append(unit)
        if ready_s:
            self.launch_s.append(max(ready_s.values()))

    def declared(self) -> dict[str, int]:
        """The regions of each unit: as many as the stage met that met most.

        That is the source, or the stage that makes the regions where it declares none.
        """
        units = self.regions[SOURCE_STAGE]
        return {unit: max(met.get(unit, 0) for met in self.regions.values()) for unit in units}

    def stage_rates(self) -> dict[str, StageRate]:
        declared = self.declared()
        stages = {}
        for stage, reached in self.regions.items():
            shared = [unit for unit in declared if unit in reached]
            total = sum(declared[unit] for unit in shared)
            rate = _fit_rate(self.units[stage], stage in _BY_IMAGE)
            rate.reach = sum(reached[unit] for unit in shared) / total if total else 0.0
            rate.load_s = _mean(self.load_s[stage])
            stages[stage] = rate
        return stages


def _measure_subset(out: Location, subset: str, runs: list[list[tuple[str, Event]]]) -> SubsetRates:
    tally = _Tally()
    model_stages = {event.stage for run in runs for _, event in run if event.what == "started"}
    for run in runs:
        tally.add_run(run, model_stages)
    stages = tally.stage_rates()
    regions = sum(tally.declared().values())
    done = _count_committed(out, subset)
    evidence = sum(files.size_of(Blob(url)) for url in files.expand(f"{out}/{subset}/evidence/*/*.parquet"))
    return SubsetRates(
        images=sum(tally.images.values()),
        regions=regions,
        kept=done["kept"] / max(1, done["regions"]),
        launch_s=_mean(tally.launch_s),
        shard_bytes_per_image=done["shard"] / max(1, done["images"]),
        ledger_bytes_per_region=done["ledger"] / max(1, done["regions"]),
        evidence_bytes_per_region=evidence / max(1, regions),
        stages=stages,
    )


def _unit_of(event: Event, is_model: bool) -> _Unit | None:
    """What a stage did on a unit; None if a model had all its answers already."""
    regions = event.asked if is_model else event.regions
    if not regions and (is_model or event.stage not in _BY_IMAGE):
        return None
    share = regions / event.regions if is_model and event.regions else 1.0
    return _Unit(event.images * share, regions, event.seconds, event.cpu, False, event.busy)


def _fit_rate(units: list[_Unit], by_image: bool) -> StageRate:
    """Seconds per image and per region: both, if the units differ enough to tell them apart, else one."""
    later = [unit for unit in units if not unit.first]
    counted = later if len(later) >= 2 else units
    images = np.array([unit.images for unit in counted], float)
    regions = np.array([unit.regions for unit in counted], float)
    seconds = np.array([unit.seconds for unit in counted], float)
    if not counted or not seconds.sum():
        return StageRate(0.0, 0.0, 0.0)
    rate = StageRate(0.0, 0.0, 0.0, cpu_share=sum(unit.cpu for unit in counted) / float(seconds.sum()))
    if (busy_s := sum(unit.busy for unit in counted)) > 0:
        rate.busy_share = min(1.0, busy_s / float(seconds.sum()))
    if by_image and images.sum():
        rate.image_s = float(seconds.sum() / images.sum())
    elif regions.sum():
        rate.region_s = float(seconds.sum() / regions.sum())
    both = fit_two_costs(images, regions, seconds)
    if both is not None:
        rate.image_s, rate.region_s = both
    rate.reach = 1.0
    if counted is later:
        extra = [unit.seconds - rate.seconds(unit.images, unit.regions) for unit in units if unit.first]
        rate.first_s = max(0.0, _mean(extra))
    return rate


def fit_two_costs(images: np.ndarray, regions: np.ndarray, seconds: np.ndarray) -> tuple[float, float] | None:
    """(seconds per image, seconds per region) by least squares; None where the units cannot tell them apart.

    The predictions for all units add up to the measured seconds.
    """
    if len(seconds) < _MIN_UNITS:
        return None
    columns = np.stack([images, regions], axis=1)
    (per_image, per_region), _, rank, _ = np.linalg.lstsq(columns, seconds, rcond=1e-6)
    if rank < 2 or per_image <= 0 or per_region <= 0:
        return None
    noise = seconds - columns @ (per_image, per_region)
    variance = float(noise @ noise) / (len(seconds) - 2)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(columns.T @ columns)))
    if min(per_image / max(errors[0], 1e-12), per_region / max(errors[1], 1e-12)) < _MIN_T:
        return None
    scale = seconds.sum() / (columns @ (per_image, per_region)).sum()
    return float(per_image * scale), float(per_region * scale)


def _count_committed(out: Location, subset: str) -> Counter[str]:
    """Images, regions, kept regions, and the bytes of shards and ledgers of the committed units."""
    total: Counter[str] = Counter()
    for _, manifest in reader.open_corpus(out, confined=False).manifests(subset):
        total["images"] += len(manifest.images)
        total["regions"] += manifest.regions_in
        total["kept"] += manifest.kept
        total["shard"] += manifest.shard.bytes if manifest.shard else 0
        total["ledger"] += manifest.ledger.bytes
    return total


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _rounded(value: object) -> object:
    """Four significant digits: more would claim what nobody measured."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
