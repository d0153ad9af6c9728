"""The idle shares of a mixed build: what is counted, and a small run of the measurement."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks import mixed
from paracaption.pipeline.corpus.events import Event
from paracaption.pipeline.executor.estimate.predict import estimate_build
from tests.pipeline.executor.estimate.cases import MIXED, mixed_config, mixed_rates


def write_run(out: Path, number: int, subset: str, events: list[Event]) -> None:
    folder = out / "events" / f"2026010{number}-000000-{subset}-x"
    folder.mkdir(parents=True)
    (folder / "worker.jsonl").write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def call(stage: str, begin_s: float, end_s: float) -> Event:
    return Event(end_s, "unit", stage, seconds=end_s - begin_s, busy=end_s - begin_s)


def around(begun_s: float, ready_s: float, last_s: float) -> list[Event]:
    times = {"begun": begun_s, "ready": ready_s, "committed": last_s, "ended": last_s}
    return [Event(time_s, what) for what, time_s in times.items()]


def test_a_pool_is_idle_from_the_first_start_up_to_the_last_commit_where_it_is_not_in_a_call(tmp_path):
    write_run(
        tmp_path,
        1,
        "coconut",
        [
            *around(0, 10, 60),
            call("caption", 10, 40),
            call("caption", 20, 60),
            call("verify_category", 40, 45),
        ],
    )
    write_run(
        tmp_path,
        2,
        "sa1b",
        [*around(60, 80, 110), call("caption", 80, 100), call("agree_with_segmenter", 100, 110)],
    )
    measured = mixed.measure(tmp_path, mixed_config())
    assert (measured.up_s, measured.last_s) == (10, 110)
    assert measured.idle_share("captioner", 2, 10, 110) == pytest.approx(1 - 90 / 200)
    assert measured.idle_share("judge", 1, 10, 110) == pytest.approx(0.95)
    assert measured.idle_share("segmenter", 1, 10, 110) == pytest.approx(0.9)


def test_side_by_side_all_models_are_up_when_those_of_both_subsets_are(tmp_path):
    judge = call("verify_category", 40, 45)
    write_run(tmp_path, 1, "coconut", [*around(0, 10, 60), call("caption", 10, 40), judge])
    segmenter = call("agree_with_segmenter", 50, 70)
    write_run(tmp_path, 2, "sa1b", [*around(1, 12, 70), call("caption", 20, 50), segmenter])
    measured = mixed.measure(tmp_path, mixed_config())
    assert (measured.up_s, measured.last_s) == (12, 70)
    assert measured.idle_share("captioner", 1, 20, 30) == pytest.approx(-1), "two calls at once on one actor"
    assert measured.steady("captioner") is None, "its last call begins before the segmenter's first"
    later = call("caption", 60, 65)
    write_run(tmp_path, 3, "sa1b", [*around(1, 12, 70), later])
    assert mixed.measure(tmp_path, mixed_config()).steady("captioner") == (50, 60)


def test_a_call_counts_for_the_part_of_the_build_that_it_is_in():
    half = mixed.Call(end_s=20, seconds=10, busy_s=5)
    assert half.busy_within(0, 30) == 5
    assert half.busy_within(15, 30) == half.busy_within(0, 15) == 2.5
    assert half.busy_within(20, 30) == half.busy_within(0, 10) == 0


def test_the_table_has_what_was_predicted_beside_what_was_measured():
    estimated = estimate_build(mixed_config(), mixed_rates(), MIXED)
    span_s = estimated.wall_s
    calls = {
        use.title: [mixed.Call(span_s, span_s, use.busy_s / use.actors)] * use.actors
        for use in estimated.pools
        if use.gpus
    }
    result = mixed.compare(mixed.Measured(0, span_s, calls), estimated)
    assert result.bottleneck == "captioner" and result.predicted_s == result.took_s == span_s
    for row in result.rows:
        assert row.whole == pytest.approx(row.predicted)
    lines = result.table().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["captioner", "judge", "segmenter"]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("order", ["one after the other", "side by side"])
def test_a_small_mixed_build_is_measured_beside_its_prediction(order, tmp_path):
    command = [sys.executable, "-m", "benchmarks.mixed", "--shrink", "8000"]
    if order == "one after the other":
        command.append("--apart")
    done = subprocess.run(
        [*command, "--folder", tmp_path], capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stderr
    assert f"subsets {order}: predicted" in done.stdout
    rows = re.findall(r"\| (\w+) \| (\d) \| (-?[\d.]+)% \| (-?[\d.]+)% \|", done.stdout)
    assert [row[:2] for row in rows] == [("captioner", "6"), ("judge", "1"), ("segmenter", "1")]
    assert all(0 <= float(share) <= 100 for _, _, *shares in rows for share in shares)
