"""Builds small corpora in tests: the driver without Prefect, on the local engine unless a test needs Ray."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paracaption.pipeline.corpus import adopt
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.engine import Engine
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.progress import Progress
from paracaption.pipeline.executor.ray_data import RayEngine
from paracaption.schemas.config import BuildConfig

BACKENDS = {"captioner": "InstantCaptioner", "judge": "InstantJudge", "segmenter": "InstantSegmenter"}


def config_of(
    out: Path | str,
    *,
    coconut: Any = None,
    sa1b: Any = None,
    apart: bool = False,
    beside: Path | None = None,
    **changes: Any,
) -> BuildConfig:
    """A configuration with the test backends; `captioner={...}` and the like are their options.

    These note what they are asked in files next to `out`; for a bucket, in the folder `beside`.

    All stages share one actor, unless `apart`: then each model has its own, as models on GPUs have.
    """
    values: dict[str, Any] = {
        "out": str(out),
        "images_per_shard": 4,
        "masks": {"min_area_px": 16},
        "io": {"num_cpus": 0.1, "concurrency": [1, 1]},
        "failures": {"min_free_gb": 0, "stall_s": 120, "read_retry_s": 0},
    }
    for number, (protocol, name) in enumerate(BACKENDS.items(), start=1):
        given = changes.pop(protocol, {})
        values[protocol] = {
            "name": f"tests.backends:{name}",
            "num_cpus": 0.1 + 0.01 * number * apart,
            "batch_images": given.pop("batch_images", 64),
            "concurrency": given.pop("concurrency", [1, 1]),
            "options": {"log": str((beside or Path(out).parent) / f"{protocol}.log"), **given},
        }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    if coconut:
        values["coconut"] = [coconut]
    if sa1b:
        values["sa1b"] = [sa1b]
    return BuildConfig.model_validate(values)


def build(
    config: BuildConfig,
    engine: Engine | None = None,
    retry_failed: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Progress]:
    """Build every subset, by default with the local engine; the last progress of each, by its name.

    A subset with nothing to do has none.
    """
    done: dict[str, Progress] = {}

    def note(progress: Progress) -> None:
        done[progress.subset] = progress
        on_progress(progress)

    driver.build(config, engine or LocalEngine(), retry_failed=retry_failed, on_progress=note, step=_unmerged)
    return done


def _unmerged(step: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves out index, plots and card: most tests look at units."""
    return (lambda *_: {}) if step is driver.merge_corpus else step


def committed(out: Path) -> dict[str, str]:
    """SHA-256 of every committed file by its path below `out`: what two builds are compared by."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in adopt.FOLDERS
        for path in sorted(out.glob(f"*/{folder}/*"))
    }


def calls(log: Path) -> list[str]:
    """What a test backend was asked, one line a region, over all processes and runs."""
    return log.read_text().splitlines() if log.exists() else []


def drops(out: Path, subset: str) -> dict[tuple[str, int], tuple[str, str, str]]:
    """(key, region) -> (stage, reason, detail) of every dropped region, from the ledgers."""
    import pyarrow.parquet as pq

    found = {}
    for path in sorted((out / subset / "ledger").glob(f"{subset}-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            if row["drop_reason"]:
                found[row["key"], row["region"]] = (row["drop_stage"], row["drop_reason"], row["drop_detail"])
    return found


def main() -> None:
    """Build from a JSON file, for tests that kill it: `python -m tests.building CONFIG [RAY_ADDRESS]`."""
    config = BuildConfig.model_validate(json.loads(Path(sys.argv[1]).read_text()))
    build(config, RayEngine(sys.argv[2]) if len(sys.argv) > 2 else LocalEngine())
    sys.stdout.write("built\n")


if __name__ == "__main__":
    main()
