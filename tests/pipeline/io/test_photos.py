"""Photos: what is refused at the header, and what pixels come out."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from paracaption.pipeline.io import photos
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, ImageRecord

LIMIT = 1_000_000


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)
    image.save(path, **options)
    return Blob(str(path))


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def reason_of(call, *arguments):
    with pytest.raises(BadRecord) as caught:
        call(*arguments)
    return caught.value.reason


def test_a_header_says_format_and_size_whatever_the_file_is_called(tmp_path):
    save(tmp_path / "a.jpg", noise(30, 40, 3))
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert photos.probe(Blob(str(tmp_path / "a.png")), LIMIT) == ("jpeg", 40, 30, 1)


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_truncated_photo_is_found_by_its_ending(tmp_path, ending):
    blob = save(tmp_path / f"a.{ending}", noise(300, 400, 3))
    data = (tmp_path / f"a.{ending}").read_bytes()
    (tmp_path / f"a.{ending}").write_bytes(data[: len(data) // 2])
    assert reason_of(photos.probe, blob, LIMIT) == Reason.PHOTO_UNREADABLE
    assert reason_of(photos.decode, blob, data[: len(data) // 2], LIMIT) == Reason.PHOTO_UNREADABLE


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM"])
@pytest.mark.soak(keep=2)
def test_what_is_no_image_is_unreadable(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    assert reason_of(photos.probe, Blob(str(tmp_path / "a.jpg")), LIMIT) == Reason.PHOTO_UNREADABLE


def test_a_missing_photo_is_missing(tmp_path):
    assert reason_of(photos.probe, Blob(str(tmp_path / "no.jpg")), LIMIT) == Reason.PHOTO_MISSING


def test_a_decompression_bomb_is_refused_at_its_header(tmp_path):
    Image.new("1", (2000, 2000)).save(tmp_path / "a.png")
    assert reason_of(photos.probe, Blob(str(tmp_path / "a.png")), LIMIT) == Reason.PHOTO_TOO_LARGE


def test_orientation_is_reported_and_never_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    blob = save(tmp_path / "a.jpg", noise(30, 40, 3), exif=exif)
    assert photos.probe(blob, LIMIT) == ("jpeg", 40, 30, 6)
    record = ImageRecord("a", "coconut", blob, 40, 30)
    assert photos.read_pixels(record).shape == (30, 40, 3)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_every_jpeg_mode_becomes_rgb(tmp_path, mode):
    blob = save(tmp_path / "a.jpg", noise(30, 40, 3), mode)
    pixels = photos.read_pixels(ImageRecord("a", "coconut", blob, 40, 30))
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.arange(0, 65_536, 64, dtype=np.uint16).reshape(32, 32)
    blob = save(tmp_path / "a.png", values)
    pixels = photos.read_pixels(ImageRecord("a", "coconut", blob, 32, 32))
    assert (pixels[..., 0] == values >> 8).all()


def test_a_photo_of_another_size_than_its_record_is_a_mismatch(tmp_path):
    blob = save(tmp_path / "a.png", noise(30, 40, 3))
    assert reason_of(photos.read_pixels, ImageRecord("a", "coconut", blob, 30, 40)) == Reason.SIZE_MISMATCH


def test_who_reads_the_pixels_notes_which_bytes_they_were(tmp_path):
    blob = save(tmp_path / "a.png", noise(30, 40, 3))
    record = ImageRecord("a", "coconut", blob, 40, 30)
    photos.read_pixels(record)
    data = (tmp_path / "a.png").read_bytes()
    assert record.photo_digest == photos.digest_of(data) == photos.hash_photo(blob)
    assert record.photo_digest == hashlib.sha256(data).hexdigest()


def test_fewer_bytes_than_were_planned_are_no_photo(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1000))
    with pytest.raises(BadRecord, match="900 of 950 bytes") as caught:
        photos.hash_photo(Blob(str(tmp_path / "a.tar"), 100, 950))
    assert caught.value.reason == Reason.SOURCE_UNAVAILABLE


def test_a_photo_inside_a_tar_is_read_by_offset(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(noise(30, 40, 3)).save(buffer, "PNG")
    (tmp_path / "a.tar").write_bytes(b"before" + buffer.getvalue() + b"after")
    blob = Blob(str(tmp_path / "a.tar"), 6, len(buffer.getvalue()))
    assert photos.probe(blob, LIMIT)[:3] == ("png", 40, 30)


@pytest.mark.soak
def test_damaged_files_never_raise_anything_but_a_bad_record(tmp_path):
    random = np.random.default_rng(1)
    for ending in ("jpg", "png", "webp", "bmp", "tiff"):
        path = tmp_path / f"a.{ending}"
        blob = save(path, noise(24, 32, 3))
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(150):
            data = whole.copy()
            data[random.integers(0, min(data.size, 600), 4)] = random.integers(0, 256, 4)
            path.write_bytes(data.tobytes())
            for call in (
                lambda b=blob: photos.probe(b, LIMIT),
                lambda b=blob, d=data: photos.decode(b, d.tobytes(), LIMIT),
            ):
                try:
                    call()
                except BadRecord as error:
                    assert error.reason in (Reason.PHOTO_UNREADABLE, Reason.PHOTO_TOO_LARGE)


@pytest.mark.parametrize(
    "after", [bytes(4096), b"\xff" * 200, b"<!-- note -->" * 20, b"MotionPhoto_Data" * 6000]
)
@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.soak(keep=3)
def test_bytes_after_a_photos_end_are_no_reason_to_drop_it(tmp_path, ending, after):
    blob = save(tmp_path / f"a.{ending}", noise(300, 400, 3))
    with open(blob.url, "ab") as file:
        file.write(after)
    assert photos.probe(blob, LIMIT)[1:3] == (400, 300)


def kinds():
    """Photos that Pillow reads in every mode and form that is met, and others with what is said of them."""

    def made(form, image=None, **options):
        buffer = io.BytesIO()
        (image or Image.fromarray(noise(60, 80, 3))).save(buffer, form, **options)
        return buffer.getvalue()

    plain, text = Image.fromarray(noise(60, 80, 3)), PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 2_000_000, zip=True)
    read = {f"png {mode}": made("PNG", plain.convert(mode)) for mode in ("1", "L", "LA", "P", "RGBA")}
    read |= {f"jpeg {mode}": made("JPEG", plain.convert(mode)) for mode in ("L", "CMYK", "YCbCr")}
    read |= {
        "progressive": made("JPEG", progressive=True),
        "jpeg profile": made("JPEG", icc_profile=bytes(200_000)),
    }
    read |= {
        "apng": made("PNG", save_all=True, append_images=[plain]),
        "mpo": made("MPO", append_images=[plain]),
    }
    read |= {"webp": made("WEBP"), "bmp": made("BMP"), "lzw": made("TIFF", compression="tiff_lzw")}
    long = "save it without its long text or color profile"
    heic = b"\0\0\0\x18ftypheic" + bytes(99)
    return {name: (data, "") for name, data in read.items()} | {
        "profile": (made("PNG", icc_profile=bytes(2_000_000)), long),
        "text": (made("PNG", pnginfo=text), long),
        "gif": (made("GIF"), "a GIF; save it as PNG"),
        "heic": (heic, "HEIC, AVIF or a video; save it as JPEG or PNG"),
        "ppm": (made("PPM"), "not a supported image; convert it to one of JPEG, PNG, WEBP, BMP, TIFF, MPO"),
        "json": (b'{"error": "gone"}', "not a supported photo: JSON; give the photo itself"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "cut": (made("JPEG")[:-400], "truncated"),
    }


@pytest.mark.parametrize(("data", "told"), kinds().values(), ids=kinds())
@pytest.mark.soak(keep=9)
def test_photos_of_every_kind_are_read_or_called_what_they_are(tmp_path, data, told):
    blob = Blob(str(tmp_path / "a.jpg"))
    (tmp_path / "a.jpg").write_bytes(data)
    if not told:
        assert photos.probe(blob, LIMIT)[1:3] == (80, 60)
        assert photos.decode(blob, data, LIMIT).shape == (60, 80, 3)
        return
    for call in (lambda: photos.probe(blob, LIMIT), lambda: photos.decode(blob, data, LIMIT)):
        with pytest.raises(BadRecord) as caught:
            call()
        assert caught.value.reason == Reason.PHOTO_UNREADABLE and told in caught.value.detail


def test_a_cut_photo_is_refused_though_it_has_a_whole_preview(tmp_path):
    thumbnail = io.BytesIO()
    Image.new("RGB", (16, 12)).save(thumbnail, "JPEG")
    blob = save(tmp_path / "a.jpg", noise(60, 80, 3), comment=thumbnail.getvalue())
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-400])
    assert reason_of(photos.probe, blob, LIMIT) == Reason.PHOTO_UNREADABLE
