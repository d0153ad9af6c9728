"""Scratch of a corpus on this machine: bounded, a user's own, and cleaned of what dead processes left."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paracaption.pipeline.io import scratch
from paracaption.pipeline.io.process_identity import this_process
from paracaption.pipeline.io.scratch import IN_MEMORY_BYTES, Staged, clean, folder_of, make_room, note_driver
from paracaption.schemas.errors import ConfigError

OUT = "s3://bucket/corpus"


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch"))
    monkeypatch.setattr(scratch, "_cleaned", {})
    return tmp_path / "scratch"


def test_a_corpus_has_one_folder_and_another_corpus_another(home):
    folder = folder_of(OUT)
    assert folder == folder_of(f"{OUT}/") and folder.is_dir() and folder.is_relative_to(home)
    assert folder.name.startswith("bucket-corpus-")
    assert folder_of("s3://bucket-corpus") != folder != folder_of("az://bucket/corpus")
    assert (folder.parent.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o700, 0o700)


def test_without_the_variable_it_is_in_the_systems_folder_for_temporary_files(monkeypatch, tmp_path):
    monkeypatch.delenv(scratch.VARIABLE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert folder_of(OUT).is_relative_to(tmp_path)


def test_a_folder_that_others_may_write_is_refused(home):
    root = folder_of(OUT).parent
    root.chmod(0o777)
    with pytest.raises(ConfigError, match=f"{root}.*{scratch.VARIABLE}"):
        folder_of(OUT)
    shutil.rmtree(root)
    root.symlink_to(home)
    with pytest.raises(ConfigError, match=scratch.VARIABLE):
        folder_of(OUT)


def test_a_folder_that_cannot_be_made_is_a_line(home):
    home.write_bytes(b"")
    with pytest.raises(ConfigError, match=scratch.VARIABLE):
        folder_of(OUT)


@pytest.mark.soak
def test_few_bytes_stay_in_memory_and_many_go_to_a_file_that_is_discarded(home):
    staged = Staged(OUT, "a.tar")
    assert staged.write(b"x" * IN_MEMORY_BYTES) == IN_MEMORY_BYTES
    assert staged.content() == b"x" * IN_MEMORY_BYTES
    assert not [path for path in home.rglob("*") if path.is_file()]
    staged.write(memoryview(b"yz"))
    path = staged.content()
    assert isinstance(path, Path) and path.read_bytes() == b"x" * IN_MEMORY_BYTES + b"yz"
    assert staged.size == IN_MEMORY_BYTES + 2 and "a.tar" in path.name
    staged.discard()
    assert not path.exists()
    staged.discard()


_STAGING = """
import sys
from paracaption.pipeline.io.process_identity import this_process
from paracaption.pipeline.io.scratch import IN_MEMORY_BYTES, Staged
staged = Staged(sys.argv[1], "a.tar")
staged.write(bytes(IN_MEMORY_BYTES + 1))
print(staged.content(), flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_by_the_next_one_and_no_living_ones():
    command = [sys.executable, "-c", _STAGING, OUT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    try:
        killed, living = (Path(process.stdout.readline().strip()) for process in processes)
        processes[0].kill()
        processes[0].wait()
        note = folder_of(OUT) / "notes.json"
        note.write_bytes(b"1")
        assert killed.is_file() and living.is_file()
        Staged(OUT, "b.tar")
        assert not killed.exists() and not killed.parent.exists()
        assert living.is_file() and note.is_file()
        assert clean(OUT) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    end = time.monotonic() + 10
    while living.exists() and time.monotonic() < end:
        clean(OUT)
    assert not living.exists() and note.is_file()


def test_what_a_dead_run_left_is_removed_and_no_living_ones():
    """A run is its driver's; where only its workers were, it is old when nothing was written for a day."""
    started = subprocess.Popen([sys.executable, "-c", ""])
    dead = this_process()._replace(pid=started.pid)
    started.wait()
    runs = {name: folder_of(OUT) / "events" / name for name in ("dead", "living", "elsewhere", "old")}
    for name, run in runs.items():
        run.mkdir(parents=True)
        (run / "stack-caption-1.txt").write_text("waiting for work")
        if name in ("dead", "living"):
            note_driver(run)
    (runs["dead"] / "driver").write_text(scratch._folder_name(dead))
    for path in (runs["old"] / "stack-caption-1.txt", runs["old"]):
        os.utime(path, (time.time() - 90_000,) * 2)
    assert clean(OUT) > 0
    assert {name for name, run in runs.items() if run.exists()} == {"living", "elsewhere"}


def test_a_full_disk_is_refused_before_it_is_full(home, monkeypatch):
    folder = folder_of(OUT)
    make_room(folder, 1)
    with pytest.raises(OSError, match=scratch.VARIABLE) as caught:
        make_room(folder, 1 << 60)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(folder)
    staged = Staged(OUT, "a.tar")
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 << 20))
    with pytest.raises(OSError, match="10 MiB are free") as caught:
        staged.write(os.urandom(IN_MEMORY_BYTES + 1))
    assert caught.value.errno == errno.ENOSPC
    staged.discard()
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_the_free_space_is_looked_at_again_while_a_large_file_grows(monkeypatch):
    monkeypatch.setattr(scratch, "_STEP_BYTES", 1 << 20)
    staged = Staged(OUT, "a.tar")
    staged.write(bytes(IN_MEMORY_BYTES + 1))
    usage = shutil.disk_usage(folder_of(OUT))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(OSError, match="0 MiB are free"):
        for _ in range(5):
            staged.write(bytes(1 << 19))
    staged.discard()


def test_what_an_earlier_container_left_is_removed_after_a_day(home, monkeypatch):
    monkeypatch.setattr(scratch, "this_process", lambda: this_process()._replace(name_space="pid:[1]"))
    for name in ("a.tar", "b.tar"):
        staged = Staged(OUT, name)
        staged.write(bytes(IN_MEMORY_BYTES + 1))
    path = staged.content()
    assert isinstance(path, Path)
    assert clean(OUT) == 0 and path.exists(), "it may be alive"
    for each in (path.parent, *path.parent.iterdir()):
        os.utime(each, (time.time() - 90_000,) * 2)
    assert clean(OUT) > 2 * IN_MEMORY_BYTES and not path.parent.exists()
