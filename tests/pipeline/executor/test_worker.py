"""One worker without Ray: what it notes, what it asks, what it drops, and what it tells the driver."""

from typing import Any

import msgspec
import pytest

from paracaption.pipeline.corpus import work_list, writer
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.corpus.writer import Draft
from paracaption.pipeline.executor import rows
from paracaption.pipeline.executor.worker import Job, Unit, Worker
from paracaption.pipeline.io import failures
from paracaption.pipeline.io.json_lines import LineWriter
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages import recipes
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.pipeline.stages.masks import UsableMasks
from paracaption.schemas import errors
from paracaption.schemas.errors import EngineLost
from paracaption.schemas.reasons import Reason
from tests.building import calls, config_of
from tests.pipeline.executor.images import die, image
from tests.synthetic import write_coconut

NUM_IMAGES = 6
FIFTH = "000000000004"


@pytest.fixture(scope="module")
def coconut(tmp_path_factory):
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", num_images=NUM_IMAGES)


class Bench:
    """A worker with all stages of COCONut, and the row of its only unit."""

    def __init__(self, root, source, **changes):
        self.root, self.out = root, root / "out"
        self.config = config_of(self.out, coconut=source, images_per_shard=NUM_IMAGES, **changes)
        self.folder = self.out / "coconut"
        self.run = self.out / "events" / "000"
        self.run.mkdir(parents=True, exist_ok=True)
        writer.prepare(self.folder)
        self.plan = work_list.make_work_list(open_source(self.config, "coconut"), self.config, self.folder)
        self.stages = recipes.recipe_of(self.config, "coconut")
        self.row = {"unit": self.plan.unit_name(0), "index": 0}

    def worker(self, steps=None) -> Worker:
        job = Job(self.config, "coconut", str(self.folder), self.plan.digest, "recipe", str(self.run))
        return Worker(job, steps or ["source", *self.stages, "write"])

    def model(self, worker: Worker, stage: str) -> Any:
        return worker.models.get(self.stage(stage))

    def put(self, worker: Worker, stage: str, model: Any) -> None:
        """Have a model asked that no configuration names."""
        worker.models.put(self.stage(stage), model)

    def stage(self, name: str) -> ModelStage:
        return next(s for s in self.stages if isinstance(s, ModelStage) and s.name == name)

    def draft(self) -> Draft:
        return msgspec.msgpack.decode(self.worker()(self.row)["draft"], type=Draft)

    def failed(self) -> str:
        return self.worker()(self.row)["failed"]

    def note(self, stage: str, **content) -> None:
        model = next(s for s in self.stages if s.name == stage)
        path = self.folder / "journal" / f"{stage}-{model.evidence_digest}" / f"{self.row['unit']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(content))

    def captioned(self) -> set[str]:
        """Images whose captions are in the evidence store."""
        model = next(s for s in self.stages if s.name == "caption")
        store = EvidenceStore(self.folder / "evidence" / f"caption-{model.evidence_digest}", model.evidence)
        return {key for key, _ in store.load(self.row["unit"])}

    def events(self, what: str):
        return [event for event in EventReader(self.run).new() if event.what == what]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_judge_with_a_wrong_number_of_answers_is_an_error(tmp_path, coconut, count):
    from paracaption.pipeline.models.protocols import Answer

    class Miscounting:
        def ask(self, questions):
            return [Answer("yes", 1.0)] * count

    judge = next(s for s in Bench(tmp_path, coconut).stages if s.name == "verify_category")
    with pytest.raises(ValueError, match=f"asked 2 questions, answered {count}"):
        judge.ask(Miscounting(), [image("i0", num_regions=2)])


def test_a_caption_that_is_no_text_is_a_drop_and_not_the_end(tmp_path, coconut):
    class Numbering:
        def caption(self, images):
            return [[7 if each.key == FIFTH else "a red thing" for _ in each.live()] for each in images]

    bench = Bench(tmp_path, coconut, failures={"unit_retries": 0})
    worker = bench.worker()
    bench.put(worker, "caption", Numbering())
    draft = msgspec.msgpack.decode(worker(bench.row)["draft"], type=Draft)
    assert draft.manifest.dropped["caption/model_error"] >= 1 and draft.failures == {}
    assert FIFTH not in bench.captioned() and len(bench.captioned()) == NUM_IMAGES - 1


def test_a_unit_becomes_a_draft_that_is_not_committed(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)
    draft = bench.draft()
    assert (draft.manifest.regions_in, draft.manifest.kept, draft.failures) == (24, 24, {})
    assert list((bench.folder / "manifests").glob("*.json")) == []
    assert not list((bench.folder / "journal").rglob("*.json"))


def test_a_failing_image_is_dropped_and_the_evidence_of_the_others_is_saved(tmp_path, coconut):
    bench = Bench(tmp_path, coconut, captioner={"misbehave": {FIFTH: "raise"}})
    draft = bench.draft()
    assert draft.manifest.dropped == {"caption/model_error": 4}
    assert draft.failures == {}, "the unit is not to blame for one image"
    assert len(bench.captioned()) == NUM_IMAGES - 1 and FIFTH not in bench.captioned()


def test_saved_evidence_is_not_asked_for_again(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)
    first = bench.draft().manifest
    paid = calls(tmp_path / "captioner.log")
    assert bench.draft().manifest == first
    assert calls(tmp_path / "captioner.log") == paid


def test_a_unit_on_which_all_fails_is_tried_again_with_a_fresh_model(tmp_path, coconut, monkeypatch):
    bench = Bench(tmp_path, coconut, captioner={"misbehave": {"*": "raise"}}, failures={"unit_retries": 2})
    loads = []
    monkeypatch.setattr(Worker, "_load", _counting(Worker._load, loads))
    draft = bench.draft()
    assert loads.count("caption") == 1 + 2
    assert draft.failures["caption"].startswith("RuntimeError: cannot caption")
    assert draft.manifest.dropped == {"caption/model_error": 24}
    assert bench.captioned() == set()


def test_a_retry_that_succeeds_leaves_no_failure(tmp_path, coconut, monkeypatch):
    mark = tmp_path / "mended"
    bench = Bench(tmp_path, coconut, captioner={"misbehave": {"*": f"raise-unless:{mark}"}})
    loads = []

    def load(self, stage, plain=Worker._load):
        loads.append(stage.name)
        if loads.count("caption") == 2:
            mark.touch()
        plain(self, stage)

    monkeypatch.setattr(Worker, "_load", load)
    draft = bench.draft()
    assert (draft.manifest.kept, draft.failures, loads.count("caption")) == (24, {}, 2)


def test_bad_records_alone_are_not_retried(tmp_path, coconut, monkeypatch):
    bench = Bench(tmp_path, coconut, captioner={"misbehave": {"*": "bad"}})
    loads = []
    monkeypatch.setattr(Worker, "_load", _counting(Worker._load, loads))
    draft = bench.draft()
    assert (loads.count("caption"), draft.failures) == (1, {})
    assert draft.manifest.dropped == {"caption/photo_unreadable": 24}


def test_one_bad_photo_does_not_hide_a_broken_model(tmp_path, coconut):
    misbehave = {"*": "raise", FIFTH: "bad"}
    draft = Bench(tmp_path, coconut, captioner={"misbehave": misbehave}).draft()
    assert draft.manifest.dropped == {"caption/model_error": 20, "caption/photo_unreadable": 4}
    assert draft.failures["caption"].startswith("RuntimeError: cannot caption")


def test_known_evidence_speaks_for_the_model(tmp_path, coconut):
    Bench(tmp_path, coconut, captioner={"misbehave": {FIFTH: "raise"}}).draft()
    again = Bench(tmp_path, coconut, captioner={"misbehave": {"*": "raise"}}).draft()
    assert again.manifest.dropped == {"caption/model_error": 4}
    assert again.failures == {}


def test_an_engine_that_is_lost_is_started_anew_and_costs_no_record(tmp_path, coconut, monkeypatch):
    bench = Bench(tmp_path, coconut, captioner={"batch_images": 2})
    loads = []
    monkeypatch.setattr(Worker, "_load", _counting(Worker._load, loads))
    worker = bench.worker()
    lost = bench.model(worker, "caption")
    monkeypatch.setattr(lost, "caption", lambda _: (_ for _ in ()).throw(EngineLost("gone")))
    draft = msgspec.msgpack.decode(worker(bench.row)["draft"], type=Draft)
    assert (draft.manifest.kept, loads.count("caption")) == (24, 2)


def test_an_engine_lost_on_an_image_alone_is_tried_again_before_the_image_is_dropped(
    tmp_path, coconut, monkeypatch
):
    bench = Bench(tmp_path, coconut, captioner={"batch_images": 1})
    worker = bench.worker()
    caption = type(bench.model(worker, "caption")).caption
    left = {FIFTH: 2, "000000000001": 99}

    def dies(self, images):
        if left.get(images[0].key, 0) > 0:
            left[images[0].key] -= 1
            raise EngineLost("gone")
        return caption(self, images)

    monkeypatch.setattr(type(bench.model(worker, "caption")), "caption", dies)
    draft = msgspec.msgpack.decode(worker(bench.row)["draft"], type=Draft)
    assert (draft.manifest.kept, draft.manifest.dropped) == (20, {"caption/model_error": 4})
    assert left == {FIFTH: 0, "000000000001": 96}


def test_a_backend_that_cannot_start_again_fails_this_unit_and_the_next(tmp_path, coconut, monkeypatch):
    bench = Bench(tmp_path, coconut, captioner={"misbehave": {"*": "raise"}})
    worker = bench.worker()

    def gone(*_):
        raise OSError("no such device")

    monkeypatch.setattr("paracaption.pipeline.models.registry.load_backend", gone)
    for _ in range(2):
        told = worker(bench.row)["failed"]
        assert told.startswith("StageFailed: caption: the backend cannot start: OSError: no such device; ")


def test_a_backend_that_cannot_start_is_told_by_a_row_that_passes_through(tmp_path, coconut):
    bench = Bench(tmp_path, coconut, captioner={"no_such_option": 1})
    row = bench.worker()(bench.row)
    assert row["unit"] == bench.row["unit"]
    assert row["failed"].startswith("StageFailed: caption: the backend cannot start: TypeError")
    assert Bench(tmp_path / "sound", coconut).worker(["write"])(row) is row


def test_an_image_that_killed_too_often_is_dropped_unasked(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)
    bench.note("caption", deaths={FIFTH: 2}, working=[FIFTH])
    assert bench.draft().manifest.dropped == {"caption/worker_crashed": 4}
    assert not [line for line in calls(tmp_path / "captioner.log") if line.startswith(FIFTH)]


def test_a_unit_whose_every_image_kills_is_a_failure_of_the_stage(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)
    bench.note("caption", deaths={f"{number:012d}": 3 for number in range(NUM_IMAGES)}, working=[])
    assert bench.draft().failures == {"caption": "the worker died 3 times while it had only this image"}


def test_a_record_that_kills_the_reader_is_dropped_as_an_image(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)
    for _ in range(3):
        die(bench.folder / "journal" / "source", [FIFTH], attempts=3, unit=bench.row["unit"])
    record = bench.draft().manifest
    assert record.images_dropped == {Reason.WORKER_CRASHED: 1}
    assert (record.regions_in, record.kept) == (20, 20)


def test_a_record_that_the_source_trips_over_is_dropped_as_an_image(tmp_path, coconut, monkeypatch):
    bench = Bench(tmp_path, coconut)
    worker = bench.worker()
    (source,) = worker.source.sources
    plain = source.fill

    def fill(image, entry, limits, notes):
        plain(image, entry, limits, notes)
        if entry.key == FIFTH:
            raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(source, "fill", fill)
    record = msgspec.msgpack.decode(worker(bench.row)["draft"], type=Draft).manifest
    assert record.images_dropped == {Reason.ANNOTATION_UNREADABLE: 1}
    assert (record.regions_in, record.kept, record.failed) == (24, 20, {})


def test_a_filter_that_raises_drops_its_image_alone(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)

    class Tripping(UsableMasks):
        def decide(self, image):
            if image.key == FIFTH:
                raise KeyError("hole")
            return super().decide(image)

    bench.stages[0] = Tripping(bench.config)
    record = bench.draft().manifest
    assert record.dropped == {"usable_masks/model_error": 4}
    assert (record.images_dropped, record.kept) == ({Reason.MODEL_ERROR: 1}, 20)


def test_a_unit_travels_between_workers_as_it_is(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)
    whole = bench.draft().manifest
    row = bench.worker(["source", bench.stages[0]])(bench.row)
    assert len(msgspec.msgpack.decode(row["state"], type=Unit).images) == NUM_IMAGES
    row = bench.worker(bench.stages[1:])(row)
    draft = msgspec.msgpack.decode(bench.worker(["write"])(row)["draft"], type=Draft)
    assert draft.manifest == whole


def test_failures_travel_with_the_unit(tmp_path, coconut):
    bench = Bench(tmp_path, coconut, captioner={"misbehave": {"*": "raise"}})
    row = bench.worker(["source", *bench.stages])(bench.row)
    draft = msgspec.msgpack.decode(bench.worker(["write"])(row)["draft"], type=Draft)
    assert set(draft.failures) == {"caption"}


def test_every_stage_tells_what_it_did_and_asked(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)
    bench.draft()
    told = [(event.stage, event.images, event.regions, event.asked) for event in bench.events("unit")]
    assert told == [
        ("source", 6, 24, 0),
        ("usable_masks", 6, 24, 0),
        ("caption", 6, 24, 24),
        ("verify_category", 6, 24, 24),
        ("clean_text", 6, 24, 0),
        ("write", 6, 24, 0),
    ]
    assert [event.stage for event in bench.events("started")] == ["caption", "verify_category"]
    assert {event.unit for event in bench.events("batch")} == {bench.row["unit"]}


def test_a_retry_is_told_with_its_error(tmp_path, coconut):
    bench = Bench(tmp_path, coconut, captioner={"misbehave": {"*": "raise"}}, failures={"unit_retries": 1})
    bench.draft()
    (event,) = bench.events("failed")
    assert (event.stage, event.unit) == ("caption", bench.row["unit"])
    assert "cannot caption" in event.detail


def test_evidence_that_cannot_be_written_is_a_failed_row_that_names_the_disk(tmp_path, coconut, monkeypatch):
    bench = Bench(tmp_path, coconut)

    def save(*_):
        raise OSError(28, "No space left on device", "/out/evidence")

    monkeypatch.setattr(EvidenceStore, "save", save)
    assert bench.failed().startswith("StageFailed: /out/evidence: disk full; free space")


def test_a_worker_whose_events_cannot_be_written_does_its_work(tmp_path, coconut, monkeypatch):
    bench = Bench(tmp_path, coconut)

    def append(self, _):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LineWriter, "append", append)
    assert bench.draft().manifest.kept == 24
    assert bench.events("unit") == []


def _counting(plain, loads: list[str]):
    def load(self, stage):
        loads.append(stage.name)
        plain(self, stage)

    return load


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.Fenced("another one"), errors.Fenced),
        (errors.StageFailed("full"), errors.StageFailed),
        (failures.SourceUnavailable("away"), errors.Retryable),  # of a module of its own
    ],
)
def test_an_error_of_a_worker_comes_to_the_driver_by_its_kind(error, kind):
    found = rows.outcome_of({"unit": 0, "failed": rows.error_text(error)})
    assert type(found) is kind and str(found) == str(error)
