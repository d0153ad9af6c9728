"""Subsets that are built side by side: the same bytes as one after the other, and each fails alone.

All but the bytes of Ray's own engine is shown without Ray, by an engine that mixes units as Ray's does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from paracaption.pipeline.corpus import utilization
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.progress import Progress
from paracaption.pipeline.models import registry
from paracaption.pipeline.stages.registry import allow_stages
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import StageFailed, UnitsHeldBack
from tests.building import build, calls, committed, config_of
from tests.pipeline.executor.conformance import Conformance, Interrupted, unit_of
from tests.pipeline.executor.side_by_side import SideBySide


@pytest.mark.soak
class TestSideBySide(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return SideBySide()

    @pytest.mark.soak
    def test_the_sample_by_the_embedded_backends_is_equal_to_the_last_byte(self, engine, tmp_path):
        super().test_the_sample_by_the_embedded_backends_is_equal_to_the_last_byte(engine, tmp_path)


def backend(root: Path, protocol: str, cls: str, num_cpus: float = 0.1, **options: Any) -> dict[str, Any]:
    """An entry's own backend. Another `num_cpus` is another pool, as another GPU would be."""
    return {
        "name": cls,
        "num_cpus": num_cpus,
        "concurrency": [1, 1],
        "options": {"log": str(root / f"{protocol}.log"), **options},
    }


def mixed(root: Path, coconut: dict, sa1b: dict, recipes: Mapping[str, Any] = {}) -> BuildConfig:
    """Both subsets, each model in a pool of its own, and recipes of their own where these are given."""
    values = config_of(root / "out", coconut=coconut, sa1b=sa1b, apart=True).model_dump(mode="json")
    for subset, recipe in recipes.items():
        values["subsets"][subset]["recipe"] = recipe
    config = BuildConfig.model_validate(values)
    allow_stages(config.subsets.values())
    return config


def other(root: Path, **more: Any) -> dict[str, Any]:
    """A captioner with a pool of its own."""
    made = backend(root, "other", "tests.picky:OtherCaptioner", 0.15, **more)
    return {"stage": "caption", "id": "other", "captioner": made}


RECIPES: dict[str, Any] = {
    "the paper's two": lambda root: {},
    "in another order": lambda root: {
        "coconut": ["usable_masks", other(root), "verify_category", "caption", "clean_text"]
    },
    "two captioners": lambda root: {"sa1b": ["usable_masks", other(root), "extract_category"]},
    "a stage of one's own": lambda root: {
        "sa1b": ["caption", {"stage": "tests.own_stages:EvenRegions", "id": "even"}, "extract_category"]
    },
    "a judge that is asked twice": lambda root: {
        "coconut": ["caption", "verify_category", {"stage": "verify_category", "id": "again"}, "clean_text"]
    },
}


@pytest.mark.parametrize("recipes", RECIPES.values(), ids=RECIPES)
@pytest.mark.soak(keep=1)
def test_mixed_subsets_are_equal_to_the_last_byte(tmp_path, coconut, sa1b, recipes):
    found = {}
    for name, engine in (("one", LocalEngine()), ("other", SideBySide())):
        root = tmp_path / name
        build(mixed(root, coconut, sa1b, recipes(root)), engine)
        found[name] = committed(root / "out")
    assert found["one"] == found["other"] and len(found["one"]) == 3 * (3 + 2)
    paid = {name: sorted(calls(tmp_path / name / "captioner.log")) for name in found}
    assert paid["one"] == paid["other"] and len(paid["one"]) == len(set(paid["one"]))


@pytest.mark.soak
def test_a_model_of_several_subsets_and_stages_is_loaded_once(tmp_path, coconut, sa1b, monkeypatch):
    loaded: list[str] = []

    def load(protocol, backend, plain=registry.load_backend):
        loaded.append(protocol)
        return plain(protocol, backend)

    monkeypatch.setattr(registry, "load_backend", load)
    again = {"stage": "verify_category", "id": "again"}
    recipe = ["usable_masks", "caption", "verify_category", again, "clean_text"]
    config = config_of(tmp_path / "out", coconut=coconut, sa1b=sa1b)
    values = config.model_dump(mode="json")
    values["subsets"]["coconut"]["recipe"] = recipe
    build(BuildConfig.model_validate(values), SideBySide())
    assert sorted(loaded) == ["captioner", "judge", "segmenter"]
    started = {}
    for subset, (run,) in utilization.list_runs(tmp_path / "out").items():
        events = list(EventReader(run).new())
        started[subset] = {event.stage: event.seconds for event in events if event.what == "started"}
    assert list(started["coconut"]) == ["caption", "verify_category", "again"]
    assert list(started["sa1b"]) == ["caption", "extract_category", "agree_with_segmenter"]
    assert started["coconut"]["caption"] == started["sa1b"]["caption"] > 0
    assert started["coconut"]["again"] == 0.0, "a stage does not pay for the model of the one before it"


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.soak
def test_a_mixed_build_that_is_interrupted_after_any_unit_is_resumed(tmp_path, coconut, sa1b, at):
    reference = tmp_path / "reference"
    build(mixed(reference, coconut, sa1b), LocalEngine())
    config = mixed(tmp_path, coconut, sa1b)
    done: dict[str, int] = {}

    def look(progress: Progress) -> None:
        done[progress.subset] = progress.done
        if sum(done.values()) >= at:
            raise Interrupted

    from paracaption.pipeline.executor import committer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committer, "COMMIT_EVERY_S", 0.0)
        with pytest.raises(Interrupted):
            build(config, SideBySide(), on_progress=look)
    units = {path.stem for path in (tmp_path / "out").glob("*/manifests/*.json")}
    assert len(units) == at
    assert at == 1 or len({unit.partition("-")[0] for unit in units}) == 2, "both subsets get ahead"
    build(config, SideBySide())
    assert committed(tmp_path / "out") == committed(reference / "out")
    asked = calls(tmp_path / "captioner.log")
    assert not units & {unit_of(call) for call in asked if asked.count(call) > 1}


# One subset fails.


def failing(root: Path, coconut: dict, sa1b: dict, what: str) -> BuildConfig:
    """SA-1B has a captioner of its own, on which `what` happens; it stops after two units."""
    config = mixed(root, coconut, sa1b, {"sa1b": ["caption", "extract_category"]})
    values = config.model_dump(mode="json")
    made = backend(root, "own", "tests.backends:InstantCaptioner", 0.15, misbehave={"*": what})
    values["subsets"]["sa1b"]["recipe"][0] = {"stage": "caption", "captioner": made}
    values["failures"] |= {"stop_after_units": 1, "unit_retries": 0}
    return BuildConfig.model_validate(values)


@pytest.mark.soak
def test_a_subset_that_fails_ends_alone_and_the_other_is_committed(tmp_path, coconut, sa1b, caplog):
    fixed = tmp_path / "fixed"
    config = failing(tmp_path, coconut, sa1b, f"raise-unless:{fixed}")
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(StageFailed, match=r"caption: failed on every image of 1 units in a row.*sa1b-"),
    ):
        build(config, SideBySide())
    (line,) = [each.message for each in caplog.records if "ends here" in each.message]
    assert line.startswith("sa1b ends here, coconut goes on: caption: failed on every image")
    units = {path.parent.name for path in (tmp_path / "out").glob("*/manifests/*.json")}
    assert len(list((tmp_path / "out/coconut/manifests").iterdir())) == 3
    assert not list((tmp_path / "out/sa1b/manifests").iterdir()), units
    assert not list((tmp_path / "out").glob("*/shards/.tmp-*"))
    sources = [
        event.unit
        for run in utilization.list_runs(tmp_path / "out")["sa1b"]
        for event in EventReader(run).new()
        if event.what == "unit" and event.stage == "source"
    ]
    assert sources == ["sa1b-000000"], "what comes after the failure is not run"
    fixed.touch()
    build(config, SideBySide())
    build(reference := failing(tmp_path / "reference", coconut, sa1b, "nothing"), LocalEngine())
    assert {path: digest for path, digest in committed(tmp_path / "out").items() if "sa1b" not in path} == {
        path: digest for path, digest in committed(Path(reference.out)).items() if "sa1b" not in path
    }


def test_a_model_that_cannot_start_ends_the_subset_that_asks_it(tmp_path, coconut, sa1b):
    config = failing(tmp_path, coconut, sa1b, "nothing")
    values = config.model_dump(mode="json")
    values["subsets"]["sa1b"]["recipe"][0]["captioner"]["options"] = {"no_such_option": 1}
    with pytest.raises(StageFailed, match=r"^caption: the backend cannot start: TypeError"):
        build(BuildConfig.model_validate(values), SideBySide())
    assert len(list((tmp_path / "out/coconut/manifests").iterdir())) == 3


def test_units_on_which_a_stage_failed_are_not_trusted_if_another_subset_failed(tmp_path, coconut, sa1b):
    config = config_of(
        tmp_path / "out",
        coconut=coconut,
        sa1b=sa1b,
        captioner={"misbehave": {"*": "raise"}},
        failures={"unit_retries": 0},
    )
    with pytest.raises(StageFailed, match="3 units in a row"):
        build(config, SideBySide())
    assert committed(tmp_path / "out") == {}, "sa1b has only two units, and is not dropped for that"


def test_both_fail_and_the_build_stops_with_the_first(tmp_path, coconut, sa1b):
    config = config_of(tmp_path / "out", coconut=coconut, sa1b=sa1b, captioner={"no_such_option": 1})
    with pytest.raises(StageFailed, match=r"the backend cannot start"):
        build(config, SideBySide())
    assert committed(tmp_path / "out") == {}


@pytest.mark.soak
def test_units_of_a_source_that_fails_are_held_back_and_the_other_subset_goes_on(tmp_path, coconut, sa1b):
    config = mixed(tmp_path, coconut, sa1b)
    away = dict(coconut) | {"photos": [str(tmp_path / "photos")]}
    values = config.model_dump(mode="json")
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in Path(coconut["photos"][0]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    values["subsets"]["coconut"]["sources"] = [{"source": "coconut", **away}]
    config = BuildConfig.model_validate(values)

    def go_away(progress: Progress) -> None:
        if progress.done and folder.exists():
            folder.rename(tmp_path / "gone")

    with pytest.raises(UnitsHeldBack, match="held back"):
        build(config, SideBySide(), on_progress=go_away)
    assert len(list((tmp_path / "out/sa1b/manifests").iterdir())) == 2
    (tmp_path / "gone").rename(folder)
    build(config, SideBySide())
    assert len(list((tmp_path / "out/coconut/manifests").iterdir())) == 3
