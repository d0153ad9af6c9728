"""The model in samples/model: what it says of the sample scenes, in the commands of the README."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.pipeline.corpus import reader
from paracaption.schemas.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
pytestmark = pytest.mark.skipif(not SAMPLES.exists(), reason="no clone, but an installed wheel")

PINNED: dict[str, list[str]] = {
    "heldout-1-000000": [
        "a large dotted purple circle at the bottom right",
        "a small striped blue bar at the top right",
        "a small dotted yellow circle in the middle",
        "a large striped orange circle on the left",
    ],
    "heldout-1-000001": [
        "a large striped yellow bar at the top",
        "a small striped pink bar in the middle",
        "a large striped purple triangle on the right",
        "a small plain red triangle on the left",
    ],
    "heldout-1-000002": [
        "a small dotted orange circle at the bottom left",
        "a large striped purple triangle at the top right",
        "a small plain turquoise circle on the left",
        "a large striped blue triangle in the middle",
        "a small striped red circle on the right",
    ],
    "heldout-1-000003": [
        "a large striped turquoise triangle in the middle",
        "a small striped orange triangle at the top left",
        "a small plain orange triangle at the top right",
        "a large striped red bar at the bottom",
    ],
    "heldout-1-000004": [
        "a small striped orange triangle at the top",
        "a small striped orange bar at the bottom right",
        "a small plain blue triangle at the top right",
        "a large striped yellow triangle in the middle",
        "a small plain turquoise triangle on the right",
    ],
    "heldout-1-000005": [
        "a small dotted green circle on the left",
        "a small plain blue circle on the right",
        "a small plain blue triangle in the middle",
        "a small striped turquoise circle at the bottom right",
        "a small dotted purple triangle at the top left",
        "a small striped orange circle at the top",
    ],
}
"""What it says of the regions of each scene, in their order: 27 of 28 captions are exactly right."""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with the samples, where commands run as in the repository's."""
    shutil.copytree(SAMPLES, tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def rows(corpus: Path) -> list[dict]:
    found = [row for table in reader.open_corpus(corpus).ledgers() for row in table.to_pylist()]
    return sorted(found, key=lambda row: (row["key"], row["region"]))


def test_it_is_small_and_in_half_precision_and_has_a_card():
    model = SAMPLES / "model"
    assert sum(file.stat().st_size for file in model.iterdir()) < 1_200_000
    assert json.loads((model / "config.json").read_text())["dtype"] == "float16"
    card = (model / "README.md").read_text()
    assert "circles, triangles and bars" in card and "python -m benchmarks.sample_model" in card
    assert RegionCaptioner.load(model, "cpu").model.dtype.itemsize == 4


def test_a_photo_without_masks_gets_them_and_the_captions_are_those_of_its_shapes(home):
    number = "heldout-1-000000"
    photo = f"samples/scenes/photos/{number}.jpg"
    record = json.loads(
        run(
            *("caption", "--model", "samples/model", "--image", photo, "--json", "-"),
            *("--strategy", "threshold", "--max-new-tokens", "12", "--steps", "12"),
        )
    )
    areas = [region["area"] for region in record["regions"]]
    assert areas == sorted(areas, reverse=True) and len(areas) == 4
    assert record["regions"][0]["source"] == "color_regions: mask 1"
    assert {region["caption"] for region in record["regions"]} == set(PINNED[number])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--mask-generator", "nobody"), "no backend 'nobody'; choose from"),
        (("--mask-generator", "{name: color_regions, options: {colours: 3}}"), "colours"),
        (("--mask-generator", "{name: "), "not YAML"),
        (
            ("--mask-generator", "color_regions", "--masks", "samples/scenes/panoptic.json"),
            "leave out --masks",
        ),
        (("--key", "x"), "--key names an image"),
    ],
)
def test_a_wrong_mask_generator_is_told_before_the_model_is_loaded(home, given, told):
    photo = "samples/scenes/photos/heldout-1-000000.jpg"
    done = CliRunner().invoke(app, ["caption", "--model", "nowhere", "--image", photo, *given])
    assert isinstance(done.exception, ConfigError) or done.exit_code == 2
    assert told in f"{done.output}{done.exception}", (done.output, done.exception)


def test_it_labels_the_scenes_in_a_build_with_the_pinned_captions(home):
    run("build", "samples/scenes/label.yaml", "--local")
    labeled = rows(home / "out/scenes/labeled")
    found: dict[str, list[str]] = {}
    for row in labeled:
        found.setdefault(row["key"], []).append(row["caption"])
    assert found == PINNED
    assert all(0.5 < row["confidence"] <= 1 for row in labeled)
    assert all(row["confidence"] >= 0.99 for row in labeled if row["kept"])
    reasons = [row["drop_reason"] for row in labeled if not row["kept"]]
    assert reasons == ["text_unsure"]
    true = json.loads((SAMPLES / "scenes/captions.json").read_text())
    right = [row["caption"] == true[row["key"]][str(row["source_id"])] for row in labeled]
    kept = [each for each, row in zip(right, labeled, strict=True) if row["kept"]]
    assert sum(right) == 27 and sum(kept) == len(kept) == 27


def test_it_captions_a_photo_with_the_masks_of_a_panoptic_json(home):
    key, captions = next(iter(PINNED.items()))
    photo = f"samples/scenes/photos/{key}.jpg"
    record = run(
        *("caption", "--model", "samples/model", "--image", photo),
        *("--masks", "samples/scenes/panoptic.json", "--json", "-"),
        *("--strategy", "threshold", "--max-new-tokens", "12", "--steps", "12"),
    )
    assert [region["caption"] for region in json.loads(record)["regions"]] == captions


@pytest.mark.soak
def test_it_is_evaluated_on_the_scenes(home):
    run("build", "samples/scenes/truth.yaml", "--local")
    true = {(row["key"], row["region"]): row["caption"] for row in rows(home / "out/scenes/truth")}
    exact = sum(true[key, region] == said for key in PINNED for region, said in enumerate(PINNED[key]))
    run("evaluate", "samples/scenes/evaluate.yaml")
    found = json.loads((home / "out/scenes/evaluation/sample/toy.json").read_text())
    assert found["parallel"]["exact"] == pytest.approx(exact / len(true))
