"""Corpora built from the other kinds of source: verified by their names, and resumed without a model."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from paracaption.pipeline.corpus import reader
from paracaption.schemas.config import BuildConfig
from tests.building import build, calls, config_of
from tests.pipeline.sources import instances_file
from tests.synthetic import jpeg, scene, write_coconut


def sources(root):
    """COCO, masks and the shards of a corpus, each with two photos of three regions."""
    first = config_of(root / "first" / "out", coconut=write_coconut(root / "source", 2, 3))
    build(first)
    photos, masks = root / "photos", root / "masks"
    photos.mkdir()
    masks.mkdir()
    annotations, images = [], []
    for number in range(2):
        pixels, labels = scene(100 + number, 3)
        (photos / f"{number:012}.jpg").write_bytes(jpeg(pixels))
        Image.fromarray(labels.astype(np.uint16)).save(masks / f"{number:012}.png")
        images.append(instances_file.image_row(number, width=128, height=96))
        for value in (1, 2, 3):
            flat = (labels == value).T.ravel().astype(np.int8)
            runs = np.diff(np.flatnonzero(np.diff(flat)) + 1, prepend=0, append=flat.size).tolist()
            mask = {"size": [96, 128], "counts": [0, *runs] if flat[0] else runs}
            annotations.append(
                instances_file.annotation(10 * number + value, number, segmentation=mask, area=None)
            )
    (root / "instances.json").write_text(json.dumps(instances_file.content(*annotations, images=images)))
    (root / "classes.json").write_text(json.dumps([{"id": n, "name": f"block {n}"} for n in (1, 2, 3)]))
    return {
        "coco": {
            "source": "coco",
            "annotations": [str(root / "instances.json")],
            "photos": [str(photos)],
        },
        "masks": {
            "source": "masks",
            "layout": "indexed",
            "photos": [str(photos)],
            "masks": str(masks),
            "categories": str(root / "classes.json"),
        },
        "again": {
            "source": "webdataset",
            "paths": [str(root / "first" / "out" / "coconut" / "shards" / "*.tar")],
        },
    }


@pytest.mark.soak
def test_a_corpus_of_all_kinds_is_built_verified_and_resumed_without_a_model(tmp_path):
    subsets = {name: {"sources": source} for name, source in sources(tmp_path).items()}
    config = config_of(tmp_path / "out", subsets=subsets)
    build(config)
    corpus = reader.open_corpus(tmp_path / "out")
    names = {}
    for subset in subsets:
        samples = [sample for sample, _ in corpus.samples(subset)]
        assert len(samples) == 2, subset
        names[subset] = {region.category for sample in samples for region in sample.regions}
    assert names["coco"] == {"cat"}
    assert names["masks"] == {"block 1", "block 2", "block 3"}
    assert len(names["again"]) > 1
    asked = len(calls(tmp_path / "captioner.log"))
    assert asked and build(BuildConfig.model_validate(config.model_dump())) == {}
    assert len(calls(tmp_path / "captioner.log")) == asked


@pytest.mark.soak
def test_the_shards_of_the_second_corpus_hold_the_photos_and_masks_of_the_first(tmp_path):
    found = sources(tmp_path)
    build(config_of(tmp_path / "out", subsets={"again": {"sources": found["again"]}}))

    def members(folder):
        result = {}
        for path in sorted((folder / "shards").glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    result[member.name] = tar.extractfile(member).read()
        return result

    first, second = members(tmp_path / "first" / "out" / "coconut"), members(tmp_path / "out" / "again")
    assert list(first) == list(second)
    for name, data in first.items():
        if name.endswith(".jpg"):
            assert second[name] == data
        else:
            masks = [[each["rle"] for each in json.loads(text)["regions"]] for text in (data, second[name])]
            assert masks[0] == masks[1]
