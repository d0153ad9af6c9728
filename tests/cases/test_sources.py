"""The recorded cases of `../shared/cases/sources`, each with the outcome that it should have.

Links, permissions, HTTP and S3 are cases of another kind.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.executor import audit
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.errors import ConfigError
from tests.shared_data import shared_data

ELSEWHERE = ("symlink-", "path-brackets", "perm-", "http-", "s3-", "build-")
"""Cases of links, modes, servers or the configuration's folder: the rooms' tests have inputs of their own."""

DESCRIBED = (
    "config-kinds",
    "consumers",
    "photo-jpeg-trailer",
    "photo-kinds",
    "verify-trunc",
    "real-coconut-file",
)
"""Words, or a configuration without its files: see `test_described`."""

# usable images, images, usable regions, regions; then the reasons of what is dropped
READ: dict[str, tuple[int, int, int, int, str]] = {
    "coco-id-kinds/area_nan": (2, 2, 6, 6, ""),
    "coco-id-kinds/area_str": (0, 2, 0, 6, "labels_disagree"),  # "12" is 12, and no mask has 12 pixels
    "coco-id-kinds/cats_float_ids": (2, 2, 6, 6, ""),
    "coco-id-kinds/crowd_str": (2, 2, 6, 6, ""),
    "coco-id-kinds/dup_image_ids": (2, 2, 6, 6, ""),
    "coco-id-kinds/dup_image_ids2": (1, 2, 3, 3, "annotation_missing"),
    "coco-id-kinds/float_cat": (2, 2, 6, 6, ""),
    "coco-id-kinds/float_size": (2, 2, 6, 6, ""),
    "coco-id-kinds/huge_ids": (2, 2, 6, 6, ""),
    "coco-id-kinds/huge_size": (0, 2, 0, 6, "size_mismatch"),
    "coco-id-kinds/images_dict": (2, 2, 6, 6, ""),
    "coco-id-kinds/isthing_str": (2, 2, 6, 6, ""),
    "coco-id-kinds/neg_size": (0, 2, 0, 6, "size_mismatch"),
    "coco-id-kinds/no_images": (2, 2, 6, 6, ""),
    "coco-id-kinds/null_ids": (2, 2, 6, 6, ""),
    "coco-id-kinds/segs_dict": (2, 2, 6, 6, ""),
    "coco-id-kinds/segs_empty": (1, 2, 3, 3, ""),
    "coco-id-kinds/segs_null": (1, 2, 3, 3, "annotation_unreadable"),
    "coco-id-kinds/str_cat": (2, 2, 6, 6, ""),
    "coco-id-kinds/str_size": (2, 2, 6, 6, ""),
    "coco-id-kinds/zero_size": (2, 2, 6, 6, ""),
    "declared-size-beyond-int32": (1, 2, 3, 6, "photo_missing"),
    "dup-image-ids-wrong-photo": (2, 2, 6, 6, ""),
    "json-ending-case": (5, 5, 15, 15, ""),
    "json-forms/cat_bom": (1, 1, 3, 3, ""),
    "json-forms/cat_crlf": (1, 1, 3, 3, ""),
    "json-forms/cat_infinity": (1, 1, 3, 3, ""),
    "json-forms/cat_utf16": (1, 1, 3, 3, ""),
    "json-forms/pan_bom": (1, 1, 3, 3, ""),
    "json-forms/pan_crlf": (1, 1, 3, 3, ""),
    "json-forms/pan_infinity": (1, 1, 3, 3, ""),
    "json-forms/pan_jsonl": (1, 1, 3, 3, ""),
    "json-forms/panseg": (3, 16, 9, 10, "annotation_unreadable"),
    "json-forms/sa": (3, 16, 9, 9, "annotation_unreadable"),
    "key-underscores": (6, 6, 18, 18, ""),
    "label-forms": (13, 27, 39, 81, "labels_disagree labels_unreadable segment_absent"),
    "label-map-taken-for-photo": (1, 2, 3, 6, "photo_missing"),
    "label-palette-optimised": (2, 2, 58, 58, ""),
    "names-backslash": (0, 1, 0, 3, "photo_missing"),  # of another folder, as with a slash; the drop says so
    "names-nfc-nfd": (1, 1, 3, 3, ""),
    "names-subfolders-same-base": (2, 2, 6, 6, ""),
    "parquet-mask_binary": (2, 2, 6, 6, ""),
    "parquet-seg_bbox": (2, 2, 6, 6, ""),
    "sa1b-annotation-kinds": (1, 1, 42, 60, "annotation_unreadable mask_undecodable size_mismatch"),
    "sa1b-split-paths": (2, 2, 6, 6, ""),
    "stem-dots": (2, 2, 6, 6, ""),
    "subfolder-other-video": (0, 1, 0, 3, "photo_missing"),
    "tar-concat": (3, 3, 9, 9, ""),
}

REFUSED = {
    "categories-bool_id": r"category 0 is not",
    "categories-odd": r"id 1 is used for 'person' and 'bicycle'",
    "json-forms/cat_empty": r"empty",
    "json-forms/cat_gzip": r"gzip; unpack",
    "json-forms/cat_html": r"a web page",
    "json-forms/cat_lfs": r"git lfs pull",
    "json-forms/pan_blank": r"empty",
    "json-forms/pan_empty": r"empty",
    "json-forms/pan_gzip": r"gzip; unpack",
    "json-forms/pan_html": r"a web page",
    "json-forms/pan_lfs": r"git lfs pull",
    "json-forms/pan_toplist": r"a list, not an object; give the panoptic JSON",
    "json-forms/pan_utf16": r"UTF-16",
    "tar-gz": r"gzipped; unpack it",
    **{f"json-forms/cat_{name}": "categor" for name in ("blank", "jsonl", "nul_pad", "null", "singlequotes")},
    **{f"json-forms/cat_{name}": "categor" for name in ("string", "toplist", "trailing_comma")},
    **{f"json-forms/pan_{name}": "not JSON" for name in ("nul_pad", "null", "singlequotes", "string")},
    "json-forms/pan_trailing_comma": "not JSON",
}
"""What ends with one line, and what that says."""

NOT_YET: dict[str, str] = {}
"""Cases that are not mended yet, with the reason."""


def cases() -> list[str]:
    home = Path(__file__).resolve().parents[2].parent / "shared" / "cases" / "sources"
    return sorted(str(path.parent.relative_to(home)) for path in home.rglob("c.yaml"))


def look(name: str, monkeypatch: pytest.MonkeyPatch) -> audit.AuditReport:
    """The audit of a case. Paths in it begin at the folder of its kind."""
    home = shared_data("../cases/sources").resolve()
    monkeypatch.chdir(home / name.partition("/")[0])
    config = load_config(yaml.safe_load((home / name / "c.yaml").read_text()))
    (subset,) = config.subsets
    return audit.audit_subset(open_source(config, subset), config.limits, jobs=1)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(reason=NOT_YET[name], strict=True))
        if name in NOT_YET
        else name
        for name in READ
    ],
)
def test_a_recorded_source_is_read_as_far_as_it_is_right(name, monkeypatch):
    report = look(name, monkeypatch)
    found = report.result
    reasons = sorted({str(problem.reason) for problem in found.problems if problem.drops})
    counted = (found.images_usable, found.images, found.regions_usable, found.regions, " ".join(reasons))
    assert counted == READ[name], report.text()
    assert not re.search(r"0x[0-9a-f]{6,}|Traceback|[A-Z]\w+Error: |Expected `", report.text())


@pytest.mark.parametrize("name", REFUSED)
def test_a_recorded_source_that_is_none_is_one_line(name, monkeypatch):
    with pytest.raises(ConfigError, match=REFUSED[name]) as caught:
        look(name, monkeypatch)
    assert "\n" not in str(caught.value)


def test_every_recorded_source_is_tried():
    shared_data("../cases/sources")
    tried = {*READ, *REFUSED}
    assert {name for name in cases() if not name.startswith((*ELSEWHERE, *DESCRIBED))} <= tried
