"""A small corpus with scores of every kind, built by the workers' own code without Ray, and built again."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from paracaption.filters import rle
from paracaption.pipeline.corpus import merge, work_list, writer
from paracaption.pipeline.corpus.writer import Draft
from paracaption.pipeline.executor.worker import Job, Worker
from paracaption.pipeline.models.protocols import Answer, Candidate, Question
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages import recipes
from paracaption.schemas.config import BuildConfig, dump_config
from paracaption.schemas.records import ImageRecord
from tests.synthetic import write_coconut, write_sa1b

HOSTILE = '<script>window.hacked = 1</script> & "x" <img src=q onerror="window.hacked=2">'
CATEGORY = "cat <i>& dog"
"""A name that an annotation may have: markup in it is text."""

_WORDS = "a red green large small wooden plain block chair leaf cup with edges beside under near the of and"
_LOOP = "the left part of it and "
_PHRASE = "a red chair with large wooden edges under"
_BETWEEN = "the leaf, one cup, some block, that wall, both plates, it".split(", ")


def luck(*parts: Any) -> float:
    """0..1, the same for the same parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest()) / (1 << 48)


class Captioner:
    """From one word to many, some that loop, one that is an attack."""

    def __init__(self, **_: Any):
        pass

    @classmethod
    def identity(cls, **_: Any) -> dict[str, str]:
        return {"version": "1"}

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        return [[_caption(image.key, region.id) for region in image.live()] for image in images]


def _caption(key: str, region: int) -> str | None:
    if (key, region) == ("000000000001", 1):
        return HOSTILE
    kind = luck("kind", key, region)
    if kind < 0.04:
        return None
    if kind < 0.2:
        return f"A {_LOOP * (1 + int(kind * 30))}end, {key} number {region}."
    if kind < 0.35:  # copies that are not back to back: only the share of 4-grams says so
        copies = [f"{_PHRASE} {between}" for between in _BETWEEN[: 1 + int(kind * 17)]]
        return f"In {key} number {region} {' '.join(copies)}."
    size = 1 + int(24 * luck("size", key, region) ** 1.5)
    words = _WORDS.split()
    chosen = (words[int(luck("word", key, region, i) * len(words))] for i in range(size))
    return f"  {' '.join(chosen).capitalize()} \u2003\n"


class Judge(Captioner):
    """Yes for margins above 0; without a margin now and then."""

    def ask(self, questions: list[Question]) -> list[Answer]:
        return [_answer(question) for question in questions]


def _answer(question: Question) -> Answer:
    chance = luck(question.kind, question.caption)
    if question.kind == "extract":
        return Answer("none" if chance < 0.1 else f"the {'block' if chance < 0.7 else 'wooden chair'}")
    margin = 6 * (chance - 0.25)
    return Answer("yes" if margin > 0 else "no", None if 0.5 < chance < 0.6 else margin)


class Segmenter(Captioner):
    """A part of the box, so that every IoU occurs; nothing now and then."""

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> list[list[Candidate]]:
        return [_candidates(photo.shape[:2], box) for box in boxes.astype(int).tolist()]


def _candidates(size: tuple[int, ...], box: list[int]) -> list[Candidate]:
    x1, y1, x2, y2 = box
    chance = luck("iou", box)
    if chance < 0.08:
        return []
    mask = np.zeros(size, np.uint8)
    mask[y1:y2, x1 : x1 + max(1, round((x2 - x1) * chance))] = 1
    return [Candidate(rle.from_mask(mask).rle, 0.5 + chance / 2)]


def config_of(root: Path) -> BuildConfig:
    """Both subsets, sources written beside `root/out`."""
    coconut = write_coconut(root / "coconut", 24)
    declared = root / "coconut" / "panoptic.json"
    text = json.loads(declared.read_text())
    text["categories"][1]["name"] = CATEGORY
    declared.write_text(json.dumps(text))
    (root / "coconut" / "photos" / "000000000002.jpg").write_bytes(b"no photo")
    names = {"captioner": "Captioner", "judge": "Judge", "segmenter": "Segmenter"}
    values: dict[str, Any] = {
        "out": str(root / "out"),
        "images_per_shard": 5,
        "masks": {"min_area_px": 16},
        "coconut": [coconut],
        "sa1b": [write_sa1b(root / "sa1b", 12, 9)],
    }
    values |= {
        protocol: {"name": f"tests.pipeline.explorer.corpus:{name}"} for protocol, name in names.items()
    }
    return BuildConfig.model_validate(values)


def write_merged(root: Path) -> Path:
    """The corpus in a folder of its own, merged; returns its `out`."""
    config = config_of(root)
    build(config)
    merge.merge(root / "out", config)
    return root / "out"


def build(config: BuildConfig) -> None:
    """Build or rebuild every unit; models are asked only for evidence that is not there."""
    out = Path(config.out)
    for subset in config.subsets:
        folder = out / subset
        writer.prepare(folder)
        planned = work_list.make_work_list(open_source(config, subset), config, folder)
        recipe = recipes.recipe_of(config, subset)
        run = out / "events" / f"20260101-000000-{subset}-0"
        run.mkdir(parents=True, exist_ok=True)
        digest = recipes.recipe_digest(recipe, config)
        job = Job(config, subset, str(folder), planned.digest, digest, str(run))
        worker = Worker(job, ["source", *recipe, "write"])
        for index in range(planned.num_units):
            done = worker({"unit": planned.unit_name(index), "index": index})
            writer.commit(folder, msgspec.msgpack.decode(done["draft"], type=Draft))
    (out / "config.yaml").write_text(dump_config(config))


def rebuilt(out: Path, to: Path, wanted: BuildConfig) -> Path:
    """A copy of a corpus, built again with other thresholds."""
    shutil.copytree(out, to)
    build(wanted.model_copy(update={"out": str(to)}))
    return to


@contextmanager
def serving(out: Path, *options: str) -> Iterator[str]:
    """The command in a process of its own, with the address that it prints."""
    command = [sys.executable, "-m", "paracaption.flows.cli", "explore", str(out), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split(" ")[0]
        finally:
            process.terminate()


def regions(out: Path, subset: str) -> list[dict[str, Any]]:
    """Every row of a subset's ledgers, read without DuckDB."""
    import pyarrow.parquet as pq

    paths = sorted((out / subset / "ledger").glob(f"{subset}-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]
