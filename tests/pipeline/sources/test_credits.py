"""License and origin of an image, as the records of COCO and its relatives name them."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paracaption.pipeline.corpus import work_list
from paracaption.pipeline.sources.credits import Licenses, read_credit
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.records import Credit
from tests.building import config_of
from tests.synthetic import jpeg, scene

BY = "http://creativecommons.org/licenses/by/2.0/"
BLOCK = [
    {"url": "http://creativecommons.org/licenses/by-nc/2.0/", "id": 2, "name": "Attribution-NonCommercial"},
    {"url": BY, "id": 4, "name": "Attribution License"},
    {"name": "", "id": 0, "url": ""},
    "not a license",
    {"id": 9, "url": "https://x.org/terms"},
]
NAMED = Credit(license="Attribution License", license_url=BY, license_id="4")


def credit(block=BLOCK, **record) -> Credit:
    return read_credit(json.dumps(record).encode(), Licenses(json.dumps(block).encode()))


@pytest.mark.parametrize(
    "number",
    [4, "4", 4.0, [4], "attribution license", BY, {"id": 4}, {"name": "Attribution License", "url": BY}],
)
def test_a_license_is_found_in_the_block_by_id_name_or_address(number):
    found = credit(license=number)
    assert (found.license, found.license_url) == (NAMED.license, NAMED.license_url)


def test_a_block_that_is_an_object_by_id_is_read():
    assert credit({"4": {"name": "Attribution License", "url": BY}, "5": "Free"}, license=4) == NAMED
    assert credit({"5": "Free"}, license=5) == Credit(license="Free", license_id="5")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            9,
            Credit(license="https://x.org/terms", license_url="https://x.org/terms", license_id="9"),
        ),
        (7, Credit(license_id="7")),  # not in the list: the id is all that is known
        ("CC0", Credit(license="CC0")),
        ("https://x.org/l", Credit(license="https://x.org/l", license_url="https://x.org/l")),
        (0, Credit()),
        ("", Credit()),
        (None, Credit()),
        ("nan", Credit()),
        (True, Credit()),
        ({"odd": [1]}, Credit()),
    ],
)
def test_a_license_that_no_block_names_is_as_it_is_given_and_nothing_stays_nothing(value, expected):
    assert credit(license=value) == expected


def test_zero_that_no_block_names_is_no_license_and_one_that_it_names_is():
    assert credit([], license=0) == Credit()
    assert credit([{"id": 0, "name": "CC0"}], license=0) == Credit(license="CC0", license_id="0")


def test_what_coco_lvis_and_objects365_write_is_read():
    coco_url, flickr_url = (
        "http://images.cocodataset.org/val2017/1.jpg",
        "http://farm6.static.flickr.com/1.jpg",
    )
    record = {"license": 4, "coco_url": coco_url, "flickr_url": flickr_url, "date_captured": "2013-11-14"}
    expected = Credit("Attribution License", BY, "4", coco_url=coco_url, flickr_url=flickr_url)
    assert credit(**record, not_exhaustive_category_ids=[1], id=1) == expected
    assert credit(license=4, url="") == NAMED


def test_what_open_images_writes_is_read():
    found = credit(
        [],
        OriginalURL="https://farm2.staticflickr.com/1_o.jpg",
        OriginalLandingURL="https://www.flickr.com/photos/x/1",
        License="https://creativecommons.org/licenses/by/2.0/",
        AuthorProfileURL="https://www.flickr.com/people/x/",
        Author="Ann Example",
        Title="A  red\n barn",
    )
    assert found == Credit(
        license="https://creativecommons.org/licenses/by/2.0/",
        license_url="https://creativecommons.org/licenses/by/2.0/",
        author="Ann Example",
        author_url="https://www.flickr.com/people/x/",
        title="A red barn",
        source_url="https://www.flickr.com/photos/x/1",
    )


def test_attribution_and_an_author_as_an_object_are_read():
    found = credit(
        license_name="CC BY 4.0",
        license_url="https://creativecommons.org/licenses/by/4.0/",
        attribution="Photo by Ann, https://x.org/ann",
        creator={"name": "Ann"},
        creator_url="https://x.org/ann",
    )
    assert (found.license, found.license_url) == ("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/")
    assert (found.attribution, found.author) == ("Photo by Ann, https://x.org/ann", "Ann")
    assert found.author_url == "https://x.org/ann"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://bob:s3cret@x.org/1.jpg", "https://x.org/1.jpg"),
        ("https://s3cret@x.org/1.jpg", "https://x.org/1.jpg"),
        ("https://x.org/1.jpg?X-Amz-Signature=s3cret&id=1", "https://x.org/1.jpg"),
        ("https://x.org/1.jpg?s3cret", "https://x.org/1.jpg"),
        ("https://x.org/1.jpg#access_token=s3cret", "https://x.org/1.jpg"),
        (
            "https://x.org/w/index.php?title=File:A.jpg&oldid=3",
            "https://x.org/w/index.php?title=File:A.jpg&oldid=3",
        ),
        ("https://x.org/wiki/A#/media/File:A.jpg", "https://x.org/wiki/A#/media/File:A.jpg"),
        ("/home/s3cret/1.jpg", ""),
        ("file:///home/s3cret/1.jpg", ""),
        ("s3://s3cret-bucket/1.jpg", ""),
        ("data:image/png;base64,s3cret", ""),
        ("https://[s3cret/1.jpg", ""),
        ("C:\\Users\\s3cret\\1.jpg", ""),
        ("https://x.org/1.jpg;jsessionid=s3cret", "https://x.org/1.jpg"),
        ("https://x.org/1.jpg#access_token:s3cret", "https://x.org/1.jpg"),
        ("https://x.org/w?id=5;sig=s3cret", "https://x.org/w"),
        ("https://x.org/w?id=5%26sig=s3cret", "https://x.org/w"),
        ("https://x.org/1.jpg%3Fsig%3Ds3cret", "https://x.org/1.jpg"),
        ("http://localhost:8000/s3cret/1.jpg", ""),
        ("http://127.0.0.1/s3cret/1.jpg", ""),
        (f"https://x.org/{'a' * 2000}", ""),
    ],
)
def test_no_password_signature_or_path_of_a_machine_travels(given, shown):
    found = credit(coco_url=given, attribution=given, license=given, author_url={"url": given})
    assert found.coco_url == found.license_url == found.author_url == shown
    assert "s3cret" not in repr(found)
    inside = credit(attribution=f"by Ann ({given})", title=f"see <{given}>") if "://" in given else Credit()
    assert "s3cret" not in repr(inside)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("from www.x.org/1?sig=s3cret", "from www.x.org/1"),
        ("https://x.org/a b.jpg?id=1&sig=s3cret", "https://x.org/a b.jpg"),
        ("bob:s3cret@x.org/1", "x.org/1"),
        ("from //bob:s3cret@x.org/1", "from //x.org/1"),
        ("copied from /home/s3cret/1.jpg today", "copied from today"),
        ("copied from C:\\Users\\s3cret\\1.jpg", "copied from"),
        ("Ann <mailto:ann@x.org>, a/b? c = d & e", "Ann <mailto:ann@x.org>, a/b? c = d & e"),
        ("A/B at 1:2, https://x.org/1?id=5 and ann@x.org", "A/B at 1:2, https://x.org/1?id=5 and ann@x.org"),
    ],
)
def test_a_text_keeps_its_words_and_loses_what_is_secret(given, shown):
    assert credit(attribution=given).attribution == shown


def test_a_long_odd_text_costs_no_time():
    assert len(credit(attribution="?a:b&" * 1_000_000).attribution) <= 1000


@pytest.mark.parametrize("record", [b"", b"[]", b"{", b"null", b'{"license": NaN, "title": 1e999}'])
def test_a_record_that_cannot_be_read_states_nothing(record):
    assert read_credit(record, Licenses(b"{]")).license == ""


def test_text_that_is_not_unicode_is_readable_and_long_text_is_cut():
    found = read_credit(b'{"author": "A\\ud800", "title": "%s"}' % (b"x" * 5000))
    assert found.author == "A?"
    assert len(found.title) == 1000 and found.title.endswith("...")


# The layouts.


def write_images(root, count=2):
    photos, labels = root / "photos", root / "labels"
    photos.mkdir(parents=True)
    labels.mkdir()
    segments = []
    for number in range(count):
        photo, ids = scene(number, 2, (48, 64))
        (photos / f"p{number}.jpg").write_bytes(jpeg(photo))
        rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2).astype(np.uint8)
        Image.fromarray(rgb).save(labels / f"p{number}.png")
        segments.append([{"id": each, "category_id": 1, "iscrowd": 0} for each in (1, 2)])
    return segments


def read_all(config, subset="coconut"):
    source = open_source(config, subset)
    return [source.read(entry, config.limits) for entry in source.catalog()]


RECORDS = [{"license": 4, "flickr_url": "https://x.org/0"}, {}]
EXPECTED = [Credit("Attribution License", BY, "4", flickr_url="https://x.org/0"), Credit()]


def document(segments, **more):
    names = [f"p{number}" for number in range(len(segments))]
    images = [
        {"id": number, "file_name": f"{name}.jpg", "width": 64, "height": 48} | RECORDS[number]
        for number, name in enumerate(names)
    ]
    annotations = [
        {"image_id": number, "file_name": f"{name}.png", "segments_info": segments[number]}
        for number, name in enumerate(names)
    ]
    return {"licenses": BLOCK, "images": images, "annotations": annotations, **more}


@pytest.mark.parametrize("clean", [True, False])
def test_a_document_gives_each_image_its_credit_however_it_is_parsed(tmp_path, clean):
    found = document(write_images(tmp_path))
    if not clean:
        found["images"][1]["width"] = float("nan")
    (tmp_path / "p.json").write_text(json.dumps(found))
    source = {
        "annotations": [f"{tmp_path}/p.json"],
        "labels": f"{tmp_path}/labels",
        "photos": [f"{tmp_path}/photos"],
    }
    images = read_all(config_of(tmp_path / "out", coconut=source))
    assert [image.credit for image in images] == EXPECTED
    assert all(image.live() for image in images)


def test_a_folder_of_one_json_per_image_and_parquet_rows_give_it_too(tmp_path):
    segments = write_images(tmp_path)
    (tmp_path / "info").mkdir()
    rows = []
    for number, found in enumerate(segments):
        own = RECORDS[number] | {"licenses": BLOCK, "segments_info": found, "width": 64, "height": 48}
        (tmp_path / "info" / f"p{number}.json").write_text(json.dumps(own))
        png = (tmp_path / "labels" / f"p{number}.png").read_bytes()
        image = {"file_name": f"p{number}.jpg", "id": number, "width": 64, "height": 48}
        image |= {
            "license": "CC0" if number == 0 else None,
            "date_captured": datetime(2013, 11, 14),
        }
        info = {"file_name": f"p{number}.png", "image_id": number, "segments_info": found}
        rows.append({"mask": {"bytes": png, "path": None}, "segments_info": info, "image_info": image})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    places = {"labels": f"{tmp_path}/labels", "photos": [f"{tmp_path}/photos"]}
    images = read_all(config_of(tmp_path / "out", coconut={"annotations": [f"{tmp_path}/info"], **places}))
    assert [image.credit for image in images] == EXPECTED
    parquet = {"layout": "parquet", "annotations": [f"{tmp_path}/rows.parquet"], "photos": places["photos"]}
    images = read_all(config_of(tmp_path / "out", coconut=parquet))
    assert [image.credit for image in images] == [Credit(license="CC0"), Credit()]
    assert all(image.live() for image in images)


def test_a_pair_of_sa1b_gives_it_where_its_json_states_any(tmp_path):
    for number, more in enumerate([{"license": "CC0", "author": "Ann"}, {}]):
        photo, ids = scene(number, 1, (48, 64))
        (tmp_path / f"sa_{number}.jpg").write_bytes(jpeg(photo))
        counts = [int((ids != 1).sum()), int((ids == 1).sum())]
        mask = {"id": 1, "segmentation": {"size": [48, 64], "counts": counts}}
        pair = {"image": {"image_id": number, "width": 64, "height": 48, **more}, "annotations": [mask]}
        (tmp_path / f"sa_{number}.json").write_text(json.dumps(pair))
    config = config_of(tmp_path / "out", sa1b={"paths": [str(tmp_path)]})
    images = read_all(config, "sa1b")
    assert [image.credit for image in images] == [Credit(license="CC0", author="Ann"), None]


def test_the_work_list_keeps_them(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(document(write_images(tmp_path))))
    source = {
        "annotations": [f"{tmp_path}/p.json"],
        "labels": f"{tmp_path}/labels",
        "photos": [f"{tmp_path}/photos"],
    }
    config = config_of(tmp_path / "out", coconut=source)
    opened = open_source(config, "coconut")
    planned = work_list.make_work_list(opened, config, tmp_path / "out" / "coconut")
    assert planned.credits
    assert [entry.credit for entry in planned.read_unit(0)] == EXPECTED
