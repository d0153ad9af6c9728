"""WebDataset tars: those of our own builds and of SA-1B, JSON with RLEs or polygons, mask images, damage."""

import io
import json
import tarfile

import msgspec
import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import reader
from paracaption.pipeline.executor.audit import audit_subset
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig, Limits
from paracaption.schemas.errors import ConfigError
from tests import committed
from tests.synthetic import write_sa1b

WIDTH, HEIGHT = 48, 32


def box(x=4, y=3, width=10, height=8):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + height, x : x + width] = True
    return mask


def encoded(pixels, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def photo(form="JPEG", width=WIDTH):
    return encoded(np.full((HEIGHT, width, 3), 90, np.uint8), form)


def written(mask):
    found = rle.from_mask(mask).rle
    return {"size": list(found.size), "counts": found.counts}


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def open_tars(*paths, recipe="identify", **options):
    source = {"source": "webdataset", "paths": [str(path) for path in paths]} | options
    values = {"out": "out", "subsets": {"again": {"sources": source, "recipe": recipe}}}
    return open_source(BuildConfig.model_validate(values), "again")


def read(*paths, limits=None, notes=None, **options):
    source = open_tars(*paths, **options)
    images = {entry.key: source.read(entry, limits or Limits(), notes) for entry in source.catalog()}
    if notes is not None:
        notes += source.notes
    return images


def reasons(image):
    return [None if region.drop is None else str(region.drop.reason) for region in image.regions]


@pytest.mark.parametrize("subset", ["coconut", "sa1b"])
def test_the_shards_of_our_own_corpora_are_read_with_masks_names_and_credit(subset, tmp_path):
    committed.write(tmp_path / "out")
    shards = sorted((tmp_path / "out" / subset / "shards").glob("*.tar"))
    samples = [sample for path in shards for sample, _ in reader.iter_shard(str(path))]
    assert samples
    images = read(*shards)
    assert list(images) == [sample.key for sample in samples]
    for sample in samples:
        image = images[sample.key]
        assert (image.width, image.height, image.file_name) == (sample.width, sample.height, sample.file_name)
        assert reasons(image) == [None] * len(sample.regions)
        for region, kept in zip(image.regions, sample.regions, strict=True):
            assert (region.rle.size, region.rle.counts) == (tuple(kept.rle.size), kept.rle.counts)
            assert (region.area, region.bbox) == (kept.area, tuple(kept.bbox))
            assert region.category == (kept.category or kept.core_category)
            assert region.source_id == kept.id and region.caption is None
        given = sample.credit()
        credit = {} if image.credit is None else msgspec.structs.asdict(image.credit)
        assert {name: value for name, value in credit.items() if value} == given


def test_the_tars_of_sa1b_are_read_too_but_not_as_if_their_regions_had_names(tmp_path):
    paths = write_sa1b(tmp_path / "source", 2)["paths"]
    images = read(*paths, unnamed="keep")
    assert list(images) == ["sa_0", "sa_1"]
    assert all(reasons(image) == [None] * 4 for image in images.values())
    with pytest.raises(ConfigError, match=r"the first 2 samples has a name; set `unnamed: keep`"):
        read(*paths)


def test_a_subset_whose_regions_have_no_names_needs_a_recipe(tmp_path):
    path = tmp_path / "c.yaml"
    source = '{source: webdataset, paths: ["*.tar"]'
    path.write_text(f"out: out\nsubsets: {{again: {{sources: {source}, unnamed: keep}}}}}}\n")
    with pytest.raises(ConfigError, match=r"subsets\.again\.recipe: not every region .* set `recipe`"):
        load_config(path)
    path.write_text(f"out: out\nsubsets: {{again: {{sources: {source}}}}}}}\n")
    assert load_config(path).subsets["again"].recipe == "verify"


def test_masks_are_read_as_rle_as_polygons_and_as_images_with_names_of_any_usual_key(tmp_path):
    document = {
        "width": WIDTH,
        "height": HEIGHT,
        "annotations": [
            {"id": 5, "segmentation": written(box()), "category_name": "Hair drier"},
            {"id": 6, "segmentation": [[4, 3, 14, 3, 14, 11, 4, 11]], "category_id": 2},
            {"label": "cup", "rle": written(box())},
            {"label": "cup", "mask": "a.mask_1.png"},
            {"label": "cup", "mask": written(box())},
            {"label": "cup", **written(box())},
            {"label": "group", "segmentation": written(box()), "iscrowd": 1},
            {"label": "group", "segmentation": written(box()), "iscrowd": [1]},
            {"label": "cup", "segmentation": written(box()), "iscrowd": False},
            {"segmentation": written(box())},
            {"label": "cup", "segmentation": []},
            {"label": "cup", "mask": "a.gone.png"},
            {"label": "cup", "mask": "a.empty.png"},
            7,
        ],
        "categories": [{"id": 2, "name": "tree-merged", "isthing": 0}],
    }
    members = [
        ("a.jpg", photo()),
        ("a.json", document),
        ("a.mask_1.png", encoded(box().astype(np.uint8) * 255)),
        ("a.empty.png", encoded(box(width=0).astype(np.uint8))),
    ]
    (image,) = read(write_tar(tmp_path / "a.tar", members)).values()
    for region in image.live():
        assert np.array_equal(rle.decode(region.rle), box())
    assert reasons(image) == [
        *[None] * 6,
        "crowd",
        "annotation_unreadable",
        None,
        "unknown_category",
        "mask_undecodable",
        "labels_unreadable",
        "mask_empty",
        "annotation_unreadable",
    ]
    names = ["hair dryer", "tree", "cup", "cup", "cup", "cup", "cup"]
    assert [region.category for region in image.live()] == names
    assert image.regions[1].is_thing is False and image.regions[0].source_id == 5


def test_a_sample_of_a_photo_and_mask_images_alone_is_read(tmp_path):
    pixels = encoded(box().astype(np.uint8) * 255)
    members = [
        ("x/a.png", photo("PNG")),
        ("x/a.0.png", pixels),
        ("x/a.1.PNG", pixels),
        ("x/b.jpg", photo()),
        ("x/b.png", pixels),
        ("x/b.txt", b"a caption"),
        ("x/a.txt", b"another"),
        ("x/LICENSE", b"free"),
    ]
    notes = []
    images = read(write_tar(tmp_path / "a.tar", members), notes=notes, unnamed="keep")
    assert {key: reasons(image) for key, image in images.items()} == {"a": [None, None], "b": [None]}
    assert [note.kind for note in notes] == ["other_file"] * 2
    assert "2 with the ending 'txt', such as x/b.txt" in notes[0].detail
    assert images["a"].photo_format == "png" and images["b"].photo_format == "jpeg"


def test_an_indexed_image_of_a_sample_has_its_names_in_the_json_or_the_category_list(tmp_path):
    values = np.zeros((HEIGHT, WIDTH), np.uint16)
    values[box()] = 3
    values[box(20)] = 700
    values[box(32)] = 255
    document = {
        "regions": [{"value": 700, "category": "cup"}, {"category": "saucer", "rle": written(box(1))}],
        "categories": [{"id": 3, "name": "plate"}],
    }
    members = [("a.jpg", photo()), ("a.json", document), ("a.seg.png", encoded(values))]
    path = write_tar(tmp_path / "a.tar", members)
    (image,) = read(path, layout="indexed", background=[0, 255]).values()
    assert [region.category for region in image.live()] == ["saucer", "plate", "cup"]
    assert [region.source_id for region in image.regions] == [None, 3, 700]
    assert np.array_equal(rle.decode(image.regions[2].rle), values == 700)
    (image,) = read(path, layout="indexed").values()
    assert reasons(image) == [None, None, "unknown_category", None]
    (image,) = read(path, layout="indexed", limits=Limits(max_masks=3)).values()
    assert str(image.drop.reason) == "too_many_masks" and not image.live()


def test_an_element_about_a_value_that_no_image_has_or_that_is_named_twice_is_dropped(tmp_path):
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[box()] = 3
    elements = [
        {"value": 3, "category": "cup"},
        {"value": 3, "category": "bowl"},
        {"value": 77, "category": "saucer"},
    ]
    members = [("a.jpg", photo()), ("a.json", {"regions": elements}), ("a.seg.png", encoded(values))]
    (image,) = read(write_tar(tmp_path / "a.tar", members), layout="indexed").values()
    assert [region.category for region in image.regions] == ["cup", "bowl", "saucer"]
    assert reasons(image) == [None, "annotation_unreadable", "segment_absent"]
    assert "value 77: no indexed image" in image.regions[2].drop.detail


@pytest.mark.parametrize("text", [None, "[", '[{"id": "x"}]'])
def test_a_category_list_that_cannot_be_read_is_an_error(text, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", photo()), ("a.json", {"regions": []})])
    if text is not None:
        (tmp_path / "k.json").write_text(text)
    with pytest.raises(ConfigError, match=r"k\.json: .*categor"):
        read(path, categories=str(tmp_path / "k.json"))


def test_a_tar_that_is_cut_in_the_zeros_behind_a_member_is_noted(tmp_path):
    members = [
        ("a.jpg", photo()),
        ("a.json", {"regions": [{"label": "cup", "segmentation": written(box())}]}),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size + 5])
    notes = []
    (image,) = read(str(path), notes=notes).values()
    assert reasons(image) == [None] and [note.kind for note in notes] == ["tar_without_end"]


def test_text_ids_and_numbers_that_are_too_large_stay_empty(tmp_path):
    elements = [
        {"id": "0a1b", "category_id": "/m/01", "label": "cup", "segmentation": written(box())},
        {"id": 10**30, "category_id": 2.5, "label": "cup", "segmentation": written(box())},
    ]
    (image,) = read(
        write_tar(tmp_path / "a.tar", [("a.jpg", photo()), ("a.json", {"regions": elements})])
    ).values()
    assert reasons(image) == [None, None]
    assert all(region.source_id is None and region.category_id is None for region in image.regions)


def test_what_is_wrong_with_a_sample_is_its_drop(tmp_path):
    good = {"regions": [{"label": "cup", "segmentation": written(box())}]}
    members = [
        *(("good.jpg", photo()), ("good.json", good)),
        ("alone.jpg", photo()),
        ("record.json", good),
        *(("torn.jpg", photo()), ("torn.json", b'{"regions": [')),
        *(("none.jpg", photo()), ("none.json", {"caption": "x"})),
        *(("two.jpg", photo()), ("two.json", good), ("two.more.json", good)),
        *(("wide.jpg", photo(width=WIDTH + 1)), ("wide.json", good | {"width": WIDTH, "height": HEIGHT})),
        *(("../up.jpg", photo()), ("../up.json", good)),
        *(("list.jpg", photo()), ("list.json", good["regions"])),
    ]
    images = read(write_tar(tmp_path / "a.tar", members), write_tar(tmp_path / "b.tar", members[:2]))
    assert [(image.drop and str(image.drop.reason)) for image in images.values()] == [
        None,
        "annotation_missing",
        "photo_missing",
        "annotation_unreadable",
        "annotation_unreadable",
        "pair_ambiguous",
        "size_mismatch",
        "unsafe_name",
        None,
        "duplicate_key",
    ]


def test_a_tar_that_is_cut_short_costs_only_what_is_lost(tmp_path):
    good = {"regions": [{"label": "cup", "segmentation": written(box())}]}
    members = [(f"{name}.{end}", data) for name in "ab" for end, data in (("jpg", photo()), ("json", good))]
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[:3300])
    images = read(path)
    assert reasons(images["a"]) == [None]
    assert len(images) == 2 and all(image.drop for key, image in images.items() if key != "a")


def test_a_folder_and_a_file_that_is_no_tar_are_errors(tmp_path):
    (tmp_path / "shards").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder; give .*shards/\*\.tar"):
        read(tmp_path / "shards")
    (tmp_path / "x.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(ConfigError, match=r"x\.tar"):
        read(tmp_path / "x.tar")


def test_the_limits_hold(tmp_path):
    element = {"label": "cup", "segmentation": written(box())}
    members = [("a.jpg", photo()), ("a.json", {"regions": [element, element]})]
    path = write_tar(tmp_path / "a.tar", members)
    assert reasons(read(path, limits=Limits(max_masks=1))["a"]) == ["too_many_masks"] * 2
    assert reasons(read(path, limits=Limits(max_pixels=100))["a"]) == ["photo_too_large"] * 2
    assert str(read(path, limits=Limits(max_record_bytes=20))["a"].drop.reason) == "annotation_unreadable"


def test_the_audit_says_what_to_do(tmp_path):
    elements = [{"label": "cup", "segmentation": written(box())}, {"segmentation": written(box())}]
    path = write_tar(tmp_path / "a.tar", [("a.jpg", photo()), ("a.json", {"regions": elements})])
    text = audit_subset(open_tars(path, recipe="verify"), Limits()).text()
    assert "1 of 1 images and 1 of 2 regions are usable" in text
    assert "unknown_category: 1 x, 1 regions (give the category list as `categories`" in text
