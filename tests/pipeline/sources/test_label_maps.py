"""Label maps: colors name ids, whatever a file stores them as, and declared areas are a witness."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.sources.label_maps import Declared, looks_like, read_label_map
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason

LABELS = np.zeros((12, 20), np.uint32)
LABELS[1:4, 1:9] = 1  # 24 pixels
LABELS[5:11, 2:8] = 2  # 36
LABELS[2:10, 12:19] = 3  # 56
DECLARED = [Declared(1, 24), Declared(2, 36), Declared(3, 56)]
NO_AREAS = [Declared(each.id, None) for each in DECLARED]


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def rgb(labels=LABELS):
    return Image.fromarray(np.stack([labels & 255, labels >> 8 & 255, labels >> 16], -1).astype(np.uint8))


def palette(indices, colors):
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette([value for color in colors for value in color])
    return image


def raw_gray(values, bits):
    """A gray PNG of fewer than 8 bits with these stored values."""
    rows = [np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, -bits:].ravel() for row in values]
    data = zlib.compress(b"".join(b"\0" + np.packbits(row).tobytes() for row in rows))
    height, width = values.shape
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def is_right(data, declared, labels=LABELS):
    masks = read_label_map(data, "a.png", declared)
    return all((rle.decode(masks[each.id].rle) == (labels == each.id)).all() for each in declared)


def refusal(data, declared):
    with pytest.raises(BadRecord) as caught:
        read_label_map(data, "a.png", declared)
    assert "a.png" in caught.value.detail and " at 0x" not in caught.value.detail
    return caught.value


ORDER = np.array([2, 0, 3, 1])
"""Where an optimizer puts each color of the map in its palette."""
PERMUTED = palette(ORDER[LABELS], [(int(np.flatnonzero(ORDER == place)[0]), 0, 0) for place in range(4)])
VOC = palette(LABELS, [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)])


@pytest.mark.parametrize("declared", [DECLARED, NO_AREAS])
def test_colors_of_a_reordered_palette_name_the_ids(declared):
    assert is_right(png(PERMUTED), declared)
    assert is_right(png(rgb()), declared)


@pytest.mark.parametrize("declared", [DECLARED, NO_AREAS])
def test_an_index_is_the_id_where_the_palette_only_paints(declared):
    assert is_right(png(VOC), declared)
    assert is_right(png(palette(LABELS, [(index,) * 3 for index in range(4)])), declared)


def test_areas_decide_where_colors_and_indices_are_both_declared_ids():
    painted = palette(LABELS, [(0, 0, 0), (2, 0, 0), (9, 9, 9), (8, 8, 8)])
    assert is_right(png(painted), DECLARED)
    assert refusal(png(painted), NO_AREAS).reason == Reason.LABELS_DISAGREE


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("declared", [DECLARED, NO_AREAS])
def test_gray_of_few_bits_holds_the_stored_values_or_what_they_are_spread_to(bits, declared):
    assert is_right(raw_gray(LABELS, bits), declared)
    factor = 255 // (2**bits - 1)
    spread = [Declared(each.id * factor, each.area) for each in declared]
    assert is_right(raw_gray(LABELS, bits), spread, LABELS * factor)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_gray_holds_values_or_colors_that_an_optimizer_made_gray(mode):
    gray = png(Image.fromarray(LABELS.astype(np.uint8)).convert(mode))
    assert is_right(gray, DECLARED)
    assert is_right(gray, [Declared(each.id * 0x010101, each.area) for each in DECLARED], LABELS * 0x010101)


def test_areas_that_disagree_refuse_the_whole_map_with_an_example():
    swapped = np.where(LABELS == 1, 2, np.where(LABELS == 2, 1, LABELS))
    error = refusal(png(rgb(swapped)), DECLARED)
    assert error.reason == Reason.LABELS_DISAGREE
    assert "2 of 3 segments" in error.detail and "segment 1: declared 24, in the map 36" in error.detail


def test_a_palette_that_lost_colors_is_refused():
    lossy = palette(np.minimum(LABELS, 2), [(0, 0, 0), (1, 0, 0), (2, 0, 0)])
    assert refusal(png(lossy), DECLARED).reason == Reason.LABELS_DISAGREE


def test_areas_of_polygons_may_differ_by_their_outline_and_no_more():
    near = [Declared(1, 20.5), Declared(2, 40), Declared(3, None)]
    assert is_right(png(rgb()), near)
    assert refusal(png(rgb()), [Declared(1, 36.5)]).reason == Reason.LABELS_DISAGREE
    assert refusal(png(rgb()), [Declared(1, 23)]).reason == Reason.LABELS_DISAGREE


def test_a_segment_without_pixels_is_no_witness_against_the_others():
    masks = read_label_map(png(rgb()), "a.png", [*DECLARED, Declared(77, 500)])
    assert masks[1].area == 24 and 77 not in masks


def test_a_png_whose_pixels_fail_their_checksum_is_refused():
    data = bytearray(png(rgb()))
    data[data.index(b"IDAT") + 12] ^= 1
    error = refusal(bytes(data), NO_AREAS)
    assert error.reason == Reason.LABELS_UNREADABLE and "IDAT" in error.detail


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<html>404</html>", "web page"),
        (b"", "empty"),
        (bytes(500), "zero bytes"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (b"what is this?", "not an image of PNG"),
        (png(rgb())[:60], "does not decode"),
    ],
)
def test_a_file_that_is_no_label_map_is_called_what_it_is(data, words):
    error = refusal(data, DECLARED)
    assert error.reason == Reason.LABELS_UNREADABLE and words in error.detail


def test_a_label_map_is_told_from_a_photo():
    ids = {each.id for each in DECLARED}
    large = np.kron(LABELS, np.ones((8, 8), np.uint32))
    assert looks_like(png(rgb(large)), ids) and looks_like(png(Image.fromarray(large.astype(np.uint8))), ids)
    noise = np.random.default_rng(0).integers(0, 4, (12, 20, 3), np.uint8)
    assert not looks_like(png(Image.fromarray(noise)), ids)
    assert not looks_like(png(Image.new("RGB", (20, 12), (90, 120, 30))), ids)
