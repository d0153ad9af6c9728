"""What every engine does: the promises of a build, asked of whichever engine a subclass gives.

    class TestMine(Conformance):
        @pytest.fixture(scope="class")
        @classmethod
        def engine(cls):
            return MyEngine()

Few builds and much asked of each, since an engine may take seconds for one. What a driver does whatever the
engine is in `test_driver.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import verify
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.engine import Engine
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.progress import Progress
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import StageFailed
from tests.building import build, calls, committed, config_of, drops
from tests.synthetic import write_coconut, write_sa1b

SAMPLE = Path(__file__).resolve().parents[3] / "samples" / "build.yaml"
MODELS = {
    "coconut": {"caption", "verify_category"},
    "sa1b": {"caption", "extract_category", "agree_with_segmenter"},
}


class Interrupted(Exception):
    """A driver that stops in the middle."""


def started(out: Path) -> list[set[str]]:
    """The models that were loaded in each run, in the order of the runs."""
    runs = [list(EventReader(run).new()) for run in (out / "events").iterdir()]
    runs.sort(key=lambda events: min(event.time_s for event in events))
    return [{event.stage for event in events if event.what == "started"} for events in runs]


def paid(out: Path) -> dict[str, list[str]]:
    """Every call of a test backend, by protocol."""
    return {name: calls(out.parent / f"{name}.log") for name in ("captioner", "judge", "segmenter")}


def unit_of(call: str) -> str:
    """The unit that a captioner's call belongs to."""
    key = call.partition("/")[0]
    subset, number = ("sa1b", key.removeprefix("sa_")) if key.startswith("sa_") else ("coconut", key)
    return f"{subset}-{int(number) // 4:06d}"


def stop_after_a_unit(config: BuildConfig, engine: Engine) -> None:
    """Build as far as the first committed unit."""

    def look(progress: Progress) -> None:
        if progress.done:
            raise Interrupted

    with pytest.raises(Interrupted):
        build(config, engine, on_progress=look)


class Conformance:
    """The tests of an engine; a subclass has the fixture `engine`."""

    @pytest.fixture(scope="class")
    @classmethod
    def sources(cls, tmp_path_factory) -> dict[str, dict]:
        root = tmp_path_factory.mktemp("source")
        return {"coconut": write_coconut(root / "coconut", 10), "sa1b": write_sa1b(root / "sa1b", 6)}

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, sources, tmp_path_factory) -> dict[str, str]:
        """What the local engine commits for both sources, undisturbed."""
        out = tmp_path_factory.mktemp("reference") / "out"
        build(config_of(out, **sources), LocalEngine())
        return committed(out)

    def test_the_sample_by_the_embedded_backends_is_equal_to_the_last_byte(self, engine, tmp_path):
        found = {}
        for name, chosen in (("one", engine), ("other", LocalEngine())):
            out = tmp_path / name
            driver.build(load_config(SAMPLE).model_copy(update={"out": str(out)}), chosen)
            found[name] = committed(out) | {"index": (out / "index.parquet").read_bytes()}
        assert found["one"] == found["other"]
        kinds = {path.partition("/")[2].partition("/")[0] for path in found["one"]}
        assert kinds >= {"shards", "ledger", "manifests"}
        report = verify.verify(tmp_path / "one")
        assert report.ok, report.text()

    def test_each_region_is_asked_about_once_and_other_thresholds_load_no_model(
        self, engine, sources, reference, tmp_path
    ):
        out = tmp_path / "out"
        loose = config_of(out, **sources, min_iou=0.5)
        done = build(loose, engine)
        assert done["coconut"].regions == 40 == done["coconut"].kept + sum(done["coconut"].dropped.values())
        assert done["sa1b"].regions == 24
        assert (done["coconut"].done, done["sa1b"].done) == (3, 2)
        assert committed(out) == reference and len(reference) == 3 * (3 + 2)
        asked = paid(out)
        assert {name: len(lines) for name, lines in asked.items()} == {
            "captioner": 64,
            "judge": 64,
            "segmenter": 24,
        }
        assert len(set(asked["captioner"])) == 64
        assert started(out) == [MODELS["coconut"], MODELS["sa1b"]]
        strict = loose.model_copy(update={"text": loose.text.model_copy(update={"min_words": 60})})
        done = build(strict, engine)
        assert done["coconut"].dropped == {"clean_text/text_too_short": 40}
        assert done["sa1b"].dropped["clean_text/text_too_short"] == done["sa1b"].regions - sum(
            n for reason, n in done["sa1b"].dropped.items() if not reason.startswith("clean_text")
        )
        assert started(out)[2:] == [set(), set()]
        assert paid(out) == asked

    @pytest.mark.parametrize("begins", [True, False], ids=["begun by it", "finished by it"])
    def test_what_one_engine_begins_another_finishes(self, engine, sources, reference, tmp_path, begins):
        config = config_of(tmp_path / "out", **sources)
        first, second = (engine, LocalEngine()) if begins else (LocalEngine(), engine)
        stop_after_a_unit(config, first)
        units = list((tmp_path / "out").glob("*/manifests/*.json"))
        assert 1 <= len(units) < 3 + 2
        build(config, second)
        assert committed(tmp_path / "out") == reference
        asked = paid(tmp_path / "out")["captioner"]
        assert len(set(asked)) == 64
        done = {path.stem for path in units}
        again = {line for line in asked if asked.count(line) > 1}
        assert not done & set(map(unit_of, again))

    def test_records_that_fail_are_dropped_with_their_errors_and_tried_again_on_request(
        self, engine, sources, reference, tmp_path
    ):
        mended = tmp_path / "mended"
        wrong = {"000000000001": "bad", "000000000005": f"raise-unless:{mended}"}
        out = tmp_path / "out"
        config = config_of(out, **sources, captioner={"misbehave": wrong})
        done = build(config, engine)
        assert done["coconut"].dropped == {"caption/model_error": 4, "caption/photo_unreadable": 4}
        assert done["sa1b"].regions == 24 and not done["sa1b"].dropped.keys() & {"caption/model_error"}
        found = drops(out, "coconut")
        assert found["000000000005", 0] == (
            "caption", "model_error", "RuntimeError: cannot caption 000000000005",
        )  # fmt: skip
        assert found["000000000001", 3] == ("caption", "photo_unreadable", "000000000001 is bad")
        asked = paid(out)["captioner"]
        mended.touch()
        again = build(config, engine, retry_failed=True)
        assert (again["coconut"].pending, again["coconut"].regions, again["coconut"].kept) == (2, 32, 28)
        assert "sa1b" not in again
        assert sorted(paid(out)["captioner"][len(asked) :]) == [f"000000000005/{i}" for i in range(4)]

    def test_a_stage_that_fails_on_everything_stops_the_build_and_nothing_of_it_is_committed(
        self, engine, sources, tmp_path
    ):
        config = config_of(tmp_path / "out", **sources, captioner={"misbehave": {"*": "raise"}})
        told = r"caption: failed on every image of 3 units in a row.*cannot caption"
        with pytest.raises(StageFailed, match=told):
            build(config, engine)
        assert committed(tmp_path / "out") == {}
        assert not list((tmp_path / "out" / "coconut").glob("shards/.tmp-*"))

    def test_a_backend_that_cannot_start_is_one_clear_error(self, engine, sources, tmp_path):
        config = config_of(tmp_path / "out", **sources, captioner={"no_such_option": 1})
        told = r"caption: the backend cannot start: TypeError.*no_such_option"
        with pytest.raises(StageFailed, match=told) as raised:
            build(config, engine)
        assert "\n" not in str(raised.value)
        assert committed(tmp_path / "out") == {}
