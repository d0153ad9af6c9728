"""The audit: every problem is counted, shown with its fix, and written as a row."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paracaption.pipeline.corpus import work_list
from paracaption.pipeline.executor import audit
from paracaption.pipeline.executor.audit import audit_sample, audit_subset
from paracaption.pipeline.sources.registry import SOURCES, find_source, open_source
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from tests import synthetic
from tests.shared_data import shared_data


@pytest.fixture
def config(tmp_path):
    """Six images of four segments, three of them damaged."""
    source = synthetic.write_coconut(tmp_path / "source", 6)
    photos, labels = tmp_path / "source" / "photos", tmp_path / "source" / "labels"
    (photos / f"{1:012d}.jpg").unlink()
    (photos / f"{2:012d}.jpg").write_bytes((photos / f"{2:012d}.jpg").read_bytes()[:-50])
    pixels = np.asarray(Image.open(labels / f"{3:012d}.png")).copy()
    pixels[pixels[..., 0] == 2] = [77, 0, 0]
    Image.fromarray(pixels).save(labels / f"{3:012d}.png")
    (labels / "stray.png").write_bytes(b"")
    return BuildConfig.model_validate(
        {"out": str(tmp_path / "out"), "coconut": [source], "images_per_shard": 2}
    )


def test_every_problem_is_counted_and_shown_with_its_fix(config):
    report = audit_subset(open_source(config, "coconut"), config.limits)
    found = report.result
    assert (found.images, found.images_usable, found.regions, found.regions_usable) == (6, 4, 24, 15)
    counted = {(problem.reason, problem.drops, problem.regions) for problem in found.problems}
    assert {
        (Reason.PHOTO_MISSING, True, 4),
        (Reason.PHOTO_UNREADABLE, True, 4),
        (Reason.SEGMENT_ABSENT, True, 1),
        ("undeclared_ids", False, 0),
        ("label_map_without_record", False, 0),
    } <= counted
    text = report.text()
    assert "4 of 6 images and 15 of 24 regions are usable" in text
    assert "photo_missing: 1 x, 4 regions (put the photos there" in text and "000000000001" in text


def test_the_report_is_a_parquet_file_with_a_row_per_problem(config, tmp_path):
    report = audit_subset(open_source(config, "coconut"), config.limits)
    report.write(tmp_path / "deep" / "audit.parquet")
    rows = pq.read_table(tmp_path / "deep" / "audit.parquet").to_pylist()
    assert len(rows) == len(report.result.problems)
    absent = next(row for row in rows if row["reason"] == "segment_absent")
    assert (absent["key"], absent["region"], absent["subset"]) == (f"{3:012d}", 1, "coconut")


def test_a_photo_that_breaks_inside_is_not_usable(tmp_path):
    source = synthetic.write_coconut(tmp_path / "source", 2)
    path = tmp_path / "source" / "photos" / f"{1:012d}.png"
    Image.open(path.with_suffix(".jpg")).save(path)
    path.with_suffix(".jpg").unlink()
    data = path.read_bytes()  # header and end stay whole
    path.write_bytes(data[: len(data) // 2] + bytes(40) + data[len(data) // 2 + 40 :])
    config = BuildConfig.model_validate({"out": str(tmp_path / "out"), "coconut": [source]})
    for report in (
        audit_subset(open_source(config, "coconut"), config.limits),
        audit_sample(open_source(config, "coconut"), config),
    ):
        (problem,) = (each for each in report.result.problems if each.drops)
        assert (problem.reason, problem.regions) == (Reason.PHOTO_UNREADABLE, 4)
        assert str(path) in problem.detail and report.result.images_usable == 1


def test_processes_find_what_one_loop_finds(config):
    alone = audit_subset(open_source(config, "coconut"), config.limits, jobs=1)
    steps = []
    together = audit_subset(open_source(config, "coconut"), config.limits, jobs=2, progress=steps.append)
    assert together == alone and steps[-1] == 6


def test_an_audit_without_problems_is_one_line(tmp_path):
    source = synthetic.write_coconut(tmp_path / "source", 2)
    config = BuildConfig.model_validate({"out": str(tmp_path / "out"), "coconut": [source]})
    report = audit_subset(open_source(config, "coconut"), config.limits)
    assert [problem for problem in report.result.problems if problem.drops] == []
    assert report.text().splitlines()[0] == "coconut: 2 of 2 images and 8 of 8 regions are usable"


def test_a_sample_reads_no_more_than_it_was_asked_for(config, tmp_path):
    small = config.model_copy(update={"audit_images": 2})
    first = audit_sample(open_source(small, "coconut"), small)
    assert first.result.images == 2 and "sample" in first.text()
    work_list.make_work_list(open_source(small, "coconut"), small, tmp_path / "out" / "coconut")
    spread = audit_sample(open_source(small, "coconut"), small)
    keys = [problem.key for problem in spread.result.problems if problem.drops]
    assert spread.result.images == 2 and keys == [f"{2:012d}"]


def test_a_source_of_which_nothing_is_usable_is_refused_before_the_build(config, tmp_path):
    (tmp_path / "empty").mkdir()
    values = config.model_dump()
    values["subsets"]["coconut"]["sources"][0]["photos"] = [str(tmp_path / "empty")]
    config = BuildConfig.model_validate(values)
    with pytest.raises(ConfigError, match=r"no region of 6 images is usable") as caught:
        audit_sample(open_source(config, "coconut"), config)
    assert "photo_missing: 6 x, 24 regions" in str(caught.value)


def test_every_reason_of_a_source_has_a_fix():
    fixes = audit.FIXES | {reason: fix for kind in SOURCES for reason, fix in find_source(kind).fixes.items()}
    assert all(reason in fixes for reason in list(Reason)[: list(Reason).index(Reason.MASK_NONE)])


def test_the_published_traps_are_all_reported():
    root = shared_data("format_edge")
    edge = root / "tfds_panoptic_size_mismatch"
    config = BuildConfig.model_validate(
        {
            "out": "out",
            "coconut": [
                {
                    "annotations": [str(edge / "*.json")],
                    "labels": str(edge / "panoptic"),
                    "photos": [str(edge / "images")],
                }
            ],
            "sa1b": [
                {"paths": [str(root / "datumaro_sa1b"), str(shared_data("sa1b_real/shards/messy.tar"))]}
            ],
        }
    )
    reports = {name: audit_subset(open_source(config, name), config.limits) for name in ("coconut", "sa1b")}
    declared = [
        len(each["segments_info"])
        for path in edge.glob("*.json")
        for each in json.loads(path.read_text())["annotations"]
    ]
    assert (
        reports["coconut"].result.regions == sum(declared) and reports["coconut"].result.regions_usable == 0
    )
    assert {p.reason for p in reports["sa1b"].result.problems} == {"size_mismatch", "annotation_missing"}


def test_photos_that_two_sources_share_are_reported_within_a_subset_and_between_subsets(tmp_path):
    first = synthetic.write_coconut(tmp_path / "first", 3)
    second = synthetic.write_coconut(tmp_path / "second", 4)  # its first three photos are those of `first`
    panoptic = tmp_path / "second" / "panoptic.json"
    for number in range(4):
        for folder, ending in (("photos", "jpg"), ("labels", "png")):
            path = tmp_path / "second" / folder / f"{number:012d}.{ending}"
            path.rename(path.with_name(f"other_{path.name}"))
    panoptic.write_text(panoptic.read_text().replace('"file_name": "', '"file_name": "other_'))
    third = synthetic.write_coconut(tmp_path / "third", 2)
    subsets = {
        "both": {"sources": [{"source": "coconut"} | first, {"source": "coconut"} | second]},
        "alone": {"sources": {"source": "coconut"} | third},
    }
    config = BuildConfig.model_validate({"out": str(tmp_path / "out"), "subsets": subsets})
    shared = audit.SharedPhotos()
    reports = [audit_subset(open_source(config, name), config.limits, shared=shared) for name in subsets]
    found = [[each for each in r.result.problems if each.reason == "photo_shared"] for r in reports]
    assert [each.key for each in found[0]] == [f"other_{number:012d}" for number in range(3)]
    assert found[0][1].detail == f"both, source 1: the photo is that of {1:012d} in both, source 0"
    assert [each.key for each in found[1]] == [f"{number:012d}" for number in range(2)]
    assert "in both, source 0" in found[1][0].detail
    assert all(each.regions == 0 and not each.drops for each in found[0] + found[1])
    assert "photo_shared: 3 x (the regions of both are read" in reports[0].text()
    assert [report.result.images_usable for report in reports] == [7, 2]
