"""The commands on the commit log, as they are read in a terminal and in a pipe."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from paracaption.flows.cli import versions as commands
from paracaption.flows.cli.app import app
from paracaption.pipeline.corpus import log, status
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests.building import config_of
from tests.stopped import HEEDING_SIGNALS
from tests.synthetic import write_coconut

runner = CliRunner()


@pytest.fixture(scope="module")
def _built(tmp_path_factory):
    out = tmp_path_factory.mktemp("versions") / "out"
    source = write_coconut(out.parent / "source", 9)
    driver.build(config_of(out, coconut=source), LocalEngine())
    first = log.read_state(str(out)).number
    driver.build(config_of(out, coconut=source, masks={"min_area_px": 1000}), LocalEngine())
    return out, first


@pytest.fixture
def built(_built, tmp_path):
    """A corpus that was built twice, with other thresholds, and the last record of the first build."""
    shutil.copytree(_built[0], tmp_path / "out")
    return tmp_path / "out", _built[1]


def lines_of(*args: object, exit_code: int = 0) -> list[str]:
    done = runner.invoke(app, [str(each) for each in args])
    assert done.exit_code == exit_code, (done.output, done.exception)
    return (done.output if exit_code else done.stdout).splitlines()


@pytest.mark.soak
def test_versions_in_a_pipe_are_one_line_for_each_entry(built):
    out, _ = built
    lines = lines_of("versions", out)
    kinds = [re.fullmatch(r" *\d+  \d{4}-\d\d-\d\d \d\d:\d\d  (\w+) +\S.*", line)[1] for line in lines]
    assert kinds == "planned config commit merged config commit merged".split()
    assert lines[4].endswith("  masks.min_area_px: 16 -> 1000")
    every = lines_of("versions", out, "--all")
    assert len(every) == log.read_state(str(out)).number and "build, by" in "\n".join(every)


def test_in_a_terminal_long_entries_go_on_below_their_own_column():
    lines = commands._wrapped("12  2026-01-02 03:04  config  ", "masks.min_area_px: 16 -> 1000; " * 5, 80)
    assert len(lines) > 1 and max(map(len, lines)) <= 80
    assert all(line.startswith(" " * 30) for line in lines[1:])


def test_the_configuration_of_a_version_can_be_built_again(built):
    out, first = built
    done = runner.invoke(app, ["versions", str(out), "--config", str(first)])
    assert yaml.safe_load(done.output)["masks"]["min_area_px"] == 16
    missing = runner.invoke(app, ["versions", str(out), "--config", "99"])
    assert isinstance(missing.exception, ConfigError) and "no record 99" in str(missing.exception)


def test_a_diff_shows_counts_reasons_and_examples(built):
    out, first = built
    newest = log.read_state(str(out)).number
    lines = lines_of("diff", out, first, newest, "--limit", "2")
    assert lines[0] == "coconut: regions kept 36 -> 32 (-4)"
    assert lines[2].split() == ["lost", "4", "now", "dropped", "as", "usable_masks/mask_too_small"]
    assert f"lost: kept in {first} and not in {newest} (2 of 4)" in lines
    examples = [
        line for line in lines if re.match(r"  \d+ #\d  A .*  usable_masks/mask_too_small: \d+ px", line)
    ]
    assert len(examples) == 2


def test_a_diff_that_lacks_files_says_so_in_one_line_and_fails(built):
    out, first = built
    shutil.rmtree(out / log.REPLACED)
    done = runner.invoke(app, ["diff", str(out), str(first), str(log.read_state(str(out)).number)])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: 2 changed units cannot be compared") and f"--config {first}" in line


def test_the_status_fits_eighty_columns(built):
    out, _ = built
    lines = lines_of("status", out)
    assert lines[0] == "coconut: 3 of 3 units, 100%, 9 of 9 images"
    assert lines[1] == "  regions: 32 kept of 36"
    assert any("released" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_the_status_counts_one_of_everything_in_words(built):
    (found,) = status.Watcher(str(built[0])).read().subsets
    one = found._replace(
        **dict.fromkeys(("units", "planned_units", "images", "planned_images", "older", "gone"), 1),
        gone_examples=["a"],
        missing=["u"],
    )
    assert list(commands._committed_lines(one)) == [
        "coconut: 1 of 1 unit, 100%, 1 of 1 image",
        "  regions: 32 kept of 36",
        "  1 unit is of an older configuration",
        "  1 image is gone from the source (a) and stays in the corpus",
        "  FILES MISSING in 1 unit, which the next build makes again: u",
    ]
    assert "1 of ? units" in next(commands._committed_lines(one._replace(planned_units=None)))


def test_the_status_that_is_watched_ends_with_an_interrupt_and_without_a_word(built):
    out, _ = built
    command = [
        *HEEDING_SIGNALS, sys.executable, "-m", "paracaption.flows.cli", "status", str(out), "--watch",
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    watching = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = watching.stdout.readline()
        time.sleep(0.2)
        watching.send_signal(signal.SIGINT)
        rest, errors = watching.communicate(timeout=60)
    finally:
        watching.kill()
        watching.wait()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  coconut 3/3 units, 32 kept; .*released\n", line)
    assert (watching.returncode, rest, errors) == (0, "", "")


def test_an_undo_in_a_pipe_wants_a_yes_and_changes_nothing_without_it(built):
    out, _ = built
    number = log.read_state(str(out)).number
    done = runner.invoke(app, ["undo", str(out)])
    assert isinstance(done.exception, ConfigError) and "--yes" in str(done.exception)
    assert (done.output, log.read_state(str(out)).number) == ("", number)


def test_an_undo_says_what_it_does_and_does_it(built):
    out, _ = built
    lines = lines_of("undo", out, "--yes")
    assert re.fullmatch(r"Undoing records? \d+( to \d+)? gives 3 units the files .*", lines[0])
    assert lines[1:3] == [
        "  regions kept in them: 32 -> 36",
        "  configuration: masks.min_area_px: 1000 -> 16",
    ]
    assert lines[-2].startswith("undone; 36 regions are kept now")
    assert lines[-1].startswith("Your own YAML file is not changed")
    assert lines_of("status", out)[1] == "  regions: 36 kept of 36"


@pytest.mark.parametrize("args", [("versions",), ("status",), ("diff", "1", "2"), ("undo", "--yes")])
def test_a_damaged_log_is_one_clear_line(built, args):
    out, _ = built
    Path(log.record_path(str(out), 2)).write_bytes(b"{}")
    done = runner.invoke(app, [args[0], str(out), *args[1:]])
    assert isinstance(done.exception, IntegrityError)
    assert "000000000002.json: not a record" in str(done.exception) and "\n" not in str(done.exception)


@pytest.mark.parametrize("args", [("versions",), ("status",), ("diff", "1", "2"), ("undo", "--yes")])
def test_a_folder_without_a_corpus_is_one_clear_line(tmp_path, args):
    done = runner.invoke(app, [args[0], str(tmp_path), *args[1:]])
    assert isinstance(done.exception, ConfigError) and "`out` of a build" in str(done.exception)
    assert list(tmp_path.iterdir()) == []
