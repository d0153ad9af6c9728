"""The list of benchmarks' photos, from their annotation files: names and sizes, nothing else of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...filters.benchmark_photos import Listed, canonical
from ...schemas.errors import ConfigError
from . import annotations


def list_photos(folders: Mapping[str, Path]) -> bytes:
    """The photos of some benchmarks as JSON, a line for each: name -> [width, height, benchmarks], by name.

    A photo's name is that of its file. An id that says otherwise counts nothing: in ParaDLC-Bench, each photo
    of COCO has another number as its `image_id`.

    Args:
        folders: folders of `annotations.json`, by the benchmark's title; of either layout.

    Raises:
        ConfigError: a file is missing or of another form, or a photo is neither of COCO nor of Objects365.
    """
    found: dict[str, Listed] = {}
    for title, folder in folders.items():
        path = folder / annotations.ANNOTATIONS
        for number, image in enumerate(_images(annotations.read_json(path), path)):
            try:
                name, size = canonical(image["file_name"]), (int(image["width"]), int(image["height"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}: image {number}: not in the published form ({error!r})") from error
            if not name:
                raise ConfigError(
                    f"{path}: {image['file_name']}: not a file name of COCO or Objects365; only photos of "
                    "these can be listed"
                )
            titles = found[name].title.split(" and ") if name in found else []
            found[name] = Listed(*size, " and ".join(dict.fromkeys([*titles, title])))
    lines = [
        f"{msgspec.json.encode(name).decode()}: {msgspec.json.encode(found[name]).decode()}"
        for name in sorted(found)
    ]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _images(raw: Any, path: Path) -> list[Any]:
    images = raw.get("images") if isinstance(raw, dict) else raw
    if not isinstance(images, list):
        raise ConfigError(f"{path}: not a list of images; give a benchmark's annotation file")
    return images
