"""A training run for the browser: its curves and sample captions, read from the files that it writes.

`metrics.jsonl` has a line per step, `left_out.json` the numbers of images that are not trained on,
`evaluation/captions.jsonl` a line per image, and `evaluation/pictures/` some images with their captions
drawn. Each may be missing, or end in a line that is not complete.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...schemas.config import Limits
from ...schemas.errors import ConfigError
from ...schemas.records import Blob
from ..io import confined, files, photos
from .charts import Curve, draw_curve

METRICS = "metrics.jsonl"
LEFT_OUT = "left_out.json"
CAPTIONS = "evaluation/captions.jsonl"
SUMMARY = "evaluation/summary.json"
PICTURES = "evaluation/pictures"

_POINTS = 200
"""Points of a curve; each is the mean of some consecutive steps."""
_SAMPLES = 24
_MAX_PICTURE = 8 << 20


class CaptionSample(NamedTuple):
    """An evaluated image, and of each region its number, the model's caption and the corpus's."""

    image: str
    regions: list[tuple[str, str, str]]


class TrainingRun(NamedTuple):
    """What the files of a run hold.

    Attributes:
        steps: (done, planned); planned is None if the run does not say.
        left_out: number of images that are not trained on, by reason.
        last: the numbers of its last step.
        curves: one for each number that the run reports.
        summary: the numbers of the evaluation, by name.
        samples: some images of the evaluation.
        num_pictures: how many `read_picture` has.
    """

    steps: tuple[int, int | None]
    left_out: dict[str, int]
    last: dict[str, Any]
    curves: list[Curve]
    summary: dict[str, Any]
    samples: list[CaptionSample]
    num_pictures: int


def read_run(folder: Path) -> TrainingRun:
    """The run in a folder.

    Raises:
        ConfigError: the folder holds no run.
    """
    if not (folder / METRICS).is_file():
        raise ConfigError(f"{folder}: no training run here (no {METRICS}); give the `out` of a training")
    records = list(_records(folder / METRICS))
    last = records[-1] if records else {}
    planned = last.get("steps")
    summary = next(_records(folder / SUMMARY, whole=True), {})
    omitted = next(_records(folder / LEFT_OUT, whole=True), {})
    return TrainingRun(
        steps=(int(last.get("step", 0)), planned if isinstance(planned, int) else None),
        left_out={name: n for name, n in omitted.items() if isinstance(n, int)},
        last=last,
        curves=_curves(records),
        summary=summary,
        samples=[_sample(record) for record in islice(_records(folder / CAPTIONS), _SAMPLES)],
        num_pictures=len(list_pictures(folder)),
    )


def list_pictures(folder: Path) -> list[Path]:
    """The drawn images of the evaluation, in order."""
    return sorted((folder / PICTURES).glob("*.jpg"))


def read_picture(folder: Path, number: int) -> bytes:
    """A drawn image of the evaluation, by its number from 0, as a JPEG of ours.

    Raises:
        ConfigError: there is no such picture.
        BadRecord: the file is no picture.
        IntegrityError: it leads out of the run's folder.
    """
    found = list_pictures(folder)
    if not 0 <= number < len(found) or found[number].stat().st_size > _MAX_PICTURE:
        raise ConfigError(f"the run has no picture {number}")
    data = files.read(Blob(str(found[number])))
    picture = photos.decode_image(Blob(found[number].name), data, Limits().max_pixels)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _records(path: Path, whole: bool = False) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one per line or the whole file; whatever is not one is left out."""
    if not path.is_file():
        return
    confined.check(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in [file.read()] if whole else file:
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def _curves(records: list[dict[str, Any]]) -> list[Curve]:
    names = dict.fromkeys(name for record in records for name in record)
    levels = {f"masked share up to {float(n[3:]):.0%}": n for n in sorted(names) if n.startswith("ce_")}
    rates = {name[3:]: name for name in names if name.startswith("lr_")}
    wanted = [
        ("loss", {"loss": "loss"}, True),
        ("cross-entropy of masked tokens, in nats", levels, True),
        ("gradient norm", {"norm": "norm"}, True),
        ("learning rate", rates, False),
        ("tokens per second", {"tokens": "tokens_per_s"}, False),
        ("memory in GB", {"memory": "memory_gb"}, False),
    ]
    drawn = (
        draw_curve(title, {s: _mean(records, n) for s, n in of.items()}, log) for title, of, log in wanted
    )
    return [each for each in drawn if each is not None]


def _mean(records: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values), each the mean of consecutive steps; NaN and infinities are strings, and left out."""
    pairs = [
        (record["step"], record[name])
        for record in records
        if isinstance(record.get(name), int | float) and isinstance(record.get("step"), int)
    ]
    width = max(1, -(-len(pairs) // _POINTS))
    parts = [pairs[i : i + width] for i in range(0, len(pairs), width)]
    steps = [float(part[-1][0]) for part in parts]
    return steps, [sum(value for _, value in part) / len(part) for part in parts]


def _sample(record: dict[str, Any]) -> CaptionSample:
    regions = record.get("regions")
    rows = [
        (_number(region), *(str(region.get(name) or "") for name in ("caption", "corpus_caption")))
        for region in (regions if isinstance(regions, list) else [])
        if isinstance(region, dict)
    ]
    return CaptionSample(Path(str(record.get("image", ""))).name, rows)  # type: ignore[arg-type]


def _number(region: dict[str, Any]) -> str:
    """The region's number in the corpus; runs of earlier releases have it at the end of `source`."""
    number = region.get("region")
    return str(region.get("source") or "").rpartition(": region ")[2] if number is None else str(number)
