"""Paths on real disks: names that look like patterns, links that go in circles, closed folders."""

import errno
import os
from pathlib import Path

import fsspec
import pytest

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.executor.places import refuse_overlap
from paracaption.pipeline.io import backends, files
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return str(path)


@pytest.mark.parametrize("folder", ["data [1]", "what?", "all*", "[a-z]", "a[1]/b[2]"])
@pytest.mark.parametrize("name", ["a.json", "a [2].json", "b?.json"])
@pytest.mark.soak(keep=3)
def test_a_path_that_exists_is_that_path_before_it_is_a_pattern(tmp_path, folder, name):
    path = touch(tmp_path / folder / name)
    touch(tmp_path / "data 1" / name)  # what the pattern would name
    assert files.expand(path) == [path]
    assert files.expand(f"file://{path}") == [path]
    assert files.expand(str(tmp_path / folder)) == [str(tmp_path / folder)]
    touch(tmp_path / folder / "other.txt")
    assert files.expand(str(tmp_path / folder / "*.json")) == [path]


def test_what_no_file_is_called_is_still_a_pattern(tmp_path):
    one, two = touch(tmp_path / "data [1]" / "sa_1.tar"), touch(tmp_path / "data [1]" / "sa_2.tar")
    assert files.expand(str(tmp_path / "data [1]" / "sa_[12].tar")) == [one, two]
    assert files.expand(str(tmp_path / "data*" / "sa_?.tar")) == [one, two]
    assert files.expand(str(tmp_path / "data [2]" / "*.tar")) == []


def test_relative_patterns_are_seen_from_a_folder_with_brackets(tmp_path, monkeypatch):
    touch(tmp_path / "data [1]" / "a.json")
    monkeypatch.chdir(tmp_path / "data [1]")
    assert files.expand("*.json") == ["a.json"]
    assert files.expand("../data [1]/*.json") == ["../data [1]/a.json"]


def test_names_of_a_store_are_names_before_they_are_patterns():
    store = fsspec.filesystem("memory")
    for name in ("data [1]/a.tar", "data [1]/b.tar", "data 1/c.tar"):
        store.pipe(f"/bucket/{name}", name.encode())
    try:
        where = "memory:///bucket/data [1]"
        assert files.expand(f"{where}/a.tar") == [f"{where}/a.tar"]
        assert files.expand(f"{where}/*.tar") == [f"{where}/a.tar", f"{where}/b.tar"]
        assert files.expand("memory:///bucket/data [2]/*.tar") == []
        assert list(files.read_many([f"{where}/a.tar", f"{where}/b.tar"])) == [
            b"data [1]/a.tar",
            b"data [1]/b.tar",
        ]
    finally:
        store.rm("/bucket", recursive=True)


def test_an_output_inside_a_source_is_found_in_folders_with_brackets(tmp_path):
    home = tmp_path / "data [1]"
    home.mkdir()
    config = BuildConfig.model_validate(
        {"out": str(home / "out"), "sa1b": [{"paths": [f"{home}/*/sa1b/shards/*.tar"]}]}
    )
    with pytest.raises(ConfigError, match="matches what a build writes"):
        refuse_overlap(config)


def names(folder: Path) -> list[str]:
    return sorted(relative for _, relative in files.walk(str(folder)))


def test_no_folder_is_entered_inside_itself(tmp_path):
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "sub" / "b.jpg")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "sub" / "up").symlink_to("..")
    assert names(tmp_path) == ["a.jpg", "sub/b.jpg"]


def test_folders_that_link_to_each_other_are_listed_within_a_second(tmp_path):
    count = 12  # with every order of them, 12! paths
    for own in range(count):
        touch(tmp_path / f"d{own}" / "a.jpg")
        for other in range(count):
            (tmp_path / f"d{own}" / f"to{other}").symlink_to(f"../d{other}")
    found = names(tmp_path)
    assert {f"d{own}/a.jpg" for own in range(count)} <= set(found)
    assert len(found) <= 2 * count * count
    assert found == names(tmp_path)


def test_links_to_folders_elsewhere_are_followed_each(tmp_path):
    touch(tmp_path / "elsewhere" / "x" / "1.jpg")
    for name in ("a", "b"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).symlink_to("../elsewhere")
    assert names(tmp_path / "photos") == ["a/x/1.jpg", "b/x/1.jpg"]


def test_a_link_that_leads_nowhere_is_a_file_that_nobody_can_open(tmp_path):
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    assert names(tmp_path) == ["gone.jpg", "self.jpg"]


def closed(monkeypatch, folder: Path) -> None:
    """As for a user who may not read the folder; tests may run as root, who may."""
    scan = os.scandir

    def scandir(path: str = "."):
        if os.path.realpath(path) == str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(backends.os, "scandir", scandir)


def test_a_closed_folder_is_an_error_that_names_it_and_lost_and_found_is_none(tmp_path, monkeypatch):
    touch(tmp_path / "a.jpg")
    (tmp_path / "lost+found").mkdir()
    closed(monkeypatch, tmp_path / "lost+found")
    assert names(tmp_path) == ["a.jpg"]
    (tmp_path / "private").mkdir()
    closed(monkeypatch, tmp_path / "private")
    with pytest.raises(PermissionError, match="private"):
        names(tmp_path)


def test_a_named_pipe_is_neither_a_file_nor_a_folder_and_is_not_waited_for(tmp_path):
    pipe = tmp_path / "photo.jpg"
    os.mkfifo(pipe)
    for read in (files.read_mapped, lambda path: files.read(Blob(path))):
        with pytest.raises(OSError, match="neither a file nor a folder"):
            read(str(pipe))
    with pytest.raises(ConfigError, match=f"^{pipe} is a pipe; give the YAML file$"):
        load_config(pipe)


def test_a_pipe_that_a_shell_makes_is_a_configuration(tmp_path):
    read, write = os.pipe()
    os.write(write, f"out: {tmp_path}/out\nsa1b: [{{paths: [a.tar]}}]\n".encode())
    os.close(write)
    try:
        assert load_config(f"/dev/fd/{read}").out == str(tmp_path / "out")
    finally:
        os.close(read)


def test_a_folder_whose_name_is_not_utf_8_is_one_line(tmp_path):
    folder = tmp_path / "n\udcff"
    folder.mkdir()
    (folder / "c.yaml").write_text("out: out\nsa1b: [{paths: [a.tar]}]\n")
    with pytest.raises(ConfigError, match="out: a name on its path is not UTF-8, and cannot be stored"):
        load_config(folder / "c.yaml")
