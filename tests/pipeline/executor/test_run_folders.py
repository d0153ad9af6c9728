"""Where the machines of a build keep what only they need, and for how long."""

from __future__ import annotations

import os
import time

import pytest

from paracaption.pipeline.executor.run_folders import forget_old, local_folder, run_folder
from paracaption.pipeline.io import scratch

OUT = "s3://bucket/corpus"


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_a_corpus_in_a_folder_has_its_notes_and_stacks_in_it(tmp_path):
    out = tmp_path / "out"
    assert local_folder(str(out), "coconut/journal/caption") == out / "coconut/journal/caption"
    assert run_folder(str(out / "events/run")) == out / "events/run"
    assert (out / "events/run").is_dir() and (out / "coconut/journal/caption").is_dir()


def test_a_corpus_in_a_bucket_has_them_on_scratch(home):
    folder = scratch.folder_of(OUT)
    assert local_folder(OUT, "coconut/journal/caption") == folder / "coconut/journal/caption"
    assert run_folder(f"{OUT}/events/run") == folder / "events/run"


def test_what_nobody_has_written_to_for_a_day_is_removed_but_for_the_runs_that_go_on():
    stack, note = "stack-caption-node-1.txt", "coconut-000000.json"
    old = [
        run_folder(f"{OUT}/events/ended") / stack,
        local_folder(OUT, "coconut/journal/caption") / note,
    ]
    kept = [
        run_folder(f"{OUT}/events/goes-on") / stack,
        run_folder(f"{OUT}/events/new") / stack,
        local_folder(OUT, "coconut/journal/source") / note,
    ]
    for path in (*old, *kept):
        path.write_text("{}")
    for path in (*old, kept[0]):
        os.utime(path, (time.time() - 90_000,) * 2)
    forget_old(OUT, ["goes-on"])
    assert not any(path.parent.exists() for path in old) and all(path.exists() for path in kept)


def test_nothing_of_a_corpus_in_a_folder_is_ever_removed(tmp_path):
    path = run_folder(str(tmp_path / "out/events/ended")) / "stack-caption-node-1.txt"
    path.write_text("")
    os.utime(path, (0, 0))
    forget_old(str(tmp_path / "out"), [])
    assert path.exists()
