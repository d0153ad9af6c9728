"""One limit of pixels for all that is decoded: small files that would take gigabytes are refused by their
headers.
"""

import resource
import struct
import zlib

import pytest

from paracaption.model_training.decoding import read_regions
from paracaption.pipeline.explorer import training
from paracaption.pipeline.io import mask_images, photos
from paracaption.pipeline.sources import label_maps
from paracaption.schemas.errors import BadRecord, ConfigError
from paracaption.schemas.records import Blob


def bomb(side=50_000):
    """A PNG of one bit per pixel, all of one row again and again: about 300 KB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((side + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def data():
    return bomb()


@pytest.fixture(autouse=True)
def memory():
    """What a test may take: the bomb's pixels are 2.5 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.soak
def test_a_mask_with_too_many_pixels_is_refused_by_its_header(data, tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="50000x50000 pixels; at most 200,000,000"):
        mask_images.read_mask_image(str(path), (120, 120))


def test_a_label_map_with_too_many_pixels_is_refused_by_its_header(data):
    with pytest.raises(BadRecord, match="50000x50000 pixels"):
        label_maps.read_label_map(data, "labels.png", [])


def test_a_photo_with_too_many_pixels_is_refused_by_its_header(data, tmp_path):
    with pytest.raises(BadRecord, match="photo_too_large"):
        photos.decode(Blob("photo.png"), data, photos.MAX_PIXELS)
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    with pytest.raises((BadRecord, ConfigError), match="50000x50000"):
        read_regions.read_pixels(str(path))


def test_a_picture_of_a_training_run_with_too_many_pixels_is_refused_by_its_header(data, tmp_path):
    (tmp_path / training.PICTURES).mkdir(parents=True)
    (tmp_path / training.PICTURES / "0.jpg").write_bytes(data)
    with pytest.raises(BadRecord, match="photo_too_large"):
        training.read_picture(tmp_path, 0)


def test_a_mask_of_ordinary_size_is_read(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(bomb(64))
    assert mask_images.read_mask_image(str(path), (64, 64)).all()
