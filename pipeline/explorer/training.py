"""A training run's folder for the browser: its curves and sample captions, read from the files it writes.

`metrics.jsonl` has a line per step, `evaluation/captions.jsonl` one per image, `evaluation/pictures/` some of
them drawn. All may be missing, or end in a line that is not whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...schemas.errors import ConfigError
from .charts import Curve, curve

METRICS = "metrics.jsonl"
CAPTIONS = "evaluation/captions.jsonl"
SUMMARY = "evaluation/summary.json"
PICTURES = "evaluation/pictures"

_POINTS = 200
"""Of a curve; each is the mean of a stretch of steps."""
_SAMPLES = 24
_MAX_PICTURE = 8 << 20


class Sample(NamedTuple):
    """An image with its regions' captions: (source, the model's, the corpus's)."""

    image: str
    regions: list[tuple[str, str, str]]


class Run(NamedTuple):
    """What a run's files say.

    Attributes:
        steps: (done, planned); planned is None if the run does not say.
        last: the numbers of its last step.
        curves: those of which there are numbers.
        summary: of the evaluation, by name.
        samples: some images of the evaluation.
        num_pictures: `picture(0)` and so on.
    """

    steps: tuple[int, int | None]
    last: dict[str, Any]
    curves: list[Curve]
    summary: dict[str, Any]
    samples: list[Sample]
    num_pictures: int


def read(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ConfigError: there is none.
    """
    if not (folder / METRICS).is_file():
        raise ConfigError(f"{folder}: no training run here (no {METRICS}); give the `out` of a training")
    records = list(_records(folder / METRICS))
    last = records[-1] if records else {}
    planned = last.get("steps")
    summary = next(_records(folder / SUMMARY, whole=True), {})
    return Run(
        steps=(int(last.get("step", 0)), planned if isinstance(planned, int) else None),
        last=last,
        curves=_curves(records),
        summary=summary,
        samples=[_sample(record) for record in islice(_records(folder / CAPTIONS), _SAMPLES)],
        num_pictures=len(pictures(folder)),
    )


def pictures(folder: Path) -> list[Path]:
    """The drawn images of the evaluation, in order."""
    return sorted((folder / PICTURES).glob("*.jpg"))


def picture(folder: Path, number: int) -> bytes:
    """One of them, by its number.

    Raises:
        ConfigError: there is no such number.
    """
    found = pictures(folder)
    if not 0 <= number < len(found) or found[number].stat().st_size > _MAX_PICTURE:
        raise ConfigError(f"the run has no picture {number}")
    return found[number].read_bytes()


def _records(path: Path, whole: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a file, one a line or the whole file; what is none is passed over."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in [file.read()] if whole else file:
            try:
                record = json.loads(text)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _curves(records: list[dict[str, Any]]) -> list[Curve]:
    names = dict.fromkeys(name for record in records for name in record)
    levels = {f"up to {float(n[3:]):.0%} masked": n for n in sorted(names) if n.startswith("ce_")}
    rates = {name[3:]: name for name in names if name.startswith("lr_")}
    wanted = [
        ("loss", {"loss": "loss"}, True),
        ("cross-entropy of masked tokens, in nats", levels, True),
        ("gradient norm", {"norm": "norm"}, True),
        ("learning rate", rates, False),
        ("tokens per second", {"tokens": "tokens_per_s"}, False),
        ("memory in GB", {"memory": "memory_gb"}, False),
    ]
    drawn = (curve(title, {s: _mean(records, n) for s, n in of.items()}, log) for title, of, log in wanted)
    return [each for each in drawn if each is not None]


def _mean(records: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values): means over stretches of the run; NaN and infinities are strings and left out."""
    pairs = [
        (record["step"], record[name])
        for record in records
        if isinstance(record.get(name), int | float) and isinstance(record.get("step"), int)
    ]
    width = max(1, -(-len(pairs) // _POINTS))
    parts = [pairs[i : i + width] for i in range(0, len(pairs), width)]
    steps = [float(part[-1][0]) for part in parts]
    return steps, [sum(value for _, value in part) / len(part) for part in parts]


def _sample(record: dict[str, Any]) -> Sample:
    regions = record.get("regions")
    rows = [
        tuple(str(region.get(name) or "") for name in ("source", "caption", "corpus_caption"))
        for region in (regions if isinstance(regions, list) else [])
        if isinstance(region, dict)
    ]
    return Sample(Path(str(record.get("image", ""))).name, rows)  # type: ignore[arg-type]
