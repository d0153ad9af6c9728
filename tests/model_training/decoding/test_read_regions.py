"""Masks in every form that people keep them in, and what is said about those that are none."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco

from paracaption.filters import rle
from paracaption.model_training.decoding import read_regions
from paracaption.model_training.decoding.read_regions import read_photo_regions
from paracaption.pipeline.corpus import reader
from paracaption.schemas.errors import ConfigError
from tests import committed
from tests.shared_data import shared_data
from tests.synthetic import write_sa1b

HEIGHT, WIDTH = 48, 64
SAMPLES = read_regions.Path(__file__).resolve().parents[3] / "samples" / "coconut"


def rectangle(x=9, y=5, width=30, height=21):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + height, x : x + width] = True
    return mask


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    return saved(Image.fromarray(pixels), tmp_path / "000000000007.png")


def palette(colors, mask):
    image = Image.fromarray(mask.astype(np.uint8)).convert("P")
    image.putpalette([channel for color in colors for channel in color])
    return image


def with_alpha(color, alpha):
    pixels = np.broadcast_to(np.array(color, np.uint8), (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.dstack([pixels, alpha.astype(np.uint8) * 255]))


def cut_out(mask):
    noise = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    return Image.fromarray(np.dstack([noise, mask.astype(np.uint8) * 255]))


def margin(mask):
    """White on black, with a transparent column at the left: alpha differs, but is not the mask."""
    pixels = np.repeat((mask * np.uint8(255))[..., None], 3, axis=2)
    alpha = np.full(mask.shape, 255, np.uint8)
    alpha[:, :2] = 0
    return Image.fromarray(np.dstack([pixels, alpha]))


GREY = {"grey 0 and 1": 1, "grey 0 and 255": 255, "dark grey": 40}
FORMS = {
    "1 bit": lambda mask: Image.fromarray(mask),
    **{name: lambda mask, top=top: Image.fromarray(mask * np.uint8(top)) for name, top in GREY.items()},
    "16 bits": lambda mask: Image.fromarray(mask * np.uint16(65_535)),
    "16 bits of 0 and 1": lambda mask: Image.fromarray(mask * np.uint16(1)),
    "colour": lambda mask: Image.fromarray(np.repeat((mask * np.uint8(255))[..., None], 3, axis=2)),
    "red on black": lambda mask: Image.fromarray(mask[..., None] * np.array([128, 0, 0], np.uint8)),
    "palette": lambda mask: palette([(0, 0, 0), (128, 0, 0)], mask),
    "palette that begins with white": lambda mask: palette([(255, 255, 255), (0, 0, 0)], ~mask),
    "alpha over white": lambda mask: with_alpha((255, 255, 255), mask),
    "alpha over black": lambda mask: with_alpha((0, 0, 0), mask),
    "grey and alpha": lambda mask: with_alpha((9, 9, 9), mask).convert("LA"),
    "cut out of a photo": cut_out,
    "transparent margin": margin,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_is_the_same_in_every_encoding(form, photo, tmp_path):
    path = saved(FORMS[form](rectangle()), tmp_path / "mask.png")
    [region] = read_photo_regions(photo, [path]).regions
    assert np.array_equal(region.dense(), rectangle())
    assert region.mask.bbox == (9, 5, 30, 21) and region.label == "" and region.source == str(path)


@pytest.mark.parametrize("quality", [20, 75])
def test_a_jpeg_mask_with_noise_gives_the_same_area_as_its_png(quality, photo, tmp_path):
    mask = Image.fromarray(rectangle() * np.uint8(255))
    path = saved(mask, tmp_path / "mask.jpg", quality=quality)
    assert (np.asarray(Image.open(path)) > 0).sum() > rectangle().sum(), "there is noise"
    assert read_photo_regions(photo, [path]).regions[0].mask.area == rectangle().sum()


def test_soft_edges_are_cut_in_their_middle(photo, tmp_path):
    soft = np.zeros((HEIGHT, WIDTH), np.uint8)
    soft[:, 20:40] = 255
    soft[:, 19], soft[:, 40] = 100, 150
    [region] = read_photo_regions(photo, [saved(Image.fromarray(soft), tmp_path / "m.png")]).regions
    assert region.mask.bbox == (20, 0, 21, HEIGHT)


def test_soft_edges_between_two_colors_are_shades_and_no_third_color(photo, tmp_path):
    soft = np.full((HEIGHT, WIDTH, 3), (20, 0, 40), np.uint8)
    soft[:, 20:40] = 250, 200, 0
    soft[:, 19], soft[:, 40] = (66, 40, 32), (204, 160, 8)
    [region] = read_photo_regions(photo, [saved(Image.fromarray(soft), tmp_path / "m.png")]).regions
    assert region.mask.bbox == (20, 0, 21, HEIGHT)


def test_the_bytes_count_and_not_the_name(photo, tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(rectangle() * np.uint8(255)).save(path, "JPEG")
    assert read_photo_regions(photo, [path]).regions[0].mask.area == rectangle().sum()


def test_a_mask_of_the_same_shape_is_scaled_to_the_nearest_pixel(photo, tmp_path):
    half = rectangle(8, 4, 30, 20)[::2, ::2]
    [region] = read_photo_regions(photo, [saved(Image.fromarray(half), tmp_path / "half.png")]).regions
    assert np.array_equal(region.dense(), rectangle(8, 4, 30, 20))
    double = np.kron(rectangle(), np.ones((2, 2), bool))
    [region] = read_photo_regions(photo, [saved(Image.fromarray(double), tmp_path / "double.png")]).regions
    assert np.array_equal(region.dense(), rectangle())


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((64, 64), "64x64, the photo 64x48"),
        ((48, 64), "48x64, the photo 64x48 (width and height are swapped"),
    ],
)
def test_a_mask_of_another_shape_is_an_error_with_both_sizes(size, says, photo, tmp_path):
    path = saved(Image.new("1", size, 1), tmp_path / "mask.png")
    with pytest.raises(ConfigError, match=r"mask\.png") as caught:
        read_photo_regions(photo, [path])
    assert says in str(caught.value)


def labels():
    return Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 5)


def ids(*colors):
    """A label map: two regions on black."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for place, color in enumerate(colors):
        pixels[4:20, 8 + 20 * place : 20 + 20 * place] = color
    return Image.fromarray(pixels)


def areas(*grays, kind=np.uint8):
    """Rectangles side by side on black; a gray 0 is none."""
    pixels = np.zeros((HEIGHT, WIDTH), kind)
    for place, gray in enumerate(grays):
        pixels[4:14, 2 + 10 * place : 10 + 10 * place] = gray
    return Image.fromarray(pixels)


def as_palette(image):
    found = image.convert("P")
    found.putpalette([gray for gray in range(256) for _ in "RGB"])
    return found


LABELS = {
    "VOC": areas(1, 2, 3, 4, 255),
    "VOC of one object": areas(15, 255),
    "ids": areas(200, 210, 220),
    "palette": as_palette(areas(200, 210, 220)),
    "colors": areas(200, 210, 220).convert("RGB"),
    "16 bits": areas(40_000, 60_000, 61_000, kind=np.uint16),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_gray_label_map_is_refused_and_no_merged_region(kind, photo, tmp_path):
    path = saved(LABELS[kind], tmp_path / "m.png")
    with pytest.raises(ConfigError, match=r"m\.png: areas of several grays, as in a label map.*one file for"):
        read_photo_regions(photo, [path])


def disk(size=(WIDTH, HEIGHT), scale=1):
    image = Image.new("L", (size[0] * scale, size[1] * scale))
    ImageDraw.Draw(image).ellipse([8 * scale, 8 * scale, 40 * scale, 40 * scale], fill=255)
    return image.resize(size, Image.Resampling.BOX)


def saved_as_jpeg_before(quality):
    buffer = io.BytesIO()
    disk().save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("L")


SOFT = {
    "4 shades": disk(scale=2),
    "64 shades": disk(scale=8),
    "shades of a palette": as_palette(disk(scale=2)),
    "blurred": disk().filter(ImageFilter.GaussianBlur(1)),
    "a trimap": areas(128, 255),
    "a trimap of 127": areas(127, 255),
    **{f"JPEG of quality {each}": saved_as_jpeg_before(each) for each in (50, 75, 90, 95, 100)},
}


@pytest.mark.parametrize("kind", SOFT)
def test_shades_noise_and_trimaps_are_no_label_maps(kind, photo, tmp_path):
    [region] = read_photo_regions(photo, [saved(SOFT[kind], tmp_path / "m.png")]).regions
    expected = np.asarray(SOFT[kind].convert("L")) > 127
    assert abs(region.mask.area - expected.sum()) <= 0.02 * expected.sum()


BROKEN = {
    "is empty": lambda path: Image.new("L", (WIDTH, HEIGHT)).save(path),
    "is empty (brightest": lambda path: Image.new("L", (WIDTH, HEIGHT), 3).save(path, "JPEG"),
    "a label map is not a mask": lambda path: labels().save(path),
    "a picture, not a mask": lambda path: cut_out(rectangle()).convert("L").save(path),
    "three colors or more": lambda path: cut_out(rectangle()).convert("RGB").save(path),
    "three colors or more, as in a picture or a label map": lambda path: ids([230, 20, 0], [0, 60, 90]).save(
        path
    ),
    "its colors have the same brightness": lambda path: palette([(255, 0, 0), (0, 255, 0)], rectangle()).save(
        path
    ),
    "empty file": lambda path: path.write_bytes(b""),
    "not an image": lambda path: path.write_bytes(b"%PDF"),
    "no such file": lambda path: None,
    "cut short": lambda path: path.write_bytes(png(cut_out(rectangle()))[:200]),
}


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("says", BROKEN)
def test_what_is_no_mask_is_an_error_that_names_the_file(says, photo, tmp_path):
    path = tmp_path / "mask.png"
    BROKEN[says](path)
    with pytest.raises(ConfigError) as caught:
        read_photo_regions(photo, [path])
    assert str(caught.value).startswith(str(path)) and says in str(caught.value)


def test_a_mask_that_scaling_loses_is_an_error(tmp_path):
    photo = saved(Image.new("RGB", (4, 4)), tmp_path / "photo.png")
    tiny = np.zeros((400, 400), bool)
    tiny[1, 1] = True
    with pytest.raises(ConfigError, match=r"mask\.png: no pixel is left at the photo's 4x4"):
        read_photo_regions(photo, [saved(Image.fromarray(tiny), tmp_path / "mask.png")])


def test_regions_come_in_the_order_of_the_arguments_and_folders_in_that_of_their_names(photo, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    paths = [folder / name for name in ("b.png", "a.png")]
    for shift, path in enumerate(paths):
        saved(Image.fromarray(rectangle(x=9 + shift)), path)
    (folder / "notes.txt").write_text("no mask")
    given = read_photo_regions(photo, paths).regions
    assert [region.source for region in given] == [str(path) for path in paths]
    assert [region.source for region in read_photo_regions(photo, [folder]).regions] == sorted(
        map(str, paths)
    )


# Annotation files.


def polygon():
    return [[9.0, 5.0, 39.0, 5.0, 39.0, 26.0, 9.0, 26.0]]


def uncompressed(mask):
    counts = rle.to_counts(rle.from_mask(mask).rle).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def compressed(mask):
    found = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def instance(number, segmentation, **changes):
    return {"id": number, "image_id": 7, "category_id": 2, "segmentation": segmentation} | changes


def instances(path, *annotations, **changes):
    content = {
        "images": [
            {"id": 7, "file_name": "val/000000000007.jpg", "width": WIDTH, "height": HEIGHT},
            {"id": 8, "file_name": "000000000008.jpg", "width": 3, "height": 2},
        ],
        "annotations": [*annotations, instance(99, [[0, 0, 1, 0, 1, 1]], image_id=8)],
        "categories": [{"id": 2, "name": "tree-merged"}],
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_coco_instances_are_read_as_polygons_and_both_kinds_of_rle(photo, tmp_path):
    forms = polygon(), uncompressed(rectangle()), compressed(rectangle())
    path = instances(tmp_path / "i.json", *(instance(n, form) for n, form in enumerate(forms)))
    scene = read_photo_regions(photo, [path])
    for number, region in enumerate(scene.regions):
        assert np.array_equal(region.dense(), rectangle()), number
        assert region.label == "tree" and region.source == f"{path}: annotation {number}"
    assert len(scene.regions) == 3 and scene.left_out == []


def test_records_that_cannot_be_used_are_left_out_and_said_so(photo, tmp_path):
    nothing = compressed(np.zeros((HEIGHT, WIDTH), bool))
    crowd = instance(2, uncompressed(rectangle()), iscrowd=1)
    path = instances(tmp_path / "i.json", instance(1, nothing), crowd, instance(3, polygon()))
    scene = read_photo_regions(photo, [path])
    assert [region.source[-12:] for region in scene.regions] == ["annotation 3"]
    assert "annotation 1: no foreground pixel" in scene.left_out[0]
    assert scene.left_out[1].startswith("crowd: ") and scene.left_out[1].endswith(": annotation 2")
    with pytest.raises(ConfigError, match=r"no usable region .* annotation 1: no foreground pixel"):
        read_photo_regions(photo, [instances(path, instance(1, nothing))])


def test_a_list_of_annotations_is_matched_by_the_number_in_the_photos_name(photo, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([instance(1, polygon()), instance(2, polygon(), image_id=70)]))
    [region] = read_photo_regions(photo, [path]).regions
    assert region.source.endswith("annotation 1") and region.label == ""


def test_a_key_says_which_image_is_meant_where_the_photos_name_does_not(photo, tmp_path):
    path = instances(tmp_path / "i.json", instance(1, polygon()))
    renamed = photo.rename(tmp_path / "holiday.png")
    with pytest.raises(
        ConfigError, match=r"no image is called holiday\.png; .* val/000000000007\.jpg, 000000000008\.jpg"
    ):
        read_photo_regions(renamed, [path])
    for key in ("7", "000000000007", "000000000007.jpg"):
        assert len(read_photo_regions(renamed, [path], key).regions) == 1
        assert len(read_photo_regions(renamed, [f"{path}#{key}"]).regions) == 1


def test_a_json_of_many_photos_is_searched_through_once(tmp_path, monkeypatch):
    count, calls = 60, []
    images = [
        {"id": 1000 + number, "file_name": f"p{number}.jpg", "height": HEIGHT, "width": WIDTH}
        for number in range(count)
    ]
    annotations = [instance(number, polygon(), image_id=1000 + number) for number in range(count)]
    path = instances(tmp_path / "i.json", *annotations, images=images)
    for number in range(count):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"p{number}.png")
    stem = read_regions.file_names.stem
    monkeypatch.setattr(read_regions.file_names, "stem", lambda name: calls.append(name) or stem(name))
    for number in range(count):
        [region] = read_photo_regions(tmp_path / f"p{number}.png", [path]).regions
        assert region.source.endswith(f"annotation {number}")
    assert len(calls) < 10 * count


def test_the_photo_of_another_size_than_the_json_says_is_an_error(photo, tmp_path):
    path = instances(tmp_path / "i.json", instance(1, polygon()))
    with pytest.raises(ConfigError, match=r"photo is 64x48, annotation says 3x2; give the photo that"):
        read_photo_regions(photo, [path], "8")


@pytest.mark.parametrize("text", ["{", "[1]", '{"annotations": 3}', '{"annotations": [{"id": 1}]}', "{}"])
def test_a_json_of_another_kind_is_an_error_that_names_the_kinds(text, photo, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{path}: .*COCO instances, COCO panoptic or SA-1B"):
        read_photo_regions(photo, [path])


def test_panoptic_annotations_find_their_label_map():
    scene = read_photo_regions(SAMPLES / "photos" / "coffee.jpg", [SAMPLES / "panoptic.json"])
    assert [region.label for region in scene.regions] == ["cup"]
    labels = np.asarray(Image.open(SAMPLES / "labels" / "coffee.png"))
    assert scene.regions[0].mask.area == np.count_nonzero(labels.any(axis=2))


def test_a_missing_label_map_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "panoptic.json"
    path.write_bytes((SAMPLES / "panoptic.json").read_bytes())
    with pytest.raises(ConfigError, match=r"no label map coffee.png; put it there"):
        read_photo_regions(SAMPLES / "photos" / "coffee.jpg", [path])


def test_a_label_map_with_a_name_that_no_file_can_have_is_an_error_with_its_beginning(tmp_path):
    document = json.loads((SAMPLES / "panoptic.json").read_text())
    for each in document["annotations"]:
        each["file_name"] = "x" * 300
    (tmp_path / "labels").mkdir()
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"panoptic.json: file_name 'x{40}': .*too long.*; correct it"):
        read_photo_regions(SAMPLES / "photos" / "coffee.jpg", [path])


def test_an_sa1b_json_gives_all_masks_of_its_photo(tmp_path):
    import tarfile

    entry = write_sa1b(tmp_path / "source", 1)
    with tarfile.open(entry["paths"][0]) as tar:
        tar.extractall(tmp_path, filter="data")
    annotation, image = next(tmp_path.glob("*.json")), next(tmp_path.glob("*.jpg"))
    declared = json.loads(annotation.read_text())["annotations"]
    found = read_photo_regions(image, [annotation]).regions
    assert [region.mask.area for region in found] == [each["area"] for each in declared]


# Corpora.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "out"
    committed.write(out, num_coconut=1, num_sa1b=1)
    return out


@pytest.fixture(scope="module")
def kept(corpus):
    """Key, shard and rows of an image of the corpus."""
    key = "000000000000"
    rows = [row for row in reader.open_corpus(corpus).find_image(key).rows if row["kept"]]
    return key, corpus / "coconut" / rows[0]["shard"], rows


def test_a_corpus_and_a_key_give_the_photo_and_its_kept_regions(corpus, kept):
    key, shard, rows = kept
    scene = read_photo_regions(None, [corpus], key)
    assert [region.caption for region in scene.regions] == [row["caption"] for row in rows]
    assert scene.pixels.shape == (96, 128, 3) and scene.name == f"{corpus}#{key}"
    for given, chosen in ((f"{corpus}#{key}", None), (shard, key), (f"{shard}#{key}", None)):
        again = read_photo_regions(None, [given], chosen)
        assert [region.mask for region in again.regions] == [region.mask for region in scene.regions]


@pytest.mark.parametrize(
    ("key", "image", "says"),
    [
        (None, None, "which image"),
        ("no-such-key", None, "no-such-key"),
        ("any", "photo.png", "has its own photos"),
    ],
)
def test_a_corpus_without_what_is_needed_is_an_error(key, image, says, corpus):
    with pytest.raises(ConfigError, match=says):
        read_photo_regions(image, [corpus], key)


def test_masks_without_a_photo_or_with_a_missing_one_are_errors(photo, tmp_path):
    mask = saved(Image.fromarray(rectangle()), tmp_path / "mask.png")
    with pytest.raises(ConfigError, match="these masks need their photo"):
        read_photo_regions(None, [mask])
    with pytest.raises(ConfigError, match=r"nowhere\.jpg: no such photo"):
        read_photo_regions(tmp_path / "nowhere.jpg", [mask])
    with pytest.raises(ConfigError, match="no masks"):
        read_photo_regions(photo, [])


# Published data.


@pytest.mark.parametrize(
    ("photo", "masks", "boxes"),
    [
        ("perceptiondlm/demo.jpg", "perceptiondlm/demo_mask_2.jpg", (67, 324, 108, 142)),
        ("gar_1/demo_image_1.png", "gar_1/demo_mask_1.png", (738, 669, 76, 43)),
        ("gar_3/demo_image_3.png", "gar_3/demo_mask_3_1.png", (104, 244, 28, 26)),
        ("dam_1/1.jpg", "dam_1/1_example_mask.png", (806, 522, 975, 458)),
        ("dam_video/00000.jpg", "dam_video/00000_mask_1.png", (1481, 364, 439, 106)),
    ],
)
def test_published_demo_masks_are_read_whatever_their_encoding(photo, masks, boxes):
    home = shared_data("demo_masks")
    [region] = read_photo_regions(home / photo, [home / masks]).regions
    assert region.mask.bbox == boxes


def test_the_same_published_segments_are_read_from_labels_and_from_rle():
    home = shared_data("coco_panopticapi")
    photo = home / "images" / "000000142238.jpg"
    labels = read_photo_regions(photo, [home / "panoptic.json"])
    runs = read_photo_regions(photo, [home / "same_segments_as_rle.json"])
    assert {(r.label, r.mask) for r in labels.regions} == {(r.label, r.mask) for r in runs.regions}
    assert len(labels.left_out) == len(runs.left_out) == 1 and "crowd" in labels.left_out[0]
