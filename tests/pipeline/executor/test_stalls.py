"""What takes too long is told: the step, the unit, the record, the file, and where the stack lies."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from paracaption.pipeline.corpus import card, owner, plots, reader, writer
from paracaption.pipeline.corpus.events import Event, EventLog, EventReader
from paracaption.pipeline.executor import build as building
from paracaption.pipeline.executor import preflight, stalls
from paracaption.pipeline.executor.progress import STALL_GRACE_S, Progress, Watch
from paracaption.pipeline.executor.stalls import StackFile, telling
from paracaption.pipeline.executor.worker import Worker
from paracaption.pipeline.io import photos, scratch
from paracaption.pipeline.io.activity import NOW, Activity
from paracaption.pipeline.io.location import Prefix, locate
from paracaption.pipeline.io.store import store_of
from paracaption.pipeline.models import registry
from paracaption.pipeline.sources import coco_json
from paracaption.pipeline.stages.base import FilterStage
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.schemas.errors import StageStalled
from tests.building import build, config_of
from tests.file_server import serving

STALL_S, SLEEP_S = 0.15, 0.5


def sleep_once(patch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    """The first call of a function takes as long as a file system that hangs."""
    function, slept = getattr(place, name), []

    def run(*arguments: Any, **options: Any) -> Any:
        if not slept:
            slept.append(True)
            time.sleep(SLEEP_S)
        return function(*arguments, **options)

    patch.setattr(place, name, run)


@pytest.fixture(scope="module")
def told(coconut, tmp_path_factory) -> list[str]:
    """The lines of a build in which everything hangs once."""
    config = config_of(tmp_path_factory.mktemp("out") / "out", coconut=coconut, failures={"stall_s": STALL_S})
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    stalls.log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            (preflight, "check_output"),
            (coco_json, "read_document"),
            (photos, "read_pixels"),
            (owner, "_claim"),
            (registry, "load_backend"),
            (Worker, "_read_one"),
            (FilterStage, "run"),
            (EvidenceStore, "save"),
            (EvidenceStore, "load"),
            (writer, "_read_photo"),
            (writer, "table_bytes"),
            (writer, "_commit"),
            (reader, "read_ledger"),
            (plots, "draw_plots"),
            (card, "render_card"),
        ):
            sleep_once(patch, place, name)
        building.build(config)
    stalls.log.removeHandler(handler)
    for line in lines:
        Path(stack_of(line)).unlink()
    return lines


def stack_of(line: str) -> str:
    return line.partition("the stack is in ")[2].partition(";")[0]


@pytest.mark.parametrize(
    "words",
    [
        "checking the configuration",
        "planning coconut",
        "reading a sample of coconut, at 000000000000",
        "opening the output",
        "caption: starting the model",
        "source, unit coconut-000000, at 000000000000",
        "usable_masks, unit coconut-000000, at 000000000000",
        "caption, unit coconut-000000",
        "caption, unit coconut-000000, saving its evidence",
        "write, unit coconut-000000, at 000000000000",
        "write, unit coconut-000000, at its ledger",
        "commit, unit coconut/coconut-000000",
        "merge, at coconut/coconut-000000",
        "merge, at plots",
        "merge, at card",
    ],
)
@pytest.mark.soak
def test_whatever_hangs_is_told_with_step_unit_record_seconds_stack_and_what_to_do(told, words):
    line = next(line for line in told if line.startswith(f"{words}: "))
    assert re.fullmatch(
        r".*: no progress for \d s \(failures.stall_s\); the stack is in /\S+\.txt; if the step is only "
        r"slow, raise failures.stall_s; else press Ctrl-C: what is committed stays",
        line,
    )


def test_a_server_of_photos_that_does_not_answer_is_told_with_the_photo(tmp_path, coconut, caplog):
    slept: list[str] = []

    def hang(_: str, path: str) -> None:
        if path.endswith("000000000006.jpg") and not slept:
            slept.append(path)
            time.sleep(SLEEP_S)

    with serving(Path(coconut["photos"][0])) as server:
        remote = {**coconut, "photos": [server.url]}
        config = config_of(tmp_path / "out", coconut=remote, failures={"stall_s": STALL_S}, audit_images=0)
        server.fault = hang
        with caplog.at_level("ERROR"):
            assert build(config)["coconut"].kept == 40
        url = f"{server.url}/000000000006.jpg"
    assert slept
    lines = [line for line in caplog.messages if f"waiting for {url}: no progress" in line]
    assert lines and lines[0].startswith("source, unit coconut-000001, at 000000000006, ")
    Path(stack_of(lines[0])).unlink()


def test_a_signed_url_is_told_without_its_signature():
    now = Activity()
    with (
        now.during("source", "coconut-000000", "7"),
        now.touching("https://a.org/7.jpg?X-Amz-Signature=ab12"),
    ):
        assert now.words() == "source, unit coconut-000000, at 7, waiting for https://a.org/7.jpg?..."
    assert now.words() == ""


def test_the_file_that_is_waited_for_longest_is_named_whichever_thread_waits():
    now, ended = Activity(), threading.Event()

    def wait() -> None:
        with now.touching("/first"):
            ended.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    while not now._files:
        time.sleep(0.001)
    with now.during("commit"), now.touching("/second"):
        assert now.words() == "commit, waiting for /first"
    ended.set()
    thread.join()


# What the driver finds of its workers.


@pytest.fixture
def watch(tmp_path) -> Callable[[], str]:
    """The line with which a driver ends whose workers have not moved for 7 s."""

    class Silent:
        def named(self) -> list:
            return []

    def run() -> str:
        found = Watch(7.0)
        found.follow(Silent(), Progress("coconut", 1), tmp_path)  # type: ignore[arg-type]
        found.moved -= 7.1 + STALL_GRACE_S
        with pytest.raises(StageStalled) as raised:
            found.update(moved=False)
        return str(raised.value)

    return run


class Talking:
    """A run whose workers say something each time somebody asks."""

    def named(self) -> list:
        return [("w", Event(0.0, "batch"))]


@pytest.mark.parametrize("others", [True, False])
def test_a_subset_that_waits_is_no_stall_as_long_as_another_one_moves(tmp_path, others):
    class Silent:
        def named(self) -> list:
            return []

    found = Watch(7.0)
    for name, run in (("coconut", Silent()), ("sa1b", Talking() if others else Silent())):
        (tmp_path / name).mkdir()
        found.follow(run, Progress(name, 1), tmp_path / name)  # type: ignore[arg-type]
    (tmp_path / "sa1b" / "stack-caption-1.txt").write_text(f"caption, unit sa1b-000003\n{stalls.STACK_MARK}")
    found.moved -= 7.1 + STALL_GRACE_S
    if others:
        found.update(moved=False)
        assert found.moved > time.monotonic() - 1
    else:
        with pytest.raises(
            StageStalled, match=r"^caption, unit sa1b-000003: no progress .*sa1b/stack-caption"
        ):
            found.update(moved=False)


FIX = (
    "what is committed stays; run the same command again, and raise failures.stall_s if the step is only slow"
)


def test_a_worker_that_hangs_leaves_its_step_and_its_stack_in_the_folder_of_the_run(tmp_path, watch):
    path = tmp_path / "stack-write-1.txt"
    with StackFile(path, 0.2), NOW.during("write", "coconut-000003", "000000000012"):
        NOW.at("000000000013")
        time.sleep(0.5)
        line = watch()
        assert "test_stalls.py" in path.read_text()
    words = "write, unit coconut-000003, at 000000000013"
    assert line == f"{words}: no progress for 7 s (failures.stall_s); the stack is in {path}; {FIX}"


def test_a_stack_of_a_call_that_came_back_is_removed(tmp_path):
    path = tmp_path / "stack-write-1.txt"
    with StackFile(path, 0.1), NOW.during("write", "coconut-000003"):
        time.sleep(0.3)
        NOW.at("000000000013")
        assert stalls.STACK_MARK not in path.read_text()


def test_records_that_follow_each_other_leave_no_stack_and_are_progress(tmp_path):
    path, moved = tmp_path / "stack-source-1.txt", []
    with StackFile(path, 0.5, lambda: moved.append(NOW.step)), NOW.during("source", "coconut-000003"):
        for number in range(14):
            time.sleep(0.06)
            NOW.at(f"{number:012}")
        assert stalls.STACK_MARK not in path.read_text()
        assert "at 000000000013" in path.read_text()
    assert 3 <= len(moved) <= 14


def test_a_worker_whose_stack_the_output_takes_no_more_is_told_by_its_copy_on_this_machine(tmp_path, watch):
    (tmp_path / "stack-write-1.txt").write_text("write, unit coconut-000003, at 000000000012\n")
    with telling(0.1, run=tmp_path.name), NOW.during("write", "coconut-000003", "000000000012"):
        with NOW.touching("/mnt/out/coconut"):
            time.sleep(0.4)
            line = watch()
    words, _, rest = line.partition(": no progress for 7 s (failures.stall_s); ")
    assert words == "write, unit coconut-000003, at 000000000012, waiting for /mnt/out/coconut"
    stack = Path(stack_of(rest))
    assert "test_stalls.py" in stack.read_text() and rest.endswith(f"; {FIX}")
    stack.unlink()


def test_a_worker_on_another_machine_that_could_leave_no_stack_is_told_by_its_step(tmp_path, watch):
    (tmp_path / "stack-write-1.txt").write_text("write, unit coconut-000003, at 000000000012   \n")
    (tmp_path / "stack-write-2.txt").write_text("waiting for work   \n")
    line = watch()
    words = "write, unit coconut-000003, at 000000000012: no progress for 7 s (failures.stall_s)"
    assert line == f"{words}; its process could leave no stack; {FIX}"


def test_where_no_worker_is_at_work_ray_is_told_to_have_placed_none(tmp_path, watch):
    (tmp_path / "stack-write-2.txt").write_text("waiting for work   \n")
    assert watch().startswith(
        "no progress for 7 s (failures.stall_s); no worker is at work: Ray may have too few"
    )


# A corpus in a bucket: stacks are on scratch, and uploaded.


@pytest.fixture
def run(bucket_out) -> Prefix:
    found = locate(f"{bucket_out}/events/20260101-000000-coconut-abc")
    assert isinstance(found, Prefix)
    return found


@pytest.fixture
def watch_bucket(run) -> Callable[[], str]:
    def look() -> str:
        found = Watch(7.0)
        found.follow(EventReader(run), Progress("coconut", 1), run)
        found.moved -= 7.1 + STALL_GRACE_S
        found.update(moved=False)  # stacks come with the next events
        found.moved -= 60
        with pytest.raises(StageStalled) as raised:
            found.update(moved=False)
        return str(raised.value)

    return look


def test_a_stack_is_uploaded_next_to_the_events_and_named_from_another_node(
    run, watch_bucket, tmp_path, monkeypatch
):
    events = EventLog(run, "write")
    events.add_files(partial(stalls.read_stacks, str(run)))
    stack = stalls.stack_file(str(run), 0.2, "write", lambda: None)
    with stack, NOW.during("write", "coconut-000003", "000000000012"):
        time.sleep(0.5)
        events.close()
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch of the driver"))
    line = watch_bucket()
    words = "write, unit coconut-000003, at 000000000012: no progress for 7 s (failures.stall_s)"
    assert line == f"{words}; the stack is in {run / stack.path.name}; {FIX}"
    assert "test_stalls.py" in store_of(run).read(str(run / stack.path.name)).decode()


def test_a_worker_that_holds_pythons_lock_has_its_stack_uploaded_by_another_of_its_node(run, watch_bucket):
    """It writes the file by C code, and uploads nothing."""
    path = stalls.stack_file(str(run), 9, "caption", lambda: None).path
    path.write_text(f"caption, unit coconut-000001\n{stalls.STACK_MARK}")
    events = EventLog(run, "write")
    events.add_files(partial(stalls.read_stacks, str(run)))
    events.close()
    path.unlink()
    assert watch_bucket().startswith("caption, unit coconut-000001: no progress")


def test_a_stack_on_the_drivers_own_node_is_named_there_while_the_bucket_does_not_answer(
    faulty_s3, monkeypatch
):
    run = locate("s3://corpus/out/events/20260101-000000-coconut-abc")
    path = stalls.stack_file(str(run), 9, "caption", lambda: None).path
    path.write_text(f"caption, unit coconut-000001\n{stalls.STACK_MARK}")
    faulty_s3.fail("503", count=None)
    assert stalls.hanging(run) == [("caption, unit coconut-000001", path)]


def test_where_no_stack_was_uploaded_the_line_says_both_reasons(run, watch_bucket):
    line = watch_bucket()
    assert "no worker has uploaded a stack" in line and "`ray status`" in line
    assert f"the nodes do not reach {run.parent.parent} any more" in line


def test_events_that_cannot_be_read_end_nothing(faulty_s3):
    run = locate("s3://corpus/out/events/20260101-000000-coconut-abc")
    watch = Watch(7.0)
    watch.follow(EventReader(run), Progress("coconut", 1), run)
    faulty_s3.fail("503", count=None)
    watch.update(moved=False)
