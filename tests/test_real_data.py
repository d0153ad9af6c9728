"""Published annotations through the whole stream with the embedded backends: every region is accounted for,
every mask is the source's to the last pixel.
"""

from __future__ import annotations

import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco

from paracaption.pipeline.corpus import merge, verify
from paracaption.schemas.config import BuildConfig
from tests.building import build
from tests.shared_data import shared_data

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(300)]

PANOPTIC = [
    ("coco_panopticapi", "panoptic.json", "panoptic", "images"),
    ("coco_hf_39769", "panoptic.json", "panoptic", "."),
    ("gar_bench_open", "panoptic_derived.json", "panoptic_derived", "images"),
]
BACKENDS = {"captioner": "classical", "judge": "lexical", "segmenter": "grabcut"}
TARS = ["sa1b_style_open/sa_900000.tar", "sa1b_real/shards/standin.tar", "sa1b_real/shards/messy.tar"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The corpus of all published annotations."""
    coconut = [
        {
            "annotations": [str(shared_data(folder) / document)],
            "labels": str(shared_data(folder) / labels),
            "photos": [str(shared_data(folder) / photos)],
        }
        for folder, document, labels, photos in PANOPTIC
    ]
    sa1b = [{"paths": [str(shared_data(tar))]} for tar in TARS]
    out = tmp_path_factory.mktemp("real") / "out"
    config = BuildConfig.model_validate(
        {
            "out": str(out),
            "coconut": coconut,
            "sa1b": sa1b,
            "images_per_shard": 3,
            "io": {"num_cpus": 1, "concurrency": [1, 2]},
            **{name: {"name": backend, "concurrency": [1, 2]} for name, backend in BACKENDS.items()},
            "failures": {"min_free_gb": 0, "stall_s": 120},
        }
    )
    build(config)
    merge.merge(out, config)
    return out


def ledger(out: Path, subset: str) -> list[dict]:
    paths = sorted((out / subset / "ledger").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def panoptic_source() -> dict[str, tuple[list[dict], np.ndarray]]:
    """Stem of the photo -> (segments as published, (H, W) ids decoded from the PNG)."""
    found = {}
    for folder, document, labels, _ in PANOPTIC:
        for annotation in json.loads((shared_data(folder) / document).read_text())["annotations"]:
            pixels = np.asarray(Image.open(shared_data(folder) / labels / annotation["file_name"]), np.uint32)
            ids = pixels[..., 0] + 256 * pixels[..., 1] + 65_536 * pixels[..., 2]
            found[Path(annotation["file_name"]).stem] = annotation["segments_info"], ids
    return found


def sa1b_source() -> list[tuple[str, list[dict]]]:
    """(stem, annotations as published) of every JSON in the tars, in their order."""
    found = []
    for name in TARS:
        with tarfile.open(shared_data(name)) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.load(tar.extractfile(member))
                    found.append((Path(member.name).stem, record["annotations"]))
    return found


def photos_of_the_source() -> dict[str, bytes]:
    """Stem -> bytes; of two with one stem the first."""
    found = {}
    for folder, _, _, photos in PANOPTIC:
        for path in sorted((shared_data(folder) / photos).iterdir()):
            if path.suffix in (".jpg", ".png"):
                found.setdefault(path.stem, path.read_bytes())
    for name in TARS:
        with tarfile.open(shared_data(name)) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    found.setdefault(Path(member.name).stem, tar.extractfile(member).read())
    return found


def decoded(row: dict) -> np.ndarray:
    size = [row["image_height"], row["image_width"]]
    return coco.decode({"size": size, "counts": row["rle_counts"].encode()}).astype(bool)


def test_verify_finds_nothing(real):
    report = verify.verify(real)
    assert report.ok, report.text()
    assert report.notes == []


def test_every_declared_segment_of_coconut_is_in_the_ledger_once(real):
    rows = ledger(real, "coconut")
    listed = Counter((row["key"], row["source_id"]) for row in rows)
    declared = {(key, one["id"]) for key, (segments, _) in panoptic_source().items() for one in segments}
    assert len(declared) == 50 + 6 + 32
    assert listed == Counter(declared)
    assert Counter(row["drop_reason"] for row in rows)["crowd"] == 3


def test_every_declared_mask_of_sa1b_is_in_the_ledger_once(real):
    rows = ledger(real, "sa1b")
    counts = Counter(row["key"] for row in rows if row["region"] is not None)
    published = sa1b_source()
    assert [stem for stem, _ in published].count("sa_226381") == 2
    assert sum(counts.values()) == sum(len(annotations) for _, annotations in published) == 73 + 113 + 113
    assert counts["sa_226381"] == counts["sa_226381-dup2"] == 113


def test_the_image_that_comes_again_and_the_orphan_are_listed_with_their_reasons(real):
    rows = ledger(real, "sa1b")
    again = [row for row in rows if row["key"] == "sa_226381-dup2"]
    assert {(row["drop_stage"], row["drop_reason"]) for row in again} == {("source", "duplicate_key")}
    (orphan,) = [row for row in rows if row["key"] == "sa_8776"]
    assert (orphan["region"], orphan["drop_reason"]) == (None, "annotation_missing")
    assert "messy.tar" in orphan["drop_detail"]


def test_every_coconut_mask_is_the_label_maps_to_the_last_pixel(real):
    source = panoptic_source()
    compared = 0
    for row in ledger(real, "coconut"):
        _, ids = source[row["key"]]
        assert row["rle_counts"] is not None, row
        mask = ids == row["source_id"]
        assert (decoded(row) == mask).all(), (row["key"], row["region"])
        assert row["area"] == mask.sum()
        compared += 1
    assert compared == 88


def test_every_sa1b_mask_is_the_published_one_to_the_last_pixel(real):
    published = dict(reversed(sa1b_source()))  # the first of two images with one name
    compared = 0
    for row in ledger(real, "sa1b"):
        if row["rle_counts"] is None:
            assert row["drop_reason"] in ("duplicate_key", "annotation_missing")
            continue
        annotation = published[row["key"]][row["region"]]
        assert annotation["segmentation"]["size"] == [row["image_height"], row["image_width"]]
        assert (decoded(row) == coco.decode(annotation["segmentation"])).all(), (row["key"], row["region"])
        assert row["source_id"] == annotation["id"]
        assert row["predicted_iou"] == annotation["predicted_iou"]
        assert row["stability_score"] == annotation["stability_score"]
        assert row["crop_box"] == annotation["crop_box"]
        assert row["point_coords"] == annotation["point_coords"]
        compared += 1
    assert compared == 73 + 113


def test_both_subsets_keep_regions_with_captions(real):
    stats = json.loads((real / "stats.json").read_text())
    for subset in ("coconut", "sa1b"):
        kept = [row for row in ledger(real, subset) if row["kept"]]
        assert kept and all(row["caption"] for row in kept)
        assert stats["subsets"][subset]["counts"]["kept"] == len(kept)


def test_no_model_failed_on_a_published_photo(real):
    reasons = {row["drop_reason"] for subset in ("coconut", "sa1b") for row in ledger(real, subset)}
    assert not reasons & {"model_error", "worker_crashed", "photo_unreadable", "annotation_unreadable"}


def test_plain_webdataset_reads_the_shards_and_the_photos_are_the_publishers_bytes(real):
    import webdataset

    sources = photos_of_the_source()
    seen = {}
    for subset in ("coconut", "sa1b"):
        urls = [str(path) for path in sorted((real / subset / "shards").glob("*.tar"))]
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            seen[sample["__key__"]] = len(json.loads(sample["json"])["regions"])
            assert sample["jpg"] == sources[sample["__key__"]], sample["__key__"]
    kept = Counter(
        row["key"] for row in itertools.chain(ledger(real, "coconut"), ledger(real, "sa1b")) if row["kept"]
    )
    assert seen == kept
