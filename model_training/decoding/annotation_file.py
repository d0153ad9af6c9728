"""A JSON of masks, COCO's or SA-1B's, and which of it is about a photo: it may be that of many thousands."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from ...pipeline.io import files
from ...pipeline.sources import file_names
from ...pipeline.sources.coco_json import Image
from ...schemas.errors import ConfigError
from ...schemas.records import Blob

_Item = TypeVar("_Item")

KINDS = "COCO instances, COCO panoptic or SA-1B"


class Annotation(msgspec.Struct):
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


class File(msgspec.Struct):
    """All that is read of such a JSON; `image` is SA-1B's."""

    annotations: list[Annotation]
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


class Indexed:
    """The content of a JSON, and which of it is about each photo: it may have the masks of many thousands."""

    def __init__(self, content: File):
        self.content = content

    @functools.cached_property
    def is_panoptic(self) -> bool:
        """Whether segments are listed by image."""
        return any(each.segments_info for each in self.content.annotations)

    @functools.cached_property
    def has_masks(self) -> bool:
        """Whether any annotation has a mask."""
        return self.is_panoptic or any(each.segmentation for each in self.content.annotations)

    @functools.cached_property
    def annotations(self) -> dict[str, list[Annotation]]:
        """By the id of their image."""
        return _grouped((str(each.image_id), each) for each in self.content.annotations)

    def about(self, image: Image) -> list[Annotation]:
        """The annotations of an image."""
        return self.annotations.get(str(image.id), [])

    @functools.cached_property
    def _images(self) -> list[dict[str, list[Image]]]:
        """By each of `_NAMES`."""
        return [_grouped((name_of(each), each) for each in self.content.images) for name_of in _NAMES]

    def images(self, wanted: str) -> list[Image]:
        """The records of a photo, by the surest of its names that any has."""
        names = [wanted] * (len(_NAMES) - 1) + [file_names.stem(wanted)]
        found = (images.get(name, []) for images, name in zip(self._images, names, strict=True))
        return next(filter(None, found), [])

    def called(self, image: str, key: str | None = None) -> list[Image]:
        """All records that may be meant by a photo's path, or by a key."""
        found = self.images(key or file_names.base_name(image))
        number = re.search(r"(\d+)$", key or file_names.stem(image))
        if not found and not self.content.images and number:  # a list of annotations: names hold the id
            found = [Image(each.image_id) for each in self.annotations.get(str(int(number[1])), [])[:1]]
        return found

    def known(self) -> str:
        """Some of the images that it has."""
        listed = [each.file_name or str(each.id) for each in self.content.images]
        listed = listed or sorted({str(each.image_id) for each in self.content.annotations})
        more = [f"and {len(listed) - 3:,} more"] if len(listed) > 3 else []
        return ", ".join(listed[:3] + more)


def _grouped(pairs: Iterable[tuple[str | None, _Item]]) -> dict[str, list[_Item]]:
    found: dict[str, list[_Item]] = defaultdict(list)
    for name, item in pairs:
        if name is not None:
            found[name].append(item)
    return dict(found)


def parse(path: str) -> Indexed:
    """The content of a JSON. The last one is kept, since it may be that of many photos."""
    try:
        version = files.version(path)
    except OSError:
        return Indexed(_read_file(path))  # says what is wrong
    return _kept_file(path, version)


@functools.lru_cache(maxsize=1)
def _kept_file(path: str, _version: str) -> Indexed:
    return Indexed(_read_file(path))


def _read_file(path: str) -> File:
    try:
        data = files.read(Blob(path))
        if data.lstrip()[:1] == b"[":  # results, and files that hold the annotations of one image alone
            return File(msgspec.json.decode(data, type=list[Annotation]))
        return msgspec.json.decode(data, type=File)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; correct the path") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from error
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file of {KINDS} ({error}); correct the file") from error
