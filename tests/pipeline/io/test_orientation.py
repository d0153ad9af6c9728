"""A photo's orientation is taken out of its bytes, and nothing else."""

import io
import re
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from paracaption.pipeline.io import photos
from paracaption.pipeline.io.orientation import make_upright, orientation_of, restore
from paracaption.schemas.records import Blob, ImageRecord

FORMATS = ["JPEG", "PNG", "WEBP", "TIFF"]
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def saved(form: str, orientation: int | None = 6, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010F], exif[0x0131] = "a camera", "and its software"
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, exif=exif, **options)
    return buffer.getvalue()


def shown(data: bytes) -> np.ndarray:
    """The pixels as readers show them that turn a photo."""
    with Image.open(io.BytesIO(data)) as opened:
        return np.array(ImageOps.exif_transpose(opened).convert("RGB"))


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.soak(keep=4)
def test_readers_that_turn_photos_show_the_stored_pixels_of_an_upright_one(form, orientation):
    data, plain = saved(form, orientation), saved(form, 1)
    assert orientation_of(data) == orientation
    upright, before = make_upright(data)
    assert before == orientation and orientation_of(upright) == 1
    assert (shown(upright) == shown(plain)).all() and shown(data).tolist() != shown(plain).tolist()


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.soak(keep=4)
def test_only_the_tag_changes_and_the_source_s_bytes_can_be_had_back(form, orientation):
    data = saved(form, orientation)
    upright, before = make_upright(data)
    changed = sum(a != b for a, b in zip(data, upright, strict=True))
    assert 1 <= changed <= (5 if form == "PNG" else 1)  # a PNG has a checksum of 4 bytes behind it
    assert restore(upright, before) == data
    assert make_upright(upright) == (upright, 1)


@pytest.mark.parametrize("orientation", [None, 1, 0, 9])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.soak(keep=9)
def test_photos_that_nothing_turns_stay_as_they_are_to_the_byte(form, orientation):
    data = saved(form, orientation)
    assert make_upright(data) == (data, 1) and restore(data, 1) == data


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_an_orientation_in_xmp_alone_turns_no_photo_either(form):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, form, xmp=XMP)
    data = buffer.getvalue()
    assert shown(data).shape == (40, 30, 3)
    upright, before = make_upright(data)
    assert before == 6 and shown(upright).shape == (30, 40, 3) and restore(upright, 6) == data


def test_exif_goes_before_xmp_and_only_what_readers_go_by_changes():
    data = saved("JPEG", 3, xmp=XMP)
    upright, before = make_upright(data)
    assert before == 3 and XMP in upright and shown(upright).shape == (30, 40, 3)
    assert make_upright(saved("JPEG", 1, xmp=XMP)) == (saved("JPEG", 1, xmp=XMP), 1)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "code"), [(1, "B3x"), (3, "H2x"), (4, "I")])
def test_the_tag_is_found_in_both_byte_orders_and_as_every_kind_of_number(order, kind, code):
    magic = b"II*\0" if order == "<" else b"MM\0*"
    tiff = magic + struct.pack(f"{order}IHHHI{code}I", 8, 1, 0x0112, kind, 1, 8, 0)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=b"Exif\0\0" + tiff)
    data = buffer.getvalue()
    upright, before = make_upright(data)
    assert before == 8 and shown(upright).shape == (30, 40, 3) and restore(upright, 8) == data


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.soak(keep=1)
def test_damaged_metadata_is_left_as_it_is_and_never_an_error(form):
    data, random = saved(form), np.random.default_rng(1)
    for _ in range(300):
        broken = bytearray(data[: random.integers(0, len(data))])
        for at in random.integers(0, max(1, len(broken)), 8):
            if broken:
                broken[at % min(200, len(broken))] = random.integers(0, 256)
        upright, before = make_upright(bytes(broken))
        assert len(upright) == len(broken) and (before != 1 or upright == bytes(broken))


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.soak(keep=4)
def test_our_own_reader_gives_the_stored_pixels(tmp_path, form, orientation):
    (tmp_path / "a").write_bytes(saved(form, orientation))
    blob = Blob(str(tmp_path / "a"))
    assert photos.probe(blob, 10_000) == (form.lower(), 40, 30, orientation)
    pixels = photos.read_pixels(ImageRecord("a", "sa1b", blob, 40, 30))
    assert (pixels == shown(saved(form, 1))).all()


def test_the_digest_of_a_photo_in_a_shard_is_that_of_its_source(tmp_path):
    data = saved("JPEG", 6)
    (tmp_path / "a").write_bytes(make_upright(data)[0])
    blob = Blob(str(tmp_path / "a"))
    record = ImageRecord("a", "sa1b", blob, 40, 30, removed_orientation=6)
    photos.read_pixels(record)
    assert record.photo_digest == photos.digest_of(data) == photos.hash_photo(blob, 6)
    assert photos.fetch_as_published(record) == data


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.soak(keep=3)
def test_a_big_tiff_is_read_as_stored_and_its_bytes_can_be_had_back(tmp_path, orientation):
    data = saved("TIFF", orientation, big_tiff=True)
    upright, before = make_upright(data)
    assert data[:4] == b"II+\0" and before == orientation and restore(upright, orientation) == data
    assert (shown(upright) == shown(saved("TIFF", 1))).all()
    (tmp_path / "a").write_bytes(data)
    pixels = photos.read_pixels(ImageRecord("a", "sa1b", Blob(str(tmp_path / "a")), 40, 30))
    assert (pixels == shown(saved("TIFF", 1))).all()


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.soak(keep=1)
def test_a_tiff_that_xmp_alone_turns_is_read_as_stored(tmp_path, orientation):
    xmp = XMP.replace(b'"6"', b'"%d"' % orientation)
    data = saved("TIFF", None, tiffinfo={700: xmp})
    assert shown(data).tolist() != shown(saved("TIFF", 1)).tolist()
    upright, before = make_upright(data)
    assert before == orientation and restore(upright, orientation) == data
    (tmp_path / "a").write_bytes(data)
    pixels = photos.read_pixels(ImageRecord("a", "sa1b", Blob(str(tmp_path / "a")), 40, 30))
    assert (pixels == shown(upright)).all() and (pixels == shown(saved("TIFF", 1))).all()


def as_texts(*texts: tuple[str, str, bool, bool]) -> bytes:
    """A PNG with texts: name, text, whether it is compressed, and whether it is international."""
    info = PngImagePlugin.PngInfo()
    for name, text, packed, international in texts:
        if international:
            info.add_itxt(name, text, zip=packed)
        else:
            info.add_text(name, text, zip=packed)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def profile(orientation: int) -> str:
    """EXIF as ImageMagick writes it into a PNG's text."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = exif.tobytes()
    return f"\nexif\n{len(data):8}\n" + "\n".join(re.findall(".{1,72}", data.hex())) + "\n"


def xmp(orientation: int) -> str:
    return XMP.decode().replace('"6"', f'"{orientation}"')


RAW, ADOBE = "Raw profile type exif", "XML:com.adobe.xmp"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("texts", "orientation"),
    [
        ([(RAW, 6, False)], 6),
        ([(RAW, 1, False)], 1),
        ([(ADOBE, 8, True)], 8),
        ([(ADOBE, 6, False)], 6),
        ([(RAW, 6, False), (ADOBE, 8, True)], 6),
        ([(RAW, 1, False), (ADOBE, 8, True)], 1),
        ([(RAW, 5, False), (RAW, 6, False)], 6),
    ],
)
@pytest.mark.soak(keep=2)
def test_a_png_whose_text_turns_it_shows_the_stored_pixels(packed, texts, orientation):
    made = {RAW: profile, ADOBE: xmp}
    data = as_texts(*((name, made[name](value), packed, wide) for name, value, wide in texts))
    assert shown(data).shape[:2] == ((40, 30) if orientation > 4 else (30, 40))
    upright, before = make_upright(data)
    assert before == orientation == orientation_of(data) and shown(upright).shape == (30, 40, 3)
    assert restore(upright, before) == data and make_upright(upright) == (upright, 1)
    assert (orientation != 1) == (upright != data)
