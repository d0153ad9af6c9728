"""A trace as an animated GIF: for each step the photo with its masks, and the captions next to or below."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ...pipeline.io import draw
from .trace import AFTER, END, FRESH, OPEN, Piece, Trace

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

_PAPER, _INK, _DIM, _PALE = (255, 255, 255), (34, 34, 34), (110, 110, 110), (170, 170, 170)
_BOX, _MARKED, _BAR = (214, 214, 214), (255, 224, 130), (0, 114, 178)
_TEXT, _STEP, _MARGIN, _GAP = 17, 25, 18, 14
_BOX_WIDTH, _BOX_SPACE = 20, 4
_SIDE, _COLUMN, _LEAST_COLUMN = 640, 520, 420
_INDENT, _HEADER = 34, 62
_WIDE = 1.9
"""From this ratio of width to height on, captions stand below the photo instead of next to it."""
_TALL = 1.5
"""Captions also stand below if, next to the photo, they would be higher than it by more than this factor."""
_FRAME_MS, _LAST_MS, _LONGEST_MS = 220, 3000, 16_000


def render_gif(trace: Trace) -> bytes:
    """A GIF with one frame for each snapshot. The last frame stays longest, and the GIF repeats."""
    from PIL import Image

    layout = _Layout.of(trace)
    shown = list(layout.frames())
    palette = _palette(shown[-1])
    still = layout.picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    indexed = []
    for frame in shown:
        flat = frame.quantize(palette=palette, dither=Image.Dither.NONE)
        flat.paste(still, layout.corner)  # the photo is dithered once: it does not flicker
        indexed.append(flat)
    each = min(_FRAME_MS, max(40, _LONGEST_MS // len(shown)))
    buffer = io.BytesIO()
    indexed[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=[each] * (len(shown) - 1) + [_LAST_MS],
        loop=0,
        optimize=False,
    )
    return buffer.getvalue()


def render_frames(trace: Trace) -> Iterator[Image]:
    """The frames: for every snapshot the photo with its masks, and the captions next to or below it."""
    return _Layout.of(trace).frames()


class _Layout(NamedTuple):
    """Where things are in every frame; all places and sizes are in pixels.

    Attributes:
        trace: what is shown.
        pieces: the slots of each snapshot and region.
        picture: the photo with its masks.
        corner: top left corner of the picture.
        size: (width, height) of a frame.
        header: left, top and right of the progress bar.
        entries: top left corner of each region's number.
        room: width of the lines of a caption.
        labels: the regions' labels, shortened to one line.
    """

    trace: Trace
    pieces: list[list[list[Piece]]]
    picture: Image
    corner: tuple[int, int]
    size: tuple[int, int]
    header: tuple[int, int, int]
    entries: list[tuple[int, int]]
    room: int
    labels: list[str]

    @classmethod
    def of(cls, trace: Trace) -> _Layout:
        """The layout of a trace: captions next to the photo if there is room, else below it in columns."""
        picture = draw.draw_masks(trace.photo, trace.overlays, _SIDE)
        pieces = [trace.pieces(step) for step in range(len(trace.snapshots))]
        width, height = picture.size
        room = _COLUMN - 2 * _MARGIN - _INDENT
        overlays = trace.overlays
        tall = _HEADER + sum(_heights(pieces, overlays, room))
        beside = width < _WIDE * height and tall <= _TALL * height
        across = _COLUMN if beside else max(width, _COLUMN * min(2, len(overlays)))
        columns = 1 if beside else max(1, min(len(overlays), across // _LEAST_COLUMN))
        room = across // columns - 2 * _MARGIN - _INDENT
        left, top = (width, 0) if beside else (0, height)
        places, end = _columns(_heights(pieces, overlays, room), columns, across // columns)
        return cls(
            trace,
            pieces,
            picture,
            corner=(0, 0) if beside else ((across - width) // 2, 0),
            size=(left + across, max(height if beside else 0, top + _HEADER + end + _MARGIN - _GAP)),
            header=(left + _MARGIN, top, left + across - _MARGIN),
            entries=[(left + _MARGIN + x, top + _HEADER + y) for x, y in places],
            room=room,
            labels=[_shortened(overlay.label, room) for overlay in overlays],
        )

    def frames(self) -> Iterator[Image]:
        from PIL import Image, ImageDraw

        for step, pieces in enumerate(self.pieces):
            canvas = Image.new("RGB", self.size, _PAPER)
            canvas.paste(self.picture, self.corner)
            pen = ImageDraw.Draw(canvas)
            _draw_progress(pen, self.trace, step, self.header)
            for number, region in enumerate(pieces):
                x, y = self.entries[number]
                color = draw.color_of(self.trace.overlays[number], number)
                draw.draw_disc(canvas, (x + 12, y + 12), 12, number + 1, color)
                if label := self.labels[number]:
                    pen.text((x + _INDENT, y + 2), label, _INK, draw.load_font(_TEXT, bold=True))
                    y += _STEP
                _draw_pieces(pen, region, (x + _INDENT, y), self.room)
            yield canvas


def _columns(heights: list[int], columns: int, width: int) -> tuple[list[tuple[int, int]], int]:
    """Top left corner of each entry in columns of about equal height, and the end of the longest column."""
    share = max(1, sum(heights)) / columns
    places, ends, above = [], [0] * columns, 0.0
    for height in heights:
        column = min(columns - 1, int((above + height / 2) // share))
        places.append((column * width, ends[column]))
        ends[column] += height
        above += height
    return places, max(ends)


def _draw_progress(pen: ImageDraw, trace: Trace, step: int, header: tuple[int, int, int]) -> None:
    left, top, right = header
    written, total = trace.progress(step)
    pen.text((left, top + 14), trace.line(step), _DIM, draw.load_font(_TEXT - 2))
    pen.rounded_rectangle((left, top + 40, right, top + 45), 2, fill=_BOX)
    if written:
        pen.rounded_rectangle((left, top + 40, left + (right - left) * written // total, top + 45), 2, _BAR)


def _draw_pieces(pen: ImageDraw, pieces: list[Piece], corner: tuple[int, int], room: int) -> None:
    face = draw.load_font(_TEXT)
    for piece, x, line, width in _flow(pieces, face, room):
        left, top = corner[0] + x, corner[1] + line * _STEP
        if piece.state == OPEN:
            pen.rounded_rectangle((left + 1, top + 5, left + width - _BOX_SPACE, top + _STEP - 5), 3, _BOX)
            continue
        if piece.state == FRESH:
            pen.rounded_rectangle((left - 1, top + 1, left + width, top + _STEP - 3), 3, _MARKED)
        color = _PALE if piece.state in (END, AFTER) else _INK
        pen.text((left, top + 2), piece.text, color, face)


def _heights(every: list[list[list[Piece]]], overlays: Sequence[draw.Overlay], room: int) -> list[int]:
    """Height of each region's entry at the step where it is highest, so that nothing moves between frames."""
    face = draw.load_font(_TEXT)
    heights = []
    for overlay, steps in zip(overlays, zip(*every, strict=True), strict=True):
        most = max(max((line for _, _, line, _ in _flow(slots, face, room)), default=0) for slots in steps)
        heights.append((1 + most + bool(overlay.label)) * _STEP + _GAP)
    return heights


def _shortened(label: str, room: int) -> str:
    label, face = " ".join(label.split()), draw.load_font(_TEXT, bold=True)
    if _length(label, face) <= room:
        return label
    while label and _length(f"{label}...", face) > room:
        label = label[:-1]
    return f"{label}..."


def _flow(pieces: list[Piece], face: FreeTypeFont, room: int) -> Iterator[tuple[Piece, int, int, int]]:
    """Pieces in lines: (piece without the space before it, its left edge, its line, its width).

    Pieces of one word stay together if the word fits into a line.
    """
    x = line = 0
    space = round(face.getlength(" "))
    for word in _words(pieces):
        widths = [_width(piece, face) for piece in word]
        gap = space if x and word[0].text.startswith(" ") else 0
        if x and x + gap + sum(widths) > room:
            x, line, gap = 0, line + 1, 0
        x += gap
        for piece, width in zip(word, widths, strict=True):
            if x and x + width > room:
                x, line = 0, line + 1
            yield piece._replace(text=piece.text.strip(" ")), x, line, width
            x += width


def _words(pieces: list[Piece]) -> Iterator[list[Piece]]:
    word: list[Piece] = []
    for piece in pieces:
        joined = word and OPEN not in (piece.state, word[-1].state) and not piece.text.startswith(" ")
        if word and not joined:
            yield word
            word = []
        word.append(piece)
    if word:
        yield word


def _width(piece: Piece, face: FreeTypeFont) -> int:
    return _BOX_WIDTH if piece.state == OPEN else _length(piece.text.strip(" "), face)


@lru_cache(maxsize=4096)
def _length(text: str, face: FreeTypeFont) -> int:
    return round(face.getlength(text))


def _palette(frame: Image) -> Image:
    """The 256 colors of all frames: those of text and boxes, and the frame's own ones.

    Colors of the frame that are close to those of text and boxes are left out; else white paper would not
    stay white.
    """
    from PIL import Image

    flat = [_PAPER, _INK, _DIM, _PALE, _BOX, _MARKED, _BAR, *draw.PALETTE]
    flat += [_between(_PAPER, _INK, part / 12) for part in range(1, 12)]
    flat += [_between(_MARKED, _INK, part / 8) for part in range(1, 8)]
    flat += [_between(_PAPER, color, 0.5) for color in draw.PALETTE]
    own = frame.quantize(256 - len(flat), method=Image.Quantize.MEDIANCUT).getpalette() or []
    own = [tuple(own[at : at + 3]) for at in range(0, len(own), 3)]
    apart = [color for color in own if min(_distance(color, each) for each in flat) > 10]
    values = list(itertools.chain(*flat, *apart))
    palette = Image.new("P", (1, 1))
    palette.putpalette(values + values[:3] * (256 - len(values) // 3))
    return palette


def _distance(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def _between(first: tuple[int, ...], second: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
