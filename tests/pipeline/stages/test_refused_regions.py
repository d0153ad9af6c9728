"""A model that has no answer for one region: that region is dropped, alone, and can be asked about again."""

import msgspec
import pytest

from paracaption.pipeline.corpus import work_list, writer
from paracaption.pipeline.corpus.writer import Draft
from paracaption.pipeline.executor.worker import Job, Unit, Worker
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages import recipes
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.schemas.reasons import ERRORS, Reason
from tests.building import config_of
from tests.synthetic import write_coconut


class Bench:
    """A worker with the source and the stages of COCONut on a corpus of three images with four regions."""

    def __init__(self, root, backend: str, **options):
        self.root = root
        protocol = "judge" if backend == "PickyJudge" else "captioner"
        source = write_coconut(root / "source", num_images=3)
        config = config_of(root / "out", coconut=source, images_per_shard=3, **{protocol: options})
        picky = getattr(config, protocol).model_copy(update={"name": f"tests.picky:{backend}"})
        self.config = config.model_copy(update={protocol: picky})
        self.folder, self.run = root / "out" / "coconut", root / "out" / "events" / "000"
        self.run.mkdir(parents=True)
        writer.prepare(self.folder)
        self.plan = work_list.make_work_list(open_source(self.config, "coconut"), self.config, self.folder)
        self.stages = recipes.recipe_of(self.config, "coconut")

    def row(self, *ends: str) -> dict:
        job = Job(self.config, "coconut", str(self.folder), self.plan.digest, "recipe", str(self.run))
        return Worker(job, ["source", *self.stages, *ends])({"unit": self.plan.unit_name(0), "index": 0})

    def regions(self):
        unit = msgspec.msgpack.decode(self.row()["state"], type=Unit)
        return [region for image in unit.images for region in image.regions]

    def stored(self) -> int:
        stage = next(stage for stage in self.stages if stage.name == "verify_category")
        store = EvidenceStore(
            self.folder / "evidence" / f"verify_category-{stage.evidence_digest}", stage.evidence
        )
        return len(store.load(self.plan.unit_name(0)))

    def asked(self) -> list[str]:
        return (self.root / "judge.log").read_text().splitlines()


@pytest.fixture
def mended(tmp_path):
    return tmp_path / "mended"


@pytest.mark.parametrize("says", ["", "maybe"], ids=["a BadRecord", "an answer outside the schema"])
def test_one_region_without_an_answer_is_dropped_alone(tmp_path, mended, says):
    bench = Bench(tmp_path, "PickyJudge", refuse="A cat", mended=str(mended), says=says)
    regions = bench.regions()
    refused = [region for region in regions if region.category == "cat"]
    assert 0 < len(refused) < len(regions)
    for region in regions:
        reason = region.drop.reason if region.drop else None
        assert reason is (Reason.ANSWER_INVALID if region in refused else None)
    assert bench.stored() == len(regions) - len(refused)


def test_only_the_refused_regions_are_asked_about_again(tmp_path, mended):
    bench = Bench(tmp_path, "PickyJudge", refuse="A cat", mended=str(mended))
    first = bench.regions()
    before = len(bench.asked())
    mended.touch()
    assert all(region.drop is None for region in bench.regions())
    again = bench.asked()[before:]
    assert len(again) == sum(region.category == "cat" for region in first)
    assert all("A cat" in line for line in again)


def test_its_reason_is_one_that_a_retry_can_turn():
    assert Reason.ANSWER_INVALID in ERRORS and Reason.MODEL_ERROR in ERRORS


def test_a_judge_without_any_answer_is_told_to_the_driver(tmp_path, mended):
    bench = Bench(tmp_path, "PickyJudge", refuse="A ", mended=str(mended))
    draft = msgspec.msgpack.decode(bench.row("write")["draft"], type=Draft)
    assert draft.failures == {"verify_category": "it said maybe"}


def test_a_judge_with_some_answers_is_no_failure_of_the_stage(tmp_path, mended):
    bench = Bench(tmp_path, "PickyJudge", refuse="A cat", mended=str(mended))
    draft = msgspec.msgpack.decode(bench.row("write")["draft"], type=Draft)
    assert draft.failures == {}


def test_a_captioner_may_have_no_caption_for_one_region(tmp_path):
    regions = Bench(tmp_path, "PickyCaptioner").regions()
    dropped = [region for region in regions if region.drop]
    assert [region.id for region in dropped] == [0, 0, 0] and len(regions) == 12
    assert {(region.drop.reason, region.drop.detail) for region in dropped} == {
        (Reason.MODEL_ERROR, "no caption for this one")
    }
