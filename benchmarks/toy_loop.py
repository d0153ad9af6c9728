"""The closed loop on the toy world: a model labels masks, and the next one is trained on its labels, too.

    python -m benchmarks.toy loop                         # two seeds; hours on two cores
    python -m benchmarks.toy loop --seeds 0 --steps 1500  # one seed, a smaller budget
    python -m benchmarks.toy loop --table                 # the table of what has been run

For each seed: a small world with true captions is built, and a model trained on it. The model is then the
captioner of the build of a larger world, whose masks have categories (the shapes) and no captions. The judge
and the filters decide which of its labels are kept. A second model is trained from scratch, with the same
seed and as many steps, on both corpora. Both models are examined on the held-out scenes that
`python -m benchmarks.toy` examines. The truth about the labels is known, but only the report looks at it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.scores import compare_decoding
from paracaption.pipeline.corpus import reader
from paracaption.schemas.decoding import DecodeOptions

from .toy import FOLDER, HELD_OUT, ROOT, run_command

CONFIG = ROOT / "configs/train/sample.yaml"
DECODE = {"strategy": "threshold", "threshold": 0.95, "max_new_tokens": 12, "steps": 12}


@dataclass(frozen=True)
class Loop:
    """The budget of a loop.

    Attributes:
        folder: worlds, corpora, runs and results go there.
        labeled, unlabeled, held_out: numbers of scenes.
        steps: of each training.
        min_confidence: labels below are dropped; None drops none for that reason.
        options: how hard the world is.
        training: changes of the training's configuration, by section.
    """

    folder: Path = FOLDER / "loop"
    labeled: int = 1000
    unlabeled: int = 4000
    held_out: int = HELD_OUT
    steps: int = 2400
    min_confidence: float | None = 0.9
    options: toy.WorldOptions = toy.EASY
    training: Mapping[str, Any] | None = None


class Labels(NamedTuple):
    """What the first model said of the masks without captions.

    Attributes:
        regions: masks that were asked about.
        kept: captions that judge and filters let pass.
        right, kept_right: how many of either are exactly right.
        dropped: dropped captions by reason.
    """

    regions: int
    kept: int
    right: int
    kept_right: int
    dropped: dict[str, int]


def run_loop(loop: Loop, seed: int) -> dict[str, Any]:
    """Run the loop once, or go on with it.

    Returns:
        `first` and `second`: the scores of both models, in parallel and one by one; `labels`, see `Labels`.
    """
    home = loop.folder / f"seed-{seed}"
    held_out = _world(loop.folder / "heldout", loop.held_out, 0, loop.options, "heldout") / "corpus"
    _build(loop.folder / "heldout/build.yaml")
    labeled = _world(home / "labeled", loop.labeled, 1000 + seed, loop.options, "train")
    unlabeled = _world(home / "unlabeled", loop.unlabeled, 2000 + seed, loop.options, "train")
    _build(labeled / "build.yaml")
    first = _train(loop, home / "first", seed, [labeled / "corpus"])
    own = _label_config(loop, unlabeled, first)
    _build(own)
    labels = labels_of(unlabeled / "own-labels", unlabeled / "captions.json")
    second = _train(loop, home / "second", seed, [labeled / "corpus", unlabeled / "own-labels"])
    return {
        "first": _scores(first, held_out),
        "labels": labels._asdict(),
        "second": _scores(second, held_out),
    }


def labels_of(corpus: Path, truth: Path) -> Labels:
    """Compare every label with the truth, dropped ones included."""
    true = json.loads(truth.read_text())
    regions = kept = right = kept_right = 0
    dropped: dict[str, int] = {}
    for row in _rows(corpus):
        is_right = row["caption"] == true[row["key"]][str(row["source_id"])]
        regions, right = regions + 1, right + is_right
        kept, kept_right = kept + row["kept"], kept_right + (is_right and row["kept"])
        if not row["kept"]:
            dropped[row["drop_reason"]] = dropped.get(row["drop_reason"], 0) + 1
    return Labels(regions, kept, right, kept_right, dropped)


def _rows(corpus: Path) -> Iterator[dict[str, Any]]:
    columns = ["key", "region", "source_id", "caption", "kept", "drop_reason"]
    for table in reader.open_corpus(corpus).ledgers(columns=columns):
        yield from (row for row in table.to_pylist() if row["region"] is not None)


def _world(folder: Path, images: int, seed: int, options: toy.WorldOptions, split: str) -> Path:
    """Draw a world, unless it is there."""
    if not (folder / "build.yaml").exists():
        print(f"drawing {images:,} scenes into {folder}", flush=True)
        toy.write_world(folder, images, seed, options, split)
    return folder


def _build(config: Path) -> None:
    print(f"building {config}", flush=True)
    run_command("build", config, "--local")


def _label_config(loop: Loop, unlabeled: Path, model: Path) -> Path:
    """The build of a world whose captioner is a model, not the truth."""
    config = yaml.safe_load((unlabeled / "build.yaml").read_text())
    config["out"] = "own-labels"
    config["captioner"] = {
        "name": "perceptiondlm",
        "options": {"model": str(model), "device": "cpu", "decode": DECODE},
    }
    config["text"] = {"min_confidence": loop.min_confidence}
    path = unlabeled / "label.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _train(loop: Loop, folder: Path, seed: int, corpora: Sequence[Path]) -> Path:
    """Train a model from scratch, or go on with it. Returns the model's folder."""
    config = yaml.safe_load(CONFIG.read_text())
    for section, changes in (loop.training or {}).items():
        config[section] = {**config[section], **changes} if isinstance(changes, Mapping) else changes
    config |= {"out": str(folder), "seed": seed, "steps": loop.steps, "export_dtype": "float32"}
    config["corpora"] = [{"corpus": str(corpus)} for corpus in corpora]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    print(f"training {folder}", flush=True)
    run_command("train", path)
    return folder / "model"


def _scores(model: Path, held_out: Path) -> dict[str, Any]:
    captioner = RegionCaptioner.load(model, "cpu")
    found = compare_decoding(captioner, list(iter_photo_regions(held_out)), DecodeOptions(**DECODE))
    return {name: {**each._asdict(), "predicted": each.predicted[:6]} for name, each in found.items()}


def report(results: Mapping[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    head = "| seed | first model: exact | one by one | labels right | kept | of the kept right | "
    lines = [head + "second model: exact | one by one |", "| --- |" + " ---: |" * 7]
    for seed, result in results.items():
        labels = Labels(**result["labels"])
        first, second = (
            " | ".join(f"{result[name][how]['exact']:.1%}" for how in ("parallel", "one by one"))
            for name in ("first", "second")
        )
        lines.append(
            f"| {seed} | {first} | {labels.right / labels.regions:.1%} | {labels.kept / labels.regions:.1%} "
            f"| {labels.kept_right / max(1, labels.kept):.1%} | {second} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Run the loop for each seed, and print the table."""
    given = Loop()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toy loop",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--labeled", type=int, default=given.labeled, help="scenes with true captions")
    parser.add_argument("--unlabeled", type=int, default=given.unlabeled, help="scenes that the model labels")
    parser.add_argument("--steps", type=int, default=given.steps, help="steps of each training")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(arguments)
    name = f"loop-{args.labeled}-{args.unlabeled}-{args.steps}"  # another budget is another loop
    loop = Loop(FOLDER / name, args.labeled, args.unlabeled, steps=args.steps)
    done = loop.folder / "results.json"
    results = json.loads(done.read_text()) if done.exists() else {}
    for seed in [] if args.table else args.seeds:
        results[str(seed)] = run_loop(loop, seed)
        done.write_text(json.dumps(results, indent=1))
        print(report({str(seed): results[str(seed)]}), flush=True)
    print(report(results))
