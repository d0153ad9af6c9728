"""How long the commands take before they work, or before they say why they cannot.

    python -m benchmarks.startup                      # provoked errors, the demo, a finished build
    python -m benchmarks.startup --only errors --command OTHER/.venv/bin/paracaption

Each error is provoked in a folder of its own, on a copy of the sample corpus's sources. A row says how many
seconds the command took, its exit code, how many lines it printed on stderr, and the last of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 180.0
ERROR_S = 3.0


class Case(NamedTuple):
    """A mistake: what it is, the command, and a configuration to write into the folder first."""

    name: str
    command: str
    config: dict[str, Any]


class Outcome(NamedTuple):
    """What a command did."""

    seconds: float
    code: int | None
    lines: int
    words: str


def cases(folder: Path) -> Iterator[Case]:
    """Twenty-four mistakes of `build`, `train` and `evaluate`."""
    sample = yaml.safe_load((ROOT / "samples" / "build.yaml").read_text())
    subsets = sample["subsets"]

    def build(**changes: Any) -> dict[str, Any]:
        return sample | {"out": "corpus"} | changes

    def source(subset: str, **changes: Any) -> dict[str, Any]:
        changed = {"sources": subsets[subset]["sources"] | changes}
        return build(subsets=subsets | {subset: changed})

    def captioner(name: str, **options: Any) -> dict[str, Any]:
        return build(captioner={"name": name, "options": options})

    yield Case("an unknown key", "build", build(imges_per_shard=3))
    yield Case("no photos folder", "build", source("coconut", photos=["nowhere"]))
    yield Case("no annotations", "build", source("coconut", annotations=["nowhere.json"]))
    yield Case("annotations are no JSON", "build", source("coconut", annotations=["README.md"]))
    yield Case("no tar matches", "build", source("sa1b", paths=["nowhere/sa_*.tar"]))
    yield Case("an unknown captioner", "build", captioner("clasical"))
    yield Case("a captioner that cannot be imported", "build", captioner("my_captioner:Mine"))
    yield Case("an unknown option of a captioner", "build", captioner("classical", colour="red"))
    yield Case("no checkpoint of the captioner", "build", captioner("gar", model="nowhere/GAR-8B"))
    judge = {"name": "vllm", "options": {"model": "empty-checkpoint"}}
    yield Case("a checkpoint without weights", "build", build(judge=judge))
    yield Case("`out` is a file", "build", build(out="README.md"))
    yield Case("the wrong photos folder", "build", source("coconut", photos=["coconut/labels"]))

    model = {"path": str(ROOT / "tests" / "formats" / "v0_1" / "model")}
    corpus = {"corpus": str(ROOT / "tests" / "formats" / "v0_1" / "corpus")}

    def train(**changes: Any) -> dict[str, Any]:
        return {"out": "run", "model": model, "corpora": [corpus], "steps": 1, "device": "cpu"} | changes

    yield Case("no corpus to train on", "train", train(corpora=[{"corpus": "nowhere"}]))
    yield Case(
        "the same, on Ray's workers", "train", train(corpora=[{"corpus": "nowhere"}], ray={"workers": 2})
    )
    yield Case("no model to train", "train", train(model={"path": "nowhere"}))
    yield Case("no tokenizer", "train", train(model={"tokenizer": "nowhere"}))
    yield Case("no conversations", "train", train(conversations=[{"path": "nowhere.json"}]))
    yield Case("no corpus to evaluate on", "train", train(evaluation={"corpus": "nowhere"}))
    yield Case("an unknown key", "train", train(learning_rates={}))

    bench = {"name": "bench", "kind": "dlc", "folder": "nowhere"}

    def evaluate(**changes: Any) -> dict[str, Any]:
        values = {
            "out": "results",
            "label": "tiny",
            "benchmarks": [bench],
            "captioner": {"name": "classical"},
        }
        return values | changes

    yield Case("no benchmark", "evaluate", evaluate())
    missing = {"name": "perceptiondlm", "options": {"model": "nowhere"}}
    yield Case(
        "no model to evaluate", "evaluate", evaluate(captioner=missing, benchmarks=[], toy=corpus["corpus"])
    )
    yield Case("an unknown captioner", "evaluate", evaluate(captioner={"name": "clasical"}))
    saved = {"name": "perceptiondlm", "options": {"model": model["path"]}}
    yield Case("no toy world", "evaluate", evaluate(captioner=saved, benchmarks=[], toy="nowhere"))
    unread = evaluate(captioner=saved, benchmarks=[], profile={"corpus": "nowhere"})
    yield Case("no corpus to profile on", "evaluate", unread)
    wanting = evaluate(judge={"name": "vllm", "options": {"model": "nowhere"}})
    yield Case("no checkpoint of the judge", "evaluate", wanting)


def run(command: list[str], folder: Path, limit_s: float = LIMIT_S) -> Outcome:
    """Run a command to its end, or to the limit; it and what it started are then killed."""
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"COLUMNS": "400"},
    ) as process:
        try:
            _, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome(time.perf_counter() - start, None, 0, f"no answer in {limit_s:.0f} s")
    lines = [line for line in errors.splitlines() if line.strip()]
    words = lines[-1].replace(str(folder), "...").replace(str(ROOT), "...") if lines else ""
    return Outcome(time.perf_counter() - start, process.returncode, len(lines), words)


def errors(command: str, folder: Path) -> list[dict[str, Any]]:
    """Provoke every error; prints a row each."""
    rows = []
    for number, case in enumerate(cases(folder)):
        home = folder / f"{number:02}"
        shutil.copytree(ROOT / "samples", home)
        (home / "empty-checkpoint").mkdir()
        (home / "empty-checkpoint" / "config.json").write_text("{}")
        (home / "config.yaml").write_text(yaml.safe_dump(case.config, sort_keys=False))
        found = run([command, case.command, "config.yaml"], home)
        print(
            f"{case.command:<8}  {case.name:<36}  {found.seconds:6.1f} s  exit {found.code}  "
            f"{found.lines:3} lines\n    {found.words[:300]}",
            flush=True,
        )
        rows.append({"command": case.command, "mistake": case.name, **found._asdict()})
    slow = [row for row in rows if row["seconds"] > ERROR_S]
    print(f"{len(rows)} mistakes, {len(rows) - len(slow)} of them reported in {ERROR_S:.0f} s")
    return rows


def demo(command: str, folder: Path) -> list[dict[str, Any]]:
    """The demo, and the same once more, which has nothing to do."""
    rows = []
    for name in ("demo", "demo, finished"):
        found = run([command, "demo", "--out", "demo"], folder)
        print(f"{name:<46}  {found.seconds:6.1f} s  exit {found.code}", flush=True)
        rows.append({"command": name, **found._asdict()})
    return rows


MEASUREMENTS: dict[str, Callable[[str, Path], list[dict[str, Any]]]] = {"errors": errors, "demo": demo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--command", default=str(Path(sys.executable).parent / "paracaption"))
    parser.add_argument("--only", choices=MEASUREMENTS)
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [arguments.only] if arguments.only else MEASUREMENTS:
            rows += MEASUREMENTS[name](arguments.command, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
