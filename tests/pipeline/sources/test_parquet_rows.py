"""The hub's Parquet files of COCONut: a row per image, whose label map stays in the file."""

import decimal

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


def plan_of(path):
    source = open_coconut(layout="parquet", annotations=[str(path)], photos=[str(path.parent)])
    with pytest.raises(ConfigError, match=path.name) as caught:
        list(source.catalog())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_table_of_millions_of_empty_rows_is_one_line_before_a_row_is_made(tmp_path):
    count = 20_000_000
    columns = {"mask": pa.nulls(count, pa.binary()), "segments_info": pa.nulls(count, pa.string())}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 1 << 20
    assert "20,000,000 rows are too many for a file of" in plan_of(tmp_path / "rows.parquet")


def test_a_table_of_which_each_row_is_the_same_long_text_is_one_line_in_bounded_memory(tmp_path):
    text = '{"segments_info": [' + " " * 2_000_000 + "]}"
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array([text]))
    table = pa.table({"mask": pa.nulls(20_000, pa.binary()), "segments_info": rows})
    pq.write_table(table, tmp_path / "rows.parquet", store_schema=False)  # 40 GB, in a file of 90 KB
    assert "when unpacked" in plan_of(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([decimal.Decimal("1.5")]),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.nulls(1),
        pa.array([[None]], pa.list_(pa.null())),
        pa.array([b"ab"]).dictionary_encode(),
        pa.array([b"0" * 16], pa.uuid()),
        pa.array([1 << 62], pa.duration("ns")),
        pa.array([(1 << 64) - 1], pa.uint64()),
        pa.array(["[" * 100_000]),
        pa.array(["x" * 10_000_000]),
    ],
    ids=["decimal", "map", "null", "nested null", "dictionary", "uuid", "duration", "uint64", "deep", "long"],
)
def test_a_column_of_an_odd_type_is_a_drop_with_its_reason(release, column):
    release.add("a")
    good = pa.Table.from_pylist([parquet_row("a", panoptic_png(label_map()))])
    for name in ("segments_info", "image_info", "mask"):
        place = good.column_names.index(name)
        pq.write_table(good.set_column(place, name, column), release.root / f"{name}.parquet")
        source = open_coconut(
            layout="parquet",
            annotations=[str(release.root / f"{name}.parquet")],
            photos=[str(release.root / "photos")],
        )
        (entry,) = source.catalog()
        image = source.read(entry, LIMITS)
        if name == "image_info" and image.live():  # what says nothing of the image is not needed
            continue
        drops = [image.drop, *(region.drop for region in image.regions)]
        assert not image.live() and any(drops)
        assert not any("Traceback" in each.detail or "\n" in each.detail for each in drops if each)
