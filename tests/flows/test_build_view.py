"""What a build shows on a terminal and in a pipe while it runs."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console

from paracaption.flows.cli import progress as view
from paracaption.flows.cli.progress import BuildView, draw_build
from paracaption.pipeline.executor.progress import Progress, StageProgress

STAGES = {
    "coconut": ("source", "usable_masks", "caption", "verify_category", "clean_text", "write"),
    "sa1b": (
        *("source", "usable_masks", "whole_objects", "caption", "extract_category"),
        *("agree_with_segmenter", "clean_text", "write"),
    ),
}


def large(subset: str, done: int = 400) -> Progress:
    """A subset with numbers as large as real ones."""
    return Progress(
        subset,
        pending=1180,
        done=done,
        images=done * 100,
        regions=done * 2000,
        kept=done * 1500,
        seconds=4000.0,
        stages={name: StageProgress(done, done * 2000, done * 1500, 400.0) for name in STAGES[subset]},
        dropped=Counter({"usable_masks/mask_too_small": 12345, "clean_text/text_too_short": 123}),
    )


def drawn(*subsets: Progress, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(draw_build(list(subsets)))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_two_subsets_side_by_side_fit_on_a_terminal_of_80_columns_and_24_lines():
    lines = drawn(large("coconut"), large("sa1b", 300))
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.index("coconut: 400 of 1,180 units") < text.index("sa1b: 300 of 1,180 units")
    assert text.count("800,000   600,000") == len(STAGES["coconut"]), "no number is cut"
    assert text.count("600,000   450,000") == len(STAGES["sa1b"])


def test_of_a_subset_that_has_ended_a_line_is_left():
    ended = large("coconut", 1180)
    ended.ended = True
    lines = drawn(ended, large("sa1b"))
    assert lines[0].startswith("coconut: 1,180 of 1,180 units") and "left" not in lines[0]
    assert not [line for line in lines if "verify_category" in line]
    assert [line for line in lines if "extract_cate" in line]


def test_one_subset_is_drawn_with_its_stages_alone():
    assert not [line for line in drawn(large("coconut"))[2:] if "coconut" in line]


def test_in_a_pipe_each_subset_has_a_line_now_and_then_and_one_at_its_end(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: clock[0])
    with BuildView() as shown:
        for done in range(60):
            clock[0] += 1.0
            for subset in STAGES:
                shown.show(large(subset, done))
        for subset in STAGES:
            shown.show(large(subset, 1180))
    lines = [line for line in capsys.readouterr().err.splitlines() if " units" in line]
    assert [line.split(" units")[0] for line in lines] == [
        "coconut: 0 of 1,180",
        "sa1b: 0 of 1,180",
        "coconut: 31 of 1,180",
        "sa1b: 31 of 1,180",
        "coconut: 1,180 of 1,180",
        "sa1b: 1,180 of 1,180",
    ]


def test_the_time_left_is_nothing_once_a_subset_has_ended():
    found = large("coconut")
    assert found.seconds_left == pytest.approx(4000 / 400 * 780)
    found.ended = True
    assert found.seconds_left == 0
