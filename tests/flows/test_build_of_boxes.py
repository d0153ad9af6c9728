"""The demo's photos with boxes alone: audited, built, resumed, checked and shown by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from paracaption.filters.boxes import box_iou
from paracaption.flows.cli.app import app
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.sources.registry import open_source
from tests.building import committed
from tests.pipeline.corpus.test_growth import records

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SAMPLES.exists(), reason="no clone, but an installed wheel"),
]
FUNNEL = ["box masks", "usable masks", "caption", "verify category", "clean text"]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A build of the boxes of the demo's regions: one leaves its photo, and is there twice."""
    root = tmp_path_factory.mktemp("boxes")
    demo = load_config(SAMPLES / "build.yaml")
    source = open_source(demo, "coconut")
    images, annotations, categories = [], [], {}
    for number, entry in enumerate(source.catalog()):
        image = source.read(entry, demo.limits)
        size = {"width": image.width, "height": image.height}
        images.append({"id": number, "file_name": image.file_name, **size})
        for region in image.live():
            categories[region.category_id] = region.category
            row = {"image_id": number, "bbox": list(region.bbox), "category_id": region.category_id}
            annotations.append({"id": len(annotations), **row})
    annotations[0]["bbox"][3] += 50
    annotations.append(annotations[0] | {"id": len(annotations)})
    named = [{"id": number, "name": name} for number, name in categories.items()]
    document = {"images": images, "annotations": annotations, "categories": named}
    (root / "boxes.json").write_text(json.dumps(document))
    photos = str(SAMPLES / "coconut" / "photos")
    config = {
        "out": "out",
        "images_per_shard": 3,
        "subsets": {
            "det": {"sources": {"source": "boxes", "annotations": ["boxes.json"], "photos": [photos]}}
        },
        "captioner": {"name": "classical"},
        "judge": {"name": "lexical"},
        "segmenter": {"name": "grabcut"},
        "failures": {"min_free_gb": 0},
    }
    (root / "build.yaml").write_text(yaml.safe_dump(config))
    run("build", str(root / "build.yaml"), "--local")
    return root


def test_the_audit_says_what_is_usable_and_what_is_odd(home):
    text = run("audit", str(home / "build.yaml"))
    assert "6 of 6 images and 6 of 7 regions are usable" in text
    assert "box_duplicate: 1 x" in text and "box_clipped: 2 x" in text


def test_every_region_has_a_mask_near_its_box_and_a_caption(home):
    boxes = {each["id"]: each for each in json.loads((home / "boxes.json").read_text())["annotations"]}
    rows = list(records(home / "out").values())
    assert [row["drop_reason"] for row in rows].count(None) == 6 and len(rows) == 7
    for row in rows:
        if row["kept"]:
            mask = tuple(row[f"bbox_{name}"] for name in "xywh")
            assert box_iou(mask, tuple(boxes[row["source_id"]]["bbox"])) > 0.6
            assert row["caption"] and row["area"] and 0 < row["predicted_iou"] <= 1


def test_the_corpus_is_whole_and_its_funnel_is_that_of_the_recipe(home):
    assert "complete and undamaged" in run("verify", str(home / "out"))
    text = run("inspect", str(home / "out"))
    places = [text.index(f"\n{stage}") for stage in FUNNEL]
    assert places == sorted(places)
    card = (home / "out" / "README.md").read_text()
    assert "| box_masks | 6 | 0 | 6 |" in card
    assert "`box_masks` lets the segmenter find the mask of each region in its box" in card


def test_a_build_that_lost_all_but_its_evidence_has_the_same_bytes(home, tmp_path):
    before = committed(home / "out")
    again = tmp_path / "again"
    assert "nothing to do" in CliRunner().invoke(app, ["build", str(home / "build.yaml"), "--local"]).stderr
    run("build", str(home / "build.yaml"), "--local", "--set", f"out={again}")
    assert committed(again) == before


def test_the_estimate_has_a_line_for_the_stage_that_makes_the_masks(home):
    text = run("estimate", str(home / "build.yaml"), "--sources")
    assert "segmenter" in text and "6 images" in text


def test_the_explorer_shows_the_funnel_and_each_image(home):
    client = TestClient(make_app(Explorer(home / "out")), base_url="http://localhost:8080")
    first = client.get("/").text
    assert all(stage in first for stage in FUNNEL)
    for key in {key for _, key, _ in records(home / "out")}:
        page = client.get(f"/image/det/{key}")
        assert page.status_code == 200 and "data-mask=" in page.text
        assert client.get(f"/thumb/det/{key}?r=0").headers["content-type"] == "image/jpeg"
    assert client.get("/whatif").status_code == 200


def test_a_coco_export_has_the_masks(home, tmp_path):
    run("export", str(home / "out"), "--format", "coco", "--to", str(tmp_path / "exported"))
    (path,) = tmp_path.rglob("*.json")
    annotations = json.loads(path.read_text())["annotations"]
    assert len(annotations) == 6 and all(each["segmentation"]["counts"] for each in annotations)
