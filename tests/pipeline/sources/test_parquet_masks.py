"""The `mask` column of Parquet files: the hub's struct, or a PNG's bytes alone, as pandas writes them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig, Limits
from paracaption.schemas.reasons import Reason

HEIGHT, WIDTH = 24, 32
KEYS = ("a", "b", "c")


def labels(number):
    """Two segments, 70_000 and 7, whose places are another in each image."""
    values = np.zeros((HEIGHT, WIDTH), np.uint32)
    values[2 + number : 12, 3:10] = 70_000
    values[14:20, 5 : 15 + number] = 7
    return values


def png(number):
    values, buffer = labels(number), io.BytesIO()
    colors = np.stack([values & 255, values >> 8 & 255, values >> 16], -1).astype(np.uint8)
    Image.fromarray(colors).save(buffer, "PNG")
    return buffer.getvalue()


def read(folder, masks, limits=None):
    """The images of a file whose `mask` column is this, two rows a group."""
    (folder / "photos").mkdir()
    rows = []
    for number, key in enumerate(KEYS):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 90, 9)).save(folder / f"photos/{key}.jpg")
        segments = [{"id": 70_000, "category_id": 1}, {"id": 7, "category_id": 17}]
        info = {"file_name": f"{key}.png", "image_id": number, "segments_info": segments}
        image = {"id": number, "file_name": f"{key}.jpg", "width": WIDTH, "height": HEIGHT}
        rows.append({"segments_info": info, "image_info": image})
    table = pa.Table.from_pylist(rows).append_column("mask", masks)
    pq.write_table(table, folder / "rows.parquet", row_group_size=2)
    options = {"layout": "parquet", "annotations": [f"{folder}/rows.parquet"], "photos": [f"{folder}/photos"]}
    source = open_source(BuildConfig.model_validate({"out": "out", "coconut": options}), "coconut")
    return [source.read(entry, limits or Limits()) for entry in source.catalog()]


PNGS = [png(number) for number in range(len(KEYS))]
STRUCTS = [{"bytes": data, "path": f"{key}.png"} for key, data in zip(KEYS, PNGS, strict=True)]

WHOLE = {
    "struct": pa.array(STRUCTS),
    "struct without path": pa.array([{"bytes": data} for data in PNGS]),
    "binary": pa.array(PNGS, pa.binary()),
    "large binary": pa.array(PNGS, pa.large_binary()),
    "dictionary": pa.array(PNGS, pa.binary()).dictionary_encode(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_each_row_has_the_masks_of_its_own_png_however_the_column_holds_it(tmp_path, name):
    images = read(tmp_path, WHOLE[name])
    assert [image.key for image in images] == list(KEYS)
    for number, image in enumerate(images):
        assert [region.source_id for region in image.live()] == [70_000, 7]
        for region in image.live():
            assert (rle.decode(region.rle) == (labels(number) == region.source_id)).all()


OTHERS = {
    "base64": (pa.array([base64.b64encode(data).decode() for data in PNGS]), "has str"),
    "numbers": (pa.array([list(data) for data in PNGS], pa.list_(pa.uint8())), "has list"),
    "pixels": (pa.array([labels(number).tolist() for number in range(len(KEYS))]), "has list"),
    "path": (pa.array([{"path": f"{key}.png"} for key in KEYS]), "no PNG in it"),
    "null": (pa.nulls(len(KEYS)), "no PNG in it"),
}
"""Columns that hold no PNG, and what is said of each row."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_column_without_pngs_costs_each_image_its_regions_with_file_row_and_type(tmp_path, name):
    masks, told = OTHERS[name]
    for number, image in enumerate(read(tmp_path, masks)):
        assert image.drop.reason == Reason.LABELS_UNREADABLE and len(image.regions) == 2
        assert {region.drop.reason for region in image.regions} == {Reason.LABELS_UNREADABLE}
        where = f"rows.parquet, row {number % 2} of row group {number // 2}: "
        assert where in image.drop.detail and told in image.drop.detail
        assert told == "no PNG in it" or "column `mask`" in image.drop.detail


def test_bytes_that_are_no_png_cost_their_own_row_alone_and_are_called_what_they_are(tmp_path):
    others = pa.array([PNGS[0], b"version https://git-lfs.github.com/spec/v1\n", None], pa.binary())
    first, second, third = read(tmp_path, others)
    assert len(first.live()) == 2 and not second.live() and not third.live()
    assert "a Git LFS pointer" in second.drop.detail and "no PNG in it" in third.drop.detail
