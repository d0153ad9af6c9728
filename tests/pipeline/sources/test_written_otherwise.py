"""Lists as objects by id, and masks in other writings: what can only mean one thing is read as that."""

from __future__ import annotations

import copy
import json
import tarfile

import pytest
from pycocotools import mask as coco

from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig, Limits
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from tests.synthetic import write_coconut, write_sa1b

NUM_MASKS = 3


class Source:
    """A source of two images, whose JSON is read as it is and with a change."""

    def __init__(self, kind, entry, path):
        self.kind, self.entry, self.path = kind, entry, path
        self.document = json.loads(path.read_text())

    def open(self, document):
        self.path.write_text(json.dumps(document))
        return open_source(BuildConfig.model_validate({"out": "out", self.kind: self.entry}), self.kind)

    def read(self, document):
        source = self.open(document)
        return [source.read(entry, Limits(), []) for entry in source.catalog()]


@pytest.fixture
def panoptic(tmp_path):
    entry = write_coconut(tmp_path, 2, NUM_MASKS)
    return Source("coconut", entry, tmp_path / "panoptic.json")


@pytest.fixture
def pair(tmp_path):
    with tarfile.open(write_sa1b(tmp_path, 1, NUM_MASKS)["paths"][0]) as tar:
        tar.extractall(tmp_path / "sa", filter="data")
    return Source("sa1b", {"paths": [str(tmp_path / "sa")]}, tmp_path / "sa" / "sa_0.json")


def by_id(records, with_ids):
    """A list as an object of its elements by id; these have their ids themselves or not."""
    numbered = {str(record.get("id", place)): record for place, record in enumerate(records)}
    if with_ids:
        return numbered
    return {number: {k: v for k, v in each.items() if k != "id"} for number, each in numbered.items()}


def rewritten(document, which, change):
    """The document with each list of this name changed."""
    document = copy.deepcopy(document)
    for container in [document] if which in document else document["annotations"]:
        container[which] = change(container[which])
    return document


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("which", ["images", "annotations", "segments_info"])
def test_a_list_written_as_an_object_by_id_has_the_same_elements(panoptic, which, with_ids):
    document = panoptic.document
    if which == "images":  # so that only ids tell which is which
        for each in document["annotations"]:
            del each["file_name"]
    wanted = panoptic.read(document)
    assert [len(image.live()) for image in wanted] == [NUM_MASKS, NUM_MASKS]
    assert panoptic.read(rewritten(document, which, lambda found: by_id(found, with_ids))) == wanted


@pytest.mark.parametrize("which", ["images", "annotations", "segments_info"])
def test_a_list_written_as_its_only_element_has_that(panoptic, which):
    document = {**panoptic.document, "images": panoptic.document["images"][:1]}
    document["annotations"] = [dict(document["annotations"][0])]
    document["annotations"][0]["segments_info"] = document["annotations"][0]["segments_info"][:1]
    wanted = panoptic.read(document)
    assert [len(image.live()) for image in wanted] == [1]
    assert panoptic.read(rewritten(document, which, lambda found: found[0])) == wanted


@pytest.mark.parametrize("which", ["images", "annotations"])
@pytest.mark.parametrize("value", [7, "text", {"a": 1}, True])
def test_a_list_that_is_none_is_one_line(panoptic, which, value):
    with pytest.raises(ConfigError, match=rf"panoptic\.json: `{which}` is .*, not a list"):
        list(panoptic.open({**panoptic.document, which: value}).catalog())


@pytest.mark.parametrize("value", [7, "text", {}, {"a": 1}])
def test_segments_that_are_no_list_drop_their_image(panoptic, value):
    document = copy.deepcopy(panoptic.document)
    document["annotations"][0]["segments_info"] = value
    first, second = panoptic.read(document)
    assert first.drop.reason == Reason.ANNOTATION_UNREADABLE and "is not a list" in first.drop.detail
    assert len(second.live()) == NUM_MASKS


@pytest.mark.parametrize("value", [None, [], {}])
def test_without_a_list_of_images_names_are_enough(panoptic, value):
    images = panoptic.read({**panoptic.document, "images": value})
    assert [len(image.live()) for image in images] == [NUM_MASKS, NUM_MASKS]


@pytest.mark.parametrize("bad", [None, 5, {}, {"width": 5}])
def test_an_image_that_names_nothing_is_dropped_as_that(panoptic, bad):
    *images, nameless = panoptic.read(rewritten(panoptic.document, "images", lambda found: [*found, bad]))
    assert [len(image.live()) for image in images] == [NUM_MASKS, NUM_MASKS]
    assert (nameless.key, nameless.drop.reason) == ("image", Reason.ANNOTATION_UNREADABLE)
    assert "neither an id nor a file name" in nameless.drop.detail


@pytest.mark.parametrize("with_ids", [True, False])
def test_annotations_of_a_pair_written_as_an_object_by_id_are_the_same(pair, with_ids):
    wanted = pair.read(pair.document)
    assert [len(image.live()) for image in wanted] == [NUM_MASKS]
    assert pair.read(rewritten(pair.document, "annotations", lambda found: by_id(found, with_ids))) == wanted


def test_annotations_of_a_pair_written_as_their_only_one_are_that(pair):
    one = rewritten(pair.document, "annotations", lambda found: found[:1])
    wanted = pair.read(one)
    assert [len(image.live()) for image in wanted] == [1]
    assert pair.read(rewritten(one, "annotations", lambda found: found[0])) == wanted


def run_lengths(segmentation):
    """Run lengths of a packed mask, by pycocotools."""
    flat = coco.decode(segmentation).ravel(order="F").tolist()
    counts, value = [0], 0
    for each in flat:
        if each != value:
            counts.append(0)
            value = each
        counts[-1] += 1
    return counts


@pytest.mark.parametrize(
    "write",
    [
        lambda found: {**found, "size": [str(float(each)) for each in found["size"]]},
        lambda found: {**found, "counts": run_lengths(found)},
        lambda found: {**found, "counts": [float(each) for each in run_lengths(found)]},
        lambda found: {**found, "counts": [str(each) for each in run_lengths(found)]},
        lambda found: {**found, "counts": " ".join(map(str, run_lengths(found)))},
        lambda found: {**found, "counts": str(run_lengths(found))},
        lambda found: {**found, "counts": str(found["counts"].encode())},
        lambda found: {**found, "counts": found["counts"] + "\n"},
        lambda found: [found],
        lambda found: json.dumps(found),
    ],
)
def test_a_mask_in_another_writing_is_the_same_mask(pair, write):
    wanted = pair.read(pair.document)
    assert len(wanted[0].live()) == NUM_MASKS
    document = copy.deepcopy(pair.document)
    for each in document["annotations"]:
        each["segmentation"] = write(each["segmentation"])
    assert pair.read(document) == wanted


def test_a_region_without_a_mask_says_so_by_its_id(pair):
    document = copy.deepcopy(pair.document)
    document["annotations"][1]["mask"] = document["annotations"][1].pop("segmentation")
    (image,) = pair.read(document)
    assert [region.id for region in image.live()] == [0, 2]
    assert image.regions[1].drop.detail.endswith("sa_0.json: annotation 1: `segmentation` is missing")
