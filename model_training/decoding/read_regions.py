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

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from ...schemas.reasons import Reason
from ...schemas.records import Blob, ImageRecord
from ...schemas.sample import Sample
from .annotation_file import KINDS, Indexed, parse


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
        regions: the regions, at least one; none if a JSON of many photos has none of this one.
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


class _Found(NamedTuple):
    regions: list[Region]
    left_out: list[str]


def read_photo_regions(
    image: str | Path | None,
    masks: Sequence[str | Path],
    key: str | None = None,
    may_be_empty: bool = False,
) -> PhotoRegions:
    """Read a photo and its regions.

    Args:
        image: path of the photo; None for a corpus, which has its own photos.
        masks: files and folders in the order in which their regions are wanted, as in the table above.
            `PATH#KEY` is the same as `PATH` with `key`.
        key: key of the image in a corpus, or its name or id in a JSON that does not know the photo's name.
        may_be_empty: whether a JSON may have no annotations of the photo, or none but crowds and empty ones.

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
    found = [_from(path, str(image), pixels.shape[:2], chosen, may_be_empty) for path, chosen in split]
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


def _from(path: str, image: str, size: tuple[int, int], key: str | None, may_be_empty: bool) -> _Found:
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
        return _from_json(path, image, key, may_be_empty)
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


_NOTHING_TO_CAPTION = (Reason.CROWD, Reason.MASK_EMPTY)


def _from_json(path: str, image: str, key: str | None, may_be_empty: bool) -> _Found:
    indexed = parse(path)
    content = indexed.content
    if may_be_empty and not content.image and not indexed.about(_image_of(path, indexed, image, key)):
        return _Found([], [])
    if content.image:
        found = _usable(_sa1b(path, image), path)
    elif indexed.is_panoptic:
        found = _usable(_panoptic(path, indexed, image, key), path)
    elif indexed.has_masks:
        found = _usable(_instances(path, indexed, image, key), path)
    else:
        raise _without_masks(path)
    skipped = all(line.startswith(_NOTHING_TO_CAPTION) for line in found.left_out)
    if not found.regions and not (may_be_empty and skipped):
        why = "; ".join(found.left_out)[:500] or "it has none"
        raise ConfigError(f"{path}: no usable region of {file_names.base_name(image)}: {why}")
    return found


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


def _panoptic(path: str, indexed: Indexed, image: str, key: str | None) -> ImageRecord:
    from ...pipeline.sources.coconut import Coconut, CoconutOptions
    from ...pipeline.sources.panoptic import Record

    content, described = indexed.content, _image_of(path, indexed, image, key)
    own = indexed.about(described)
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


def _instances(path: str, indexed: Indexed, image: str, key: str | None) -> ImageRecord:
    from ...pipeline.sources.coco import Coco, CocoOptions
    from ...pipeline.sources.instances import Record

    content, described = indexed.content, _image_of(path, indexed, image, key)
    own = [each.instance() for each in indexed.about(described) if each.segmentation]
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


def _image_of(path: str, indexed: Indexed, image: str, key: str | None) -> Image:
    """The record of the photo: by its name, by a name of another ending, or by the key."""
    wanted, found = key or file_names.base_name(image), indexed.called(image, key)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{path}: {len(found)} images are called {wanted}; choose one by its id, with --key ID or "
            "`FILE.json#ID`"
        )
    raise ConfigError(
        f"{path}: no image is called {wanted}; the file has {indexed.known()}; choose one by its name or "
        "id, with --key NAME or `FILE.json#NAME`"
    )


def _without_masks(path: str) -> ConfigError:
    return ConfigError(f"{path}: no annotation has a mask; give a JSON of {KINDS}")


def check_json(path: str, images: Sequence[str]) -> None:
    """Check that a JSON with the masks of all photos can be read, and has one record of each photo.

    Raises:
        ConfigError: it is damaged or has no masks, or does not know a photo.
    """
    indexed = parse(path)
    if indexed.content.image:
        return  # of one photo
    if not indexed.has_masks:
        raise _without_masks(path)
    count = {each: len(indexed.called(each)) for each in images}
    for number, told in ((0, "no image is called"), (2, "several images are called")):
        wrong = [file_names.base_name(each) for each in images if min(count[each], 2) == number]
        if wrong:
            more = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
            raise ConfigError(
                f"{path}: {told} {wrong[0]}{more}; the file has {indexed.known()}; give the photos that "
                "it describes, under their names in it"
            )
