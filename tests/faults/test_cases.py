"""What once lost, falsified or left something; more of each kind is in the files beside this one."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paracaption.pipeline.corpus import log, merge, plots, reader, verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.build import build_checked
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import files
from paracaption.pipeline.io.store import FolderStore
from paracaption.schemas.errors import ParaCaptionError
from tests.building import committed, config_of
from tests.synthetic import jpeg, write_coconut


def build(config, **asked) -> None:
    """As `paracaption build`, in this process."""
    asked = {"limit_images": None, "retry_failed": False, **asked}
    build_checked(config, LocalEngine(), driver.build, **asked)


def looser(config):
    return config.model_copy(update={"text": config.text.model_copy(update={"min_words": 4})})


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def kept(out: Path) -> list[int]:
    return [manifest.kept for _, manifest in reader.Corpus(out).manifests()]


def temporary(out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in out.rglob(f"{files.TEMPORARY}*")]


def killed(do: Callable[[], object], prepare: Callable[[], object]) -> bool:
    """Run in a process of its own; whether `prepare` has made it die on the way."""
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            do()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the process must not go on as a second test run
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), "it failed, and was not killed"
    return code == 9


def die_at(call: int, names: tuple[str, ...] = ("create", "put", "move", "keep", "delete")) -> None:
    """From now on this process dies before the given call to the store that changes something."""
    left = [call]

    def dying(plain):
        def run(self, *arguments):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return plain(self, *arguments)

        return run

    for name in names:
        setattr(FolderStore, name, dying(getattr(FolderStore, name)))


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """They take longer than all the rest."""
    monkeypatch.setattr(plots, "draw_plots", lambda _: dict.fromkeys(plots.NAMES, b"drawn"))


@pytest.fixture
def place(tmp_path):
    """A folder with a source and the corpus of three units that was built from it."""
    write_coconut(tmp_path / "src", 6)
    build(config_at(tmp_path))
    return tmp_path


def config_at(folder: Path, **changes):
    root = folder / "src"
    source = {
        "annotations": [str(root / "panoptic.json")],
        "labels": str(root / "labels"),
        "photos": [str(root / "photos")],
    }
    return config_of(folder / "out", coconut=source, images_per_shard=2, **changes)


# A refused command changes nothing.


def with_source(config, **changes):
    (source,) = config.subsets["coconut"].sources
    given = {key: value for key, value in {**source, **changes}.items() if key != "source"}
    values = config.model_dump()
    del values["subsets"]
    return type(config).model_validate({**values, "coconut": [given]})


def other_images(config, place):
    write_coconut(place / "other", 5, num_masks=2)
    root = place / "other"
    return with_source(
        config,
        annotations=[str(root / "panoptic.json")],
        labels=str(root / "labels"),
        photos=[str(root / "photos")],
    )


def order_of_photos(config, place):
    """The first folder counts; a copy of each photo in front is another corpus."""
    shutil.copytree(place / "src/photos", place / "src/more")
    both = with_source(config, photos=[str(place / "src/photos"), str(place / "src/more")])
    build(both)
    return with_source(config, photos=[str(place / "src/more"), str(place / "src/photos")])


def roles(config, place):
    return with_source(config, labels=str(place / "src/photos"), photos=[str(place / "src/labels")])


def source_is_not_there(config, place):
    return with_source(config, annotations=[str(place / "src/no.json")])


def broken_annotations(config, place):
    (place / "src/panoptic.json").write_text("{")
    return config


def source_in_the_output(config, place):
    shutil.copytree(place / "src/photos", place / "out/photos")
    return with_source(config, photos=[str(place / "out/photos")])


def unit_size(config, place):
    return config.model_copy(update={"images_per_shard": 3})


def unknown_option(config, place):
    judge = config.judge.model_copy(update={"options": {"no_such_option": 1}})
    return config.model_copy(update={"judge": judge})


def unknown_backend(config, place):
    return config.model_copy(update={"judge": config.judge.model_copy(update={"name": "no_such_judge"})})


@pytest.mark.parametrize(
    "mistake",
    [
        other_images,
        order_of_photos,
        roles,
        source_is_not_there,
        broken_annotations,
        source_in_the_output,
        unit_size,
        unknown_option,
        unknown_backend,
    ],
)
@pytest.mark.soak
def test_a_build_that_is_refused_changes_no_byte_of_the_corpus(place, mistake):
    wrong = looser(mistake(config_at(place), place))
    before = tree(place / "out")
    with pytest.raises(ParaCaptionError):
        build(wrong)
    assert tree(place / "out") == before
    if mistake not in (unknown_option, unknown_backend):  # the driver alone asks no backend before it starts
        with pytest.raises(ParaCaptionError):
            driver.build(wrong, LocalEngine())
        assert tree(place / "out") == before


@pytest.mark.parametrize("mistake", [source_is_not_there, broken_annotations, unknown_option])
def test_a_first_build_that_is_refused_makes_no_folder(tmp_path, mistake):
    write_coconut(tmp_path / "src", 2)
    with pytest.raises(ParaCaptionError):
        build(mistake(config_at(tmp_path), tmp_path))
    assert not (tmp_path / "out").exists()


# Kills.


@pytest.mark.parametrize("at", [2, 5, 8, 10, 12, 15])
@pytest.mark.soak
def test_a_driver_that_dies_while_it_replaces_units_loses_none_if_the_photos_are_away_then(place, at):
    config = looser(config_at(place))
    died = killed(lambda: build(config), lambda: die_at(at))
    assert died
    assert kept(place / "out") == [8, 8, 8]
    shutil.rmtree(place / "src/photos")
    (place / "src/photos").mkdir()
    build(config)
    assert kept(place / "out") == [8, 8, 8]
    assert len({manifest.recipe for _, manifest in reader.Corpus(place / "out").manifests()}) == 1
    assert temporary(place / "out") == []
    report = verify.verify(place / "out")
    assert report.ok, report.text()


def die_in_the_index() -> None:
    def die(*_):
        os._exit(9)

    merge._flush = die


@pytest.mark.parametrize("again", ["build", "merge"])
@pytest.mark.parametrize("command", ["build", "merge"])
@pytest.mark.soak
def test_a_merge_that_is_killed_leaves_no_temporary_file_after_the_next_command(place, command, again):
    config = config_at(place)
    before = committed(place / "out")
    config = looser(config) if command == "build" else config
    do = {"build": lambda: build(config), "merge": lambda: merge.merge(place / "out")}
    assert killed(do[command], die_in_the_index)
    assert temporary(place / "out"), "nothing was left, so nothing is shown"
    do[again]()
    assert temporary(place / "out") == []
    assert committed(place / "out").keys() == before.keys()
    assert verify.verify(place / "out").ok


# File systems without locks.


@pytest.mark.parametrize("call", ["flock", "lockf", "fcntl"])
@pytest.mark.soak
def test_a_file_system_without_locks_is_built_on(tmp_path, monkeypatch, call):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    write_coconut(tmp_path / "src", 4)
    monkeypatch.setattr(fcntl, call, refuse)
    build(config_at(tmp_path))
    build(looser(config_at(tmp_path)))
    merge.merge(tmp_path / "out")
    assert kept(tmp_path / "out") == [8, 8]
    assert verify.verify(tmp_path / "out").ok


# Good shards stay.


def photos_are_gone(place):
    shutil.rmtree(place / "src/photos")
    (place / "src/photos").mkdir()


def photos_are_empty(place):
    for path in (place / "src/photos").iterdir():
        path.write_bytes(b"")


def photos_are_cut(place):
    for path in (place / "src/photos").iterdir():
        path.write_bytes(path.read_bytes()[:700])


def labels_are_gone(place):
    shutil.rmtree(place / "src/labels")
    (place / "src/labels").mkdir()


def labels_are_empty(place):
    for path in (place / "src/labels").iterdir():
        path.write_bytes(b"")


def photos_are_placeholders(place):
    for path in (place / "src/photos").iterdir():
        path.write_bytes(jpeg(np.zeros((40, 60, 3), np.uint8)))


def labels_are_of_another_release(place):
    for path in (place / "src/labels").iterdir():
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(path)


@pytest.mark.parametrize(
    "away",
    [
        photos_are_placeholders,
        labels_are_of_another_release,
        photos_are_gone,
        photos_are_empty,
        photos_are_cut,
        labels_are_gone,
        labels_are_empty,
    ],
)
@pytest.mark.soak
def test_a_rebuild_without_its_sources_replaces_no_good_unit(place, away):
    good = {name: data for name, data in committed(place / "out").items() if "/shards/" in name}
    away(place)
    try:
        build(looser(config_at(place)))
    except ParaCaptionError as error:
        assert "\n" not in str(error)
    assert kept(place / "out") == [8, 8, 8]
    assert good.items() <= committed(place / "out").items()
    assert verify.verify(place / "out").ok
    assert log.read_state(str(place / "out")).units.keys() == {f"coconut/coconut-{n:06}" for n in range(3)}
