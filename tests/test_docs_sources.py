"""The smallest files that `docs/sources.md` shows are read as it says."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.executor.audit import audit_subset
from paracaption.pipeline.sources.registry import open_source

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sources.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no clone, but an installed wheel")


def test_the_least_that_each_kind_of_source_needs_is_read(tmp_path):
    panoptic, pair, instances, line, sample = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for folder in ("photos", "labels", "pairs", "masks"):
        (tmp_path / folder).mkdir()
    pixels = np.full((240, 320, 3), 90, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "cup.jpg")
    Image.fromarray(pixels).save(tmp_path / "pairs" / "cup.jpg")
    colors = np.zeros((240, 320, 3), np.uint8)
    colors[40:200, 100:120] = (1001 % 256, 1001 // 256, 0)
    Image.fromarray(colors).save(tmp_path / "labels" / "cup.png")
    (tmp_path / "panoptic.json").write_text(panoptic)
    (tmp_path / "pairs" / "cup.json").write_text(pair)
    (tmp_path / "instances.json").write_text(instances)
    (tmp_path / "names.jsonl").write_text(line)
    Image.fromarray(colors.any(-1)).save(tmp_path / "masks" / "cup_0.png")
    source = {"annotations": ["panoptic.json"], "labels": "labels", "photos": ["photos"]}
    shelf = {"sources": {"source": "coco", "annotations": ["instances.json"], "photos": ["photos"]}}
    with tarfile.open(tmp_path / "cup.tar", "w") as tar:
        (tmp_path / "cup.json").write_text(sample)
        tar.add(tmp_path / "photos" / "cup.jpg", "cup.jpg")
        tar.add(tmp_path / "cup.json", "cup.json")
    again = {"sources": {"source": "webdataset", "paths": ["cup.tar"]}}
    mine = {"sources": {"source": "masks", "photos": ["photos"], "masks": "masks/", "names": "names.jsonl"}}
    (tmp_path / "c.yaml").write_text(
        json.dumps(
            {
                "out": "out",
                "coconut": [source],
                "sa1b": [{"paths": ["pairs"]}],
                "subsets": {"shelf": shelf, "mine": mine, "again": again},
            }
        )
    )
    config = load_config(tmp_path / "c.yaml")
    for subset in ("coconut", "sa1b", "shelf", "mine", "again"):
        found = audit_subset(open_source(config, subset), config.limits)
        assert (found.result.images_usable, found.result.regions_usable) == (1, 1), found.text()
        assert not found.result.problems, found.text()
