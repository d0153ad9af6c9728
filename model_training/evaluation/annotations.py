"""The benchmarks' files: `annotations.json`, `qa.json` and `class_names.json` of a folder, and the photos.

| kind | annotations.json | a region's key |
| --- | --- | --- |
| `paradlc` | a list of images, each with its `annotations` and their `mask_rle` | IMAGE_INDEX |
| `dlc` | COCO instances | the annotation's id |

The regions are those that qa.json has questions for. Boxes and areas are computed from the masks: the files'
own do not fit them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from ...filters import rle
from ...pipeline.io import files, photos
from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.records import Blob
from .protocol import LETTERS, Choice, Kind, Question, recognition

ANNOTATIONS, QUESTIONS, CLASSES = FILES = ("annotations.json", "qa.json", "class_names.json")


class BenchRegion(NamedTuple):
    """A region to caption, and what is asked of its caption.

    Attributes:
        key: its name in all of the benchmark's files.
        mask: of the photo's size, not empty.
        class_name: what it is.
        questions: the recognition first.
    """

    key: str
    mask: rle.Mask
    class_name: str
    questions: tuple[Question, ...]

    def dense(self) -> np.ndarray:
        """The mask: (H, W) bool."""
        return rle.decode(self.mask.rle).astype(bool)


class BenchImage(NamedTuple):
    """A photo of a benchmark.

    Attributes:
        name: of the file.
        photo: where it is looked for.
        size: (height, width) in pixels.
        regions: in the order of the annotations; at least one.
    """

    name: str
    photo: str
    size: tuple[int, int]
    regions: list[BenchRegion]

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            ConfigError: the photo is missing, broken, or not of the annotation's size.
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
            shown = f"{pixels.shape[1]}x{pixels.shape[0]}, its annotation {self.size[1]}x{self.size[0]}"
            raise ConfigError(f"{self.photo}: {shown}; take the photo that the benchmark was made of")
        return pixels


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
        kind: whose protocol it has.
        images: in the order of the annotations.
        digest: changes when images, masks or questions do.
        unverified: questions that nobody has looked at yet (see `make`).
    """

    kind: Kind
    images: list[BenchImage]
    digest: str
    unverified: int

    def regions(self) -> Iterator[BenchRegion]:
        """Of all images."""
        return (region for image in self.images for region in image.regions)

    def missing_photos(self) -> list[str]:
        """Photos that are not there."""
        return [image.photo for image in self.images if not files.expand(image.photo)]


def read(folder: str | Path, kind: Kind, photo_folder: str | Path | None = None) -> Benchmark:
    """Read a benchmark's files.

    Args:
        folder: with the three files.
        kind: of the two.
        photo_folder: None: `images` beside the files.

    Raises:
        ConfigError: a file is missing or damaged, or names what another does not have; names file and key.
    """
    folder = Path(folder)
    raw = {name: _load(folder / name) for name in FILES}
    places = _paradlc(raw[ANNOTATIONS], folder) if kind == "paradlc" else _dlc(raw[ANNOTATIONS], folder)
    digest = hashlib.sha256()
    root = photo_folder or folder / "images"
    images: dict[str, BenchImage] = {}
    unverified = 0
    for key, asked in raw[QUESTIONS].items():
        if key not in places:
            raise ConfigError(
                f"{folder / ANNOTATIONS}: no region {key}, which {QUESTIONS} asks about; mend either"
            )
        if key not in raw[CLASSES]:
            raise ConfigError(f"{folder / CLASSES}: no class name for {key}; add it")
        place, class_name = places[key], raw[CLASSES][key]
        questions = (recognition(kind, class_name), *_questions(asked, folder, key))
        unverified += sum(isinstance(each, dict) and each.get("verified") is False for each in asked)
        digest.update(msgspec.json.encode([key, place.mask.rle, questions]))
        image = images.setdefault(
            place.name, BenchImage(place.name, f"{root}/{Path(place.name).name}", place.mask.rle.size, [])
        )
        image.regions.append(BenchRegion(key, place.mask, class_name, questions))
    if not images:
        raise ConfigError(f"{folder / QUESTIONS}: no questions")
    order = {key: number for number, key in enumerate(places)}
    ordered = sorted(images.values(), key=lambda image: min(order[region.key] for region in image.regions))
    for image in ordered:
        image.regions.sort(key=lambda region: order[region.key])
    return Benchmark(kind, ordered, digest.hexdigest()[:16], unverified)


class _Place(NamedTuple):
    name: str
    mask: rle.Mask


def _load(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a benchmark is {', '.join(FILES)}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: no JSON ({error}); fetch it again") from error


def _paradlc(raw: Any, folder: Path) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    path = folder / ANNOTATIONS
    for number, image in enumerate(raw if isinstance(raw, list) else _refuse(path, "no list of images")):
        with _named(path, f"image {number}"):
            size = (image["height"], image["width"])
            for annotation in image["annotations"]:
                key = f"{image['image_id']}_{annotation['index']}"
                found[key] = _Place(image["file_name"], _mask(annotation["mask_rle"], size, path, key))
    return found


def _dlc(raw: Any, folder: Path) -> dict[str, _Place]:
    path = folder / ANNOTATIONS
    found: dict[str, _Place] = {}
    with _named(path, "images"):
        images = {image["id"]: image for image in raw["images"]}
    for number, annotation in enumerate(raw["annotations"]):
        with _named(path, f"annotation {number}"):
            image, key = images[annotation["image_id"]], str(annotation["id"])
            size = (image["height"], image["width"])
            found[key] = _Place(image["file_name"], _mask(annotation["segmentation"], size, path, key))
    return found


def _mask(raw: Any, size: tuple[int, int], path: Path, key: str) -> rle.Mask:
    (mask,) = rle.check_all([raw], *size)
    if isinstance(mask, BadRecord):
        raise ConfigError(f"{path}: region {key}: {mask.detail}; mend it there")
    return mask


def _questions(raw: Any, folder: Path, key: str) -> Iterator[Question]:
    for number, each in enumerate(raw):
        with _named(folder / QUESTIONS, f"{key}, question {number}"):
            choices = tuple(Choice(str(text), float(score)) for text, score in each["choices"])
            if each["type"] not in ("positive", "negative") or not 2 <= len(choices) <= len(LETTERS):
                raise ValueError(f"type {each['type']!r}, {len(choices)} choices")
            yield Question(each["question"], choices, each["type"], each.get("subtype", ""))


@contextmanager
def _named(path: Path, where: str) -> Iterator[None]:
    """Says where a record is that has not the form it should have."""
    try:
        yield
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: {where}: not as published ({error!r}); mend it") from error


def _refuse(path: Path, why: str) -> Any:
    raise ConfigError(f"{path}: {why}; name the other kind, or mend the file")
