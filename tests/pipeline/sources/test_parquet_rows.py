"""The hub's Parquet files of COCONut: a row per image, whose label map stays in the file."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paracaption.filters import rle
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from tests.pipeline.sources.release import (
    HEIGHT,
    LIMITS,
    SEGMENTS,
    WIDTH,
    label_map,
    open_coconut,
    panoptic_png,
)


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def parquet_row(name, data, segments=SEGMENTS):
    return {
        "mask": {"bytes": data, "path": f"{name}.png"},
        "segments_info": {"file_name": f"{name}.png", "image_id": 1, "segments_info": segments},
        "image_info": {"id": 1, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT},
    }


def test_parquet_rows_carry_their_label_map_by_reference(release):
    for name in "abcde":
        release.add(name)
    rows = [parquet_row(name, panoptic_png(label_map())) for name in "abcde"]
    rows[3]["mask"]["bytes"] = None
    write_parquet(release.root / "rows.parquet", rows)
    source = open_coconut(
        layout="parquet", annotations=[str(release.root / "*.parquet")], photos=[str(release.root / "photos")]
    )
    entries = list(source.catalog())
    assert max(len(entry.record) for entry in entries) < 500
    images = [source.read(entry, LIMITS) for entry in reversed(entries)][::-1]
    assert [len(image.live()) for image in images] == [2, 2, 2, 0, 2]
    assert images[3].drop.reason == Reason.LABELS_UNREADABLE
    assert (rle.decode(images[4].regions[1].rle) == (label_map() == 7)).all()


@pytest.mark.parametrize("content", [b"", b"PAR1 no", None])
def test_a_parquet_file_that_is_none_is_one_line(release, content):
    path = release.root / "rows.parquet"
    write_parquet(path, [{"x": 1}]) if content is None else path.write_bytes(content)
    source = open_coconut(layout="parquet", annotations=[str(path)], photos=[str(release.root / "photos")])
    with pytest.raises(ConfigError, match=r"rows\.parquet"):
        list(source.catalog())


@pytest.mark.parametrize(
    ("column", "of_the_file"), [("segments_info.file_name", True), ("mask.bytes", False)]
)
def test_a_parquet_file_with_a_broken_page_is_one_line(release, column, of_the_file):
    release.add("a")
    path = release.root / "rows.parquet"
    write_parquet(path, [parquet_row("a", panoptic_png(label_map()))])
    group = pq.read_metadata(path).row_group(0)
    (chunk,) = (each for each in map(group.column, range(group.num_columns)) if each.path_in_schema == column)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 16] = b"\xff" * 16  # the header of its first page
    path.write_bytes(data)
    source = open_coconut(layout="parquet", annotations=[str(path)], photos=[str(release.root / "photos")])
    if of_the_file:
        with pytest.raises(ConfigError) as caught:
            list(source.catalog())
        detail = str(caught.value)
    else:
        (entry,) = source.catalog()
        image = source.read(entry, LIMITS)
        assert image.drop.reason == Reason.LABELS_UNREADABLE and len(image.regions) == 2
        detail = image.drop.detail
    assert "rows.parquet" in detail and "fetch it again" in detail and "\n" not in detail
