"""Whatever the values in people's files are: records that can be stored, or an error of one line."""

import json
import random

import msgspec
import numpy as np
import pytest

from paracaption.schemas.errors import ConfigError
from tests.pipeline.sources import instances_file, test_masks, test_webdataset

ODD = [
    *(None, True, [], {}, "", "x", "\ud800", "a\0b", "../x", "7", "9" * 5_000, chr(233) * 300),
    *(1e400, float("nan"), -1, 0, 1.5, 2**70, 10**300, [1], {"id": 1}, [[1, 2, 3]]),
    *({"counts": "x", "size": [1, 2]}, "https://user:word@host/x?sig=AAAAAAAAAAAAAAAAAAAA"),
]


def damaged(value, chance):
    """A copy in which some values are odd and some keys are gone."""
    if chance.random() < 0.08:
        return chance.choice(ODD)
    if isinstance(value, dict):
        return {key: damaged(each, chance) for key, each in value.items() if chance.random() > 0.03}
    return [damaged(each, chance) for each in value] if isinstance(value, list) else value


def read_coco(root, chance):
    crowd = instances_file.crowd_rle()
    rows = [instances_file.annotation(1), instances_file.annotation(2, segmentation=crowd)]
    images = [instances_file.image_row(), instances_file.image_row(7)]
    document = instances_file.content(*rows, instances_file.annotation(3, image=7), images=images)
    instances_file.write(root, json.dumps(damaged(document, chance)))
    return instances_file.read(root)


def read_webdataset(root, chance):
    regions = [
        {"id": 5, "segmentation": test_webdataset.written(test_webdataset.box()), "category_name": "cup"},
        {"label": "cup", "mask": "a.m.png"},
    ]
    content = {"width": 48, "height": 32, "file_name": "x.jpg", "license": 1, "annotations": regions}
    data = json.dumps(damaged(content | {"categories": [{"id": 1, "name": "cup"}]}, chance)).encode()
    pixels = test_webdataset.encoded(test_webdataset.box().astype(np.uint8))
    members = [("a.jpg", test_webdataset.photo()), ("a.m.png", pixels), ("a.json", data)]
    return test_webdataset.read(test_webdataset.write_tar(root / "a.tar", members)).values()


def read_masks(root, chance):
    test_masks.photo(root / "photos" / "a.jpg")
    test_masks.mask(root / "masks" / "a_0.png")
    rows = [
        {"photo": "a.jpg", "mask": "a_0.png", "category": "cup", "group": 0, "value": 3},
        {"mask": "gone.png", "category": "cup"},
    ]
    names = root / "names.jsonl"
    names.write_text("".join(json.dumps(damaged(row, chance)) + "\n" for row in rows))
    layout = chance.choice(["files", "indexed"])
    return test_masks.read(root, names=str(names), layout=layout).values()


@pytest.mark.parametrize("read", [read_coco, read_webdataset, read_masks])
def test_odd_values_become_records_that_can_be_stored_or_an_error_of_one_line(read, tmp_path):
    ended = 0
    for seed in range(40):
        (tmp_path / str(seed)).mkdir()
        try:
            for image in read(tmp_path / str(seed), random.Random(seed)):
                msgspec.msgpack.encode(image)
                assert all(region.drop or region.rle for region in image.regions), seed
                ended += 1
        except ConfigError as error:
            assert "\n" not in str(error), seed
    assert ended > 10
