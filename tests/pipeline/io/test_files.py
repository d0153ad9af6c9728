"""A folder appears whole and durable, or not at all, whatever ends its writer."""

import errno
import os
import signal
from pathlib import Path

import pytest

from paracaption.pipeline.io import files
from paracaption.schemas.errors import ConfigError


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def write(target: Path, text: str = "new", **options) -> None:
    before = target.exists() and content(target)
    with files.write_folder_atomic(target, **options) as folder:
        (folder / "a").write_text(text)
        (folder / "in").mkdir()
        (folder / "in" / "b").write_text(text)
        assert (target.exists() and content(target)) == before


def test_a_folder_appears_with_all_that_was_written_and_nothing_is_left_over(tmp_path):
    write(tmp_path / "new" / "target")
    assert content(tmp_path / "new" / "target") == {"a": "new", "in/b": "new"}
    assert hidden(tmp_path / "new") == []


def test_every_file_and_folder_is_on_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    synced, real = [], files._sync

    def sync(path):
        synced.append((path.name, (tmp_path / "target").exists()))
        real(path)

    monkeypatch.setattr(files, "_sync", sync)
    write(tmp_path / "target")
    partial = synced[-2][0]
    assert partial.endswith(".partial")
    assert sorted(synced[:-1]) == sorted((name, False) for name in ("a", "in", "b", partial))
    assert synced[-1] == (tmp_path.name, True)


def test_a_block_that_raises_leaves_nothing_and_what_was_there_stays(tmp_path):
    for options in ({}, {"replace": True}):
        with (
            pytest.raises(KeyboardInterrupt),
            files.write_folder_atomic(tmp_path / "target", **options) as folder,
        ):
            (folder / "a").write_text("half")
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []
    write(tmp_path / "target", "old")
    with pytest.raises(OSError), files.write_folder_atomic(tmp_path / "target", replace=True):
        raise OSError("the disk is gone")
    assert content(tmp_path / "target") == {"a": "old", "in/b": "old"} and hidden(tmp_path) == []


def test_a_folder_that_is_there_is_refused_unless_it_is_empty_or_to_be_replaced(tmp_path):
    (tmp_path / "target").mkdir()
    write(tmp_path / "target", "old")
    with pytest.raises(ConfigError, match="target: already exists; move it away"):
        write(tmp_path / "target")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file: already exists"):
        write(tmp_path / "file")
    assert content(tmp_path / "target") == {"a": "old", "in/b": "old"}
    write(tmp_path / "target", replace=True)
    assert content(tmp_path / "target") == {"a": "new", "in/b": "new"} and hidden(tmp_path) == []


def test_of_two_writers_the_second_does_not_replace_the_first(tmp_path):
    with pytest.raises(OSError), files.write_folder_atomic(tmp_path / "target") as folder:
        (folder / "a").write_text("second")
        write(tmp_path / "target", "first")
    assert content(tmp_path / "target") == {"a": "first", "in/b": "first"} and hidden(tmp_path) == []


def killed(target: Path, **options) -> Path:
    """What a process that was killed while it wrote has left behind."""
    child = os.fork()
    if not child:
        with files.write_folder_atomic(target, **options) as folder:
            (folder / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not target.exists()
    (left,) = hidden(target.parent)
    return left


@pytest.mark.soak
def test_what_a_killed_writer_left_is_removed_when_nobody_has_touched_it_for_hours(tmp_path):
    left = killed(tmp_path / "target")
    write(tmp_path / "target")
    assert left.exists(), "it may be another writer's, at work"
    os.utime(left, (0, 0))
    write(tmp_path / "other")
    assert left.exists(), "it is another target's"
    write(tmp_path / "target", replace=True)
    assert hidden(tmp_path) == []


@pytest.mark.soak
def test_what_the_only_writer_of_a_target_left_is_removed_at_once(tmp_path):
    temporary = tmp_path / ".target.partial"
    assert killed(tmp_path / "target", temporary=temporary) == temporary
    with files.write_folder_atomic(tmp_path / "target", temporary=temporary) as folder:
        assert folder == temporary and content(folder) == {}
        (folder / "b").write_text("new")
    assert content(tmp_path / "target") == {"b": "new"} and hidden(tmp_path) == []


def stop_between_renames(monkeypatch, what) -> None:
    """Let the rename that gives the new folder its name do `what` instead."""
    real = os.replace

    def replace(source, target):
        if Path(source).name == ".target.partial":
            what()
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)


def test_a_replacement_that_fails_between_its_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "target", "old")

    def fail():
        raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        stop_between_renames(patch, fail)
        write(tmp_path / "target", replace=True, temporary=tmp_path / ".target.partial")
    assert content(tmp_path / "target") == {"a": "old", "in/b": "old"} and hidden(tmp_path) == []


@pytest.mark.soak
def test_the_next_writer_puts_back_what_one_killed_between_its_renames_had_moved_aside(tmp_path, monkeypatch):
    write(tmp_path / "target", "old")
    options = {"replace": True, "temporary": tmp_path / ".target.partial"}
    child = os.fork()
    if not child:
        stop_between_renames(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        write(tmp_path / "target", **options)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "target").exists() and len(hidden(tmp_path)) == 2
    with pytest.raises(KeyboardInterrupt), files.write_folder_atomic(tmp_path / "target", **options):
        raise KeyboardInterrupt
    assert content(tmp_path / "target") == {"a": "old", "in/b": "old"} and hidden(tmp_path) == []
