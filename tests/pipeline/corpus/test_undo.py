"""What an undo takes back when the configuration never changed: changed sources, retries, and no removal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import plots, reader, removal, undo, verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from tests.building import committed, config_of
from tests.pipeline.corpus.test_growth import finish, grow, records


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "draw_plots", lambda _: dict.fromkeys(plots.NAMES, b"plot"))


@pytest.fixture
def built(tmp_path) -> BuildConfig:
    config = config_of(tmp_path / "out", coconut=grow(tmp_path / "source", 6))
    finish(config)
    return config


def change(root: Path, image: int) -> None:
    """Take an object of an image out of the source."""
    listed = json.loads((root / "panoptic.json").read_text())
    listed["annotations"][image]["segments_info"].pop()
    (root / "panoptic.json").write_text(json.dumps(listed))


def take_back(config: BuildConfig) -> list[str]:
    rebuild = undo.find_rebuild(config.out)
    undo.undo(config.out, rebuild)
    return rebuild.units


@pytest.mark.soak
def test_a_rebuild_that_a_changed_source_caused_is_taken_back(built, tmp_path):
    out = tmp_path / "out"
    before = committed(out)
    change(tmp_path / "source", 1)
    finish(built)
    after = committed(out)
    assert take_back(built) == ["coconut/coconut-000000"]
    assert committed(out) == before and before != after
    (problem,) = verify.verify(out).problems  # the source is still the changed one
    assert "1 units have images that were changed" in problem.what and "build" in problem.what
    take_back(built)
    assert committed(out) == after
    take_back(built)
    finish(built)  # the source is as changed as it was
    assert committed(out) == after


@pytest.mark.soak
def test_of_two_changes_of_a_source_the_last_one_is_taken_back(built, tmp_path):
    out = tmp_path / "out"
    for image in (1, 5):
        before = committed(out)
        change(tmp_path / "source", image)
        finish(built)
    assert take_back(built) == ["coconut/coconut-000001"]
    assert committed(out) == before


@pytest.mark.soak
def test_a_source_that_changes_before_a_rebuild_is_complete_belongs_to_it(built, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = committed(out)
    stricter = built.model_copy(update={"text": built.text.model_copy(update={"min_words": 30})})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(driver.merge, "merge", die)
        finish(stricter)
    change(tmp_path / "source", 1)
    finish(stricter)
    assert len(take_back(stricter)) == 2
    assert committed(out) == before


@pytest.mark.soak
def test_retries_alone_are_taken_back(tmp_path):
    out, fixed = tmp_path / "out", tmp_path / "fixed"
    fails = {"000000000001": f"raise-unless:{fixed}"}
    config = config_of(out, coconut=grow(tmp_path / "source", 6), captioner={"misbehave": fails})
    finish(config)
    before = committed(out)
    fixed.touch()
    driver.build(config, LocalEngine(), retry_failed=True)
    assert committed(out) != before
    assert take_back(config) == ["coconut/coconut-000000"]
    assert committed(out) == before
    grow(tmp_path / "source", 9)
    with pytest.raises(ConfigError, match="nothing to undo"):
        finish(other := config_of(tmp_path / "other", coconut=grow(tmp_path / "source", 9)))
        undo.find_rebuild(other.out)


@pytest.mark.soak
def test_an_image_whose_removal_died_before_a_rebuild_does_not_come_back(built, tmp_path, monkeypatch):
    gone = "000000000001"

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(removal.writer, "commit", die)
        removal.remove(built.out, [gone])
    finish(built.model_copy(update={"text": built.text.model_copy(update={"min_words": 30})}))
    assert take_back(built) == ["coconut/coconut-000001"]
    assert {row["drop_reason"] for (_, key, _), row in records(tmp_path / "out").items() if key == gone} == {
        "removed"
    }


@pytest.mark.soak
def test_a_rebuild_whose_unit_lost_an_image_on_request_is_not_taken_back_and_says_why(built, tmp_path):
    change(tmp_path / "source", 1)
    finish(built)
    key = next(reader.open_corpus(built.out).samples())[0].key
    removal.remove(built.out, [key])
    with pytest.raises(ConfigError, match="removed on request from what the last rebuild changed"):
        undo.find_rebuild(built.out)
