"""Pictures of a corpus: one image with its kept regions, or several on a contact sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...filters import rle
from ...schemas.errors import BadRecord, ConfigError, IntegrityError
from ...schemas.records import Blob
from ..io import draw, photos
from ..io.draw import Overlay
from ..io.location import Location
from . import reader
from .reader import Corpus

if TYPE_CHECKING:
    import numpy as np

_MAX_DRAWN = 200
_SHEET_TEXT = 150
_SHEET_CAPTIONS = 6
_GAP = 24
_MARGIN_COLOR = (238, 238, 238)

_KeptRows = list[dict[str, Any]]
"""The kept rows of one image."""


def draw_corpus_image(corpus: str | Location, key: str, path: str | Path) -> None:
    """Draw an image of a corpus with its kept regions and their captions, and write the picture.

    Regions have the numbers and colors that they have in the ledger and in the explorer.

    Args:
        corpus: the folder that a build wrote.
        key: the image's key, or "subset/key".
        path: the picture to write; its ending names the format (png, jpg or webp).

    Raises:
        ConfigError: there is no such image, none of its regions was kept, or there is no such format.
        IntegrityError: the corpus is damaged.
    """
    opened = reader.open_corpus(corpus)
    found = opened.find_image(key)
    kept = [row for row in found.rows if row["kept"]]
    if not kept:
        why = "; ".join(sorted({row["drop_detail"] or row["drop_reason"] for row in found.rows}))
        name = f"{found.subset}/{key.rpartition('/')[2]}"
        raise ConfigError(f"{name}: no region of this image was kept ({why[:500]}); choose another image")
    dropped = len(found.rows) - len(kept)
    title = f"{found.subset} / {kept[0]['key']}: {len(kept)} kept, {dropped} dropped"
    if len(kept) > _MAX_DRAWN:
        title += f", the first {_MAX_DRAWN} drawn"
    draw.save_picture(draw.draw_image(*_read_overlays(opened, kept), title=title), path)


def draw_contact_sheet(
    corpus: str | Location, path: str | Path, num_images: int = 9, width: int = 1800
) -> None:
    """Draw several images of a corpus with masks and captions on one sheet, in columns, and write it.

    The images are spread evenly over the subsets and their units. Of each unit, those with most kept regions
    come first.

    Args:
        corpus: the folder that a build wrote.
        path: the picture to write; its ending names the format (png, jpg or webp).
        num_images: at most this many images are drawn.
        width: of the sheet in pixels, if it has several columns.

    Raises:
        ConfigError: nothing was kept, or there is no such format.
        IntegrityError: the corpus is damaged.
    """
    from PIL import Image

    opened = reader.open_corpus(corpus)
    chosen = _choose_images(opened, num_images)
    if not chosen:
        raise ConfigError(
            f"{corpus}: no kept region to draw; `paracaption inspect CORPUS` says what was dropped and why"
        )
    columns = min(3, len(chosen))
    each = (width - _GAP * (columns + 1)) // columns
    cells = [_draw_cell(opened, rows, each) for rows in chosen]
    heights = [_GAP] * columns
    places = []
    for cell in cells:
        column = heights.index(min(heights))
        places.append((_GAP + column * (each + _GAP), heights[column]))
        heights[column] += cell.height + _GAP
    sheet = Image.new("RGB", (width if columns > 1 else each + 2 * _GAP, max(heights)), _MARGIN_COLOR)
    for cell, place in zip(cells, places, strict=True):
        sheet.paste(cell, place)
    draw.save_picture(sheet, path)


def _draw_cell(corpus: Corpus, rows: _KeptRows, width: int) -> Any:
    """One picture of the sheet: the photo, its longer side as wide as the column, above its legend."""
    photo, overlays = _read_overlays(corpus, rows)
    title = f"{rows[0]['subset']} / {rows[0]['key']}"
    if len(overlays) > _SHEET_CAPTIONS:
        title += f", {_SHEET_CAPTIONS} of its {len(overlays)} captions"
    shown = [
        overlay._replace(caption=textwrap.shorten(overlay.caption, _SHEET_TEXT, placeholder=" ..."))
        for overlay in overlays[:_SHEET_CAPTIONS]
    ]
    return draw.draw_below(draw.draw_masks(photo, overlays, width), shown, width, title)


def _read_overlays(corpus: Corpus, rows: _KeptRows) -> tuple[np.ndarray, list[Overlay]]:
    sample, data = corpus.read_sample(rows[0])
    try:
        photo = photos.decode(Blob(f"{rows[0]['shard']}: {sample.key}"), data, photos.MAX_PIXELS)
    except BadRecord as error:
        raise ConfigError(error.detail) from error
    overlays = []
    for region in sample.regions[:_MAX_DRAWN]:
        if region.rle.size != photo.shape[:2]:
            size = "x".join(map(str, region.rle.size[::-1]))
            what = f"the mask of region {region.id} is {size}, which is not its photo's size"
            raise IntegrityError(f"{rows[0]['shard']}: {sample.key}: {what}; {reader.REBUILD}")
        mask = rle.check(region.rle.counts, region.rle.size).rle
        label, color = region.category or region.core_category, draw.color_of_region(region.id)
        overlays.append(Overlay(mask, region.caption, label, color, region.id))
    return photo, overlays


def _choose_images(corpus: Corpus, num_images: int) -> list[_KeptRows]:
    """The kept rows of some images, subsets in turn."""
    streams = [_candidates(corpus, subset, num_images) for subset in corpus.subsets]
    chosen: list[_KeptRows] = []
    while streams and len(chosen) < num_images:
        for stream in list(streams):
            found = next(stream, None)
            if found is None:
                streams.remove(stream)
            elif len(chosen) < num_images:
                chosen.append(found)
    return sorted(chosen, key=lambda rows: (rows[0]["subset"], rows[0]["key"]))


def _candidates(corpus: Corpus, subset: str, wanted: int) -> Iterator[_KeptRows]:
    """Images of evenly spread units of a subset: the best one of each, then the second best, and so on."""
    units = corpus.units(subset)
    spread = units[:: max(1, len(units) // wanted)][:wanted]
    ranked: list[list[_KeptRows]] = []
    for unit in spread:
        table = reader.read_ledger(unit.ledger)
        by_key: dict[str, _KeptRows] = {}
        for row in table.filter(table["kept"]).to_pylist():
            by_key.setdefault(row["key"], []).append(row)
        best = sorted(by_key.values(), key=lambda rows: (-min(len(rows), 6), rows[0]["key"]))
        ranked.append(best[:wanted])
    for place in range(wanted):
        for best in ranked:
            if place < len(best):
                yield best[place]
