"""Selects the images of a corpus for a benchmark: those whose regions are most easily confused."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...pipeline.corpus import reader
from ...schemas.errors import ConfigError

FEWEST, MOST = 2, 8
"""Number of regions that are taken of an image."""

_NEAR = 0.1
"""Gap between two boxes, as a share of the image's diagonal, from which they do not count as near."""

_COLUMNS = ["subset", "key", "region", "category", "core_category", "caption", "image_width", "image_height"]
_COLUMNS += ["bbox_x", "bbox_y", "bbox_w", "bbox_h", "area", "shard"]
_COLUMNS += ["photo_offset", "photo_length", "json_offset", "json_length"]


class ChosenImage(NamedTuple):
    """An image: how easily its regions are confused (0..1), and the rows of 2 to 8 of them in the index."""

    confusion: float
    rows: list[dict[str, Any]]


def choose_images(corpus: str | Path, num_images: int) -> list[ChosenImage]:
    """The images whose regions are most easily confused, the most confusing first.

    Of an image with more than 8 kept regions, the 8 that are most easily confused are taken. The index is
    read one row group at a time, so memory does not grow with the corpus.

    Args:
        corpus: a merged corpus.
        num_images: number of images, at most.

    Raises:
        ConfigError: there is no index, or no image has two kept regions.
        IntegrityError: the index is damaged.
    """
    best: list[tuple[float, int, ChosenImage]] = []
    for number, rows in enumerate(_images(corpus)):
        if len(rows) >= FEWEST:
            each = confusion(rows)
            taken = sorted(np.argsort(-each, kind="stable")[:MOST].tolist())
            chosen = ChosenImage(float(each[taken].mean()), [rows[place] for place in taken])
            keep = heapq.heappush if len(best) < num_images else heapq.heappushpop
            keep(best, (chosen.confusion, -number, chosen))
    if not best:
        raise ConfigError(
            f"{corpus}: no image has {FEWEST} kept regions that could be confused; give a corpus with more "
            "regions per image"
        )
    return [chosen for _, _, chosen in sorted(best, reverse=True)]


def confusion(rows: list[dict[str, Any]]) -> np.ndarray:
    """How easily each region of an image is confused with the most similar other one: (N,), 0..1.

    Four similarities count a quarter each: being near, the same category, a similar size, and similar words
    in the captions.

    Args:
        rows: rows of the index for the regions of one image.
    """
    boxes = np.array([[row[f"bbox_{name}"] for name in "xywh"] for row in rows], np.float64)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    gaps = np.maximum(low[:, None] - high[None], low[None] - high[:, None]).clip(0)
    diagonal = np.hypot(rows[0]["image_width"], rows[0]["image_height"])
    near = (1 - np.hypot(gaps[..., 0], gaps[..., 1]) / diagonal / _NEAR).clip(0)
    area = np.array([row["area"] for row in rows], np.float64)
    size = np.minimum(area[:, None], area[None]) / np.maximum(area[:, None], area[None])
    names = [name_of(row) for row in rows]
    same = np.array([[bool(a) and a == b for b in names] for a in names], np.float64)
    words = [set(str(row["caption"]).lower().split()) for row in rows]
    alike = np.array([[len(a & b) / max(1, len(a | b)) for b in words] for a in words])
    total = (near + size + same + alike) / 4
    np.fill_diagonal(total, 0)
    return total.max(axis=1)


def name_of(row: dict[str, Any]) -> str:
    """A region's category: the source's, or else the one that the judge named."""
    return row["category"] or row["core_category"] or ""


def _images(corpus: str | Path) -> Iterator[list[dict[str, Any]]]:
    """The rows of each image. A part of the index holds whole units, and a unit whole images."""
    for table in reader.Corpus(corpus, confined=True).index(_COLUMNS):
        for _, rows in groupby(table.to_pylist(), _id):
            yield list(rows)


def _id(row: dict[str, Any]) -> tuple[str, str]:
    return row["subset"], row["key"]
