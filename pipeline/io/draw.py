"""Draws masks and captions on photos: the one way to do it, for terminal, card, demo and explorer.

A region has a color, a number at a point well inside it, and the same number before its caption in the
legend. The colors are told apart by color-blind eyes, too; the numbers tell more regions apart than there
are colors, and an outline with a light and a dark line stands out on any photo.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...filters import rle
from ...schemas.errors import ConfigError
from ...schemas.records import Rle
from . import files

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

PALETTE = (
    (86, 180, 233),  # sky
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # pink
    (0, 158, 115),  # green
    (240, 228, 66),  # yellow
    (102, 51, 51),  # brown
    (51, 34, 136),  # indigo
    (221, 221, 221),  # pale gray
    (170, 51, 119),  # purple
    (20, 20, 20),  # black
    (153, 51, 255),  # violet
    (0, 255, 153),  # mint
)
"""Colors of regions: five of Okabe and Ito's and seven more, far apart in every kind of color vision.

Okabe and Ito's blue and orange are not among them: in the plots and charts they mean kept and dropped.
"""

_STRIPE, _GAP, _DASH = 3, 9, 12
"""Pixels of a dropped mask's stripes, from one to the next, and from one dash of its outline to the next."""

_FILL, _FILL_SCENE, _SCENE = 0.38, 0.24, 0.3
"""A mask over more of the picture than this is painted thinner: it would veil the photo."""

_PAPER, _INK, _GRAY = (255, 255, 255), (34, 34, 34), (110, 110, 110)
_MARGIN = 16
_TEXT = 17
_LINE = 1.32
_COLUMN = 420
_WIDE = 1.9
"""From this ratio of width to height on, captions stand below the photo instead of next to it."""
_TALL = 1.3
"""So they do if they would be higher than the photo by this factor."""


class Overlay(NamedTuple):
    """A region to draw.

    Attributes:
        rle: its mask, of the photo's size.
        caption: for the legend.
        label: a few words before the caption, such as the category; "" for none.
        color: RGB; None takes the palette's by position.
        number: in the disc and in the legend; None counts from 1.
        dropped: drawn with stripes, a dashed outline and a crossed-out number: seen without color, too.
    """

    rle: Rle
    caption: str
    label: str = ""
    color: tuple[int, int, int] | None = None
    number: int | None = None
    dropped: bool = False


def draw_masks(
    photo: np.ndarray, overlays: Sequence[Overlay], side: int = 900, radius: int | None = None
) -> Image:
    """The photo with its masks and their numbers, without the legend.

    Args:
        photo: (H, W, 3) uint8 RGB.
        overlays: regions; the first is number 1. Smaller masks are painted over larger ones.
        side: the picture's longer side in pixels; the photo is scaled to it before anything is drawn.
        radius: of the numbers' discs in pixels; None for one that suits the side.

    Raises:
        ValueError: a mask is not of the photo's size.
    """
    from PIL import Image

    cv2: Any = importlib.import_module("cv2")
    height, width = photo.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    canvas = cv2.resize(np.ascontiguousarray(photo), size, interpolation=way)
    masks = [_scaled(overlay.rle, (height, width), size) for overlay in overlays]
    order, top = stack_masks(masks, canvas.shape[:2])
    colors = np.array([color_of(overlay, i) for i, overlay in enumerate(overlays)] or [(0, 0, 0)], np.float32)
    painted = (top >= 0) & ~_between_stripes(top, [overlay.dropped for overlay in overlays])
    fills = np.array([mask_opacity(int(mask.sum()), top.size) for mask in masks] or [0], np.float32)
    fill = fills[top[painted]][:, None]
    canvas[painted] = (canvas[painted] * (1 - fill) + colors[top[painted]] * fill).astype(np.uint8)
    for i in order:
        _outline(canvas, masks[i], tuple(map(int, colors[i])), cv2, overlays[i].dropped)
    picture = Image.fromarray(canvas)
    radius = radius or max(9, round(side / 75))
    for i, place in number_places(masks, order, top, 2 * radius).items():
        overlay = overlays[i]
        draw_disc(picture, place, radius, number_of(overlay, i), color_of(overlay, i), overlay.dropped)
    return picture


def stack_masks(masks: Sequence[np.ndarray], shape: tuple[int, ...]) -> tuple[list[int], np.ndarray]:
    """How masks lie on each other.

    Args:
        masks: (H, W) bool each.
        shape: (H, W).

    Returns:
        Their positions, the largest mask first, in which order they are painted; and (H, W) int32, the
        position of the mask that is on top at a pixel, -1 where there is none.
    """
    order = sorted(range(len(masks)), key=lambda i: -int(masks[i].sum()))
    top = np.full(shape, -1, np.int32)
    for i in order:
        top[masks[i]] = i
    return order, top


def mask_opacity(area_px: int, photo_px: int) -> float:
    """Of a mask's paint, 0..1."""
    return _FILL_SCENE if area_px > _SCENE * photo_px else _FILL


def number_places(
    masks: Sequence[np.ndarray], order: Sequence[int], top: np.ndarray, apart: int
) -> dict[int, tuple[int, int]]:
    """(x, y) for the number of each mask that has a pixel, well inside of what is visible of it.

    Args:
        masks: (H, W) bool each.
        order: their positions, the largest first; see `stack_masks`.
        top: (H, W) the position of the mask on top.
        apart: pixels between two numbers, where there is room.
    """
    cv2: Any = importlib.import_module("cv2")
    found: dict[int, tuple[int, int]] = {}
    for i in reversed(order):
        if masks[i].any():
            visible = masks[i] & (top == i)
            found[i] = _inside(visible if visible.any() else masks[i], list(found.values()), apart, cv2)
    return found


def draw_image(photo: np.ndarray, overlays: Sequence[Overlay], side: int = 900, title: str = "") -> Image:
    """The photo with its masks, and the captions in a legend next to it, or below a wide photo.

    Args:
        photo: (H, W, 3) uint8 RGB.
        overlays: regions; the first is number 1.
        side: the photo's longer side in the picture, in pixels.
        title: a line above the legend, as the image's key.

    Raises:
        ValueError: a mask is not of the photo's size.
    """
    from PIL import Image

    picture = draw_masks(photo, overlays, side)
    if picture.width < _WIDE * picture.height:
        width = max(_COLUMN, round(side * 0.62))
        legend = draw_legend(overlays, width, title)
        if legend.height <= _TALL * picture.height:
            canvas = Image.new("RGB", (picture.width + width, max(picture.height, legend.height)), _PAPER)
            canvas.paste(picture, (0, 0))
            canvas.paste(legend, (picture.width, 0))
            return canvas
    return draw_below(picture, overlays, picture.width, title)


def draw_below(picture: Image, overlays: Sequence[Overlay], width: int, title: str) -> Image:
    """A picture above the legend of its regions, which has as many columns as fit the width."""
    from PIL import Image

    width = max(width, _COLUMN)
    legend = draw_legend(overlays, width, title, columns=min(len(overlays), width // _COLUMN) or 1)
    canvas = Image.new("RGB", (width, picture.height + legend.height), _PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    canvas.paste(legend, (0, picture.height))
    return canvas


class _Entry(NamedTuple):
    """A region in the legend: its position among the overlays, and its lines with their fonts."""

    position: int
    overlay: Overlay
    lines: list[tuple[str, FreeTypeFont]]
    height: int


def draw_legend(overlays: Sequence[Overlay], width: int, title: str = "", columns: int = 1) -> Image:
    """Numbers and captions on white, in columns of equal width and about equal height."""
    from PIL import Image, ImageDraw

    normal, bold, small = load_font(_TEXT), load_font(_TEXT, bold=True), load_font(_TEXT - 3)
    radius = round(_TEXT * 0.72)
    step = round(_TEXT * _LINE)
    each = (width - _MARGIN) // columns
    indent = 2 * radius + 10
    entries = []
    for position, overlay in enumerate(overlays):
        lines = [(line, bold) for line in _wrap(overlay.label, bold, each - indent - _MARGIN)]
        lines += [(line, normal) for line in _wrap(overlay.caption, normal, each - indent - _MARGIN)]
        entries.append(_Entry(position, overlay, lines, step * max(1, len(lines)) + 10))
    filled = _columns(entries, columns)
    top = _MARGIN + (step + 6 if title else 0)
    height = top + max((sum(entry.height for entry in column) for column in filled), default=0) + _MARGIN - 10
    canvas = Image.new("RGB", (width, max(height, 2 * _MARGIN)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((_MARGIN, _MARGIN), _wrap(title, small, width - 2 * _MARGIN)[0], _GRAY, small)
    for place, column in enumerate(filled):
        x, y = _MARGIN + place * each, top
        for entry in column:
            color, number = color_of(entry.overlay, entry.position), number_of(entry.overlay, entry.position)
            draw_disc(canvas, (x + radius, y + radius), radius, number, color, entry.overlay.dropped)
            for i, (line, face) in enumerate(entry.lines):
                pen.text((x + indent, y + i * step), line, _INK, face)
            y += entry.height
    return canvas


def _columns(entries: list[_Entry], columns: int) -> list[list[_Entry]]:
    share = sum(entry.height for entry in entries) / columns
    filled: list[list[_Entry]] = [[] for _ in range(columns)]
    above = 0.0
    for entry in entries:
        filled[min(columns - 1, int((above + entry.height / 2) // share))].append(entry)
        above += entry.height
    return filled


def color_of(overlay: Overlay, position: int) -> tuple[int, int, int]:
    """The overlay's own color, or the palette's for its position."""
    return overlay.color or PALETTE[position % len(PALETTE)]


def number_of(overlay: Overlay, position: int) -> int:
    """The overlay's own number, or one more than its position."""
    return position + 1 if overlay.number is None else overlay.number


def color_of_region(region: int) -> tuple[int, int, int]:
    """The color of a region of a corpus by its id, the same in every picture and on every page, as RGB."""
    return PALETTE[region % len(PALETTE)]


def _between_stripes(top: np.ndarray, dropped: Sequence[bool]) -> np.ndarray:
    """(H, W) bool, where the photo shows between the stripes of the dropped masks on top."""
    rows, columns = np.indices(top.shape, sparse=True)
    gaps = (rows + columns) % _GAP >= _STRIPE
    return gaps & np.isin(top, np.flatnonzero(dropped))


def _scaled(mask: Rle, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    cv2: Any = importlib.import_module("cv2")
    if tuple(mask.size) != shape:
        raise ValueError(f"mask is {mask.size[1]}x{mask.size[0]}, photo {shape[1]}x{shape[0]}")
    dense = rle.decode(mask)
    small = cv2.resize(dense * np.uint8(255), size, interpolation=cv2.INTER_AREA) > 127
    if not small.any() and dense.any():  # thinner than a pixel of the picture
        y, x = np.argwhere(dense)[0]
        small[y * size[1] // shape[0], x * size[0] // shape[1]] = True
    return small


def _outline(
    canvas: np.ndarray, mask: np.ndarray, color: tuple[int, ...], cv2: Any, dashed: bool = False
) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    halo = (255, 255, 255) if is_dark(color) else (0, 0, 0)
    before = canvas.copy() if dashed else None
    cv2.drawContours(canvas, contours, -1, halo, 4, cv2.LINE_AA)
    cv2.drawContours(canvas, contours, -1, color, 2, cv2.LINE_AA)
    if before is not None:
        gaps = np.zeros(mask.shape, np.uint8)
        for contour in contours:
            points = contour[:, 0]
            for start in range(0, len(points), _DASH):
                cv2.polylines(gaps, [points[start + _DASH // 2 : start + _DASH]], False, 1, 5)
        canvas[gaps > 0] = before[gaps > 0]


def _inside(mask: np.ndarray, taken: list[tuple[int, int]], apart: int, cv2: Any) -> tuple[int, int]:
    """The point deepest inside a mask, or one almost as deep that is clear of the numbers so far."""
    padded = np.pad(mask.astype(np.uint8), 1)  # the picture's edge is an edge of the mask, too
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    allowed = depth.copy()
    for x, y in taken:
        x0, y0 = max(0, x - apart), max(0, y - apart)
        allowed[y0 : y + apart + 1, x0 : x + apart + 1] = 0
    best = allowed if allowed.max() >= min(depth.max() * 0.35, apart / 2) and allowed.max() > 0 else depth
    y, x = np.unravel_index(int(best.argmax()), best.shape)
    return int(x), int(y)


def draw_disc(
    canvas: Image,
    center: tuple[int, int],
    radius: int,
    number: int,
    color: tuple[int, int, int],
    dropped: bool = False,
) -> None:
    """A numbered disc, of a dropped region white, square and crossed out.

    It is drawn large and shrunk, because Pillow's circles have no soft edge.
    """
    from PIL import Image, ImageDraw

    text = str(number)
    half = radius + (0 if len(text) < 3 else radius // 2)
    times = 4
    large = Image.new("RGBA", (2 * half * times, 2 * radius * times), (0, 0, 0, 0))
    on = ImageDraw.Draw(large)
    dark = is_dark(color)
    edge = (255, 255, 255) if dark else (0, 0, 0)
    box = (0, 0, large.width - 1, large.height - 1)
    corner = 0 if dropped else radius * times
    on.rounded_rectangle(box, corner, fill=edge)
    inner = (times * 1.5, times * 1.5, large.width - 1 - times * 1.5, large.height - 1 - times * 1.5)
    on.rounded_rectangle(inner, corner, fill=color)
    if dropped:
        thick = max(2, radius // 5) * times
        on.rectangle((thick, thick, large.width - 1 - thick, large.height - 1 - thick), fill=_PAPER)
        edge = _INK
    face = load_font(round(radius * 1.15) * times, bold=True)
    on.text((large.width / 2, large.height / 2), text, edge, face, anchor="mm")
    if dropped:
        on.line((0, large.height - 1, large.width - 1, 0), fill=_INK, width=times)
    small = large.resize((2 * half, 2 * radius), Image.Resampling.LANCZOS)
    x = min(max(center[0] - half, 0), max(0, canvas.width - small.width))
    y = min(max(center[1] - radius, 0), max(0, canvas.height - small.height))
    canvas.paste(small, (x, y), small)


def is_dark(color: Sequence[int]) -> bool:
    """Whether white is read better on it than black (relative luminance, WCAG's crossing at 0.18)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.25


@cache
def load_font(size: int, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans, which Matplotlib ships: Latin, Greek, Cyrillic and more. Else Pillow's own."""
    import importlib.util

    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")
    if found and found.origin:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / name
        if path.exists():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)  # type: ignore[return-value]


def _wrap(text: str, face: FreeTypeFont, room: int) -> list[str]:
    """Lines that fit; a word that does not fit alone is broken."""
    lines: list[str] = []
    line = ""
    for word in " ".join(text.split()).split(" "):
        while face.getlength(word) > room:
            cut = 1
            while face.getlength(word[: cut + 1]) <= room:
                cut += 1
            if line:
                lines.append(line)
                line = ""
            lines.append(word[:cut])
            word = word[cut:]
        longer = f"{line} {word}" if line else word
        if face.getlength(longer) <= room:
            line = longer
        else:
            lines.append(line)
            line = word
    return [*lines, line] if line else lines


def save_picture(picture: Image, path: str | Path) -> None:
    """Write a picture whole or not at all, in the format that its ending names.

    Raises:
        ConfigError: no such format or folder.
    """
    from PIL import Image

    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in {"PNG", "JPEG", "WEBP"}:
        raise ConfigError(f"{path}: a picture's name ends in .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: no such folder; make it first")
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 90} if kind != "PNG" else {}))
    with files.write_atomic(path) as file:
        file.write(buffer.getvalue())
