"""A photo and its regions for captioning, from masks in whatever form they are kept.

| what is given | what it holds |
| --- | --- |
| an image, or a folder of images | one mask each, see `mask_images` |
| a JSON | COCO instances, COCO panoptic with its PNGs, or one image of SA-1B: all regions of the photo |
| a corpus or one of its shards, with a key | the photo itself and its kept regions |

A mask image that cannot be used is an error, since it was named. A record of a JSON that cannot be used is
left out, with its reason in `PhotoRegions.left_out`.
"""

from __future__ import annotations

import functools
import glob
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from ...filters import rle
from ...filters.held_out import is_held_out
from ...pipeline.corpus import reader
from ...pipeline.io import failures, files, mask_images, photos
from ...pipeline.sources import file_names
from ...pipeline.sources.categories import load_categories, make_table
from ...pipeline.sources.coco_json import Image
from ...pipeline.sources.protocols import CatalogEntry
from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.records import Blob, ImageRecord
from ...schemas.sample import Sample


class Region(NamedTuple):
    """A region to caption.

    Attributes:
        source: where the region comes from: the file of its mask, or the JSON and its record.
        mask: the mask, of the photo's size and not empty.
        label: name of the category; "" if it is not known.
        caption: the caption that the corpus has for it; "" elsewhere.
        number: its id in the corpus; None elsewhere.
    """

    source: str
    mask: rle.Mask
    label: str = ""
    caption: str = ""
    number: int | None = None

    def dense(self) -> np.ndarray:
        """The mask as (H, W) bool."""
        return rle.decode(self.mask.rle).astype(bool)


class PhotoRegions(NamedTuple):
    """A photo with its regions in the order in which they were given.

    Attributes:
        name: path of the photo, or path of the corpus and the image's key.
        pixels: (H, W, 3) uint8 RGB, as stored.
        regions: the regions, at least one.
        left_out: a line for each record that cannot be used, with the reason.
    """

    name: str
    pixels: np.ndarray
    regions: list[Region]
    left_out: list[str]

    def masks(self) -> list[np.ndarray]:
        """The mask of each region as (H, W) bool."""
        return [region.dense() for region in self.regions]

    def without_pixels(self) -> PhotoRegions:
        """The same with a black photo of its size that takes no memory, for what is said of it later."""
        return self._replace(pixels=np.broadcast_to(np.uint8(0), self.pixels.shape))


_Item = TypeVar("_Item")


class _Found(NamedTuple):
    regions: list[Region]
    left_out: list[str]


def read_photo_regions(
    image: str | Path | None, masks: Sequence[str | Path], key: str | None = None
) -> PhotoRegions:
    """Read a photo and its regions.

    Args:
        image: path of the photo; None for a corpus, which has its own photos.
        masks: files and folders in the order in which their regions are wanted, as in the table above.
            `PATH#KEY` is the same as `PATH` with `key`.
        key: key of the image in a corpus, or its name or id in a JSON that does not know the photo's name.

    Raises:
        ConfigError: a file or record is missing, unreadable or empty, or does not fit the photo.
        IntegrityError: the corpus is damaged.
    """
    if not masks:
        raise ConfigError("no masks; give mask images, an annotation file, or a corpus and a key")
    split = [_split(str(path), key) for path in masks]
    for path, chosen in split:
        if is_corpus(path):
            if image is not None or len(split) > 1:
                raise ConfigError(f"{path}: a corpus has its own photos; give it alone, without an image")
            return _from_corpus(path, chosen)
    for path, _ in split:
        if not _exists(path):
            raise ConfigError(f"{path}: no such file; correct the path")
    if image is None:
        raise ConfigError(f"{split[0][0]}: these masks need their photo; give the image too")
    pixels = read_pixels(str(image))
    found = [_from(path, str(image), pixels.shape[:2], chosen) for path, chosen in split]
    regions = [region for each in found for region in each.regions]
    return PhotoRegions(str(image), pixels, regions, [line for each in found for line in each.left_out])


def _split(path: str, key: str | None) -> tuple[str, str | None]:
    whole, mark, after = path.rpartition("#")
    is_key = mark and key is None
    if is_key and ((files.is_url(path) and not file_names.ending(whole)) or not _exists(path)):
        return whole, after
    return path, key


def _exists(path: str) -> bool:
    return Path(path).exists() or bool(files.expand(path))


def read_pixels(image: str) -> np.ndarray:
    """The pixels of a photo, (H, W, 3) uint8 RGB, as stored.

    Raises:
        ConfigError: there is no such photo, or it cannot be read.
    """
    try:
        return photos.decode(Blob(image), files.read(Blob(image)), Limits().max_pixels)
    except FileNotFoundError as error:
        raise ConfigError(f"{image}: no such photo; correct the path") from error
    except OSError as error:
        raise ConfigError(f"{image}: cannot be read ({error.strerror or error}); correct the path") from error
    except BadRecord as error:
        raise ConfigError(error.detail) from error


def _from(path: str, image: str, size: tuple[int, int], key: str | None) -> _Found:
    """The regions of one file or folder."""
    if files.is_folder(path):
        found = file_names.list_folder(path, "masks").names or []
        inside = [
            f"{path.rstrip('/')}/{name}" for name in found if name.lower().endswith(mask_images.ENDINGS)
        ]
        if not inside:
            raise ConfigError(f"{path}: no corpus and no mask images here; give the masks")
        return _Found([_of_image(each, size) for each in inside], [])
    if file_names.ending(path) == ".json":
        return _from_json(path, image, key)
    return _Found([_of_image(path, size)], [])


def _of_image(path: str, size: tuple[int, int]) -> Region:
    return Region(path, rle.from_mask(mask_images.read_mask_image(path, size)))


# A corpus.


def is_corpus(path: str) -> bool:
    """Whether a path names a corpus, or a shard of one."""
    if files.is_url(path):
        return not file_names.ending(path) and bool(reader.Corpus(path, confined=True).subsets)
    if files.is_folder(path):
        return any(Path(path).glob("*/manifests"))
    return file_names.ending(path) == ".tar" and Path(path).exists()


def _from_corpus(path: str, key: str | None) -> PhotoRegions:
    if not key:
        raise ConfigError(f"{path}: which image? Give its key, as in `{path}#KEY`")
    return of_sample(f"{path}#{key}", *_sample(path, key))


def iter_photo_regions(corpus: str | Path, held_out: bool = False) -> Iterator[PhotoRegions]:
    """Every image of a corpus with its kept regions, in the order of the shards.

    Args:
        corpus: path of the folder that a build wrote.
        held_out: only the images that are held out of training, if the corpus holds any out.

    Raises:
        ConfigError: the folder is no corpus, or a photo or a mask cannot be decoded.
        IntegrityError: the corpus is damaged.
    """
    opened = reader.open_corpus(corpus)
    share = opened.held_out_share if held_out else 0.0
    for sample, data in opened.samples():
        if share and not is_held_out(sample.key, share):
            continue
        yield of_sample(f"{corpus}#{sample.key}", sample, data)


def of_sample(name: str, sample: Sample, data: bytes) -> PhotoRegions:
    """A sample of a corpus with its photo's bytes.

    Raises:
        ConfigError: the photo or a mask cannot be decoded.
    """
    try:
        pixels = photos.decode(Blob(name), data, Limits().max_pixels)
        regions = [
            Region(
                f"{name}: region {region.id}",
                rle.check(region.rle.counts, region.rle.size),
                region.category or region.core_category,
                region.caption,
                region.id,
            )
            for region in sample.regions
        ]
    except BadRecord as error:
        raise ConfigError(f"{name}: {error.detail}") from error
    return PhotoRegions(name, pixels, regions, [])


def _sample(path: str, key: str) -> tuple[Sample, bytes]:
    if file_names.ending(path) == ".tar":
        for sample, data in reader.iter_shard(path):
            if sample.key == key:
                return sample, data
        raise ConfigError(f"{path}: no image {key} in this shard; `tar -tf {path}` lists them")
    corpus = reader.open_corpus(path)
    rows = [row for row in corpus.find_image(key).rows if row["kept"]]
    if not rows:
        raise ConfigError(f"{path}: no region of {key} was kept, so no shard has it; choose another image")
    return corpus.read_sample(rows[0])


# Annotation files.


class _Annotation(msgspec.Struct):
    """An element of `annotations`: an instance, or all segments of an image."""

    id: int | str | None = None
    image_id: int | str | None = None
    file_name: str | None = None
    category_id: int | None = None
    iscrowd: int | bool | None = None
    segmentation: msgspec.Raw = msgspec.Raw()
    segments_info: msgspec.Raw = msgspec.Raw()

    def instance(self) -> msgspec.Raw:
        """What `sources.instances` reads of it."""
        fields = {"id": self.id, "category_id": self.category_id, "iscrowd": self.iscrowd}
        return msgspec.Raw(msgspec.json.encode(fields | {"segmentation": self.segmentation}))


class _File(msgspec.Struct):
    annotations: list[_Annotation]
    image: msgspec.Raw = msgspec.Raw()
    images: list[Image] = []
    categories: msgspec.Raw = msgspec.Raw()


_NAMES: tuple[Callable[[Image], str | None], ...] = (
    lambda each: str(each.id),
    lambda each: each.file_name,
    lambda each: each.file_name and file_names.base_name(each.file_name),
    lambda each: each.file_name and file_names.stem(each.file_name),
)
"""What the record of a photo may be called, the surest first. The last is compared without an ending."""


class _Indexed:
    """The content of a JSON, and which of it is about each photo: it may have the masks of many thousands."""

    def __init__(self, content: _File):
        self.content = content

    @functools.cached_property
    def is_panoptic(self) -> bool:
        """Whether segments are listed by image."""
        return any(each.segments_info for each in self.content.annotations)

    @functools.cached_property
    def annotations(self) -> dict[str, list[_Annotation]]:
        """By the id of their image."""
        return _grouped((str(each.image_id), each) for each in self.content.annotations)

    @functools.cached_property
    def _images(self) -> list[dict[str, list[Image]]]:
        """By each of `_NAMES`."""
        return [_grouped((name_of(each), each) for each in self.content.images) for name_of in _NAMES]

    def images(self, wanted: str) -> list[Image]:
        """The records of a photo, by the surest of its names that any has."""
        names = [wanted] * (len(_NAMES) - 1) + [file_names.stem(wanted)]
        found = (images.get(name, []) for images, name in zip(self._images, names, strict=True))
        return next(filter(None, found), [])


def _grouped(pairs: Iterable[tuple[str | None, _Item]]) -> dict[str, list[_Item]]:
    found: dict[str, list[_Item]] = defaultdict(list)
    for name, item in pairs:
        if name is not None:
            found[name].append(item)
    return dict(found)


_KINDS = "COCO instances, COCO panoptic or SA-1B"


def _from_json(path: str, image: str, key: str | None) -> _Found:
    indexed = _parse(path)
    content = indexed.content
    if content.image:
        found = _usable(_sa1b(path, image), path)
    elif indexed.is_panoptic:
        found = _usable(_panoptic(path, indexed, image, key), path)
    elif any(each.segmentation for each in content.annotations):
        found = _usable(_instances(path, indexed, image, key), path)
    else:
        raise ConfigError(f"{path}: no annotation has a mask; give a JSON of {_KINDS}")
    if not found.regions:
        why = "; ".join(found.left_out)[:500] or "it has none"
        raise ConfigError(f"{path}: no usable region of {file_names.base_name(image)}: {why}")
    return found


def _parse(path: str) -> _Indexed:
    """The content of a JSON. The last one is kept, since it may be that of many photos."""
    try:
        version = files.version(path)
    except OSError:
        return _Indexed(_read_file(path))  # says what is wrong
    return _kept_file(path, version)


@functools.lru_cache(maxsize=1)
def _kept_file(path: str, _version: str) -> _Indexed:
    return _Indexed(_read_file(path))


def _read_file(path: str) -> _File:
    try:
        data = files.read(Blob(path))
        if data.lstrip()[:1] == b"[":  # results, and files that hold the annotations of one image alone
            return _File(msgspec.json.decode(data, type=list[_Annotation]))
        return msgspec.json.decode(data, type=_File)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; correct the path") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from error
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file of {_KINDS} ({error}); correct the file") from error


def _usable(record: ImageRecord, path: str) -> _Found:
    """The live regions of a record that a source of the pipeline read, and why the others were dropped."""
    if record.drop is not None:
        raise ConfigError(f"{record.drop.detail}; give the photo that {path} describes")
    found = _Found([], [])
    for region in record.regions:
        if region.drop is not None:
            found.left_out.append(f"{region.drop.reason}: {region.drop.detail}")
        elif region.rle is not None:
            name = f"{path}: annotation {region.id if region.source_id is None else region.source_id}"
            mask = rle.Mask(region.rle, region.area, region.bbox)
            found.regions.append(Region(name, mask, region.category or ""))
    return found


def _sa1b(path: str, image: str) -> ImageRecord:
    from ...pipeline.sources.sa1b import Sa1b, Sa1bOptions

    key = file_names.key_of(file_names.stem(image))
    entry = CatalogEntry(key, Blob(image), Blob(path), file_name=image)
    return Sa1b(Sa1bOptions(paths=[path])).read(entry, Limits())


def _panoptic(path: str, indexed: _Indexed, image: str, key: str | None) -> ImageRecord:
    from ...pipeline.sources.coconut import Coconut, CoconutOptions
    from ...pipeline.sources.panoptic import Record

    content, described = indexed.content, _image_of(path, indexed, image, key)
    own = indexed.annotations.get(str(described.id))
    if not own:
        raise ConfigError(f"{path}: no annotation of image {described.id}; give the JSON that has it")
    annotation = own[0]
    labels = _label_map(path, annotation.file_name or f"{file_names.stem(image)}.png", image)
    raw = _loads(path, content.categories) if content.categories else None
    table = load_categories(None) if raw is None else make_table(raw, path)
    record = Record(described.width, described.height, annotation.segments_info, list(table.by_id.values()))
    entry = CatalogEntry("photo", Blob(image), Blob(labels), msgspec.json.encode(record), image)
    options = CoconutOptions(
        annotations=[path], labels=str(Path(labels).parent), photos=[str(Path(image).parent)]
    )
    return Coconut(options).read(entry, Limits())


def _label_map(path: str, name: str, photo: str) -> str:
    """The PNG of a panoptic JSON: in the folder with the JSON's name, or in the only folder next to it."""
    home = Path(path).parent
    try:
        if (named := home / file_names.stem(path) / name).exists():
            return str(named)
        beside = sorted(home.glob(f"*/{glob.escape(name)}")) or [home / name]
        found = [str(each) for each in beside if each.exists() and each.resolve() != Path(photo).resolve()]
    except OSError as error:  # no file can have such a name
        told = failures.describe(error)
        raise ConfigError(f"{path}: file_name {name[:40]!a}: {told}; correct it in the file") from error
    if len(found) != 1:
        what = (
            f"several label maps {name}: {', '.join(found)}; keep one"
            if found
            else f"no label map {name}; put it there"
        )
        raise ConfigError(f"{path}: the folders next to it have {what}")
    return found[0]


def _instances(path: str, indexed: _Indexed, image: str, key: str | None) -> ImageRecord:
    from ...pipeline.sources.coco import Coco, CocoOptions
    from ...pipeline.sources.instances import Record

    content, described = indexed.content, _image_of(path, indexed, image, key)
    annotations = indexed.annotations.get(str(described.id), [])
    own = [each.instance() for each in annotations if each.segmentation]
    raw = _loads(path, content.categories) if content.categories else None
    categories = list(make_table(raw, path).by_id.values()) if raw else []
    record = msgspec.json.encode(Record(described.width, described.height, own, categories))
    entry = CatalogEntry("photo", Blob(image), Blob(path), record, image)
    options = CocoOptions(annotations=[path], photos=[str(Path(image).parent)], unnamed="keep")
    return Coco(options).read(entry, Limits())


def _loads(path: str, raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: a value in it is not JSON ({error}); correct the file") from error


def _image_of(path: str, indexed: _Indexed, image: str, key: str | None) -> Image:
    """The record of the photo: by its name, by a name of another ending, or by the key."""
    content, wanted = indexed.content, key or file_names.base_name(image)
    found = indexed.images(wanted)
    if len(found) > 1:
        raise ConfigError(
            f"{path}: {len(found)} images are called {wanted}; choose one by its id, with --key ID or "
            "`FILE.json#ID`"
        )
    if found:
        return found[0]
    number = re.search(r"(\d+)$", key or file_names.stem(image))
    if not content.images and number:  # a list of annotations without images: COCO's names hold the id
        for annotation in indexed.annotations.get(str(int(number[1])), []):
            return Image(annotation.image_id)
    known = ", ".join(_known(content))
    raise ConfigError(
        f"{path}: no image is called {wanted}; the file has {known}; choose one by its name or id, with "
        "--key NAME or `FILE.json#NAME`"
    )


def _known(content: _File) -> Iterator[str]:
    listed = [each.file_name or str(each.id) for each in content.images]
    listed = listed or sorted({str(each.image_id) for each in content.annotations})
    yield from listed[:3]
    if len(listed) > 3:
        yield f"and {len(listed) - 3:,} more"
