"""Mask images: files, indexed images, lists of names, as Open Images and Cityscapes have them."""

import json

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.executor.audit import audit_subset
from paracaption.pipeline.io import failures
from paracaption.pipeline.io.mask_images import read_mask_image
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig, Limits
from paracaption.schemas.errors import ConfigError
from tests.shared_data import shared_data

WIDTH, HEIGHT = 48, 32


def box(x=4, y=3, width=10, height=8, shape=(HEIGHT, WIDTH)):
    mask = np.zeros(shape, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def photo(path, width=WIDTH, height=HEIGHT):
    return save(path, np.full((height, width, 3), 90, np.uint8))


def mask(path, pixels=None):
    return save(path, (box() if pixels is None else pixels).astype(np.uint8) * 255)


def open_masks(root, recipe="identify", **options):
    source = {"source": "masks", "photos": [str(root / "photos")], "masks": str(root / "masks")} | options
    values = {"out": "out", "subsets": {"mine": {"sources": source, "recipe": recipe}}}
    return open_source(BuildConfig.model_validate(values), "mine")


def read(root, limits=None, notes=None, **options):
    source = open_masks(root, **options)
    images = {entry.key: source.read(entry, limits or Limits(), notes) for entry in source.catalog()}
    if notes is not None:
        notes += source.notes
    return images


def reasons(image):
    return [None if region.drop is None else str(region.drop.reason) for region in image.regions]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_masks_are_found_in_a_folder_of_the_photos_name_or_by_names_that_begin_with_it(tmp_path):
    for name in ("a", "a_1", "b", "c"):
        photo(tmp_path / "photos" / f"{name}.jpg")
    boxes = [box(x) for x in range(5)]
    mask(tmp_path / "masks" / "a.png", boxes[0])
    mask(tmp_path / "masks" / "a_2.png", boxes[1])
    mask(tmp_path / "masks" / "a_1_0.png", boxes[2])
    mask(tmp_path / "masks" / "b" / "left.png", boxes[3])
    mask(tmp_path / "masks" / "b" / "right.png", boxes[4])
    images = read(tmp_path)
    found = {key: [rle.decode(region.rle) for region in image.live()] for key, image in images.items()}
    assert [len(each) for each in found.values()] == [2, 1, 2, 0]
    expected = [boxes[0], boxes[1], boxes[2], boxes[3], boxes[4]]
    assert all(
        np.array_equal(one, other)
        for one, other in zip([m for each in found.values() for m in each], expected, strict=True)
    )
    assert str(images["c"].drop.reason) == "annotation_missing"
    assert images["a"].regions[0].category is None and images["a"].regions[0].source_id is None


def test_masks_without_a_photo_and_those_of_several_photos_have_their_rows_too(tmp_path):
    photo(tmp_path / "photos" / "x" / "a.jpg")
    photo(tmp_path / "photos" / "y" / "a.jpg")
    mask(tmp_path / "masks" / "y" / "a_0.png")
    mask(tmp_path / "masks" / "a_0.png")
    mask(tmp_path / "masks" / "lost" / "0.png")
    images = read(tmp_path)
    assert {key: reasons(image) for key, image in images.items()} == {
        "a": [],
        images_key(images, "y/a.jpg"): [None],
        "a_0": ["pair_ambiguous"],
        "lost": ["photo_missing"],
    }


def images_key(images, name):
    return next(key for key, image in images.items() if image.file_name == name)


def test_a_subset_without_names_needs_a_recipe_and_the_error_says_so_before_anything_is_read(tmp_path):
    path = tmp_path / "c.yaml"
    source = "{source: masks, photos: [photos], masks: masks/}"
    path.write_text(f"out: out\nsubsets:\n  mine: {{sources: {source}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "subsets.mine.recipe: not every region of its sources has a name" in str(caught.value)
    assert "\n" not in str(caught.value)
    path.write_text(f"out: out\nsubsets:\n  mine: {{sources: {source}, recipe: identify}}\n")
    assert load_config(path).subsets["mine"].recipe == "identify"
    source = "{source: masks, photos: [photos], masks: masks/, names: n.csv}"
    path.write_text(f"out: out\nsubsets:\n  mine: {{sources: {source}}}\n")
    assert load_config(path).subsets["mine"].recipe == "verify"
    source = "{source: masks, photos: [photos], masks: masks/, names: n.csv, unnamed: keep}"
    path.write_text(f"out: out\nsubsets:\n  mine: {{sources: {source}}}\n")
    with pytest.raises(ConfigError, match="set `recipe`"):
        load_config(path)


OPEN_IMAGES = """MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks
000a1249af2bc5f0_m0138tl_c5d2ff18.png,000a1249af2bc5f0,/m/0138tl,c5d2ff18,0.1,0.2,0.3,0.4,0.78,0.1 0.2 1
000a1249af2bc5f0_m01yrx_aa.png,000a1249af2bc5f0,/m/01yrx,aa,0.1,0.2,0.3,0.4,,
000a1249af2bc5f0_m01yrx_gone.png,000a1249af2bc5f0,/m/01yrx,gone,0.1,0.2,0.3,0.4,,
0123456789012345_m0xxxx_bb.png,0123456789012345,/m/0xxxx,bb,0.1,0.2,0.3,0.4,,
"""


def open_images(root):
    photo(root / "photos" / "000a1249af2bc5f0.jpg")
    photo(root / "photos" / "0123456789012345.jpg", 32, 48)
    mask(root / "masks" / "0" / "000a1249af2bc5f0_m0138tl_c5d2ff18.png")
    big = box(8, 6, 20, 16, (2 * HEIGHT, 2 * WIDTH))
    mask(root / "masks" / "1" / "000a1249af2bc5f0_m01yrx_aa.png", big)
    mask(root / "masks" / "1" / "0123456789012345_m0xxxx_bb.png")
    (root / "masks.csv").write_text(OPEN_IMAGES)
    (root / "classes.csv").write_text("/m/0138tl,Toy\n/m/01yrx,Cat\n/m/0xxxx,Human face\n")
    return {
        "masks": [str(root / "masks" / "0"), str(root / "masks" / "1")],
        "names": str(root / "masks.csv"),
        "categories": str(root / "classes.csv"),
        "recipe": "verify",
    }


def test_open_images_masks_have_their_names_and_text_ids_stay_out_of_the_numbers(tmp_path):
    notes = []
    images = read(tmp_path, notes=notes, **open_images(tmp_path))
    first, _ = images.values()
    assert (first.key, first.file_name) == ("000a1249af2bc5f0", "000a1249af2bc5f0.jpg")
    assert reasons(first) == [None, None, "labels_unreadable"]
    assert [region.category for region in first.regions] == ["toy", "cat", "cat"]
    assert all(region.source_id is None and region.category_id is None for region in first.regions)
    assert "line 4 of `names`: 000a1249af2bc5f0_m01yrx_gone.png" in first.regions[2].drop.detail


def test_a_mask_of_another_resolution_is_scaled_to_the_nearest_pixel_with_a_note(tmp_path):
    notes = []
    images = read(tmp_path, notes=notes, **open_images(tmp_path))
    region = images["000a1249af2bc5f0"].regions[1]
    assert np.array_equal(rle.decode(region.rle), box(4, 3, 10, 8))
    assert [(note.kind, note.region) for note in notes] == [("mask_resized", 1)]


def test_a_mask_of_a_turned_photo_is_dropped_and_the_detail_says_that_it_is_turned(tmp_path):
    image = read(tmp_path, **open_images(tmp_path))["0123456789012345"]
    assert reasons(image) == ["size_mismatch"]
    assert "width and height are swapped" in image.regions[0].drop.detail
    assert image.regions[0].category == "human face"


def test_a_rotation_of_the_photo_turns_no_mask_because_both_are_published_unturned(tmp_path):
    options = open_images(tmp_path)
    plain = read(tmp_path, **options)["000a1249af2bc5f0"]
    lines = OPEN_IMAGES.splitlines()
    turned = [f"{lines[0]},Rotation", *(f"{line},90.0" for line in lines[1:])]
    (tmp_path / "masks.csv").write_text("\n".join(turned))
    assert read(tmp_path, **options)["000a1249af2bc5f0"].regions == plain.regions


def test_groups_are_dropped_as_crowds_or_kept_with_a_note(tmp_path):
    options = open_images(tmp_path)
    text = OPEN_IMAGES.replace("Clicks\n", "Clicks,IsGroupOf\n").replace("0.1 0.2 1\n", "0.1 0.2 1,1\n")
    (tmp_path / "masks.csv").write_text(text)
    assert reasons(read(tmp_path, **options)["000a1249af2bc5f0"])[:2] == ["crowd", None]
    notes = []
    assert reasons(read(tmp_path, notes=notes, crowds="keep", **options)["000a1249af2bc5f0"])[0] is None
    assert ("crowd_kept", 0) in [(note.kind, note.region) for note in notes]


CITYSCAPES = [
    {"id": 7, "name": "road", "isthing": 0},
    {"id": 24, "name": "person", "isthing": 1},
    {"id": 26, "name": "car", "isthing": 1},
]


def cityscapes(root):
    stem = "aachen/aachen_000000_000019"
    photo(root / "photos" / f"{stem}_leftImg8bit.png")
    values = np.zeros((HEIGHT, WIDTH), np.uint16)
    values[20:] = 7
    values[box(2, 2)] = 26_000
    values[box(20, 2)] = 26_001
    values[box(32, 2)] = 24
    values[0] = 3
    save(root / "masks" / f"{stem}_gtFine_instanceIds.png", values)
    save(root / "masks" / f"{stem}_gtFine_labelIds.png", values.astype(np.uint8))
    (root / "classes.json").write_text(json.dumps(CITYSCAPES))
    options = {
        "layout": "indexed",
        "divisor": 1000,
        "photo_suffix": "_leftImg8bit",
        "mask_suffix": "_gtFine_instanceIds",
        "categories": str(root / "classes.json"),
        "recipe": "verify",
    }
    return values, options


def test_the_16_bit_instance_ids_of_cityscapes_are_regions_with_their_categories(tmp_path):
    values, options = cityscapes(tmp_path)
    (image,) = read(tmp_path, **options).values()
    assert image.key == "aachen_000000_000019_leftImg8bit"
    assert [region.source_id for region in image.regions] == [3, 7, 24, 26_000, 26_001]
    assert reasons(image) == ["unknown_category", None, "crowd", None, None]
    assert [region.category for region in image.regions] == [None, "road", "person", "car", "car"]
    assert [region.category_id for region in image.regions] == [None, 7, 24, 26, 26]
    assert [region.is_thing for region in image.regions][1:4] == [False, True, True]
    for region in image.live():
        assert np.array_equal(rle.decode(region.rle), values == region.source_id)
        assert region.area == np.count_nonzero(values == region.source_id)


def indexed(kind):
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[box()] = 1
    values[box(20, 2)] = 7
    if kind == "palette":
        image = Image.fromarray(values, "P")
        image.putpalette([0, 0, 0, 128, 0, 0] + [9, 9, 9] * 254)
        return image
    if kind == "gray":
        return Image.fromarray(values)
    if kind == "16 bits":
        return Image.fromarray(values.astype(np.uint16))
    return Image.fromarray(np.stack([values, values * 0, values * 0], -1))


@pytest.mark.parametrize("kind", ["palette", "gray", "16 bits", "colors"])
def test_an_indexed_image_is_read_by_its_stored_values(kind, tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    save(tmp_path / "masks" / "a.png", indexed(kind))
    (image,) = read(tmp_path, layout="indexed").values()
    assert [region.source_id for region in image.live()] == [1, 7]
    assert np.array_equal(rle.decode(image.regions[0].rle), box())
    (image,) = read(tmp_path, layout="indexed", background=[0, 7]).values()
    assert [region.source_id for region in image.live()] == [1]


def test_lines_name_the_values_of_one_photo_or_of_all(tmp_path):
    for name in ("a", "b"):
        photo(tmp_path / "photos" / f"{name}.jpg")
        save(tmp_path / "masks" / f"{name}.png", indexed("gray"))
    names = write_lines(
        tmp_path / "names.jsonl",
        {"value": 1, "category": "Cup_(tea)"},
        {"photo": "b.jpg", "value": 7, "category": "plate"},
        {"photo": "nowhere.jpg", "value": 7, "category": "plate"},
    )
    images = read(tmp_path, layout="indexed", names=names, recipe="verify")
    assert [region.category for region in images["a"].regions] == ["cup", None]
    assert reasons(images["a"]) == [None, "unknown_category"]
    assert [region.category for region in images["b"].regions] == ["cup", "plate"]
    assert reasons(images["nowhere"]) == ["photo_missing"]


def test_names_of_values_make_no_regions_of_a_photo_without_an_indexed_image(tmp_path):
    for name in ("a", "b"):
        photo(tmp_path / "photos" / f"{name}.jpg")
    save(tmp_path / "masks" / "a.png", indexed("gray"))
    (tmp_path / "n.csv").write_text("value,category,photo\n7,road,\n7,street,a.jpg\n7,lane,\n8,cup,\n")
    names = str(tmp_path / "n.csv")
    images = read(tmp_path, layout="indexed", names=names, unnamed="keep")
    assert images["b"].regions == [] and str(images["b"].drop.reason) == "annotation_missing"
    assert {region.source_id: region.category for region in images["a"].regions}[7] == "street"


def test_a_photo_without_an_indexed_image_with_an_empty_one_or_with_a_photo_in_its_place(tmp_path):
    for name in "abcd":
        photo(tmp_path / "photos" / f"{name}.jpg")
    save(tmp_path / "masks" / "b.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    save(tmp_path / "masks" / "c.png", noise)
    save(tmp_path / "masks" / "d.jpg", noise)
    images = read(tmp_path, Limits(max_masks=50), layout="indexed")
    assert {key: str(image.drop.reason) for key, image in images.items()} == {
        "a": "annotation_missing",
        "b": "mask_empty",
        "c": "too_many_masks",
        "d": "labels_unreadable",
    }


ENCODINGS = [
    ("gar_1/demo_image_1.png", "gar_1/demo_mask_1.png"),
    ("gar_3/demo_image_3.png", "gar_3/demo_mask_3_0.png"),
    ("perceptiondlm/demo.jpg", "perceptiondlm/demo_mask_0.jpg"),
    ("dam_1/1.jpg", "dam_1/1_example_mask.png"),
    ("dam_video/00000.jpg", "dam_video/00000_mask_1.png"),
]


def test_the_five_encodings_of_published_masks_are_read_as_the_captioner_reads_them(tmp_path):
    home = shared_data("demo_masks")
    names = write_lines(
        tmp_path / "names.jsonl",
        *({"photo": image, "mask": path, "category": "thing"} for image, path in ENCODINGS),
    )
    notes = []
    images = read(
        tmp_path,
        notes=notes,
        photos=[str(home)],
        masks=str(home),
        names=names,
        unnamed="drop",
        recipe="verify",
    )
    by_name = {image.file_name: image for image in images.values()}
    for name, path in ENCODINGS:
        image = by_name[name]
        assert reasons(image) == [None], name
        expected = read_mask_image(str(home / path), (image.height, image.width))
        assert np.array_equal(rle.decode(image.regions[0].rle), expected)


def test_masks_that_are_none_are_dropped_with_a_reason_and_leave_the_others(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    folder = tmp_path / "masks" / "a"
    mask(folder / "0.png")
    mask(folder / "1.png", box(width=0))
    save(folder / "2.png", np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8))
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "4.png").write_bytes(b"")
    mask(folder / "5.png", box(shape=(HEIGHT, HEIGHT)))
    save(folder / "6.png", indexed("gray"))
    (image,) = read(tmp_path).values()
    assert reasons(image) == [
        None,
        "mask_empty",
        "mask_undecodable",
        "mask_undecodable",
        "mask_undecodable",
        "size_mismatch",
        "mask_empty",
    ]
    assert all(f"{number}.png" in image.regions[number].drop.detail for number in range(1, 7))


def test_the_limits_hold(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    mask(tmp_path / "masks" / "a_0.png")
    mask(tmp_path / "masks" / "a_1.png", box(0, 0, 900, 900, (1000, 1500)))
    assert reasons(read(tmp_path, Limits(max_masks=1))["a"]) == ["too_many_masks"] * 2
    assert reasons(read(tmp_path, Limits(max_pixels=10_000))["a"]) == [None, "mask_undecodable"]
    assert reasons(read(tmp_path, Limits(max_pixels=100))["a"]) == ["photo_too_large"] * 2
    assert str(read(tmp_path, Limits(max_record_bytes=20))["a"].drop.reason) == "annotation_unreadable"


def test_photos_and_masks_may_share_a_folder_if_lines_name_the_masks(tmp_path):
    photo(tmp_path / "photos" / "a.png")
    mask(tmp_path / "photos" / "whatever.png")
    names = write_lines(
        tmp_path / "n.jsonl", {"photo": "a.png", "mask": "whatever.png", "category": "cup", "is_crowd": False}
    )
    images = read(tmp_path, masks=str(tmp_path / "photos"), names=names, recipe="verify")
    assert [(key, reasons(image)) for key, image in images.items()] == [("a", [None])]


def test_a_folder_of_masks_inside_the_folder_of_the_photos_holds_no_photos(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    mask(tmp_path / "photos" / "masks" / "a.png")
    images = read(tmp_path, masks=str(tmp_path / "photos" / "masks"))
    assert [(key, reasons(image)) for key, image in images.items()] == [("a", [None])]


def test_a_mask_that_no_line_names_is_dropped_where_names_are_given_unless_it_is_to_be_kept(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    mask(tmp_path / "masks" / "a_0.png")
    mask(tmp_path / "masks" / "a_1.png")
    (tmp_path / "n.csv").write_text("mask,category\na_1.png,cup\na_0.png,\n")
    names = str(tmp_path / "n.csv")
    (image,) = read(tmp_path, names=names, recipe="verify").values()
    assert reasons(image) == [None, "unknown_category"]
    (image,) = read(tmp_path, names=names, unnamed="keep").values()
    assert [region.category for region in image.live()] == ["cup", None]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("n.csv", "x,y\n1,2\n", "no column names a mask or a photo (x, y)"),
        ("n.jsonl", '{"mask": "a.png"}\n[]\n', "line 2: not an object"),
        ("n.jsonl", '{"mask": "a.png"}\n{"mask"\n', "line 2: not JSON"),
        ("n.csv", b"\x1f\x8b\x08 gzip", "not a text file"),
        (
            "n.csv",
            "mask,category\na_0.png,café\n".encode("latin-1"),
            "byte 25 is not UTF-8; save it as UTF-8",
        ),
        ("n.csv", "mask,category\n".encode("utf-16"), "not a text file: UTF-16; save it as UTF-8"),
        ("n.csv", b"\x89PNG\r\n\x1a\n\xff", "not a text file: a PNG; give the CSV or the JSON lines"),
        ("n.csv", "mask,category\n" + '"' + "x" * 200_000, "line 2: not CSV"),
        ("n.csv", 'mask,category\na_0.png,"cup\na_1.png,bowl\n', "not CSV (unexpected end of data)"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error_of_one_line(name, text, words, tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    mask(tmp_path / "masks" / "a_0.png")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, names=str(tmp_path / name))
    assert words in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).count("save it as UTF-8") < 2


def test_a_mask_that_is_a_link_to_nothing_is_dropped_at_once(tmp_path, monkeypatch):
    photo(tmp_path / "photos" / "a.jpg")
    mask(tmp_path / "masks" / "a_0.png")
    (tmp_path / "masks" / "a_1.png").symlink_to(tmp_path / "away" / "a_1.png")
    (tmp_path / "masks" / "a_2.png").symlink_to(tmp_path / "masks" / "a_0.png")
    monkeypatch.setattr(failures.RETRYING, "_sleep", lambda _: pytest.fail("it is waited for"))
    (image,) = read(tmp_path).values()
    assert reasons(image) == [None, "labels_unreadable", None]


def test_masks_of_a_wrong_kind_are_told_without_pydantics_words(tmp_path):
    source = "{source: masks, photos: [photos], masks: 5}"
    recipe = "[{stage: caption, captioner: 5}]"
    text = f"out: out\nsubsets:\n  mine:\n    sources: {source}\n    recipe: {recipe}\n"
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "c.yaml"))
    assert "sources.0.masks: has to be a text (given: 5)" in str(caught.value)
    assert "sources.0.masks: has to be a list (given: 5)" in str(caught.value)
    assert "function" not in str(caught.value)
    (tmp_path / "c.yaml").write_text(text.replace("masks: 5", "masks: masks"))
    with pytest.raises(ConfigError, match="captioner: has to be keys and values \\(given: 5\\)"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    "text, words",
    [("1," + "x" * 200_000, "line 1: not CSV"), ('1,"cup\n2,bowl\n', "not CSV (unexpected end of data)")],
)
def test_a_csv_of_categories_that_cannot_be_read_is_an_error_of_one_line(text, words, tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    mask(tmp_path / "masks" / "a_0.png")
    (tmp_path / "k.csv").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, categories=str(tmp_path / "k.csv"))
    assert words in str(caught.value) and "k.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_the_audit_says_what_to_do(tmp_path):
    options = open_images(tmp_path)
    text = audit_subset(open_masks(tmp_path, **options), Limits()).text()
    assert "1 of 2 images and 2 of 4 regions are usable" in text
    assert "labels_unreadable: 1 x, 1 regions (put these mask images there" in text
    assert "mask_resized: 1 x (the mask is scaled to the photo, to the nearest pixel)" in text


def test_the_fingerprint_changes_with_masks_and_names(tmp_path):
    options = open_images(tmp_path)
    first = open_masks(tmp_path, **options).fingerprint()
    assert open_masks(tmp_path, **options).fingerprint() == first
    mask(tmp_path / "masks" / "0" / "more.png")
    second = open_masks(tmp_path, **options).fingerprint()
    (tmp_path / "masks.csv").write_text(OPEN_IMAGES + "x.png,y,/m/01yrx,z,0,0,0,0,,\n")
    assert len({str(each) for each in (first, second, open_masks(tmp_path, **options).fingerprint())}) == 3
