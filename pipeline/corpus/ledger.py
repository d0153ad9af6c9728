"""The ledger: a Parquet file per unit with a row for every region, kept or dropped, and what is known of it.

An image that declares no region has one row too, with `region` null, so that every image of the plan is found
here. Equal records give equal bytes. The corpus's index has the kept rows of all ledgers, without the masks.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.errors import REBUILD, ConfigError, IntegrityError
from ...schemas.plain import plain_text
from ...schemas.records import CREDIT_FIELDS, SCORES, ImageRecord, Region
from ...schemas.secrets import shorten

if TYPE_CHECKING:
    import pyarrow as pa


class Place(NamedTuple):
    """Where an image's members are in its shard: offset of the first byte and length, in bytes."""

    photo_offset: int
    photo_length: int
    json_offset: int
    json_length: int


SOURCE_SCORES = ("predicted_iou", "stability_score")
"""The publisher's numbers that have a column; SA-1B has both, COCONut none."""

_LATER_SCORES = ("confidence",)
"""Scores that early releases did not have; their columns are the last ones."""

_IMAGE_LEVEL = Region(id=-1, rle=None)


@cache
def ledger_schema() -> pa.Schema:
    """Columns of the ledger, in order."""
    import pyarrow as pa

    text, whole, number = pa.string(), pa.int64(), pa.float64()
    return pa.schema(
        [
            pa.field("unit", text, False),
            pa.field("subset", text, False),
            pa.field("key", text, False),
            ("region", pa.int32()),
            pa.field("kept", pa.bool_(), False),
            ("drop_stage", text),
            ("drop_reason", text),
            ("drop_detail", text),
            ("source_id", whole),
            ("category", text),
            ("category_id", whole),
            ("is_thing", pa.bool_()),
            ("core_category", text),
            ("caption", text),
            ("file_name", text),
            ("photo_format", text),
            ("image_width", pa.int32()),
            ("image_height", pa.int32()),
            ("bbox_x", pa.int32()),
            ("bbox_y", pa.int32()),
            ("bbox_w", pa.int32()),
            ("bbox_h", pa.int32()),
            ("area", whole),
            ("rle_counts", text),
            *((name, number) for name in SOURCE_SCORES),
            ("crop_box", pa.list_(number)),
            ("point_coords", pa.list_(pa.list_(number))),
            *((name, number) for name in SCORES if name not in _LATER_SCORES),
            ("shard", text),
            ("photo_offset", whole),
            ("photo_length", whole),
            ("json_offset", whole),
            ("json_length", whole),
            ("photo_digest", text),
            *((name, text) for name in CREDIT_FIELDS),
            *((name, number) for name in _LATER_SCORES),
        ]
    )


NOT_IN_INDEX = frozenset({"kept", "drop_stage", "drop_reason", "drop_detail", "rle_counts", "photo_digest"})
"""Ledger columns that the index leaves out: what is the same for every kept region, the masks, and what only
`verify` looks at."""

SPLIT = "split"
"""The index's column that says of each image whether it is for training (`train`) or `held_out`."""

_LATER = frozenset({"photo_digest", *CREDIT_FIELDS, *_LATER_SCORES})
"""Columns that older releases do not have, and what has nothing for them is written without; null there."""


@cache
def index_schema(credits: bool = True) -> pa.Schema:
    """Columns of `OUT/index.parquet`: those of the ledger that say something of a kept region.

    An index of an early release has none for `credits`, the license and origin of the photo, nor for the
    captioner's confidence. In a corpus that holds images out of training, `SPLIT` follows.
    """
    import pyarrow as pa

    left_out = NOT_IN_INDEX if credits else NOT_IN_INDEX | _LATER
    return pa.schema([field for field in ledger_schema() if field.name not in left_out])


def ledger_table(unit: str, images: list[ImageRecord], places: dict[str, Place]) -> pa.Table:
    """Every region of a unit as a row, in the order of the images and their region ids.

    Args:
        unit: name of the unit.
        images: every image of the unit, in plan order.
        places: by key, where each image with a kept region lies in the unit's shard.

    Returns:
        A table of `ledger_schema()`. `shard`, offsets and lengths are null unless the region is kept,
        `photo_digest` unless the image has a sample and its evidence names the photo. A column that early
        releases did not know is left out where it is all null, so that the file is the one they wrote. Mask
        columns are null if the mask could not be read; if no stage has made it, the box is there. A number
        that does not fit its column is null, and characters that are not Unicode are escaped: nothing that
        a source or a model returns can keep a unit from being written.
    """
    import pyarrow as pa

    regions, image_of = _regions_of(images)
    drops = [region.drop or images[i].drop for region, i in zip(regions, image_of, strict=True)]
    is_region = [region is not _IMAGE_LEVEL for region in regions]
    kept = pa.array([drop is None and real for drop, real in zip(drops, is_region, strict=True)], pa.bool_())
    located = _placed(unit, [image.key for image in images], places)
    rows = pa.array(image_of, pa.int64())
    columns: dict[str, Any] = {
        "unit": pa.repeat(unit, len(regions)),
        **{name: values.take(rows) for name, values in _of_images(images).items()},
        "region": [region.id if real else None for region, real in zip(regions, is_region, strict=True)],
        "kept": kept,
        "drop_stage": [drop and drop.stage for drop in drops],
        "drop_reason": [drop and drop.reason.value for drop in drops],
        "drop_detail": [drop and _published(drop.detail) for drop in drops],
        **_of_regions(regions),
        **{name: _where(kept, values.take(rows)) for name, values in located.items()},
        "photo_digest": _digests(images, places).take(rows),
    }
    schema = ledger_schema()
    assert columns.keys() == set(schema.names)
    arrays = [_array(columns[field.name], field.type) for field in schema]
    return without_unknown(pa.Table.from_arrays(arrays, schema=schema))


def without_unknown(table: pa.Table) -> pa.Table:
    """A ledger without those columns that early releases did not know and that are all null."""
    unknown = [name for name in _LATER if table[name].null_count == len(table)]
    return table.drop_columns(unknown) if unknown else table


_PATH = re.compile(r"(?<![\w.:/~-])(?:file://)?/(?:[^\s/:;,()'\"]+/)+(?=[^\s/])")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b")


def _published(detail: str) -> str:
    """The detail of a drop without secrets, and without folders and addresses in memory of the builder."""
    return _ADDRESS.sub("0x...", _PATH.sub(".../", shorten(detail, environment=False)))


def _regions_of(images: list[ImageRecord]) -> tuple[list[Region], list[int]]:
    """The regions of all images by their ids, and the position of each region's image.

    An image without regions has one that stands for the image.
    """
    regions: list[Region] = []
    image_of: list[int] = []
    for place, image in enumerate(images):
        own = image.regions or [_IMAGE_LEVEL]
        if any(a.id >= b.id for a, b in itertools.pairwise(own)):
            own = sorted(own, key=lambda region: region.id)
        regions.extend(own)
        image_of.extend([place] * len(own))
    return regions, image_of


def _of_regions(regions: list[Region]) -> dict[str, list[Any]]:
    boxes = [region.bbox if region.rle or region.bbox[2] else (None,) * 4 for region in regions]
    return {
        "source_id": [region.source_id for region in regions],
        "category": [region.category for region in regions],
        "category_id": [region.category_id for region in regions],
        "is_thing": [region.is_thing for region in regions],
        "core_category": [region.core_category for region in regions],
        "caption": [region.caption for region in regions],
        **{f"bbox_{name}": [box[i] for box in boxes] for i, name in enumerate("xywh")},
        "area": [None if region.rle is None else region.area for region in regions],
        "rle_counts": [None if region.rle is None else region.rle.counts for region in regions],
        **{name: [region.source_scores.get(name) for region in regions] for name in SOURCE_SCORES},
        "crop_box": [region.crop_box for region in regions],
        "point_coords": [region.point_coords for region in regions],
        **{name: [region.scores.get(name) for region in regions] for name in SCORES},
    }


def _of_images(images: list[ImageRecord]) -> dict[str, pa.Array]:
    import pyarrow as pa

    values = {
        "subset": (image.subset for image in images),
        "key": (image.key for image in images),
        "file_name": (shorten(image.file_name, environment=False) for image in images),
        "photo_format": (image.photo_format for image in images),
        "image_width": (image.width for image in images),
        "image_height": (image.height for image in images),
        **{name: [_credit(image, name) for image in images] for name in CREDIT_FIELDS},
    }
    types = {name: pa.int32() if name.startswith("image_") else pa.string() for name in values}
    return {name: _array(list(of_each), types[name]) for name, of_each in values.items()}


def _credit(image: ImageRecord, name: str) -> str | None:
    return (getattr(image.credit, name) or None) if image.credit else None


def _placed(unit: str, keys: list[str], places: dict[str, Place]) -> dict[str, pa.Array]:
    import pyarrow as pa

    found = [places.get(key) for key in keys]
    shard = pa.array([place and f"shards/{unit}.tar" for place in found], pa.string())
    offsets = {name: [place and place[i] for place in found] for i, name in enumerate(Place._fields)}
    return {"shard": shard, **{name: pa.array(values, pa.int64()) for name, values in offsets.items()}}


def _digests(images: list[ImageRecord], places: dict[str, Place]) -> pa.Array:
    import pyarrow as pa

    return pa.array(
        [(image.photo_digest or None) if image.key in places else None for image in images], pa.string()
    )


def _where(kept: pa.Array, values: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    choose: Any = getattr(pc, "if_else")  # noqa: B009 - made when pyarrow.compute is imported
    return choose(kept, values, pa.scalar(None, values.type))


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    if isinstance(values, pa.Array):
        return values
    try:
        return pa.array(values, kind)
    except (UnicodeEncodeError, OverflowError, TypeError, pa.ArrowException):
        return pa.array([_fitted(value, kind) for value in values], kind)


def _fitted(value: Any, kind: pa.DataType) -> Any:
    """A value as far as a column of this kind can hold it; None for what it cannot."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return [_fitted(each, kind.value_type) for each in value] if isinstance(value, list | tuple) else None
    if pa.types.is_string(kind):
        return plain_text(value) if isinstance(value, str) else None
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    try:
        if pa.types.is_integer(kind):
            most = 1 << (kind.bit_width - 1)
            return value if type(value) is int and -most <= value < most else None
        return None if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def align_ledger(table: pa.Table, path: object, columns: list[str] | None = None) -> pa.Table:
    """A ledger of any release with today's columns, or some of them: those that it does not know are null.

    Args:
        table: as it was read.
        path: for the message.
        columns: names of the columns to return; None for all.

    Raises:
        ConfigError: there is no such column.
        IntegrityError: the ledger lacks a column that every release had, or one has another type.
    """
    import pyarrow as pa

    schema = ledger_schema()
    names = schema.names if columns is None else columns
    if unknown := set(names) - set(schema.names):
        raise ConfigError(f"{min(unknown)}: no such column; a ledger has {', '.join(schema.names)}")
    schema = pa.schema([schema.field(name) for name in names])
    missing = set(names) - set(table.schema.names)
    if lost := missing - SCORES.keys() - _LATER:
        raise IntegrityError(f"{path}: a ledger without the column {min(lost)}; {REBUILD}")
    found = [
        pa.nulls(table.num_rows, field.type) if field.name in missing else table[field.name]
        for field in schema
    ]
    try:
        return pa.Table.from_arrays(found, names=names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise IntegrityError(f"{path}: not a ledger of this version ({error}); {REBUILD}") from error


def table_bytes(table: pa.Table) -> bytes:
    """The Parquet file of a ledger. Same rows, same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, **writing_options())
    return buffer.getvalue().to_pybytes()


_REPEATS = ("unit", "subset", "key", "drop_stage", "drop_reason", "category", "core_category", "file_name")
_REPEATS += ("photo_format", "shard", "photo_digest", *CREDIT_FIELDS)


def writing_options() -> dict[str, Any]:
    """How ledgers and the index are written: level 1 is half the time of level 3 and no larger on masks and
    text.

    Dictionaries only where values repeat. Page indices let a reader skip to a key.
    """
    return {
        "compression": "zstd",
        "compression_level": 1,
        "version": "2.6",
        "use_dictionary": list(_REPEATS),
        "write_page_index": True,
    }
