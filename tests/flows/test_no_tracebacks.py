"""Whatever a file turns out to be, a command says so in a line with its name, and exit code 1 or 2."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest

from paracaption.pipeline.corpus import plots
from tests.flows import damages
from tests.flows.in_process import Answer, run
from tests.model_training.toy_corpus import write_merged

pytestmark = pytest.mark.timeout(300)

UNIT = "coconut/{}/coconut-000000.{}"
FILES = {
    "manifest": UNIT.format("manifests", "json"),
    "ledger": UNIT.format("ledger", "parquet"),
    "shard": UNIT.format("shards", "tar"),
    "statistics": "stats.json",
    "index": "index.parquet",
    "configuration": "config.yaml",
    "work list": "coconut/plan/plan.parquet",
    "its summary": "coconut/plan/plan.json",
}
QUICK = [("manifest", name) for name in ("a folder", "a loop", "a pipe", "deep")]
QUICK += [("statistics", "a folder"), ("ledger", "a folder"), ("ledger", "another table")]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    with mock.patch.object(plots, "draw_plots", lambda _: dict.fromkeys(plots.NAMES, b"")):
        return write_merged(tmp_path_factory.mktemp("good") / "world", 4)


def commands(out: Path, to: Path) -> dict[str, list[object]]:
    """Those that read a corpus and need no model."""
    return {
        "verify": ["verify", out],
        "inspect": ["inspect", out],
        "status": ["status", out],
        "versions": ["versions", out],
        "show": ["show", out, "000000", "--out", to / "image.png"],
        "report": ["report", out, "--to", to / "report.html"],
        "coco": ["export", out, "--format", "coco", "--to", to / "coco"],
        "parquet": ["export", out, "--format", "parquet", "--to", to / "parquet"],
        "json": ["export", out, "--format", "perceptiondlm-json", "--to", to / "json"],
    }


def problem(answer: Answer, *names: str) -> str:
    """What is wrong with how a command ended; "" if nothing is."""
    if answer.code == -1 or "Traceback" in answer.err + answer.out:
        return f"a traceback: {answer.err.strip().splitlines()[-1][:200]}"
    if answer.code == 0:
        return ""
    said = answer.lines or answer.out.splitlines()
    if answer.code == 2 and (len(answer.lines) != 1 or not said[0].startswith("error: ")):
        return f"not one line: {answer.err[:300]!r}"
    if not any(name in each for name in names for each in said):
        return f"no name of the file: {said[:3]}"
    return ""


def problems(good: Path, folder: Path, file: str, name: str, damage: damages.Damage) -> list[str]:
    """What is wrong with how the commands take a damaged file."""
    found = []
    work, to = folder / "out", folder / "to"
    shutil.copytree(good, work)
    to.mkdir()
    damage(work / file)
    for command, arguments in commands(work, to).items():
        answer = run(*arguments)
        if what := problem(answer, Path(file).name, Path(file).stem, str(work)):
            found.append(f"{file} is {name}: {command}: {what}")
        if command == "verify" and answer.code == 0 and name not in ("a BOM",):
            found.append(f"{file} is {name}: verify finds nothing")
    shutil.rmtree(work)
    shutil.rmtree(to)
    return found


def kinds_of(path: str) -> dict[str, damages.Damage]:
    """What may happen to a file of this name."""
    kinds = dict(damages.FILES)
    if path.endswith(".json"):
        kinds |= damages.JSONS
    if path.endswith(".parquet"):
        kinds |= damages.TABLES
    return kinds


PAIRS = [(file, name) for file, path in FILES.items() for name in kinds_of(path)]


@pytest.mark.parametrize(
    ("file", "name"),
    [each if each in QUICK else pytest.param(*each, marks=pytest.mark.soak) for each in PAIRS],
)
@pytest.mark.soak(keep=1)
def test_every_command_says_in_one_line_what_a_file_of_a_corpus_is(good, tmp_path, file, name):
    assert problems(good, tmp_path, FILES[file], name, kinds_of(FILES[file])[name]) == []


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", ["ledger", "index"])
def test_a_column_of_another_kind_is_one_line(good, tmp_path, file):
    import pyarrow.parquet as pq

    found = []
    for column in pq.read_schema(good / FILES[file]).names:
        changes = {f"as {name}": damages.column_of_kind(column, *kind) for name, *kind in damages.KINDS}
        changes |= {"gone": damages.column_gone(column), "twice": damages.column_twice(column)}
        for name, damage in changes.items():
            found += problems(good, tmp_path, FILES[file], f"with {column} {name}", damage)
    assert found == []


FOLDERS = {
    "inspect": ["inspect", "{}"],
    "verify": ["verify", "{}"],
    "status": ["status", "{}"],
    "versions": ["versions", "{}"],
    "diff": ["diff", "{}", 1, 2],
    "undo": ["undo", "{}", "--yes"],
    "remove": ["remove", "{}", "--keys", "{to}/keys.txt", "--yes"],
    "show": ["show", "{}", "1", "--out", "{to}/image.png"],
    "explore": ["explore", "{}"],
    "report": ["report", "{}"],
    "export": ["export", "{}", "--format", "coco", "--to", "{to}/coco"],
    "benchmark make": ["benchmark", "make", "{}", "--to", "{to}/bench", "--judge", "{to}/judge.yaml"],
}
CONFIGS = {
    "build": ["build", "{}", "--local"],
    "merge": ["merge", "{}"],
    "audit": ["audit", "{}"],
    "doctor": ["doctor", "{}"],
    "doctor --training": ["doctor", "{}", "--training"],
    "doctor --evaluation": ["doctor", "{}", "--evaluation"],
    "estimate": ["estimate", "{}"],
    "train": ["train", "{}"],
    "evaluate": ["evaluate", "{}"],
}


def place(folder: Path, name: str) -> Path:
    """Something that is neither a corpus nor a configuration."""
    path = folder / "given"
    if name != "missing":
        path.write_bytes(b"x")
        damages.FILES[name](path)
    return path


NOT_A_CORPUS = ("missing", "a folder", "a loop", "a dangling link", "empty", "HTML", "a picture")
NOT_A_CONFIG = (*NOT_A_CORPUS, "a pointer", "zeros", "not UTF-8", "gzipped")


@pytest.mark.parametrize("name", NOT_A_CORPUS)
@pytest.mark.parametrize("command", FOLDERS)
@pytest.mark.soak(keep=27)
def test_what_is_no_corpus_is_one_line(tmp_path, command, name):
    path = place(tmp_path, name)
    (tmp_path / "keys.txt").write_text("a\n")
    (tmp_path / "judge.yaml").write_text(
        "name: openai\noptions: {model: a, base_url: 'http://127.0.0.1:9'}\n"
    )
    answer = run(*(str(each).format(path, to=tmp_path) for each in FOLDERS[command]))
    assert answer.code == 2, answer
    assert problem(answer, str(path)) == ""


@pytest.mark.parametrize("name", NOT_A_CONFIG)
@pytest.mark.parametrize("command", CONFIGS)
@pytest.mark.soak(keep=26)
def test_what_is_no_configuration_is_one_line(tmp_path, command, name):
    path = place(tmp_path, name)
    answer = run(*(str(each).format(path) for each in CONFIGS[command]))
    assert answer.code == 2, answer
    assert problem(answer, str(path)) == ""


FAILING = [OSError(5, "Input/output error", "/corpus/a.json"), PermissionError(13, "Permission denied", "/a")]


@pytest.mark.parametrize("error", FAILING)
def test_a_disk_that_does_not_answer_is_one_line(tmp_path, error):
    with mock.patch("paracaption.pipeline.corpus.verify.verify", side_effect=error):
        answer = run("verify", tmp_path)
    assert answer.code == 2 and problem(answer, error.filename) == ""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            "torch",
            "`make models` in a clone, or install paracaption again with the extra `models` (README.md)",
        ),
        (
            "tensorboard",
            "`make models` in a clone, or install paracaption again with the extra `models` (README.md)",
        ),
        ("vllm", "install paracaption again with the extra `vllm` (docs/gpu.md)"),
        ("duckdb", "install paracaption again, with the packages that it requires (README.md)"),
        ("matplotlib", "install paracaption again, with the packages that it requires (README.md)"),
        ("yaml", "install paracaption again, with the packages that it requires (README.md)"),
        (
            "safetensors",
            "`make models` in a clone, or install paracaption again with the extra `models` (README.md)",
        ),
    ],
)
def test_a_package_that_is_missing_is_one_line_with_what_to_install(tmp_path, module, words):
    error = ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.inner")
    with mock.patch("paracaption.pipeline.corpus.verify.verify", side_effect=error):
        answer = run("verify", tmp_path)
    assert (answer.code, answer.err) == (2, f"error: {module} is not installed; {words}\n")


def test_a_corpus_that_is_not_there_is_said_before_ray_starts(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        f"out: {tmp_path}/run\nmodel: {{tokenizer: toy}}\ncorpora: [{{corpus: {tmp_path}/none}}]\nsteps: 1\n"
    )
    before = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    answer = run("train", path)
    assert answer.code == 2 and f"no corpus at {tmp_path}/none" in answer.err
    assert ("ray" in sys.modules and sys.modules["ray"].is_initialized()) == before
