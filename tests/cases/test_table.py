"""The tables of `docs/sources.md` on what becomes of which input: each row is tried, and is what happens."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from paracaption.pipeline.executor import audit
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from tests.cases import table_inputs as t

DOCS = Path(__file__).resolve().parents[2] / "docs" / "sources.md"
HEADS = ("photo", "label map", "names and ids", "annotation", "mask in a JSON", "container")

WHAT = re.compile(
    "gzip|web page|LFS|only zero|zip file|UTF-16|a list|instances|GIF|HEIC|JPEG|empty file|"
    "not in the label|a folder of tars|truncated|Unterminated|Expecting value"
)
"""What an input is called that is not what it should be, the cut ones included."""

WHOLE = json.dumps({"file_name": "a.png", "segments_info": t.SEGMENTS}).encode()
LIMITS = {"max_pixels": 4000, "max_masks": 3}


def twice(document):
    document["annotations"].append(document["annotations"][0])


def one_id(document):
    for each in document["images"]:
        each["id"] = 1
    for each in document["annotations"]:
        each["image_id"] = 1


def of_two(document):
    document["annotations"][0]["file_name"] = "b.png"
    document["annotations"].reverse()


def instances(document):
    about = {"segmentation": [t.OUTLINE], "bbox": [1, 2, 3, 4], "category_id": 1}
    document["annotations"] = [{"id": number, "image_id": number} | about for number in (1, 2)]


def by_id(name):
    def change(document):
        document[name] = {str(number): each for number, each in enumerate(document[name])}

    return change


INPUTS: dict[str, list[t.Input]] = {
    "JPEG (also CMYK, progressive and MPO), PNG, WebP, BMP or TIFF, with any file ending": [
        *(t.release(t.encoded(form, t.PLAIN)) for form in ("PNG", "WEBP", "BMP", "TIFF")),
        t.release(t.encoded("JPEG", t.PLAIN.convert("CMYK"))),
        t.release(t.encoded("JPEG", t.PLAIN, progressive=True)),
        t.release(t.encoded("MPO", t.PLAIN, append_images=[t.PLAIN])),
        *(t.ending(end) for end in (".jfif", ".JPE", ".Jpeg", ".tif")),
        t.pairs_called("a.jfif"),
    ],
    "other data follows its end: a video, padding or text": [
        t.release(photo + end)
        for photo in (t.JPEG, t.PNG)
        for end in (bytes(4096), b"ftypmp42" * 900, b"<!-- -->")
    ],
    "has an orientation tag (EXIF or XMP, also in BigTIFF or a PNG's text)": [
        t.release(t.twisted()),
        t.release(t.twisted("TIFF")),
        t.release(t.twisted("TIFF", big_tiff=True)),
        t.release(t.twisted("PNG")),
        t.release(t.twisted("WEBP")),
        t.release(t.encoded("TIFF", t.PLAIN, tiffinfo={700: b'<x tiff:Orientation="6"/>'})),
    ],
    "missing, or a photo of that name is only in another folder": [
        t.release(None),
        t.renamed("photos/one/a.jpg", "labels/two/a.png", "two/a"),
    ],
    "a label map of that name is in its place": [
        t.release(None, files={"photos/panoptic/a.png": t.encoded("PNG", t.colors())})
    ],
    "truncated, or cannot be decoded": [
        t.release(t.JPEG[:-200]),
        t.release(t.PNG[: len(t.PNG) // 2]),
        t.release(t.PNG[:400] + bytes(9) + t.PNG[409:]),
        t.pairs(t.record(), t.JPEG[:-200]),
    ],
    "GIF, HEIC, web page, Git LFS pointer, archive, or empty": [
        *(t.release(data) for data in (t.HTML, t.POINTER, b"PK\x03\x04" + bytes(99), bytes(500))),
        t.release(t.encoded("GIF", t.PLAIN)),
        t.release(b"\0\0\0\x18ftypheic" + bytes(99)),
    ],
    "PNG with more than 1 MB of text or color profile": [
        t.release(t.with_text()),
        t.release(t.encoded("PNG", t.PLAIN, icc_profile=bytes(2_000_000))),
    ],
    "its size differs from that of its annotation or its label map": [
        t.release(t.encoded("JPEG", t.picture(t.WIDTH, t.HEIGHT))),
        t.of_image(width=33),
        t.release(labels=t.encoded("PNG", t.colors(t.LABELS[:-1]))),
        t.pairs(t.record(), t.encoded("JPEG", t.picture(t.WIDTH, t.HEIGHT))),
    ],
    "has more pixels than `limits.max_pixels`": [t.release(t.encoded("PNG", t.picture(80, 80)))],
    "PNG, TIFF or BMP as RGB, RGBA, palette or gray, whose colors are the ids": [
        *(t.release(labels=t.encoded(form, t.colors())) for form in ("TIFF", "BMP")),
        t.release(labels=t.encoded("PNG", t.colors().convert("RGBA"))),
        t.release(labels=t.optimized()),
    ],
    "gray, whose values are the ids": [t.gray()],
    "its segments have other areas than declared": [t.of_segment(area=81)],
    "missing, truncated, JPEG, TIFF with a JPEG inside, GIF, or no image": [
        t.without_areas(t.encoded("TIFF", t.colors(), compression="jpeg")),
        t.release(labels=b""),
        t.release(labels=t.encoded("PNG", t.colors())[:60]),
        *(t.release(labels=t.encoded(form, t.colors())) for form in ("JPEG", "GIF")),
        *(t.release(labels=data) for data in (t.HTML, t.POINTER, gzip.compress(t.PNG))),
    ],
    "a segment has no pixel in it": [
        t.of_annotation(segments_info=[*t.SEGMENTS, {"id": 9, "category_id": 1}])
    ],
    "several images have one name, in different folders of `photos`": [
        t.renamed("photos/one/b.jpg", "labels/one/b.png", "one/b")
    ],
    "several images have one id, and their names tell them apart": [t.release(change=one_id)],
    "an annotation has the id of one image, and the name of another": [t.release(change=of_two)],
    "an image is listed again": [t.release(change=twice), t.same_name_in_tars],
    "an image has no annotation, or a JSON has no photo": [
        t.release(change=lambda found: found["annotations"].pop(0)),
        t.tar(t.tar_of(("a.json", t.record()), ("b.jpg", t.JPEG), ("b.json", t.record()))),
        t.tar(t.tar_of(("a.jpg", t.JPEG), ("b.jpg", t.JPEG), ("b.json", t.record()))),
    ],
    "a name leads out of its folder": [
        t.of_image(file_name="../a.jpg"),
        t.tar(t.tar_of(("../a.jpg", t.JPEG), ("../a.json", t.record()))[:-1024] + t.SECOND),
    ],
    "a file name is not UTF-8": [t.not_utf8_pair, t.not_utf8_info],
    "SA-1B's photos and JSONs are in two folders, and both are listed": [t.two_folders],
    "JPEGs and label maps are in one folder, which is listed as both": [
        t.release(None, files={"labels/a.jpg": t.JPEG, "labels/b.jpg": t.JPEG}, photos=["~/labels"]),
        t.release(None, files={"labels/p/a.jpg": t.JPEG, "labels/p/b.jpg": t.JPEG}, photos=["~/labels/p"]),
    ],
    "id or category is a number as text or a float without a fraction; area, bbox or score is invalid": [
        t.of_segment(id="70000"),
        t.of_segment(category_id=1.0),
        t.of_segment(area="80", bbox=[1, None], score="high"),
        t.of_image(id=1.0),
        t.of_image(id="1"),
        *(t.pairs(t.record(**odd)) for odd in ({"id": "x"}, {"area": None}, {"bbox": [1, "a"]}, {"id": 5.0})),
    ],
    "width and height are missing or 0": [
        t.of_image(width=0, height=0),
        t.of_image(width=None, height=None),
        t.release(change=lambda found: found["images"][0].pop("width")),
    ],
    "width is negative or impossible": [t.of_image(width=-32), t.of_image(width=4_294_967_295)],
    "id, category or `iscrowd` is invalid": [
        t.of_segment(id="seven"),
        t.of_segment(id=None),
        t.of_segment(category_id=[1]),
        t.of_segment(iscrowd="perhaps"),
    ],
    "the category is not in the category list": [t.of_segment(category_id=999)],
    "crowd segment": [t.of_segment(iscrowd=1), t.of_segment(iscrowd="1")],
    "segment with the id 0": [t.of_segment(id=0)],
    "`images`, `annotations` or `segments_info` is an object by id, or one element without a list": [
        *(t.release(change=by_id(name)) for name in ("images", "annotations")),
        t.of_annotation(segments_info={str(each["id"]): each for each in t.SEGMENTS}),
        t.of_annotation(segments_info=t.SEGMENTS[0]),
    ],
    "`images` or `annotations` is anything else": [
        t.release(change=lambda found, n=name, v=value: found.update({n: v}))
        for name in ("images", "annotations")
        for value in (7, "text", True)
    ],
    "an element of `images` has neither an id nor a file name": [
        t.release(change=lambda found, odd=odd: found["images"].append(odd)) for odd in (None, {}, 5)
    ],
    "byte order mark, CRLF, or NaN in a field that is not needed": [
        t.release(text=lambda text: b"\xef\xbb\xbf" + text.encode()),
        t.release(text=lambda text: text.replace(", ", ",\r\n").encode()),
        t.of_segment(bbox=[1, 2, float("nan"), 4]),
        t.single(b"\xef\xbb\xbf" + WHOLE),
        t.pairs(b"\xef\xbb\xbf" + t.record(area=float("nan"))),
        t.categories(
            b"\xef\xbb\xbf" + json.dumps([{"id": 1, "name": "a"}, {"id": 184, "name": "b"}]).encode()
        ),
    ],
    "the JSON of one image is gzip, web page, Git LFS pointer, UTF-16, or truncated": [
        made(data) for made in (t.single, t.pairs) for data in (*t.OTHER_FILES.values(), WHOLE[:-9])
    ],
    "the panoptic JSON is one of these, a list of segments, or COCO's instances": [
        *(t.release(text=lambda _, data=data: data) for data in t.OTHER_FILES.values()),
        t.release(text=lambda text: text[:-9]),
        t.release(text=lambda _: json.dumps(t.SEGMENTS)),
        t.release(change=instances),
    ],
    "the category list is gzip, a web page, a Git LFS pointer, or truncated": [
        t.categories(data) for data in (gzip.compress(b"[]"), t.HTML, t.POINTER, b'[{"id": 1, "na')
    ],
    "the category list has two names for an id, an empty name, or an invalid id": [
        t.named(row)
        for row in (
            {"id": 1, "name": "cat"},
            {"id": 9, "name": ""},
            {"id": True, "name": "x"},
            {"id": "x", "name": "x"},
        )
    ],
    "`license`, author and URLs of an image, and the list `licenses`": [
        t.of_image(license=3, flickr_url="http://example.org/a.jpg")
    ],
    "RLE with numbers as text or floats, counts as Python prints them, as JSON text, or alone in a list": [
        t.mask({"size": [str(each) for each in t.SIZE], "counts": t.COUNTS}),
        t.mask({"size": t.SIZE, "counts": [float(each) for each in t.raw_counts()]}),
        t.mask({"size": t.SIZE, "counts": repr(t.COUNTS.encode())}),
        t.mask(json.dumps({"size": t.SIZE, "counts": t.COUNTS})),
        t.mask([{"size": t.SIZE, "counts": t.COUNTS}]),
    ],
    "polygon with its points as pairs": [t.mask([np.reshape(t.OUTLINE, (-1, 2)).tolist()])],
    "polygon up to 64 px outside the photo": [
        t.mask([t.OUTLINE]),
        t.mask([[-9.0, 4.0, 90.0, 4.0, 90.0, 14.0, -9.0, 14.0]]),
    ],
    "RLE without a size, with base64 counts, or that does not fill its image; bitmap as rows; no mask": [
        t.mask(t.MASK.tolist()),
        t.mask({"counts": t.COUNTS}),
        t.mask({"size": t.SIZE, "counts": t.base64_of(t.COUNTS.encode())}),
        t.mask({"size": t.SIZE, "counts": t.raw_counts()[:-1]}),
        t.pairs(t.record().replace(b'"segmentation"', b'"mask"')),
    ],
    "RLE without a pixel": [t.mask({"size": t.SIZE, "counts": [t.HEIGHT * t.WIDTH]})],
    "RLE of another size, such as height and width swapped": [
        t.mask({"size": t.SIZE[::-1], "counts": t.COUNTS})
    ],
    "more masks than `limits.max_masks`": [t.of_annotation(segments_info=t.SEGMENTS * 3)],
    "several tars in one file; zero blocks between members": [
        t.tar(t.FIRST + t.SECOND),
        t.tar(t.body(t.FIRST) + bytes(512) + t.SECOND),
    ],
    "tar with bytes after its end that are not members": [t.tar(t.FIRST + b"\xaa" * 700)],
    "tar that is truncated in its last member": [t.tar(t.body(t.SECOND) + t.body(t.FIRST, last=False))],
    "tar that is gzipped, empty or another kind of file; a folder of tars": [
        *(t.tar(data) for data in (gzip.compress(t.FIRST), t.JPEG, t.HTML, t.POINTER, bytes(100), b"")),
        t.folder_of_tars,
    ],
    "Parquet with the PNG as plain bytes, with its JSON as text, or with the segments alone": [
        t.parquet(),
        t.parquet(lambda data: data),
        t.parquet(other=json.dumps),
        t.parquet(other=lambda cell: cell.get("segments_info", cell)),
    ],
    "Parquet with base64, numbers or only a path in `mask`": [
        t.parquet(t.base64_of),
        t.parquet(list),
        t.parquet(lambda _: {"path": "a.png"}),
    ],
    "Parquet that is broken, is another kind of file, or has no column `mask` or `segments_info`": [
        t.parquet_file(b"PAR1 no"),
        t.parquet_file(t.HTML),
        t.parquet_file(t.POINTER),
        t.parquet_file(gzip.compress(b"PAR1")),
    ],
}


def rows() -> dict[str, str]:
    """What the tables say of each input."""
    text, found = DOCS.read_text(), {}
    for head in HEADS:
        table = text.partition(f"| {head} | what happens |\n| --- | --- |\n")[2].partition("\n\n")[0]
        for line in table.splitlines():
            given, gets = line.strip("| ").split(" | ")
            found[given] = gets
    return found


def test_every_row_is_tried_and_nothing_else():
    assert list(rows()) == list(INPUTS)


def said_of(folder: Path, given: t.Input) -> audit.AuditReport:
    values = {"out": str(folder / "out"), "limits": LIMITS, "failures": {"read_retry_s": 0}}
    (folder / "in").mkdir()
    config = BuildConfig.model_validate(values | given(folder / "in"))
    (subset,) = config.subsets
    return audit.audit_subset(open_source(config, subset), config.limits, jobs=1)


@pytest.mark.parametrize(
    ("row", "number"), [(row, number) for row, given in INPUTS.items() for number in range(len(given))]
)
def test_an_input_gets_what_its_row_says(tmp_path, row, number):
    gets, given = rows()[row], INPUTS[row][number]
    if gets.startswith("an error"):
        with pytest.raises(ConfigError) as caught:
            said_of(tmp_path, given)
        told = str(caught.value)
        assert "\n" not in told and re.search(r"\.(json|tar|parquet)\b", told), told
        assert "what it is" not in gets or WHAT.search(told), told
        return
    report = said_of(tmp_path, given)
    found, told = report.result, report.text()
    drops = [problem for problem in found.problems if problem.drops]
    notes = {problem.reason for problem in found.problems if not problem.drops}
    if gets.startswith(("read", "kept")):
        assert not drops and found.regions_usable == found.regions > 0, told
        assert found.images_usable == found.images > 0, told
        assert set(re.findall(r"note `(\w+)`", gets)) <= notes, told
        return
    wanted = re.findall(r"`(\w+)`", gets)
    assert gets.startswith("dropped: ") and set(wanted) <= set(Reason)
    assert drops and {problem.reason for problem in drops} <= set(wanted), told
    assert found.regions_usable + sum(problem.regions for problem in drops) == found.regions, told
    for problem in drops:
        assert (
            "\n" not in problem.detail
            and " at 0x" not in problem.detail
            and "Traceback" not in problem.detail
        )
        assert "what it is" not in gets or WHAT.search(problem.detail), problem.detail
    if "Parquet" not in row:
        assert found.images_usable, f"what is sound beside it is read\n{told}"
