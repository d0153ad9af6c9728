"""docs/exit-codes.md: each row of its examples, provoked."""

from __future__ import annotations

import io
import logging
import re
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from paracaption.flows.cli import app as cli
from paracaption.pipeline.corpus import log
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from tests.building import config_of
from tests.stopped import run_and_stop
from tests.synthetic import write_coconut

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exit-codes.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no clone, but an installed wheel")


def rows_after(heading: str) -> list[list[str]]:
    """The rows of the first table after a heading; code, and the other cells."""
    table = re.search(r"(?:^\|.*\n)+", PAGE.read_text().partition(f"{heading}\n")[2], re.MULTILINE)
    assert table is not None
    return [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]
    ]


@pytest.fixture
def code_of(monkeypatch) -> Callable[..., int]:
    """What the program exits with, run in this process as the console script does."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["paracaption", *map(str, arguments)])
        factory = logging.getLogRecordFactory()
        try:
            with warnings.catch_warnings():
                cli.main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            logging.setLogRecordFactory(factory)
        return 0

    return run


@pytest.fixture(scope="module")
def _built(tmp_path_factory) -> Path:
    """A corpus that was built twice, with another threshold; `first` has the record after the first build."""
    folder = tmp_path_factory.mktemp("exit-codes")
    source = write_coconut(folder / "source", 3)
    driver.build(config_of(folder / "out", coconut=source), LocalEngine())
    (folder / "first").write_text(str(log.read_state(str(folder / "out")).number))
    driver.build(config_of(folder / "out", coconut=source, masks={"min_area_px": 1000}), LocalEngine())
    return folder


@pytest.fixture
def folder(_built, tmp_path) -> Path:
    """A copy of the corpus as `out`, and its configuration as `build.yaml`."""
    shutil.copytree(_built / "out", tmp_path / "out")
    shutil.copy(_built / "first", tmp_path)
    return tmp_path


def configured(folder: Path, **changes: object) -> Path:
    values = yaml.safe_load((folder / "out" / "config.yaml").read_text())
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(values | {"out": str(folder / "out")} | changes))
    return path


def build(folder: Path, **changes: object) -> tuple[object, ...]:
    return "build", configured(folder, **changes), "--local"


def damaged(folder: Path) -> tuple[object, ...]:
    shard = next((folder / "out").glob("*/shards/*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    return "verify", folder / "out"


def without_replaced_files(folder: Path) -> tuple[object, ...]:
    records = log.read_state(str(folder / "out")).number
    shutil.rmtree(folder / "out" / ".replaced")
    return "diff", folder / "out", (folder / "first").read_text(), records


def removing_nobody(folder: Path) -> tuple[object, ...]:
    (folder / "keys.txt").write_text("nobody\n")
    return "remove", folder / "out", "--keys", folder / "keys.txt", "--yes"


def without_space(folder: Path) -> tuple[object, ...]:
    return "doctor", configured(folder, failures={"min_free_gb": 1e9})


def without_photos(folder: Path) -> tuple[object, ...]:
    (folder / "empty").mkdir()
    path = configured(folder)
    values = yaml.safe_load(path.read_text())
    values["subsets"]["coconut"]["sources"][0]["photos"] = [str(folder / "empty")]
    path.write_text(yaml.safe_dump(values))
    return "audit", path, "--parquet", folder / "audit.parquet"


def broken_model(folder: Path) -> tuple[object, ...]:
    values = yaml.safe_load((folder / "out" / "config.yaml").read_text())
    captioner = values["captioner"] | {"options": {"misbehave": {"*": "raise"}}}
    return build(folder, out=str(folder / "other"), captioner=captioner, images_per_shard=1)


def missing_source(folder: Path) -> tuple[object, ...]:
    subsets = {"sa1b": {"sources": {"source": "sa1b", "paths": [str(folder / "none.tar")]}}}
    return build(folder, out=str(folder / "other"), subsets=subsets)


def a_photo_that_is_none(folder: Path) -> tuple[object, ...]:
    for home in ("photos", "masks"):
        (folder / home).mkdir()
        (folder / home / "a.png").write_bytes(b"no picture")
    where = ("--image", folder / "photos", "--masks", folder / "masks", "--out", folder / "captions.jsonl")
    return "caption", "--model", Path(__file__).parents[2] / "samples/model", *where


COMMANDS: dict[tuple[int, str, str], Callable[[Path], tuple[object, ...]]] = {
    (0, "paracaption config", "always"): lambda _: ("config",),
    (0, "paracaption audit", "at least one region is usable, even if problems are listed"): lambda folder: (
        *("audit", configured(folder)),
        *("--parquet", folder / "audit.parquet"),
    ),
    (1, "paracaption caption --out", "a photo cannot be used; its line says why"): a_photo_that_is_none,
    (0, "paracaption build", "the corpus is complete, or was complete before"): build,
    (0, "paracaption verify", "the corpus is complete and undamaged"): lambda folder: (
        "verify",
        folder / "out",
    ),
    (0, "paracaption doctor", "no check is a FAIL; warnings are allowed"): lambda folder: (
        "doctor",
        configured(folder),
    ),
    (0, "paracaption estimate --evaluation", "there is no trial: it prints what can be counted"): lambda _: (
        *("estimate", PAGE.parents[1] / "configs/evaluate/base.yaml"),
        "--evaluation",
    ),
    (1, "paracaption audit", "no region is usable"): without_photos,
    (1, "paracaption verify", "a file of the corpus is missing or damaged"): damaged,
    (1, "paracaption doctor", "a check is a FAIL"): without_space,
    (
        1,
        "paracaption diff",
        "files of one of the two versions are gone, so that the comparison is incomplete",
    ): without_replaced_files,
    (2, "any", "an unknown command, an unknown option, or a missing argument"): lambda _: ("biuld",),
    (2, "paracaption build", "the configuration has an unknown key"): lambda folder: build(
        folder, min_iuo=0.5
    ),
    (2, "paracaption build", "a source is not there"): missing_source,
    (
        2,
        "paracaption build",
        "a stage fails on every image of `failures.stop_after_units` (3) units in a row, "
        "so the model or its set-up is broken",
    ): broken_model,
    (2, "paracaption inspect", "the folder is not a corpus"): lambda folder: ("inspect", folder),
    (2, "paracaption export", "the format is unknown"): lambda folder: (
        *("export", folder / "out", "--format", "vhs"),
        *("--to", folder / "to"),
    ),
    (2, "paracaption estimate --evaluation", "`--run` is no folder"): lambda folder: (
        *("estimate", PAGE.parents[1] / "configs/evaluate/base.yaml", "--evaluation"),
        *("--run", folder / "nothing"),
    ),
    (2, "paracaption undo", "there is no terminal to ask in, and no `--yes`"): lambda folder: (
        "undo",
        folder / "out",
    ),
    (2, "paracaption remove", "a key is of no image of the corpus"): removing_nobody,
    (2, "paracaption deploy", "`PREFECT_API_URL` is not set"): lambda _: ("deploy",),
}
"""Rows of the page that a command in this process shows."""

SIGNALS = {129: signal.SIGHUP, 130: signal.SIGINT, 143: signal.SIGTERM}


@pytest.mark.parametrize("row", list(COMMANDS), ids=lambda row: f"{row[0]} {row[1]}: {row[2]}"[:60])
def test_each_command_of_the_page_ends_with_its_code(row, folder, code_of, monkeypatch, capsys):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert code_of(*COMMANDS[row](folder)) == row[0]
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    if row[0] == 2:
        assert "rror" in errors


@pytest.mark.parametrize("arguments", [("build",), ("config", "--no-such-option"), ("inspect", "a", "b")])
def test_a_mistake_in_the_command_line_ends_with_2(arguments, code_of):
    assert code_of(*arguments) == 2


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


def test_an_undo_that_is_declined_ends_with_1_and_changes_nothing(folder, code_of, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    before = log.read_state(str(folder / "out")).number
    assert code_of("undo", folder / "out") == 1
    assert log.read_state(str(folder / "out")).number == before


def test_an_unexpected_error_is_raised_which_ends_a_program_with_1(folder, code_of, monkeypatch):
    monkeypatch.setattr(
        "paracaption.pipeline.corpus.verify.verify", lambda *_, **__: (_ for _ in ()).throw(KeyError("a bug"))
    )
    with pytest.raises(KeyError, match="a bug"):
        code_of("verify", folder / "out")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize(("code", "number"), SIGNALS.items())
@pytest.mark.soak
def test_each_signal_of_the_page_ends_a_command_with_its_code(code, number):
    program = textwrap.dedent("""
        import time
        from paracaption.flows import stopping

        def command():
            print("ready", flush=True)
            time.sleep(60)

        stopping.run(command)
    """)
    assert run_and_stop([sys.executable, "-c", program], (number,)).code == code


EXPLORE = """
import sys
import uvicorn
from paracaption.flows.cli.command import main

start = uvicorn.Server.startup

async def started(self, sockets=None):
    await start(self, sockets)
    sys.__stdout__.write("ready\\n")
    sys.__stdout__.flush()

uvicorn.Server.startup, sys.stdout = started, sys.stderr
main()
"""
"""Says "ready" when the pages can be opened, and not before; its own first line goes to stderr."""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.soak
def test_the_explorer_ends_with_0_when_it_is_stopped(folder):
    """`status --watch` is stopped in test_versions.py."""
    assert (
        "`paracaption explore` and `paracaption status --watch` run until you stop them" in PAGE.read_text()
    )
    command = [sys.executable, "-c", EXPLORE, "explore", str(folder / "out"), "--port", "0"]
    found = run_and_stop(command, (signal.SIGINT,))
    assert found.code == 0 and re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", found.errors)


def test_every_example_of_the_page_is_provoked_here():
    elsewhere = {
        (1, "paracaption undo", "you answered no"),
        (1, "any", "an unexpected error, with a traceback"),
        (129, "any", "SIGHUP"),
        (130, "any except `explore` and `status --watch`, which end with 0", "SIGINT"),
        (143, "any", "SIGTERM"),
    }
    listed = {(int(row[0]), row[1], row[2]) for row in rows_after("## Examples")}
    provoked = {(code, command, when.strip("`")) for code, command, when in COMMANDS}
    assert listed == provoked | elsewhere


def test_the_table_of_codes_has_each_code_of_the_examples_and_no_other():
    codes = [int(row[0]) for row in rows_after("# Exit codes")]
    assert codes == sorted(set(codes)) == sorted({int(row[0]) for row in rows_after("## Examples")})
