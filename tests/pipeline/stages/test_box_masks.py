"""The stage `box_masks`: a region's mask is an answer of the segmenter, kept as evidence like any other."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.corpus import reader, verify
from paracaption.pipeline.executor import doctor, driver, findings, preflight
from paracaption.pipeline.executor.changed_files import note_changed_files
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.models.protocols import Candidate
from paracaption.pipeline.sources.registry import complete
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.box_masks import BoxMasks
from paracaption.pipeline.stages.recipes import recipe_of, write_out
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob, ImageRecord, Region
from tests import odd_answers
from tests.backends import InstantSegmenter
from tests.building import build, calls, committed, config_of, drops
from tests.pipeline.corpus.test_growth import records
from tests.pipeline.executor.test_odd_answers import FAIR, OTHERWISE
from tests.synthetic import jpeg, write_boxes

SIZE = (48, 64)


def det(out: Path, source: dict, recipe: Any = None, **changes: Any) -> BuildConfig:
    """A build of boxes, with test backends: masks are the boxes themselves."""
    return config_of(out, subsets={"det": {"sources": [source], "recipe": recipe}}, **changes)


@pytest.fixture
def source(tmp_path):
    return write_boxes(tmp_path / "source", 6, 2, SIZE)


@pytest.fixture
def built(tmp_path, source):
    config = det(tmp_path / "out", source)
    build(config)
    return config


def asked(root: Path) -> list[str]:
    return calls(root / "segmenter.log")


def edit(source: dict, change) -> None:
    path = Path(source["annotations"][0])
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_each_region_gets_the_mask_that_is_found_in_its_box(built, tmp_path, source):
    rows = records(tmp_path / "out")
    boxes = json.loads(Path(source["annotations"][0]).read_text())["annotations"]
    assert len(rows) == len(boxes) == len(asked(tmp_path)) == 12
    for row, box in zip(rows.values(), boxes, strict=True):
        assert [row[f"bbox_{name}"] for name in "xywh"] == box["bbox"]
        assert row["kept"] and row["area"] == box["bbox"][2] * box["bbox"][3]
        assert (row["predicted_iou"], row["segmenter_score"]) == (0.9, None)
    report = verify.verify(tmp_path / "out")
    assert report.ok, report.text()
    driver.build(built, LocalEngine())
    assert driver.is_finished(write_out(complete(built))) and len(asked(tmp_path)) == 12


def test_a_second_build_asks_nobody_and_a_rebuilt_unit_has_the_same_bytes(built, tmp_path):
    before, paid = committed(tmp_path / "out"), asked(tmp_path)
    stricter = built.model_copy(update={"text": built.text.model_copy(update={"max_words": 900})})
    build(stricter)
    assert committed(tmp_path / "out").keys() == before.keys()
    changed = {path for path, digest in committed(tmp_path / "out").items() if before[path] != digest}
    assert {Path(path).parent.name for path in changed} == {"manifests"}  # which name the recipe
    assert asked(tmp_path) == paid


def test_damaged_evidence_is_asked_for_again_and_gives_the_same_corpus(built, tmp_path):
    before, paid = committed(tmp_path / "out"), asked(tmp_path)
    (evidence,) = (tmp_path / "out" / "det" / "evidence").glob("box_masks-*")
    for path in evidence.iterdir():
        path.write_bytes(b"damaged")
    build(built.model_copy(update={"min_verdict_margin": 0.5}))
    changed = {path for path, digest in committed(tmp_path / "out").items() if before[path] != digest}
    assert {Path(path).parent.name for path in changed} == {"manifests"}
    assert Counter(asked(tmp_path)) == Counter(paid + paid)


@pytest.mark.soak
def test_nothing_in_the_box_is_a_drop_and_the_box_is_shown(tmp_path):
    source = write_boxes(tmp_path / "source", 2, 2, SIZE)
    for number in range(2):  # too few pixels for GrabCut
        box = [5 + number, 6, 2, 2]
        edit(source, lambda document, at=number, box=box: document["annotations"][at].update(bbox=box))
    plain = "000000000000"
    config = det(tmp_path / "out", source)
    grabcut = config.segmenter.model_copy(update={"name": "grabcut", "options": {}})
    driver.build(config.model_copy(update={"segmenter": grabcut}), LocalEngine())
    found = {place: drop for place, drop in drops(tmp_path / "out", "det").items() if place[0] == plain}
    assert found == {
        (plain, number): ("box_masks", "segmenter_none", "the segmenter found nothing in the box")
        for number in range(2)
    }
    row = records(tmp_path / "out")["det", plain, 0]
    assert row["rle_counts"] is None and row["area"] is None and row["bbox_w"] > 0
    assert verify.verify(tmp_path / "out").ok
    client = TestClient(make_app(Explorer(tmp_path / "out")), base_url="http://localhost:8080")
    page = client.get(f"/image/det/{plain}").text
    x, y, right = row["bbox_x"], row["bbox_y"], row["bbox_x"] + row["bbox_w"] - 1
    assert f"M{x}.5 {y}.5L{right}.5 {y}.5" in page and "box masks: segmenter none" in page
    assert client.get("/").status_code == client.get("/browse").status_code == 200


def test_a_mask_beside_the_box_is_no_mask_of_it():
    class Astray(InstantSegmenter):
        """Finds things, but in the corner of the photo."""

        def segment(self, photo, phrases, boxes):
            return super().segment(photo, phrases, np.array([[0, 0, 4, 4]] * len(boxes)))

    stage, image = stage_and_image((20, 20, 10, 10), (0, 0, 8, 8))
    ((far, near),) = stage.ask(Astray(), [image])
    assert (far.counts, far.num_candidates) == (None, 1)
    assert stage.decide(image.regions[0], far).detail == "none of the segmenter's 1 masks is in the box"
    assert stage.decide(image.regions[1], near).reason is None
    assert image.regions[1].bbox == (0, 0, 4, 4) and image.regions[1].area == 16


def test_of_several_candidates_the_one_that_fits_the_box_is_taken():
    class Everything(InstantSegmenter):
        """Finds every object of the phrase for each region, as a segmenter that reads phrases does."""

        def segment(self, photo, phrases, boxes):
            found = [each for one in super().segment(photo, phrases, boxes) for each in one]
            return [[Candidate(each.rle, 1 - place / 10) for place, each in enumerate(found)]] * len(boxes)

    stage, image = stage_and_image((20, 20, 10, 10), (1, 2, 8, 9))
    (answers,) = stage.ask(Everything(), [image])
    for region, answer, score in zip(image.regions, answers, (1, 0.9), strict=True):
        box = region.bbox
        assert stage.decide(region, answer).reason is None
        assert (region.bbox, answer.num_candidates, region.source_scores) == (
            box,
            2,
            {"predicted_iou": score},
        )


def stage_and_image(*boxes: tuple[int, int, int, int], segmenter: str = "grabcut") -> tuple[BoxMasks, Any]:
    values = {"out": "out", "sa1b": [{"paths": ["x.tar"]}], "segmenter": {"name": segmenter}}
    config = BuildConfig.model_validate(values)
    image = ImageRecord("a", "det", Blob("tests/none.jpg"), 64, 48)
    image.regions = [Region(number, None, box, category="cat") for number, box in enumerate(boxes)]
    return BoxMasks(config), image


@pytest.fixture(autouse=True)
def pixels(monkeypatch, tmp_path):
    """The photo of `stage_and_image`."""
    Image.new("RGB", (64, 48)).save(tmp_path / "none.jpg")
    (tmp_path / "tests").mkdir()
    (tmp_path / "none.jpg").rename(tmp_path / "tests" / "none.jpg")
    monkeypatch.chdir(tmp_path)


def test_the_phrase_is_asked_about_only_where_the_segmenter_reads_it():
    stage, image = stage_and_image((1, 2, 8, 9))
    assert stage.question(image.regions[0]) == (1, 2, 8, 9, "")
    stage, image = stage_and_image((1, 2, 8, 9), segmenter="tests.backends:InstantSegmenter")
    assert stage.question(image.regions[0]) == (1, 2, 8, 9, "cat")


def test_the_captions_belong_to_the_masks_that_they_are_of(tmp_path, source):
    one, other = (det(tmp_path / "out", source, segmenter={"version": each}) for each in "12")
    for before, after in zip(recipe_of(one, "det"), recipe_of(other, "det"), strict=True):
        if isinstance(before, ModelStage) and isinstance(after, ModelStage):
            assert before.evidence_digest != after.evidence_digest


def test_a_segmenter_that_reads_no_boxes_is_refused_before_anything_starts(tmp_path, source):
    config = det(tmp_path / "out", source)
    sam3 = config.segmenter.model_copy(update={"name": "sam3", "options": {"model": "/no/sam3"}})
    config = config.model_copy(update={"segmenter": sam3})
    words = "segmenter: the segmenter `sam3` does not read boxes, from which `box_masks` makes masks"
    fix = "use `grabcut` or `sam`, for all stages or for this one alone, as in {stage: box_masks,"
    with pytest.raises(ConfigError, match=f"{words}; {fix}"):
        driver.build(config, LocalEngine())
    assert not (tmp_path / "out").exists()
    for found in (preflight.check_build(config), doctor.examine_build(config)):
        (finding,) = [each for each in found if each.state == findings.FAIL and each.subject == "segmenter"]
        assert finding.found == words.removeprefix("segmenter: ") and finding.fix.startswith(fix)
    own = [{"stage": "box_masks", "segmenter": {"name": "grabcut"}}, "caption", "extract_category"]
    allowed = det(tmp_path / "out", source, [*own, "agree_with_segmenter"]).model_copy(
        update={"segmenter": sam3}
    )
    assert [each for each in preflight.check_stages(allowed) if each.state == findings.FAIL] == []


def test_the_stage_for_photos_without_regions_is_refused_for_boxes(tmp_path, source):
    told = "recipe.automatic_masks: .* the source `boxes`, which has a box for each region; use `box_masks`"
    with pytest.raises(ConfigError, match=told):
        recipe_of(det(tmp_path / "out", source, ["automatic_masks", "caption"]), "det")


def test_masks_from_boxes_pass_through_identify(tmp_path, source):
    config = det(tmp_path / "out", source, "identify")
    build(config)
    rows = records(tmp_path / "out").values()
    assert {row["drop_reason"] for row in rows} <= {None, "category_none"}
    assert {row["iou"] for row in rows if row["kept"]} <= {1.0}
    assert verify.verify(tmp_path / "out").ok


@pytest.mark.soak
def test_each_odd_answer_costs_its_region_and_no_mask_is_taken_unchecked(tmp_path):
    names = list(odd_answers.CANDIDATES)
    source = write_boxes(tmp_path / "source", len(names), 2, SIZE)
    config = det(tmp_path / "out", source, images_per_shard=1000)
    backend = config.segmenter.model_copy(
        update={
            "name": "tests.odd_answers:OddSegmenter",
            "options": {**config.segmenter.options, "odd": names},
            "batch_images": 1,
        }
    )
    config = config.model_copy(update={"segmenter": backend})
    build(config)
    reasons: dict[int, set[str]] = {}
    for (_, key, _), row in records(tmp_path / "out").items():
        reasons.setdefault(int(key), set()).update({row["drop_reason"]} - {None})
    wanted = {
        place: set() if name in FAIR else {OTHERWISE["segmenter"].get(name, "model_error")}
        for place, name in enumerate(names)
    }
    assert {names[place]: found for place, found in reasons.items() if found != wanted[place]} == {}
    paid = asked(tmp_path)
    build(config)
    assert asked(tmp_path) == paid


def test_a_changed_box_is_asked_about_again_and_nothing_else_is(built, tmp_path, source):
    paid = len(asked(tmp_path))
    edit(source, lambda document: document["annotations"][3]["bbox"].__setitem__(2, 7))
    build(built)
    assert len(asked(tmp_path)) == paid + 1
    assert records(tmp_path / "out")["det", "000000000001", 1]["bbox_w"] == 7
    at_once = det(tmp_path / "at once", source)
    build(at_once)
    assert records(tmp_path / "out") == records(at_once.out)


def test_an_image_that_is_gone_keeps_its_masks_and_its_boxes(built, tmp_path, source):
    before, paid = records(tmp_path / "out"), asked(tmp_path)

    def without_the_first(document):
        del document["images"][0]
        document["annotations"] = [each for each in document["annotations"] if each["image_id"]]

    edit(source, without_the_first)
    build(built.model_copy(update={"min_verdict_margin": 0.5}))
    assert records(tmp_path / "out") == before
    assert asked(tmp_path) == paid


def test_files_that_have_not_changed_are_not_taken_for_changed_ones(built, tmp_path, source):
    assert note_changed_files(built) == {}
    photo = Path(source["photos"][0]) / "000000000001.jpg"
    photo.write_bytes(jpeg(np.full((*SIZE, 3), 77, np.uint8)))
    assert str(note_changed_files(built)["det"]).startswith("1 image changed in the source (000000000001)")
    paid = len(asked(tmp_path))
    build(built)
    assert len(asked(tmp_path)) == paid + 2


def test_a_stage_before_the_masks_sees_the_boxes(tmp_path, source, monkeypatch):
    (tmp_path / "wide_boxes.py").write_text(
        "from paracaption.filters.verdict import Verdict\n"
        "from paracaption.pipeline.stages.base import FilterStage\n"
        "from paracaption.schemas.reasons import Reason\n"
        "class Wide(FilterStage):\n"
        "    def decide(self, image):\n"
        "        return [Verdict(Reason.OWN_RULE, 'narrow') if region.bbox[2] < 12 else Verdict()\n"
        "                for region in image.live()]\n"
    )
    edit(source, lambda document: document["annotations"][0]["bbox"].__setitem__(2, 5))
    recipe = [{"stage": "wide_boxes:Wide", "id": "wide"}, "box_masks", "caption", "clean_text"]
    (tmp_path / "c.json").write_text(det(tmp_path / "out", source, recipe).model_dump_json())
    from paracaption.pipeline.config_file import load_config

    build(load_config(tmp_path / "c.json"))
    row = records(tmp_path / "out")["det", "000000000000", 0]
    assert (row["drop_stage"], row["drop_reason"], row["rle_counts"]) == ("wide", "own_rule", None)
    assert row["bbox_w"] == 5 and len(asked(tmp_path)) == 11
    assert verify.verify(tmp_path / "out").ok


def test_masks_of_the_corpus_are_those_of_its_evidence(built, tmp_path):
    stage = next(each for each in recipe_of(built, "det") if isinstance(each, BoxMasks))
    folder = tmp_path / "out" / "det"
    answers = {}
    for unit in reader.list_units(str(folder)):
        answers |= stage.store(folder).load(unit.name)
    for (_, key, region), row in records(tmp_path / "out").items():
        answer = answers[key, region].answer
        assert stage.matches(answer, row) and (answer.height, answer.width) == SIZE
        assert rle.check(answer.counts, SIZE).area == row["area"]
