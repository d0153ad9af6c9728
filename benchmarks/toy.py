"""Learning from random weights on the toy world: configs/train/tiny.yaml, its ablations, and their worth.

    python -m benchmarks.toy                      # worlds, corpora, all variants one by one, the table
    python -m benchmarks.toy recipe neither       # some variants
    python -m benchmarks.toy --steps 1200         # another budget than the recipe's, for all of them
    python -m benchmarks.toy --alone              # the same steps in one process: half as fast, on one core
    python -m benchmarks.toy --table              # the table and the plot of what has been run
    python -m benchmarks.toy loop                 # a model labels data for the next one (toy_loop.py)

Worlds are built by `paracaption build` with a captioner that knows the truth, and trained on by
`paracaption train`, each in a process of its own. Held-out scenes hold what no scene of the training
holds. "parallel" captions up to six regions at once, "one by one" the same regions in sequences of their own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.scores import compare_decoding
from paracaption.model_training.train import curves, metrics
from paracaption.pipeline.config_file import load_training
from paracaption.schemas.decoding import DecodeOptions

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs/train/tiny.yaml"
FOLDER = ROOT / "out/toy"
TRAINED, HELD_OUT = 8000, 250

VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "no region prompts": {"region_prompting": False},
    "no feature replay": {"feature_replay": False},
    "neither": {"region_prompting": False, "feature_replay": False},
    "prefix sees captions": {"layout_options": {"isolate_prefix": False}},
    "reference layout": {"layout": "reference", "layout_options": {"cut": "block"}},
}
"""Fields of the model's config that differ from the recipe's. With the reference's own `cut`, captions end
at the first eot of the whole answer; here they are filled up with it, and only the first would be left."""


def world(name: str, images: int) -> Path:
    """Draw a split and build its corpus, unless it is there. Returns `out`."""
    folder = FOLDER / name
    if not (folder / "corpus" / "stats.json").exists():
        if not (folder / "build.yaml").exists():
            print(f"drawing {images:,} scenes into {folder} (a minute for 2,000 of them)", flush=True)
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has drawn
            toy.write_world(folder, images, seed=0, options=toy.EASY, split=name)
        print(f"building {folder / 'corpus'}", flush=True)
        run_command("build", folder / "build.yaml")
    return folder / "corpus"


def train(variant: str, steps: int | None, alone: bool) -> Path:
    """Train a variant of the recipe, or go on with it. Returns the run's folder."""
    config = yaml.safe_load(RECIPE.read_text())
    names = ["run", *([] if variant == "recipe" else variant.split()), *([str(steps)] if steps else [])]
    folder = FOLDER / "-".join(names)  # a run of another budget has another schedule
    config["out"] = str(folder)
    config["corpora"] = [{"corpus": str(FOLDER / "train/corpus")}]
    config.pop("evaluation", None)
    config["model"]["config"] |= VARIANTS[variant]
    config["steps"] = steps or config["steps"]
    if alone:
        config["gradient_accumulation_steps"] *= config.pop("ray")["workers"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    print(f"training {folder}", flush=True)
    run_command("train", path)
    return folder


def run_command(*command: str | Path) -> None:
    """Run a command of the command line in a process of its own, which ends when this one is stopped."""
    line = [sys.executable, "-m", "paracaption.flows.cli", *map(str, command)]
    process = subprocess.Popen(line)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()  # and not killed: it ends what it has started itself
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, line)


def end_when_terminated() -> None:
    """Let SIGTERM end this process by an exception, so that the command that it runs is ended, too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def scores_of(folder: Path, held_out: Path, options: DecodeOptions) -> dict[str, Any]:
    """A trained model's scores, decoded in parallel and one by one."""
    captioner = RegionCaptioner.load(folder / "model", "cpu")
    found = compare_decoding(captioner, list(iter_photo_regions(held_out)), options)
    return {name: {**each._asdict(), "predicted": each.predicted[:6]} for name, each in found.items()}


def _known(done: Path) -> dict[str, Any]:
    return json.loads(done.read_text()) if done.exists() else {}


def report(results: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    head = "| variant | steps | minutes | exact | of small things | one by one | leaked (by chance) | wrong |"
    lines = [head, "| --- |" + " ---: |" * 6 + " --- |"]
    for name, result in results.items():
        together, alone = (result["marks"][key] for key in ("parallel", "one by one"))
        wrong = ", ".join(f"{key} {value:.1%}" for key, value in together["wrong"].items())
        lines.append(
            f"| {name} | {result['steps']:,} | {result['minutes']:.1f} | {together['exact']:.1%} | "
            f"{together['exact_small']:.1%} | {alone['exact']:.1%} | "
            f"{together['leaked']:.2%} ({together['leaked_by_chance']:.2%}) | {wrong} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, and print the table."""
    end_when_terminated()
    if sys.argv[1:2] == ["loop"]:
        from . import toy_loop  # which takes worlds and commands from here

        return toy_loop.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)}; default: all")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if unknown := [variant for variant in args.variants if variant not in VARIANTS]:
        parser.error(f"{unknown[0]!r} is no variant")
    done = FOLDER / ("results.json" if args.steps is None else f"results-{args.steps}.json")
    results = _known(done)
    if not args.table:
        world("train", TRAINED)
        held_out = world("heldout", HELD_OUT)
        options = load_training(RECIPE).evaluation
        for variant in args.variants or VARIANTS:
            folder = train(variant, args.steps, args.alone)
            found = scores_of(folder, held_out, options)
            records = metrics.read_metrics(folder)
            result = {
                "folder": str(folder),
                "steps": records[-1]["step"],
                "minutes": sum(record["seconds"] for record in records) / 60,
                "marks": found,
            }
            results = _known(done) | {variant: result}  # another process may have added to them
            done.write_text(json.dumps(results, indent=1))
            print(report({variant: results[variant]}), flush=True)
    print(report(results))
    runs = {name: Path(result["folder"]) for name, result in results.items()}
    curves.draw_loss_curves(runs, done.with_suffix(".png"))
    print(done.with_suffix(".png"))


if __name__ == "__main__":
    main()
