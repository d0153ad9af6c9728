"""Benchmarks' photos are left out of new corpora, with all regions in the ledger, and old ones go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from PIL import Image
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.pipeline.corpus import reader, work_list, work_list_summary
from paracaption.pipeline.executor.audit import audit_subset
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages import recipes
from paracaption.schemas.errors import ConfigError
from tests.building import build, config_of
from tests.shared_data import shared_data
from tests.synthetic import write_coconut, write_sa1b

LISTED = "000000571598"


def _rename(source: dict, place: int, name: str, number: int) -> dict:
    """Give an image of a synthetic release another photo name and id; its label map keeps its name."""
    path = Path(source["annotations"][0])
    document = json.loads(path.read_text())
    photos = Path(source["photos"][0])
    image = document["images"][place]
    (photos / image["file_name"]).rename(photos / name)
    image |= {"file_name": name, "id": number}
    document["annotations"][place] |= {"image_id": number, "file_name": f"{Path(name).stem}.png"}
    labels = Path(source["labels"])
    (labels / f"{place:012d}.png").rename(labels / f"{Path(name).stem}.png")
    path.write_text(json.dumps(document))
    return source


@pytest.fixture
def source(tmp_path) -> dict:
    """Five images of 4 regions, the third of which is called as one of ParaDLC-Bench."""
    return _rename(write_coconut(tmp_path / "source", 5), 2, f"{LISTED}.jpg", 1592437)


def _dropped(out: Path, subset: str = "coconut") -> list[tuple[str, int]]:
    rows = [row for table in reader.open_corpus(out).ledgers(subset) for row in table.to_pylist()]
    return [(row["key"], row["region"]) for row in rows if row["drop_reason"] == "benchmark_photo"]


@pytest.mark.soak
def test_a_benchmarks_photo_is_dropped_with_all_its_regions_and_everybody_says_so(source, tmp_path):
    config = config_of(tmp_path / "out", coconut=source)
    report = audit_subset(open_source(config, "coconut"), config.limits)
    (tmp_path / "build.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    said = CliRunner().invoke(app, ["build", str(tmp_path / "build.yaml"), "--local"])
    assert "1 images are photos of benchmarks" in said.output
    assert _dropped(tmp_path / "out") == [(LISTED, region) for region in range(4)]
    counts = reader.read_summary(tmp_path / "out").subsets["coconut"].counts
    assert (counts.images, counts.regions, counts.benchmark_photos) == (5, 20, 1)
    assert counts.kept + sum(step.dropped for step in counts.funnel) == 20
    assert "benchmark_photo: 1 x, 4 regions" in report.text()
    assert (report.result.images_usable, report.result.regions_usable) == (4, 16)
    assert "(`benchmark_photo`): 1 image." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.soak
def test_it_is_dropped_for_this_reason_whether_its_photo_is_there_or_not(source, tmp_path):
    config = config_of(tmp_path / "out", coconut=source)
    folder = tmp_path / "out" / "coconut"
    first = work_list.make_work_list(open_source(config, "coconut"), config, folder)
    (Path(source["photos"][0]) / f"{LISTED}.jpg").unlink()
    assert work_list.make_work_list(open_source(config, "coconut"), config, folder).digest == first.digest
    build(config)
    assert len(_dropped(tmp_path / "out")) == 4


@pytest.mark.soak
def test_a_photo_of_another_name_is_dropped_by_its_id_where_the_size_agrees(tmp_path):
    large = write_coconut(tmp_path / "large", 3, size=(480, 640))
    config = config_of(tmp_path / "out", coconut=_rename(large, 1, "renamed.jpg", 571598))
    build(config)
    assert {key for key, _ in _dropped(tmp_path / "out")} == {"renamed"}
    small = write_coconut(tmp_path / "small", 3)
    build(config_of(tmp_path / "other", coconut=_rename(small, 1, "renamed.jpg", 571598)))
    assert _dropped(tmp_path / "other") == []


@pytest.mark.soak
def test_pairs_in_a_folder_are_dropped_by_name_with_the_regions_of_their_json(tmp_path):
    import tarfile

    (url,) = write_sa1b(tmp_path / "tar", 2)["paths"]
    with tarfile.open(url) as tar:
        tar.extractall(tmp_path / "pairs", filter="data")
    for ending in ("jpg", "json"):
        name = f"objects365_v2_00912042.{ending}"
        (tmp_path / "pairs" / f"sa_0.{ending}").rename(tmp_path / "pairs" / name)
    build(config_of(tmp_path / "out", sa1b={"paths": [str(tmp_path / "pairs")]}))
    assert _dropped(tmp_path / "out", "sa1b") == [("objects365_v2_00912042", n) for n in range(4)]


@pytest.mark.soak
def test_a_corpus_that_was_planned_with_all_photos_goes_on_so(source, tmp_path):
    early = config_of(tmp_path / "out", coconut=source, benchmarks={"leave_out": False})
    build(early)
    config = config_of(tmp_path / "out", coconut=source)
    summary = tmp_path / "out" / "coconut" / "plan" / "plan.json"
    before = summary.read_bytes()
    assert b"benchmarks" not in before
    (Path(source["photos"][0]) / "new.jpg").write_bytes(b"")  # so that the source is listed again
    build(config)
    assert _dropped(tmp_path / "out") == []
    assert len({unit.plan for unit in _manifests(tmp_path / "out")}) == 1
    summary.write_bytes(before[:40])  # lost: the committed units tell how it was planned
    build(config)
    found = work_list_summary.load_work_list(tmp_path / "out" / "coconut")
    assert (found.benchmarks, found.digest) == (0, _manifests(tmp_path / "out")[0].plan)
    with pytest.raises(
        ConfigError, match=r"leave_out: true, but the work list of coconut was made with all photos"
    ):
        build(config_of(tmp_path / "out", coconut=source, benchmarks={"leave_out": True}))


def _manifests(out: Path) -> list:
    return [manifest for _, manifest in reader.open_corpus(out).manifests("coconut")]


def test_a_list_without_benchmark_photos_has_the_digest_and_the_check_that_it_always_had(tmp_path):
    plain = write_coconut(tmp_path / "source", 3)
    made = []
    for name, wanted in (("one", {"leave_out": False}), ("two", {})):
        config = config_of(tmp_path / name, coconut=plain, benchmarks=wanted)
        folder = tmp_path / name / "coconut"
        made.append(work_list.make_work_list(open_source(config, "coconut"), config, folder))
    assert made[0].digest == made[1].digest and made[0].table == made[1].table
    fields = msgspec.structs.asdict(msgspec.structs.replace(made[0], check="", folder=""))
    for later in ("benchmarks", "steps", "gone", "gone_examples"):
        del fields[later]
    import hashlib

    text = msgspec.json.encode(fields, order="sorted")
    assert made[0].check == hashlib.sha256(text).hexdigest()[:16]


def test_copies_of_photos_that_the_user_points_to_are_dropped_by_bytes_and_by_look(tmp_path):
    plain = write_coconut(tmp_path / "source", 5, size=(240, 320))
    bench = tmp_path / "bench"
    bench.mkdir()
    photos = Path(plain["photos"][0])
    shutil.copy(photos / f"{1:012d}.jpg", bench / "same.jpg")
    with Image.open(photos / f"{3:012d}.jpg") as opened:
        opened.resize((160, 120)).save(bench / "small.png")
    config = config_of(tmp_path / "out", coconut=plain, benchmarks={"photos": [str(bench)]})
    build(config)
    assert [key for key, _ in _dropped(tmp_path / "out")] == [f"{1:012d}"] * 4 + [f"{3:012d}"] * 4
    assert audit_subset(open_source(config, "coconut"), config.limits).result.images_usable == 3
    usual = config_of(tmp_path / "out", coconut=plain)
    digests = [recipes.recipe_digest(recipes.recipe_of(each, "coconut"), each) for each in (config, usual)]
    assert digests[0] != digests[1]
    with pytest.raises(ConfigError, match=r"benchmarks.photos: no folder"):
        build(config_of(tmp_path / "new", coconut=plain, benchmarks={"photos": [str(tmp_path / "gone")]}))


def test_the_command_makes_the_list_that_the_package_has(tmp_path):
    folders = [f"{title}={shared_data(f'benchmarks/{name}')}" for title, name in _BENCHMARKS.items()]
    to = tmp_path / "list.json"
    done = CliRunner().invoke(app, ["benchmark", "photos", *folders, "--to", str(to)])
    assert done.exit_code == 0, done.output
    package = Path(work_list.__file__).parents[1] / "io" / "benchmark_photos.json"
    assert to.read_bytes() == package.read_bytes()
    wrong = CliRunner().invoke(app, ["benchmark", "photos", "folder", "--to", str(to)])
    assert "give TITLE=FOLDER" in str(wrong.exception)


_BENCHMARKS = {"ParaDLC-Bench": "paradlc", "DLC-Bench": "dlc"}
