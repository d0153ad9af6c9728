"""The files of a benchmark: `annotations.json`, `qa.json` and `class_names.json` in a folder, and the photos.

| kind | annotations.json | a region's key |
| --- | --- | --- |
| `paradlc` | a list of images, each with its `annotations` and their `mask_rle` | IMAGE_INDEX |
| `dlc` | COCO instances | the annotation's id |

A benchmark's regions are those that qa.json has questions for. Boxes and areas are computed from the masks,
since those in the files do not fit them.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from ...filters import rle
from ...pipeline.io import files, photos
from ...pipeline.io.file_kinds import what_is
from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.evaluation import BenchmarkKind
from ...schemas.records import Blob
from .scoring import LETTERS, Choice, Question, recognition_question

ANNOTATIONS, QUESTIONS, CLASSES = FILES = ("annotations.json", "qa.json", "class_names.json")


class BenchRegion(NamedTuple):
    """A region to caption, and the questions about its caption.

    Attributes:
        key: its name in all of the benchmark's files.
        mask: its mask, of the photo's size and not empty.
        class_name: its class; captioners do not see it.
        questions: the recognition first.
    """

    key: str
    mask: rle.Mask
    class_name: str
    questions: tuple[Question, ...]

    def dense(self) -> np.ndarray:
        """The mask as (H, W) bool."""
        return rle.decode(self.mask.rle).astype(bool)


class BenchImage(NamedTuple):
    """A photo of a benchmark.

    Attributes:
        name: name of its file.
        photo: path or URL where it should be.
        size: (height, width) in pixels.
        regions: its regions in the order of the annotations; at least one.
    """

    name: str
    photo: str
    size: tuple[int, int]
    regions: list[BenchRegion]

    def pixels(self) -> np.ndarray:
        """Read the photo: (H, W, 3) uint8 RGB.

        Raises:
            ConfigError: the photo is missing or damaged, or does not have the annotation's size.
        """
        try:
            pixels = photos.decode(Blob(self.photo), files.read(Blob(self.photo)), Limits().max_pixels)
        except OSError as error:
            raise ConfigError(
                f"{self.photo}: {error.strerror or error}; put the benchmark's photos there"
            ) from error
        except BadRecord as error:
            raise ConfigError(error.detail) from error
        if pixels.shape[:2] != self.size:
            sizes = f"{pixels.shape[1]}x{pixels.shape[0]}, its annotation {self.size[1]}x{self.size[0]}"
            raise ConfigError(f"{self.photo}: {sizes}; use the photo that the benchmark was made of")
        return pixels


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
        kind: which protocol it follows.
        images: its images in the order of the annotations.
        digest: a digest of images, masks and questions.
        unverified: number of questions that nobody has reviewed yet, see `make_benchmark`.
    """

    kind: BenchmarkKind
    images: list[BenchImage]
    digest: str
    unverified: int

    def regions(self) -> Iterator[BenchRegion]:
        """The regions of all images."""
        return (region for image in self.images for region in image.regions)

    def missing_photos(self) -> list[str]:
        """Photos that do not exist."""
        return [image.photo for image in self.images if not files.expand(image.photo)]


def describe_missing(photos: list[str]) -> str:
    """The error of photos that do not exist."""
    more = f", and {len(photos) - 1:,} more are missing" if len(photos) > 1 else ""
    return (
        f"{photos[0]}: no such photo{more}; fetch the photos, set `photos` to their folder, or leave them "
        "out with on_missing_photo: skip"
    )


def read_benchmark(
    folder: str | Path, kind: BenchmarkKind, photo_folder: str | Path | None = None
) -> Benchmark:
    """Read a benchmark's files.

    Args:
        folder: folder with the three files.
        kind: layout of annotations.json, and protocol.
        photo_folder: folder or URL of the photos; by default `images` next to the files.

    Raises:
        ConfigError: a file is missing or damaged, or refers to something that another file lacks. The message
            names file and key.
    """
    folder = Path(folder)
    raw = {name: read_json(folder / name) for name in FILES}
    for name in (QUESTIONS, CLASSES):
        if not isinstance(raw[name], dict):
            raise ConfigError(
                f"{folder / name}: not a JSON object whose keys are those of the regions; download it again"
            )
    layouts: dict[BenchmarkKind, Callable[[Any, Path], _Masks]] = {
        "paradlc": _paradlc_masks,
        "dlc": _dlc_masks,
    }
    masks = layouts[kind](raw[ANNOTATIONS], folder)
    digest = hashlib.sha256()
    root = photo_folder or folder / "images"
    images: dict[str, BenchImage] = {}
    unverified = 0
    for key, asked in raw[QUESTIONS].items():
        if key not in masks:
            raise ConfigError(
                f"{folder / ANNOTATIONS}: no region {key}, which {QUESTIONS} asks about; correct either file"
            )
        if key not in raw[CLASSES]:
            raise ConfigError(f"{folder / CLASSES}: no class name for {key}; add it")
        (name, mask), class_name = masks[key], raw[CLASSES][key]
        if not isinstance(class_name, str) or not any(map(str.isalnum, class_name)):
            raise ConfigError(f"{folder / CLASSES}: the class name of {key} is no word; correct it")
        questions = (recognition_question(kind, class_name), *_questions(asked, folder, key))
        unverified += sum(isinstance(each, dict) and each.get("verified") is False for each in asked)
        digest.update(msgspec.json.encode([key, mask.rle, questions]))
        if not isinstance(name, str):
            raise ConfigError(
                f"{folder / ANNOTATIONS}: the `file_name` of {key}'s image is not a text; correct it"
            )
        image = images.setdefault(name, BenchImage(name, f"{root}/{Path(name).name}", mask.rle.size, []))
        image.regions.append(BenchRegion(key, mask, class_name, questions))
    if not images:
        raise ConfigError(f"{folder / QUESTIONS}: no questions; download the file again")
    order = {key: number for number, key in enumerate(masks)}
    ordered = sorted(images.values(), key=lambda image: min(order[region.key] for region in image.regions))
    for image in ordered:
        image.regions.sort(key=lambda region: order[region.key])
    return Benchmark(kind, ordered, digest.hexdigest()[:16], unverified)


_Masks = dict[str, tuple[str, rle.Mask]]
"""For each region's key, the name of its photo's file and its mask."""


def read_json(path: Path) -> Any:
    """The content of one of a benchmark's files.

    Raises:
        ConfigError: it is missing, or no JSON.
    """
    try:
        data = path.read_bytes()
        return msgspec.json.decode(data.removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a benchmark is {', '.join(FILES)}") from error
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({what_is(data) or error}); download it again") from error


def _paradlc_masks(raw: Any, folder: Path) -> _Masks:
    found: _Masks = {}
    path = folder / ANNOTATIONS
    if not isinstance(raw, list):
        raise ConfigError(
            f"{path}: not a list of images; if this is the other benchmark, set `kind` to dlc or paradlc; "
            "otherwise correct the file"
        )
    for number, image in enumerate(raw):
        with _named(path, f"image {number}"):
            size = (image["height"], image["width"])
            for annotation in image["annotations"]:
                key = f"{image['image_id']}_{annotation['index']}"
                found[key] = (image["file_name"], _check_mask(annotation["mask_rle"], size, path, key))
    return found


def _dlc_masks(raw: Any, folder: Path) -> _Masks:
    path = folder / ANNOTATIONS
    found: _Masks = {}
    with _named(path, "images and annotations"):
        images, annotations = {image["id"]: image for image in raw["images"]}, list(raw["annotations"])
    for number, annotation in enumerate(annotations):
        with _named(path, f"annotation {number}"):
            image, key = images[annotation["image_id"]], str(annotation["id"])
            size = (image["height"], image["width"])
            found[key] = (image["file_name"], _check_mask(annotation["segmentation"], size, path, key))
    return found


def _check_mask(raw: Any, size: tuple[int, int], path: Path, key: str) -> rle.Mask:
    (mask,) = rle.check_all([raw], *size)
    if isinstance(mask, BadRecord):
        raise ConfigError(f"{path}: region {key}: {mask.detail}; correct it there")
    return mask


def _questions(raw: Any, folder: Path, key: str) -> Iterator[Question]:
    if not isinstance(raw, list):
        raise ConfigError(f"{folder / QUESTIONS}: {key}: not a list of questions; correct it there")
    for number, each in enumerate(raw):
        with _named(folder / QUESTIONS, f"{key}, question {number}"):
            choices = tuple(Choice(str(text), float(score)) for text, score in each["choices"])
            if each["type"] not in ("positive", "negative") or not 2 <= len(choices) <= len(LETTERS):
                raise ValueError(f"type {each['type']!r}, {len(choices)} choices")
            yield Question(each["question"], choices, each["type"], each.get("subtype", ""))


@contextmanager
def _named(path: Path, where: str) -> Iterator[None]:
    """Name the file and the record in the error if a record does not have the published form."""
    try:
        yield
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(f"{path}: {where}: not in the published form ({error!r}); correct it") from error
