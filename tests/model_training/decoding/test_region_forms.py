"""Photos and regions are the same pixels in every form; what is unclear is an error."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from paracaption.filters import rle
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.decoding.region_forms import to_masks, to_pixels
from paracaption.schemas.errors import ConfigError
from tests.model_training.tiny_models import lively, photo

SIZE = (20, 30)
REGION = np.zeros(SIZE, bool)
REGION[4:12, 6:21] = True
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "steps": 2, "strategy": "per-region"}

PACKED = coco.encode(np.asfortranarray(REGION.astype(np.uint8)))
RUNS = [int(each) for each in rle.to_counts(rle.from_mask(REGION).rle)]
RING = [6, 4, 21, 4, 21, 12, 6, 12]


class OnDevice:
    """As a tensor on a GPU: numpy cannot read it before it is on the CPU."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape = tensor, tensor.shape

    def detach(self):
        return self

    def cpu(self):
        return self.tensor

    def __array__(self, *_: Any):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.png").write_bytes(png(REGION.astype(np.uint8) * 255))
    (tmp_path / "photo.png").write_bytes(png(PIXELS))
    (tmp_path / "many.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    return tmp_path


FORMS: dict[str, Any] = {
    "bool": REGION,
    "uint8": REGION.astype(np.uint8),
    "255": REGION.astype(np.uint8) * 255,
    "logits": np.where(REGION, 9.0, -9.0),
    "nested lists": REGION.tolist(),
    "nested ints": REGION.astype(int).tolist(),
    "tensor": torch.from_numpy(REGION),
    "half tensor": torch.from_numpy(REGION).half(),
    "tensor on a device": OnDevice(torch.from_numpy(REGION)),
    "path": "mask.png",
    "Path": Path("mask.png"),
    "bytes": png(REGION.astype(np.uint8) * 255),
    "Pillow, 1 bit": Image.fromarray(REGION),
    "Pillow, gray": Image.fromarray(REGION.astype(np.uint8) * 255),
    "Pillow, RGB": Image.fromarray(REGION.astype(np.uint8) * 255).convert("RGB"),
    "Pillow, RGBA": Image.fromarray(np.dstack([np.full((*SIZE, 3), 9), REGION * 255]).astype(np.uint8)),
    "RLE, bytes": PACKED,
    "RLE, text": {"size": [*SIZE], "counts": PACKED["counts"].decode()},
    "RLE, runs": {"size": SIZE, "counts": RUNS},
    "RLE, array of runs": {"size": np.array(SIZE), "counts": np.array(RUNS)},
    "RLE of a corpus": rle.from_mask(REGION).rle,
    "record of COCO": {"id": 3, "bbox": [0, 0, 1, 1], "segmentation": [RING]},
    "record of SAM": {"segmentation": REGION, "area": 120, "bbox": [0, 0, 1, 1]},
    "polygons": [RING],
    "two polygons": [[6, 4, 14, 4, 14, 12, 6, 12], [14, 4, 21, 4, 21, 12, 14, 12]],
    "polygon of floats": [[float(each) for each in RING]],
    "flat polygon": RING,
    "polygon of points": [(6, 4), (21, 4), (21, 12), (6, 12)],
    "polygon of pairs": [[[6, 4], [21, 4], [21, 12], [6, 12]]],
    "array of points": np.array(RING).reshape(-1, 2),
    "contour of cv2": np.array(RING, np.int32).reshape(-1, 1, 2),
    "list of arrays": [np.array(RING, np.float32)],
    "box": [6, 4, 21, 12],
    "box as tuple": (6.0, 4.0, 21.0, 12.0),
    "box of numpy": np.array([6, 4, 21, 12]),
    "box as tensor": torch.tensor([6.2, 4.4, 20.9, 12.3]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_region_is_the_same_pixels(files, form):
    (found,) = to_masks([FORMS[form]], SIZE)
    assert found.dtype == bool and np.array_equal(found, REGION)


def test_boxes_may_be_x_y_width_height_where_it_is_said():
    (found,) = to_masks([[6, 4, 15, 8]], SIZE, "xywh")
    assert np.array_equal(found, REGION)
    with pytest.raises(ConfigError, match=r"boxes: 'cxcywh'; give 'xyxy' \(x1, y1, x2, y2\) or 'xywh'"):
        to_masks([[6, 4, 15, 8]], SIZE, "cxcywh")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_an_array_of_masks_or_of_boxes_is_one_region_each(kind):
    two = to_masks(kind([[6, 4, 21, 12], [0, 0, 30, 20]]), SIZE)
    assert np.array_equal(two[0], REGION) and two[1].all()
    assert [each.sum() for each in to_masks(kind([REGION.tolist()] * 3), SIZE)] == [REGION.sum()] * 3
    assert len(to_masks((each for each in [REGION]), SIZE)) == 1
    assert to_masks([], SIZE) == []


def test_a_box_narrower_than_a_pixel_is_a_pixel_and_one_at_the_edge_is_cut_there():
    assert to_masks([[6.1, 4.1, 6.3, 4.2]], SIZE)[0].nonzero() == (np.array([4]), np.array([6]))
    assert to_masks([[-0.5, -1, 31, 20.7]], SIZE)[0].all()


@pytest.mark.parametrize(
    ("region", "told"),
    [
        ("https://example.org/a.png", r"https://example.org/a.png is a URL; download it first"),
        (Path("https://example.org/a.png"), r"https:/example.org/a.png is a URL; download it first"),
        ("s3://bucket/mask.png", r"s3://bucket/mask.png is a URL; download it first"),
        ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA", "is a data URL; give the bytes that it holds"),
        ("none.png", "none.png: no such file; correct the path"),
        ("photo.png", r"mask 1: photo.png: "),
        ("many.json", r"many.json holds many regions; give one mask image for each"),
        ("folder", "folder holds many regions"),
        ("", "'' is not a path"),
        (b"", "empty file"),
        (b"no image", "not an image that can be read"),
        (None, "a NoneType; give a mask of the photo's size, a path, an RLE, polygons or a box"),
        (3, "a int; give a mask"),
        ({}, "a dict with nothing; give an RLE with `size` and `counts`"),
        ({"bbox": [1, 2, 3, 4]}, "a dict with bbox; give an RLE"),
        ({"counts": RUNS}, r"an RLE without its size; give `size`, \[height, width\]"),
        ({"size": [30, 20], "counts": RUNS}, "is 20x30, the image 30x20: give an RLE of this photo"),
        ({"size": [20, 30], "counts": [1, 2]}, "give the mask itself, or correct its RLE"),
        ({"size": [20, 30], "counts": [600]}, "empty"),
        ({"size": [10**9, 10**9], "counts": [5, 10**18 - 5]}, "mask 1: "),
        ({"size": "x", "counts": RUNS}, "mask 1: "),
        ({"size": [20, 30], "counts": float("nan")}, "mask 1: "),
        ([[1, 2, float("nan"), 4, 5, 6]], "polygons are lists of x1, y1, x2, y2, x3, y3"),
        ([[900, 900, 990, 900, 990, 990]], "polygons are lists"),
        ([21, 12, 6, 4], r"the box 21, 12, 6, 4 is empty; `boxes` says that it is x1, y1, x2, y2 in pixels"),
        ([6, 4, 6, 12], "is empty"),
        ([6, 4, 31.5, 12], "reaches beyond the photo, which is 30x20"),
        ([0.1, 0.1, 0.5, 0.9], "has shares of the photo; .* so multiply by width and height"),
        ([1, 2, float("nan"), 9], "has NaN or an infinite number"),
        ([1, 2, float("inf"), 9], "has NaN or an infinite number"),
        (np.zeros(SIZE, bool), "mask 1 is empty"),
        (REGION[:10], "mask 1 is 30x10, the image 30x20: scale the mask to the image"),
        (np.arange(600).reshape(SIZE), "holds integers from 0 to 599, as label maps do"),
        (np.full(SIZE, np.nan), "600 of its values are NaN"),
        ([["a"]], "mask 1: "),
        (object(), "a object; give a mask"),
    ],
)
def test_what_is_no_region_is_an_error_of_one_line_that_says_its_number(files, region, told):
    with pytest.raises(ConfigError, match=told) as refused:
        to_masks([REGION, region], SIZE)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("mask 1")


@pytest.mark.parametrize(
    ("regions", "told"),
    [
        ("mask.png", "masks: a str; give a list, with a mask of the photo's size, a path"),
        (PACKED, "masks: a dict; give a list"),
        (None, "masks: a NoneType; give a list"),
        (7, "masks: a int; give a list"),
        (REGION, r"masks: an array of the shape \(20, 30\); put a single mask into a list; of a label map"),
        (torch.from_numpy(REGION), "put a single mask into a list"),
        (
            [6, 4, 21, 12],
            r"masks: numbers; give a list of regions, such as \[\[x1, y1, x2, y2\]\]",
        ),
        (REGION.tolist(), "masks: the rows of a mask; give a list of masks"),
        ([REGION] * 2_001, "masks: 2,001 regions; at most 2,000 fit into a call"),
    ],
)
def test_a_region_that_is_not_in_a_list_and_too_many_regions_are_named(files, regions, told):
    with pytest.raises(ConfigError, match=told):
        to_masks(regions, SIZE)


PHOTOS: dict[str, Any] = {
    "array": PIXELS,
    "Pillow": Image.fromarray(PIXELS),
    "path": "photo.png",
    "Path": Path("photo.png"),
    "bytes": png(PIXELS),
    "bytearray": bytearray(png(PIXELS)),
    "tensor, channels first": torch.from_numpy(PIXELS).permute(2, 0, 1),
    "tensor, channels last": torch.from_numpy(PIXELS),
    "tensor of floats": torch.from_numpy(PIXELS).permute(2, 0, 1) / 255,
    "tensor of halves": torch.from_numpy(PIXELS).permute(2, 0, 1).double() / 255,
    "tensor on a device": OnDevice(torch.from_numpy(PIXELS).permute(2, 0, 1)),
}


@pytest.mark.parametrize("form", PHOTOS)
def test_every_form_of_a_photo_is_the_same_pixels(files, form):
    found = to_pixels(PHOTOS[form], "photo 0")
    assert found.dtype == np.uint8 and np.array_equal(found, PIXELS)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("http://example.org/a.jpg", "http://example.org/a.jpg is a URL; download it first"),
        ("gs://bucket/a.jpg", "is a URL; download it first"),
        ("none.jpg", "none.jpg: no such photo; correct the path"),
        ("folder", "folder: "),
        ("many.json", "give a path, bytes, "),
        (b"", "give a path, bytes, "),
        (np.zeros((9, 9), np.uint8), r"\(9, 9\) uint8; give .*uint8 RGB"),
        (np.zeros((0, 9, 3), np.uint8), r"\(0, 9, 3\) uint8; give"),
        (PIXELS / 255, r"\(20, 30, 3\) float64; give"),
        (
            torch.from_numpy(PIXELS).permute(2, 0, 1).float(),
            r"a tensor \(3, 20, 30\) float32; give \(3, H, W\)",
        ),
        (torch.full((3, 4, 5), float("nan")), "floats from 0 to 1"),
        (torch.zeros(1, 3, 4, 5), r"a tensor \(1, 3, 4, 5\)"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "int64; give"),
        (PIXELS.tolist(), "a list; give"),
    ],
)
def test_what_is_no_photo_is_an_error_of_one_line(files, given, told):
    with pytest.raises(ConfigError, match=told) as refused:
        to_pixels(given, "photo 3")
    assert "\n" not in str(refused.value) and "photo 3" in str(refused.value)


# Through the captioner.


@pytest.fixture(scope="module")
def ready():
    return RegionCaptioner(*lively(num_prompts=3))


def test_a_captioner_takes_every_form_at_once(ready, files):
    masks = [FORMS["path"], FORMS["RLE, text"], FORMS["polygons"], FORMS["box"], FORMS["tensor"]]
    expected = ready.caption(PIXELS, [REGION] * 5, **OPTIONS)
    assert ready.caption("photo.png", masks, **OPTIONS) == expected
    assert ready.caption(png(PIXELS), [[6, 4, 15, 8]] * 5, boxes="xywh", **OPTIONS) == expected
    steps = [*ready.caption_steps("photo.png", masks, **OPTIONS)]
    assert steps[-1].captions == expected


@pytest.mark.parametrize("name", ["regions_per_call", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, float("nan")])
def test_numbers_of_regions_and_batches_are_checked(ready, name, value):
    with pytest.raises(ConfigError, match=f"^{name}: .*; give at least 1"):
        ready.caption_photos([(PIXELS, [REGION])], **OPTIONS, **{name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("threshold", each) for each in (float("nan"), -0.1, 1.1, "high", None, True, 10**400)),
        *(("temperature", each) for each in (float("nan"), float("inf"), -1, True)),
        *(("top_p", each) for each in (0, float("nan"), 1.5)),
        *(("steps", each) for each in (0, 2.5, True, 5_000, None)),
        *(("max_new_tokens", each) for each in (0, -3, 5_000, True)),
        *(("seed", each) for each in (1.5, 2**64, True)),
    ],
)
def test_options_out_of_range_or_of_another_type_are_named(ready, field, value):
    with pytest.raises(ConfigError, match=f"^{field}: ") as refused:
        ready.caption(PIXELS, [REGION], **{field: value})
    assert "\n" not in str(refused.value)


def test_options_that_are_no_options_and_pairs_that_are_none_are_named(ready):
    with pytest.raises(ConfigError, match=r"options: a dict; give `DecodeOptions\(...\)`"):
        ready.caption(PIXELS, [REGION], {"steps": 4})
    with pytest.raises(ConfigError, match=r"photo 0: a ndarray; give \(photo, masks\)"):
        ready.caption_photos([PIXELS])


# A question of one's own.


def test_a_prompt_is_what_the_layout_would_ask(ready):
    pixels, masks = photo(1, 5)
    own = "Which color is it?"
    expected = ready.with_instruction(own).caption(pixels, masks, **OPTIONS)
    assert ready.caption(pixels, masks, prompt=own, **OPTIONS) == expected
    assert ready.caption(pixels, masks, prompt=[own] * 5, **OPTIONS) == expected
    assert ready.caption_photos([(pixels, masks, own)], **OPTIONS)[0].captions == expected
    [*_, last] = ready.caption_steps(pixels, masks, prompt=own, **OPTIONS)
    assert last.captions == expected != ready.caption(pixels, masks, **OPTIONS)


def test_regions_with_different_prompts_do_not_share_a_sequence_and_keep_their_order(ready):
    pixels, masks = photo(1, 4)
    asked = ["Which color is it?", None, "Which color is it?", "What is it made of?"]
    found = ready.caption(pixels, masks, prompt=asked, **OPTIONS)
    colors = ready.caption(pixels, [masks[0], masks[2]], prompt=asked[0], **OPTIONS)
    assert [found[0], found[2]] == colors
    assert [found[1]] == ready.caption(pixels, [masks[1]], **OPTIONS)
    assert [found[3]] == ready.caption(pixels, [masks[3]], prompt=asked[3], **OPTIONS)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("  ", "prompt: a blank text"),
        (["a", "b", "c"], "prompt: 3 texts for the 2 regions of photo 0; give one for each"),
        (["a", 3], "prompt: give a text, or a list with a text"),
        (7, "prompt: give a text"),
        ("what is <|mdm_mask|>?", "prompt: it holds '.*', a token of the model's own"),
        ("so <|eot_id|>", "prompt: it holds '<|eot_id|>', a token of the model's own"),
        ("word " * 3_000, "prompt: .* tokens; shorten it to 1,024 at most"),
        ("half \ud800", "prompt: half a surrogate pair"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_an_error(ready, prompt, told):
    pixels, masks = photo(1, 2)
    with pytest.raises(ConfigError, match=told):
        ready.caption(pixels, masks, prompt=prompt, **OPTIONS)


def test_the_record_of_a_photo_says_what_each_region_was_asked(ready, files):
    from paracaption.model_training.decoding import caption_photo
    from paracaption.model_training.decoding.read_regions import read_photo_regions
    from paracaption.schemas.decoding import DecodeOptions

    regions = read_photo_regions("photo.png", ["mask.png", "mask.png"])
    options = DecodeOptions(**OPTIONS)
    found = caption_photo.caption_regions(ready, regions, options, prompts=["What is it?"])
    record = json.loads(caption_photo.to_json(found))
    assert [each["prompt"] for each in record["regions"]] == ["What is it?"] * 2
    assert len(caption_photo.trace_photo(ready, found).snapshots) > 1
    plain = json.loads(caption_photo.to_json(caption_photo.caption_regions(ready, regions, options)))
    assert "prompt" not in plain["regions"][0]
