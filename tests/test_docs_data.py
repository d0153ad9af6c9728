"""docs/data.md: its configurations read files of the layouts that it describes, and its script works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.executor.audit import audit_subset
from paracaption.pipeline.sources.registry import SOURCES, open_source
from tests.synthetic import write_coconut, write_sa1b

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="no clone, but an installed wheel")


def page() -> str:
    return (ROOT / "docs" / "data.md").read_text()


def configurations() -> dict[str, str]:
    """The YAML blocks of the page by the file that their first line names."""
    blocks = re.findall(r"```yaml\n# (\S+)\n(.*?)```", page(), re.DOTALL)
    return {name: text for name, text in blocks}


class Release:
    """A small release in COCO's panoptic layout, whose parts are put where the page has them."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        write_coconut(folder, num_images=len(names))
        self.document = json.loads((folder / "panoptic.json").read_text())
        self.names = names
        for image, annotation, name in zip(
            self.document["images"], self.document["annotations"], names, strict=True
        ):
            image["file_name"], annotation["file_name"] = f"{name}.jpg", f"{name}.png"

    def put_photos(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(self.names):
            shutil.copy(self.folder / f"photos/{number:012d}.jpg", folder / f"{name}.jpg")

    def put_labels(self, folder: Path, gray: bool = False) -> None:
        folder.mkdir(parents=True)
        for number, name in enumerate(self.names):
            with Image.open(self.folder / f"labels/{number:012d}.png") as image:
                (image.getchannel("R") if gray else image).save(folder / f"{name}.png")

    def put_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.document))

    def put_parquet(self, path: Path) -> None:
        """As the hub has it: the PNG, the annotation and the image's record in a row."""
        path.parent.mkdir(parents=True)
        rows = [
            {
                "mask": {
                    "bytes": (self.folder / f"labels/{number:012d}.png").read_bytes(),
                    "path": f"{name}.png",
                },
                "segments_info": annotation,
                "image_info": image,
            }
            for number, (name, annotation, image) in enumerate(
                zip(self.names, self.document["annotations"], self.document["images"], strict=True)
            )
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folders that the page says result, with two images each."""
    root, scratch = tmp_path_factory.mktemp("page") / "data", tmp_path_factory.mktemp("releases")
    for number, (name, photos) in enumerate(
        {"relabeled_coco_val": "val2017", "coconut_b": "unlabeled2017"}.items()
    ):
        release = Release(scratch / name, [f"{10 * number + each:012d}" for each in (1, 2)])
        release.put_parquet(root / name / "data" / "train-00000-of-00001.parquet")
        release.put_photos(root / "coco" / photos)
    small = Release(scratch / "coconut_s", [f"{each:012d}" for each in (31, 32)])
    small.put_photos(root / "coco" / "train2017")
    small.put_labels(root / "coconut" / "coconut_s")
    small.put_json(root / "coconut" / "coconut_s.json")
    large = Release(scratch / "large", ["objects365_v2_00000041", "objects365_v2_00000042"])
    large.put_photos(root / "objects365" / "train" / "patch32")
    large.put_labels(root / "coconut_large" / "panoptic_object365")
    image, annotation = large.document["images"][1], large.document["annotations"][1]
    image["file_name"] = annotation["file_name"] = "000000000007.jpg"
    annotation["object365_file_name"] = "objects365_v2_00000042.jpg"
    large.put_json(root / "coconut_large" / "panseg_object365_train_v2.json")
    extra = Release(scratch / "xl", ["objects365_v2_00000051", "objects365_v2_00000052"])
    extra.put_photos(root / "objects365" / "train" / "patch17")
    extra.put_labels(root / "coconuts_xlarge" / "panseg", gray=True)
    (root / "coconuts_xlarge" / "panseg_info").mkdir()
    for name, each in zip(extra.names, extra.document["annotations"], strict=True):
        place = root / "coconuts_xlarge" / "panseg_info" / f"{name}.json"
        place.write_text(json.dumps(each["segments_info"]))
    write_sa1b(root / "sa1b", 2)
    return root


@pytest.fixture(scope="module")
def named_alike(data) -> Path:
    """The same after the page's script, which is started in the folder above."""
    [script] = re.findall(r"<!-- runs in the test -->\n```python\n(.*?)```", page(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data.parent)
        exec(compile(script, "docs/data.md", "exec"), {})
    return data


@pytest.mark.parametrize("name", list(configurations()))
def test_each_configuration_of_the_page_reads_every_image_of_its_layout(named_alike, name):
    path = named_alike.parent / name
    path.write_text(configurations()[name])
    config = load_config(path)
    assert config.subsets
    for subset, found in config.subsets.items():
        result = audit_subset(open_source(config, subset), config.limits).result
        assert result.images == 2 * len(found.sources), result.problems
        assert (result.images_usable, result.regions_usable) == (result.images, 4 * result.images), (
            result.problems
        )


def test_the_names_of_coconut_l_are_no_use_as_they_are_published(data):
    """If this fails, the page's script is no longer needed."""
    path = data / "as-published.yaml"
    text = configurations()["data/paper.yaml"].replace("coconut_l.json", "panseg_object365_train_v2.json")
    path.write_text(text)
    config = load_config(path)
    result = audit_subset(open_source(config, "coconut"), config.limits).result
    assert (result.images, result.images_usable) == (4, 3)


def test_every_folder_that_a_configuration_names_is_in_the_list_of_folders(named_alike):
    [tree] = re.findall(r"```\ndata/\n(.*?)```", page(), re.DOTALL)
    listed = [
        place for line in tree.splitlines() for place in re.findall(r"\S*[/.*]\S*", line.split("  your")[0])
    ]
    for text in (configurations()["data/paper.yaml"], configurations()["data/xl.yaml"]):
        for subset in yaml.safe_load(text)["subsets"].values():
            sources = subset["sources"] if isinstance(subset["sources"], list) else [subset["sources"]]
            for source in sources:
                assert source["source"] in SOURCES
                places = [source.get("labels"), *source.get("photos", [])]
                places += [*source.get("annotations", []), *source.get("paths", [])]
                for place in filter(None, places):
                    assert any(each.startswith(place) or each == place for each in listed), place
