"""The damaged work list of a corpus that has grown is made again, or it is said what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import plots, removal, verify
from paracaption.pipeline.corpus.work_list_summary import load_work_list, summary_path, table_path
from paracaption.pipeline.executor import driver
from paracaption.pipeline.sources.registry import complete
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests.building import calls, committed, config_of
from tests.pipeline.corpus.test_growth import finish, grow, named, records

GONE, REMOVED = "000000000000", "000000000003"


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "draw_plots", lambda _: dict.fromkeys(plots.NAMES, b"plot"))


@pytest.fixture
def grown(tmp_path) -> BuildConfig:
    """A corpus that has grown twice, with an image that is gone from its source and one that was removed."""
    config = config_of(tmp_path / "out", coconut=grow(tmp_path / "source", 6))
    finish(config)
    grow(tmp_path / "source", 8, first=1)
    finish(config)
    removal.remove(config.out, [REMOVED])
    return config


def images_of(out: Path) -> list[list[str]]:
    listed = load_work_list(out / "coconut")
    return [[entry.key for entry in listed.read_unit(index)] for index in range(listed.num_units)]


DAMAGES = {
    "the table is cut": lambda folder: table_path(folder).write_bytes(table_path(folder).read_bytes()[:-9]),
    "the table is gone": lambda folder: table_path(folder).unlink(),
    "the summary is damaged": lambda folder: summary_path(folder).write_bytes(b"{"),
    "the folder is gone": lambda folder: shutil.rmtree(folder / "plan"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.soak(keep=1)
def test_it_is_made_again_and_no_unit_is_touched(grown, tmp_path, damage):
    out = tmp_path / "out"
    before, images, listed = committed(out), images_of(out), load_work_list(out / "coconut")
    asked = calls(tmp_path / "captioner.log")
    DAMAGES[damage](out / "coconut")
    finish(grown)
    assert committed(out) == before and calls(tmp_path / "captioner.log") == asked
    again = load_work_list(out / "coconut")
    assert images_of(out) == images and again.plans() == listed.plans()
    assert (again.steps, again.gone_examples) == (listed.steps, [GONE])
    assert verify.verify(out).ok, verify.verify(out).text()
    assert driver.is_finished(complete(grown))
    grow(tmp_path / "source", 10, first=1)
    DAMAGES[damage](out / "coconut")
    finish(grown)
    assert images_of(out) == [*images, ["000000000009", "000000000010"]]
    assert {path: committed(out)[path] for path in before} == before
    assert {row["drop_reason"] for (_, key, _), row in records(out).items() if key == REMOVED} == {"removed"}
    assert verify.verify(out).ok, verify.verify(out).text()


def test_a_new_image_does_not_take_the_key_of_an_old_one_meanwhile(tmp_path):
    root, out = tmp_path / "source", tmp_path / "out"
    old = named(root, "m/a", "m/b", listed="old.json")
    finish(config_of(out, coconut=old))
    new = named(root, "c/a", listed="new.json")
    both = config_of(out, coconut=old | {"annotations": [*new["annotations"], *old["annotations"]]})
    finish(both)
    before = committed(out)
    table_path(out / "coconut").unlink()
    finish(both)
    assert committed(out) == before


@pytest.mark.soak
def test_other_sources_are_refused_until_it_is_made_again(grown, tmp_path):
    out = tmp_path / "out"
    table_path(out / "coconut").unlink()
    moved = config_of(out, coconut=grow(tmp_path / "elsewhere", 8, first=1))
    with pytest.raises(IntegrityError, match=r"configured otherwise.*config\.yaml.*or restore plan/"):
        finish(moved)
    smaller = grown.model_copy(update={"images_per_shard": 2})
    with pytest.raises(IntegrityError, match="images_per_shard was 4, is now 2"):
        finish(smaller)
    finish(grown)
    finish(moved)
    assert verify.verify(out).ok, verify.verify(out).text()


@pytest.mark.soak
def test_images_whose_removal_was_not_complete_do_not_come_back(grown, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(removal.writer, "commit", die)
        removal.remove(str(out), ["000000000005"])
    table_path(out / "coconut").unlink()
    with pytest.raises(IntegrityError, match=r"a removal of images was not complete: coconut-000001"):
        finish(grown)
    with pytest.raises((ConfigError, IntegrityError)):
        removal.remove(str(out), ["000000000005"])
