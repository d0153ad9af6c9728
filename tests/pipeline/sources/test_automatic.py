"""Photos without masks: a mask generator makes their regions once, as evidence like any other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import verify
from paracaption.pipeline.executor import audit, driver
from paracaption.pipeline.executor.changed_files import note_changed_files
from paracaption.pipeline.executor.estimate.rates import measure_rates
from paracaption.pipeline.executor.estimate.report import find_caveats
from paracaption.pipeline.executor.estimate.sizes import choose_sizes
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.ray_data import RayEngine
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages.recipes import recipe_of
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError, StageFailed
from tests.building import build, calls, committed, config_of

ROOT = Path(__file__).resolve().parents[3]
COUNTS = (3, 0, 1, 2, 5, 1)
"""Masks of the photos, by their names."""


def write_photo(folder: Path, name: int, count: int) -> None:
    """A photo of 64 x 16 pixels; `InstantGenerator` reads its first pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((16, 64, 3), 90, np.uint8)
    pixels[0, 0] = (name, count, 0)
    Image.fromarray(pixels).save(folder / f"photo-{name}.png")


def configured(root: Path, write: bool = True, generator: dict | None = None, **changes) -> BuildConfig:
    """A build of photos under `root`, three in a unit; `generator` are options of the mask generator."""
    if write:
        for name, count in enumerate(COUNTS):
            write_photo(root / "photos", name, count)
    values = config_of(root / "out", coconut={"x": 1}).model_dump()
    source = {"source": "automatic", "photos": [str(root / "photos")], "license": "CC0"}
    given = {"log": str(root / "generator.log"), **(generator or {})}
    del values["subsets"]
    values |= {
        "subsets": {"mine": {"sources": [source]}},
        "images_per_shard": 3,
        "min_iou": 0.0,
        "mask_generator": {"name": "tests.backends:InstantGenerator", "num_cpus": 0.1, "options": given},
    }
    values["mask_generator"]["batch_images"] = changes.pop("batch_images", 2)
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return load_config(values)


def rows(out: Path) -> list[dict]:
    paths = sorted((out / "mine" / "ledger").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def generated(root: Path) -> list[str]:
    return sorted(calls(root / "generator.log"))


ALL = [f"generate {name}" for name in range(len(COUNTS))]


def evidence(out: Path) -> list[dict]:
    paths = sorted((out / "mine" / "evidence").glob("automatic_masks-*/*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("built")
    build(configured(root))
    return root


def test_each_photo_gets_its_masks_in_a_stable_order_and_is_asked_about_once(built):
    found = rows(built / "out")
    assert generated(built) == ALL
    by_photo = Counter(row["key"] for row in found if row["region"] is not None)
    assert by_photo == {f"photo-{name}": count for name, count in enumerate(COUNTS) if count}
    first = [row for row in found if row["key"] == "photo-4"]
    assert [(row["region"], row["bbox_x"], row["predicted_iou"]) for row in first] == [
        (number, 8 * number, (number + 1) / 10) for number in range(5)
    ]
    assert {(row["bbox_w"], row["area"], row["source_id"], row["category"]) for row in first} == {
        (8, 64, None, None)
    }
    assert verify.verify(built / "out").ok


def test_a_photo_with_nothing_to_mask_is_a_row_of_the_ledger_and_a_row_of_evidence(built):
    [row] = [row for row in rows(built / "out") if row["key"] == "photo-1"]
    assert (row["region"], row["kept"], row["drop_stage"], row["drop_reason"]) == (
        *(None, False),
        *("automatic_masks", "mask_none"),
    )
    assert "photo-1.png" in row["drop_detail"]
    of_image = {each["key"]: each for each in evidence(built / "out") if each["region"] == -1}
    assert {key: each["num_masks"] for key, each in of_image.items()} == {
        f"photo-{name}": count for name, count in enumerate(COUNTS)
    }
    assert of_image["photo-1"]["counts"] is None and len(of_image["photo-1"]["photo"]) == 64


def test_nothing_is_asked_again_after_a_restart_another_threshold_or_another_captioner(tmp_path):
    build(configured(tmp_path))
    paid = len(calls(tmp_path / "captioner.log"))
    build(configured(tmp_path, masks={"min_area_px": 17}))
    assert generated(tmp_path) == ALL and len(calls(tmp_path / "captioner.log")) == paid
    build(
        configured(tmp_path, captioner={"options": {"log": str(tmp_path / "captioner.log"), "version": "2"}})
    )
    assert generated(tmp_path) == ALL and len(calls(tmp_path / "captioner.log")) == 2 * paid
    build(configured(tmp_path, generator={"version": "2"}))
    assert generated(tmp_path) == sorted(2 * ALL)


def test_a_failure_of_the_generator_drops_its_photo_alone_and_a_retry_heals_it(tmp_path, built):
    cure = tmp_path / "cured"
    wrong = {"misbehave": {"2": f"raise-unless:{cure}", "3": f"raise-unless:{cure}"}}
    config = configured(tmp_path, generator=wrong)
    build(config)
    dropped = {row["key"]: row for row in rows(tmp_path / "out") if row["region"] is None}
    assert {key: row["drop_reason"] for key, row in dropped.items()} == {
        "photo-1": "mask_none", "photo-2": "model_error", "photo-3": "model_error",
    }  # fmt: skip
    assert "no masks of 2" in dropped["photo-2"]["drop_detail"]
    assert {row["key"] for row in evidence(tmp_path / "out")} == {f"photo-{name}" for name in (0, 1, 4, 5)}
    cure.touch()
    build(config, retry_failed=True)
    assert generated(tmp_path) == ALL
    kept = [(row["key"], row["region"], row["kept"]) for row in rows(tmp_path / "out")]
    assert kept == [(row["key"], row["region"], row["kept"]) for row in rows(built / "out")]


def test_masks_that_are_none_are_an_error_of_their_photo(tmp_path):
    build(configured(tmp_path, generator={"misbehave": {"0": "wrong"}}))
    [row] = [row for row in rows(tmp_path / "out") if row["key"] == "photo-0"]
    assert row["drop_reason"] == "model_error" and "candidate 0" in row["drop_detail"]


def test_a_generator_that_fails_on_everything_stops_the_build(tmp_path):
    names = {str(name): "raise" for name in range(len(COUNTS))}
    config = configured(tmp_path, generator={"misbehave": names}, failures={"stop_after_units": 1})
    with pytest.raises(StageFailed, match=r"automatic_masks.*no masks of"):
        build(config)
    assert rows(tmp_path / "out") == []


def test_more_masks_than_allowed_drop_the_photo_with_all_of_them(tmp_path):
    build(configured(tmp_path, limits={"max_masks": 3}))
    many = [row for row in rows(tmp_path / "out") if row["key"] == "photo-4"]
    assert [row["drop_reason"] for row in many] == ["too_many_masks"] * 5
    assert {row["drop_stage"] for row in many} == {"automatic_masks"}
    build(configured(tmp_path))
    assert generated(tmp_path) == ALL, "the masks were kept"


def test_a_photo_that_changes_is_found_and_asked_about_again_and_its_old_masks_count_no_more(tmp_path):
    config = configured(tmp_path)
    build(config)
    assert note_changed_files(config) == {}
    write_photo(tmp_path / "photos", 4, 2)
    write_photo(tmp_path / "photos", 3, 0)
    changed = note_changed_files(config)["mine"]
    assert sorted(changed.examples["changed"]) == ["photo-3", "photo-4"]
    build(config)
    assert generated(tmp_path) == sorted([*ALL, "generate 3", "generate 4"])
    found = Counter(row["key"] for row in rows(tmp_path / "out") if row["region"] is not None)
    assert (found["photo-3"], found["photo-4"]) == (0, 2)
    assert note_changed_files(config) == {}, "rows of earlier photos say nothing of today's"
    build(configured(tmp_path, write=False, masks={"min_area_px": 17}))
    assert len(generated(tmp_path)) == len(ALL) + 2 and verify.verify(tmp_path / "out").ok


def test_a_photo_that_is_gone_stays_with_its_masks(tmp_path):
    build(configured(tmp_path))
    before = rows(tmp_path / "out")
    (tmp_path / "photos" / "photo-2.png").unlink()
    build(configured(tmp_path, write=False, text={"min_words": 1}))
    assert generated(tmp_path) == ALL
    names = ("key", "region", "rle_counts", "caption", "kept")
    assert [[row[name] for name in names] for row in rows(tmp_path / "out")] == [
        [row[name] for name in names] for row in before
    ]


def _drive(config: BuildConfig) -> subprocess.Popen:
    path = Path(config.out).parent / "config.json"
    path.write_text(config.model_dump_json())
    log = open(path.with_suffix(".log"), "ab")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.building", str(path)], cwd=ROOT, stdout=log, stderr=log
    )


@pytest.mark.soak
def test_a_build_that_is_killed_while_masks_are_made_resumes_and_is_equal_to_the_last_byte(tmp_path, built):
    config = configured(tmp_path, generator={"delay_s": 0.4}, batch_images=1, failures={"save_every_s": 0})
    child = _drive(config)
    for _ in range(600):
        if len(generated(tmp_path)) >= 2 and evidence(tmp_path / "out"):
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    saved = {f"generate {row['key'][6:]}" for row in evidence(tmp_path / "out")}
    paid = Counter(generated(tmp_path))
    assert saved and len(paid) < len(ALL)
    build(config)
    assert not saved & (Counter(generated(tmp_path)) - paid).keys(), "a mask that was kept was made again"
    assert committed(tmp_path / "out") == committed(built / "out")


@pytest.mark.soak
def test_a_photo_that_kills_its_worker_is_dropped(tmp_path):
    config = configured(
        tmp_path, generator={"misbehave": {"5": "die"}}, batch_images=1, failures={"crash_attempts": 1}
    )
    assert _drive(config).wait(200) == -signal.SIGKILL
    build(config)
    [row] = [row for row in rows(tmp_path / "out") if row["key"] == "photo-5"]
    assert (row["drop_stage"], row["drop_reason"]) == ("automatic_masks", "worker_crashed")


def test_the_audit_counts_photos_and_no_regions(tmp_path):
    config = configured(tmp_path)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no photo")
    report = audit.audit_subset(open_source(config, "mine"), config.limits)
    assert (report.result.images, report.result.images_usable, report.result.regions) == (7, 6, 0)
    text = report.text()
    assert "6 of 7 images are usable; their regions are made by the stage `automatic_masks`" in text
    assert "photo_unreadable" in text and "take them out of the folder" in text
    for path in (tmp_path / "photos").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ConfigError, match="none of 7 images is usable"):
        audit.audit_sample(open_source(config, "mine"), config)


def test_what_is_no_photo_by_its_name_is_passed_over_and_noted(tmp_path):
    config = configured(tmp_path)
    for name in ("._photo-1.png", "moving.gif"):
        (tmp_path / "photos" / name).write_bytes(b"x")
    source = open_source(config, "mine")
    assert [entry.key for entry in source.catalog()] == [f"photo-{number}" for number in range(len(COUNTS))]
    (note,) = source.notes
    assert (
        note.kind == "other_files"
        and "2 files are no photo by the name, such as '._photo-1.png'" in note.detail
    )
    assert note.kind in source.fixes()


def test_an_estimate_takes_the_number_of_masks_from_the_pilot_and_says_so(built):
    config = configured(built, write=False)
    rates = measure_rates(built / "out")
    assert (rates.subsets["mine"].images, rates.subsets["mine"].regions) == (6, sum(COUNTS))
    assert rates.subsets["mine"].stages["automatic_masks"].region_s > 0
    sizes = choose_sizes(config, rates, ["mine=600"], count_sources=False)
    assert sizes["mine"].regions == 100 * sum(COUNTS)
    [line] = [each for each in find_caveats(config, rates, sizes, None) if "declares no regions" in each]
    assert "`automatic_masks` made 12 for 6 images" in line


def test_the_masks_come_first_in_a_recipe_that_is_a_name_and_a_list_names_the_stage_itself(tmp_path):
    config = configured(tmp_path)
    assert [stage.name for stage in recipe_of(config, "mine")][:2] == ["automatic_masks", "usable_masks"]
    values = config.model_dump()
    mine = values["subsets"]["mine"]
    mine["recipe"] = ["automatic_masks", "caption"]
    assert [stage.name for stage in recipe_of(load_config(values), "mine")] == mine["recipe"]
    own = {"name": "color_regions", "options": {"colors": 3}}
    mine["recipe"] = [{"stage": "automatic_masks", "id": "made", "mask_generator": own}, "caption"]
    [made, _] = recipe_of(load_config(values), "mine")
    assert made.backend.options == {"colors": 3} and made.place.endswith("made.mask_generator")  # type: ignore
    for recipe, told in (
        (["caption"], "put `automatic_masks`"),
        ("verify", "needs the category"),
        (["box_masks", "caption"], "which has no boxes; use `automatic_masks`"),
    ):
        mine["recipe"] = recipe
        with pytest.raises(ConfigError, match=told):
            load_config(values)


def test_two_folders_are_listed_in_order_and_a_name_that_is_there_twice_counts_once(tmp_path):
    for folder in ("a", "b"):
        write_photo(tmp_path / folder / "x", 1, 1)
    write_photo(tmp_path / "b" / "y", 1, 1)
    (tmp_path / "a" / "notes.txt").write_text("no photo")
    values = configured(tmp_path).model_dump()
    values["subsets"]["mine"]["sources"][0]["photos"] = [str(tmp_path / "b"), str(tmp_path / "a")]
    entries = list(open_source(load_config(values), "mine").catalog())
    assert [entry.file_name for entry in entries] == ["x/photo-1.png", "y/photo-1.png", "x/photo-1.png"]
    assert [entry.drop and entry.drop.reason.value for entry in entries] == [None, None, "duplicate_key"]
    assert len({entry.key for entry in entries}) == 3
    values["subsets"]["mine"]["sources"][0]["photos"] = [str(tmp_path / "a" / "x" / "nothing")]
    (tmp_path / "a" / "x" / "nothing").mkdir()
    with pytest.raises(ConfigError, match="no photo in"):
        list(open_source(load_config(values), "mine").catalog())


@pytest.mark.skipif(not (ROOT / "samples").exists(), reason="no clone, but an installed wheel")
@pytest.mark.soak
def test_the_sample_photos_by_the_embedded_backends(tmp_path):
    samples = ROOT / "samples"
    folders = [str(samples / "coconut" / "photos"), str(samples / "scenes" / "photos")]
    path = tmp_path / "build.yaml"
    source = {"source": "automatic", "photos": folders, "license": "CC0"}
    path.write_text(
        yaml.safe_dump(
            {"out": "out", "subsets": {"mine": {"sources": source}}, "masks": {"min_area_px": 64}}
            | {"images_per_shard": 6, "failures": {"min_free_gb": 0}}
        )
    )
    config = load_config(path)
    driver.build(config, LocalEngine())
    assert verify.verify(tmp_path / "out").ok
    found = rows(tmp_path / "out")
    shapes = [row for row in found if row["key"].startswith("heldout") and row["kept"]]
    assert len(shapes) >= 20 and all(row["caption"] and row["core_category"] for row in shapes)
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())["subsets"]["mine"]
    assert stats["counts"]["regions"] == sum(row["region"] is not None for row in found)
    assert stats["counts"]["funnel"][1]["stage"] == "automatic_masks"
    assert "lets the mask generator find the regions" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.ray
@pytest.mark.soak
def test_the_generator_in_actors_of_its_own_makes_the_same_corpus(tmp_path, built):
    config = configured(tmp_path)
    build(config, RayEngine())
    assert generated(tmp_path) == ALL
    assert committed(tmp_path / "out") == committed(built / "out")
