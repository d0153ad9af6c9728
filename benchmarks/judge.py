"""2,000 verdicts through Ray Data with a real vLLM engine in its actor, at tiny size.

    python -m benchmarks.judge [--questions 2000] [--model FOLDER]

A build of the COCONut recipe: rows are units, the judge has an actor of its own, its answers are evidence on
disk. The captions are made from lists of words; the tiny Qwen3 is random, so its verdicts mean nothing and
only their form is checked. Printed: answers in the schema, the prefix cache's share, verdicts per second, and
the engine's start.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.words import captions
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.executor.ray_data import RayEngine
from paracaption.pipeline.models.vllm_judge import VllmJudge
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.recipes import recipe_of
from paracaption.schemas.records import ImageRecord
from tests.building import build, config_of
from tests.synthetic import write_coconut

MASKS, IMAGES_PER_UNIT = 10, 25


class WordyCaptioner:
    """Captions of 20 to 60 words, different for every region, the same in every run."""

    version = "1"

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        return [list(itertools.islice(captions(image.key), len(image.live()))) for image in images]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--model", help="a Qwen3 checkpoint's folder; default: a tiny random one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model, engine = arguments.model, {"max_model_len": 2048}
        if model is None:
            from tests.tiny.qwen3 import write_qwen3

            model = str(write_qwen3(root / "qwen3"))
            engine |= {"enforce_eager": True, "max_num_seqs": 128, "block_size": 32}
        source = write_coconut(root / "source", -(-arguments.questions // MASKS), MASKS)
        config = config_of(root / "out", coconut=source, images_per_shard=IMAGES_PER_UNIT)
        judge = {
            "name": "vllm",
            "options": {"model": model, "engine": engine},
            "num_cpus": 0.5,
            "num_gpus": 1 if arguments.model else 0,
        }
        captioner = {"name": "benchmarks.judge:WordyCaptioner", "num_cpus": 0.1, "options": {}}
        config = type(config).model_validate({**config.model_dump(), "judge": judge, "captioner": captioner})
        print(VllmJudge.check(**judge["options"]).what)
        build(config, RayEngine())
        (judged,) = (each for each in recipe_of(config, "coconut") if each.name == "verify_category")
        assert isinstance(judged, ModelStage)
        report(root / "out", judged)


def report(out: Path, stage: ModelStage) -> None:
    """Print what the evidence and the events of the build say."""
    folder = out / "coconut" / "evidence" / f"{stage.name}-{stage.evidence_digest}"
    rows = [row for path in folder.glob("*.parquet") for row in pq.ParquetFile(path).read().to_pylist()]
    inside = sum(row["answer"] in ("yes", "no") and row["margin"] is not None for row in rows)
    dropped = [
        row["drop_reason"]
        for path in (out / "coconut" / "ledger").glob("*.parquet")
        for row in pq.ParquetFile(path).read(columns=["drop_reason"]).to_pylist()
    ]
    failed = sum(reason in ("answer_invalid", "model_error") for reason in dropped)
    events = [event for run in (out / "events").iterdir() for event in EventReader(run).new()]
    units = [e for e in events if e.what == "unit" and e.stage == stage.name]
    started = max(e.seconds for e in events if e.what == "started" and e.stage == stage.name)
    seconds = sum(e.seconds for e in units)
    asked = sum(e.asked for e in units)
    shares = [e.report["prefix_cache_hit_share"] for e in units if getattr(e, "report", None)]
    print(f"{len(rows):,} verdicts of {len(dropped):,} regions, {inside:,} in the schema; {failed} failed")
    print(f"engine's start: {started:.1f} s; then {asked / seconds:,.0f} verdicts/s in {len(units)} units")
    print(f"prefix cache: {shares[-1]:.1%} of the prompts' tokens" if shares else "no report")
    assert inside == len(rows) == asked and not failed


if __name__ == "__main__":
    main()
