"""The committed sample is sound, small, and holds what its README says."""

import importlib.util
import json
import re
import tarfile

import pytest

from paracaption.filters import rle
from paracaption.filters.masks import usable, whole_objects
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import Limits, Masks
from paracaption.schemas.records import Drop
from tests.pipeline.models.sample import SAMPLES, sample_config
from tests.shared_data import shared_data


def read(subset):
    source = open_source(sample_config(), subset)
    return [source.read(entry, Limits()) for entry in source.catalog()]


def test_the_sample_is_small():
    files = {path: path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()}
    model = sum(size for path, size in files.items() if "model" in path.parts)
    assert model < 1_100_000 and sum(files.values()) - model < 1_500_000


def test_every_panoptic_segment_is_read_with_its_plain_category():
    images = read("coconut")
    found = {image.key: [region.category for region in image.live()] for image in images}
    assert found == {
        "astronaut": ["person"],
        "chelsea": ["cat"],
        "china": ["building"],
        "coffee": ["cup"],
        "flower": ["flower"],
        "rocket": ["rocket"],
    }


def test_every_mask_of_the_tar_is_read():
    images = read("sa1b")
    assert {image.key: len(image.live()) for image in images} == {"sa_1": 27, "sa_2": 1, "sa_3": 1, "sa_4": 2}


def test_the_planted_masks_and_no_others_are_dropped():
    dropped = {}
    for image in read("sa1b"):
        size = (image.height, image.width)
        for judge in (usable, whole_objects):
            regions = image.live()
            for region, verdict in zip(regions, judge(regions, size, Masks()), strict=True):
                if verdict.reason is not None:
                    region.drop = Drop(judge.__name__, verdict.reason)
                    dropped[region.source_id] = verdict.reason.value
    table = (SAMPLES / "README.md").read_text()
    told = dict(re.findall(r"\| `sa_\d` \| (\d+) \|.*\| `(mask_\w+)` \|", table))
    assert dropped == {int(number): reason for number, reason in told.items()}


def test_boxes_are_one_less_than_the_masks_as_in_sa1b():
    with tarfile.open(SAMPLES / "sa1b" / "sa_000000.tar") as tar:
        member = tar.extractfile("./sa_1.json")
        assert member is not None
        document = json.load(member)
    for row in document["annotations"]:
        x, y, width, height = rle.check(row["segmentation"]["counts"], row["segmentation"]["size"]).bbox
        assert row["bbox"] == [x, y, width - 1, height - 1]


def test_every_photo_is_attributed():
    text = (SAMPLES / "README.md").read_text()
    names = [path.name for path in (SAMPLES / "coconut" / "photos").iterdir()]
    with tarfile.open(SAMPLES / "sa1b" / "sa_000000.tar") as tar:
        names += [name.removeprefix("./") for name in tar.getnames() if name.endswith(".jpg")]
    assert len(names) == 10
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.slow
@pytest.mark.soak
def test_making_the_sample_again_gives_the_same_masks_and_labels(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_samples", SAMPLES / "make_samples.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    monkeypatch.setattr(maker, "HERE", tmp_path)
    maker.main(shared_data("open_images_pypi"))
    for path in [*(SAMPLES / "coconut").rglob("*.json"), *(SAMPLES / "coconut" / "photos").glob("*.jpg")]:
        again = tmp_path / path.relative_to(SAMPLES)
        assert again.exists()
        if path.suffix == ".json":  # photos converted by another Pillow release may differ in their bytes
            assert again.read_bytes() == path.read_bytes()
    with (
        tarfile.open(SAMPLES / "sa1b" / "sa_000000.tar") as ours,
        tarfile.open(tmp_path / "sa1b" / "sa_000000.tar") as new,
    ):
        assert ours.getnames() == new.getnames()
        for name in ours.getnames():
            if name.endswith(".json"):
                assert ours.extractfile(name).read() == new.extractfile(name).read()  # type: ignore[union-attr]
