"""Writes a corpus in other formats, shard by shard, so that memory does not grow with it.

| format | what comes out |
| --- | --- |
| `perceptiondlm-json` | `annotations.json`, a list of `{"image", "mask_rles", "captions"}`, and `images/`; \
the same by subset in `annotations/<subset>_dataset.json`, named by `paracaption_datasets.yaml` |
| `coco` | `instances.json`, COCO instances with RLE masks and a `caption` each, and `images/` |
| `parquet` | `data/<unit>.parquet`, a row per image with the photo's bytes and its regions as structs |

An export is whole, or absent: everything is written into a temporary folder that gets its name at the end.
One into a bucket is written on local scratch and uploaded then, the files that name the others last.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import msgspec
import yaml

from ...filters.held_out import Split, is_in
from ...schemas.errors import ConfigError, IntegrityError
from ...schemas.records import CREDIT_FIELDS
from ...schemas.sample import Sample, SampleRegion, SampleRle
from ..io import files
from ..io.bucket_checks import refuse_secrets
from ..io.bucket_folders import staged_folder, upload_folder
from ..io.location import Location, Prefix, locate
from ..io.orientation import make_upright
from . import merge, reader
from .reader import Corpus
from .units import Unit

if TYPE_CHECKING:
    import pyarrow as pa

CREDITS = "credits.json"
"""License and origin of the images, next to a list in the released layout."""

_SMALL = re.compile(r"[0-9]{1,9}")
_ROWS_PER_GROUP = 100
"""Photos are held in memory until their row group is written; 100 of SA-1B's are 150 MB."""

DATASETS = "paracaption_datasets.yaml"
"""The file that a trainer is given. The released code takes a list only under a name with this ending."""


class Selection(NamedTuple):
    """What of a corpus is exported.

    Attributes:
        corpus: it.
        split: `train`, `held_out` or `all`.
        share: of the images that are held out of training; with 0, `train` is `all`.
        images: number of images with a kept region in the split, and in the corpus; not counted if the share
            is 0.
        prefix: what photos' names in a JSON begin with.
    """

    corpus: Corpus
    split: Split
    share: float
    images: tuple[int, int]
    prefix: str = ""

    def has(self, sample: Sample) -> bool:
        """Whether a sample is in the split."""
        return is_in(self.split, sample.key, self.share)

    def samples(self, unit: Unit | None = None) -> Iterator[tuple[Sample, bytes]]:
        """The samples of the split, of one unit or of all."""
        found = self.corpus.samples() if unit is None else self.corpus.unit_samples(unit)
        return (pair for pair in found if self.has(pair[0]))


def select(corpus: str | Location, split: str | None = None) -> Selection:
    """What of a corpus an export takes.

    Args:
        corpus: path of the folder that a build wrote.
        split: `train`, `held_out` or `all`; None takes `train` if images are held out of training, else all.

    Raises:
        ConfigError: no such split, or the corpus holds no image out, or the split has none.
        IntegrityError: a manifest cannot be read.
    """
    opened = reader.open_corpus(corpus)
    share = opened.held_out_share
    chosen = split or ("train" if share else "all")
    if chosen not in get_args(Split):
        raise ConfigError(f"split {split!r}: no such split; there are {', '.join(get_args(Split))}")
    if chosen == "held_out" and not share:
        raise ConfigError(
            f"{corpus}: no image is held out of training; set held_out_share in the configuration of its "
            "build, and build again, which only merges"
        )
    counts = [merge.count_subset(opened, subset) for subset in opened.subsets] if share else []
    images, held = sum(each.images_captioned for each in counts), sum(each.images_held_out for each in counts)
    found = {"train": images - held, "held_out": held, "all": images}[chosen]
    if images and not found:
        raise ConfigError(
            f"{corpus}: with a held_out_share of {share:g}, none of its {images:,} images is in the split "
            f"{chosen}; set another held_out_share, or export --split all"
        )
    return Selection(opened, cast("Split", chosen), share, (found, images))


def export(
    corpus: str | Location, format: str, to: str | Location, prefix: str = "", split: str | None = None
) -> list[Location]:
    """Write the committed units of a corpus in another format.

    Photos and JSONs are named from the export's folder, which so can be moved as a whole.

    Args:
        corpus: path of the folder that a build wrote.
        format: one of `FORMATS`.
        to: a folder that does not exist yet, or is empty; or a URL in a bucket below which there is nothing.
        prefix: what the names of photos and JSONs begin with, for readers that open them from their own
            folder: the export's path as those readers see it.
        split: as in `select`.

    Returns:
        The annotation file of the whole corpus and the folder of photos, or the Parquet files.

    Raises:
        ConfigError: no such format or split, or the folder has something in it; nothing was written.
        IntegrityError: the corpus is damaged; nothing was written.
    """
    write = FORMATS.get(format)
    if write is None:
        raise ConfigError(f"format {format!r}: no such format; there are {', '.join(FORMATS)}")
    place, chosen = locate(to), select(corpus, split)
    chosen = chosen._replace(prefix=f"{prefix.rstrip('/')}/" if prefix else "")
    if isinstance(place, Prefix):
        refuse_secrets(str(place))
        if f"{place}/".startswith(f"{locate(corpus)}/"):
            raise ConfigError(
                f"{place}: lies in the corpus, whose builds delete what is no part of it; give another place"
            )
        with staged_folder(place) as folder:
            written = [(path.relative_to(folder), path.is_file()) for path in write(chosen, folder)]
            upload_folder(folder, place, [folder / path for path, is_file in written if is_file])
        return [place / path.as_posix() for path, _ in written]
    with files.write_folder_atomic(place) as folder:
        found = [path.relative_to(folder) for path in write(chosen, folder)]
    return [place / path for path in found]


def _write_json(chosen: Selection, folder: Path) -> list[Path]:
    """The lists that PerceptionDLM's own trainer reads: of the corpus, and of each subset with a region."""
    target = folder / "annotations.json"
    subsets: dict[str, _JsonList] = {}
    credits: _JsonList | None = None
    with ExitStack() as opened:
        whole = opened.enter_context(_JsonList(target))
        for sample, photo in chosen.samples():
            if sample.subset not in subsets:
                path = folder / "annotations" / f"{sample.subset}_dataset.json"
                path.parent.mkdir(exist_ok=True)
                subsets[sample.subset] = opened.enter_context(_JsonList(path))
            record = {
                "image": chosen.prefix + _write_photo(folder, sample, photo),
                "mask_rles": [_coco_rle(region.rle) for region in sample.regions],
                "captions": [region.caption for region in sample.regions],
            }
            whole.append(record)
            subsets[sample.subset].append(record)
            if credit := sample.credit():  # not in the lists, whose readers take three columns
                credits = credits or opened.enter_context(_JsonList(folder / CREDITS))
                credits.append({"image": record["image"], **credit})
    (folder / "images").mkdir(exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    names = [each.path.relative_to(folder).as_posix() for each in subsets.values()]
    listed = {"gar_caption": [{"data_file": chosen.prefix + name, "data_type": "json"} for name in names]}
    (folder / DATASETS).write_text(yaml.safe_dump(listed, allow_unicode=True, width=10_000), "utf-8")
    return [target, folder / "images"]


def _write_coco(chosen: Selection, folder: Path) -> list[Path]:
    """COCO instances. A region's category is the annotation's, with its id there, else the caption's.

    All ids are those of the whole corpus, so that they mean the same in each split.
    """
    target = folder / "instances.json"
    categories = _published_ids(chosen.corpus)
    taken = max(categories.values(), default=0)
    used: set[str] = set()
    licenses = _Licenses(chosen.corpus)
    spooled = folder / f"{files.TEMPORARY}annotations"
    num_annotations = 0
    with open(target, "xb") as file, open(spooled, "x+b") as annotations:
        info = {"description": "Region captions made with ParaCaption"}
        info |= {"split": chosen.split} if chosen.share else {}
        file.write(b'{"info":' + msgspec.json.encode(info) + b',"licenses":')
        file.write(msgspec.json.encode(licenses.block()) + b',"images":[')
        for number, (sample, photo, source_ids) in enumerate(_with_source_ids(chosen.corpus), 1):
            is_chosen = chosen.has(sample)
            if is_chosen:
                image = {
                    "id": number,
                    "file_name": _coco_name(_write_photo(folder, sample, photo), chosen.prefix),
                    "width": sample.width,
                    "height": sample.height,
                    **licenses.of_image(sample),
                }
                file.write(_item(image, first=not used))
            for region in sample.regions:
                num_annotations += 1
                name = region.category or region.core_category
                if name not in categories:
                    categories[name] = taken = taken + 1
                if is_chosen:
                    annotation = _annotation(region, num_annotations, number, categories[name])
                    if (source_id := source_ids.get((sample.key, region.id))) is not None:
                        annotation["source_id"] = source_id
                    annotations.write(_item(annotation, first=not used))
                    used.add(name)
        file.write(b'\n],"annotations":[')
        annotations.seek(0)
        shutil.copyfileobj(annotations, file)
        file.write(b'\n],"categories":')
        numbered = sorted((number, name) for name, number in categories.items() if name in used)
        listed = [{"id": number, "name": name, "supercategory": ""} for number, name in numbered]
        file.write(msgspec.json.encode(listed) + b"}\n")
    spooled.unlink()
    (folder / "images").mkdir(exist_ok=True)
    return [target, folder / "images"]


def _with_source_ids(
    corpus: Corpus,
) -> Iterator[tuple[Sample, bytes, dict[tuple[str, int], int]]]:
    """Every sample with its photo, and the ids that annotations of its unit have in their source."""
    for unit in corpus.units():
        table = reader.read_ledger(unit.ledger, ["key", "region", "kept", "source_id"])
        rows = table.filter(table["kept"]).to_pylist()
        ids = {(row["key"], row["region"]): row["source_id"] for row in rows if row["source_id"] is not None}
        for sample, photo in corpus.unit_samples(unit):
            yield sample, photo, ids


class _Licenses:
    """COCO's block `licenses`, of those that images with a kept region are under.

    An id stays the publisher's where it is a number and of one license only.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._ids: dict[tuple[str, str], int] = {}
        columns = ["license", "license_url", "license_id"]
        for table in corpus.ledgers(columns=["kept", *columns]):
            found = table.filter(table["kept"]).group_by(columns, use_threads=False)
            for row in found.aggregate([]).to_pylist():
                self._add(*(row[name] or "" for name in columns))

    def _add(self, name: str, url: str, number: str) -> None:
        named = (name or number, url)
        if named == ("", "") or named in self._ids:
            return
        taken = self._ids.values()
        published = int(number) if _SMALL.fullmatch(number) else 0
        fits = published > 0 and published not in taken
        self._ids[named] = published if fits else max(taken, default=0) + 1

    def block(self) -> list[dict[str, Any]]:
        """The block. A license that the publisher's list does not have has its id there as its name."""
        found = sorted((number, named) for named, number in self._ids.items())
        return [{"id": number, "name": name, "url": url} for number, (name, url) in found]

    def of_image(self, sample: Sample) -> dict[str, Any]:
        """What an image says of its license and origin, in COCO's words: `license` is an id of the block.

        Raises:
            IntegrityError: its ledger names another license.
        """
        stated: dict[str, Any] = sample.credit()
        number = stated.pop("license_id", "")
        named = (stated.pop("license", "") or number, stated.pop("license_url", ""))
        if named == ("", ""):
            return stated
        if named not in self._ids:
            raise IntegrityError(
                f"{sample.key}: its ledger names another license; run `paracaption verify CORPUS`"
            )
        return {"license": self._ids[named], **stated}


def _coco_name(name: str, prefix: str) -> str:
    """COCO's `file_name` starts at the folder of photos; with a prefix it is the whole name."""
    return prefix + name if prefix else name.removeprefix("images/")


def _published_ids(corpus: Corpus) -> dict[str, int]:
    """The publisher's id of each category of a kept region.

    Where publishers disagree, an id or a name keeps what the first unit says; whoever has no id then gets one
    above all of these. Of a corpus with an index of an early release, categories count from 1,
    as they did.
    """
    if merge.has_early_index(corpus):
        return {}
    found: dict[str, int] = {}
    named: set[int] = set()
    for table in corpus.ledgers(columns=["kept", "category", "category_id"]):
        pairs = table.filter(table["kept"]).group_by(["category", "category_id"], use_threads=False)
        for row in pairs.aggregate([]).to_pylist():
            name, number = row["category"], row["category_id"]
            if name and number is not None and name not in found and number not in named:
                found[name] = number
                named.add(number)
    return found


def _annotation(region: SampleRegion, number: int, image: int, category: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": _coco_rle(region.rle),
        "bbox": region.bbox,
        "area": region.area,
        "iscrowd": 0,
        "caption": region.caption,
    }


def _write_parquet(chosen: Selection, folder: Path) -> list[Path]:
    """A file per unit with kept regions. The schema's note on the photo makes `datasets` decode it.

    Photos are inside, so there is no name to put a prefix before.
    """
    (folder / "data").mkdir()
    written = []
    schema = _parquet_schema(as_before=merge.has_early_index(chosen.corpus))
    for unit in chosen.corpus.units():
        path = folder / "data" / f"{unit.name}.parquet"
        if _write_unit(chosen.samples(unit), path, schema):
            written.append(path)
    return written


def _write_unit(samples: Iterator[tuple[Sample, bytes]], path: Path, schema: pa.Schema) -> bool:
    """Write the samples of a unit, unless it has none; whether it has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_parquet_row(*pair) for pair in islice(samples, _ROWS_PER_GROUP)]
    if not rows:
        return False
    with (
        open(path, "xb") as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        while rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows = [_parquet_row(*pair) for pair in islice(samples, _ROWS_PER_GROUP)]
    return True


def _parquet_row(sample: Sample, photo: bytes) -> dict[str, Any]:
    row = msgspec.to_builtins(sample) | {name: None for name in CREDIT_FIELDS} | sample.credit()
    row["exif_orientation"] = sample.exif_orientation
    for region in row["regions"]:
        region["rle_size"], region["rle_counts"] = region["rle"]["size"], region["rle"]["counts"]
        del region["rle"]
    upright, _ = make_upright(photo)  # one of an early release has its tag still
    return {"image": {"bytes": upright, "path": _photo_name(sample)}, **row}


def _parquet_schema(as_before: bool) -> pa.Schema:
    """The columns; `as_before` leaves out those that early releases did not write."""
    import pyarrow as pa

    region = {
        "id": pa.int32(),
        "rle_size": pa.list_(pa.int32()),
        "rle_counts": pa.string(),
        "bbox": pa.list_(pa.int32()),
        "area": pa.int64(),
        "category": pa.string(),
        "core_category": pa.string(),
        "caption": pa.string(),
    }
    columns: dict[str, pa.DataType] = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "key": pa.string(),
        "subset": pa.string(),
        "file_name": pa.string(),
        "photo_format": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "regions": pa.list_(pa.struct(list(region.items()))),
    }
    if not as_before:
        columns |= {"exif_orientation": pa.int32(), **dict.fromkeys(CREDIT_FIELDS, pa.string())}
    features = {name: _feature(kind) for name, kind in columns.items()}
    features["image"] = {"_type": "Image"}
    note = {"info": {"features": features}}
    return pa.schema(list(columns.items()), metadata={"huggingface": json.dumps(note)})


def _feature(kind: pa.DataType) -> Any:
    """A column's type in the words of `datasets`."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": str(kind), "_type": "Value"}


def _photo_name(sample: Sample) -> str:
    """A file name from key and sniffed format alone: the publisher's name is never used as a path."""
    return f"{sample.key}.{reader.PHOTO_SUFFIXES.get(sample.photo_format, 'img')}"


def _write_photo(folder: Path, sample: Sample, photo: bytes) -> str:
    name = f"images/{sample.subset}/{_photo_name(sample)}"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_upright(photo)[0])
    return name


def _coco_rle(rle: SampleRle) -> dict[str, Any]:
    return {"size": rle.size, "counts": rle.counts}


class _JsonList:
    """A JSON list written item by item, one a line."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "xb")
        self.first = True
        self.file.write(b"[")

    def append(self, item: Any) -> None:
        self.file.write(_item(item, self.first))
        self.first = False

    def __enter__(self) -> _JsonList:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.write(b"\n]\n")
        self.file.close()


def _item(item: Any, first: bool) -> bytes:
    return (b"\n" if first else b",\n") + msgspec.json.encode(item)


FORMATS: dict[str, Callable[[Selection, Path], list[Path]]] = {
    "perceptiondlm-json": _write_json,
    "coco": _write_coco,
    "parquet": _write_parquet,
}
