"""A corpus grows with its sources: old units stay, and its records are those of one built at once."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from paracaption.pipeline.corpus import log, reader, status, verify, versions
from paracaption.pipeline.corpus.records import Planned
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.sources.registry import complete
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import IntegrityError
from tests.building import build, calls, committed, config_of
from tests.synthetic import write_coconut, write_sa1b

SIZE = (48, 64)

_OF_PLACE = {"unit", "shard", "photo_offset", "photo_length", "json_offset", "json_length"}
"""What differs where images are cut into other units."""


def records(out: Path | str) -> dict[tuple, dict]:
    """Every row of every ledger without its place, by subset, key and region."""
    corpus = reader.open_corpus(out)
    found = {}
    for subset in corpus.subsets:
        for unit in reader.list_units(f"{out}/{subset}"):
            for row in reader.read_ledger(unit.ledger).to_pylist():
                place = (subset, row["key"], row["region"])
                assert place not in found
                found[place] = {name: value for name, value in row.items() if name not in _OF_PLACE}
    return found


def samples(out: Path | str) -> dict[str, bytes]:
    corpus = reader.open_corpus(out)
    return {
        f"{each.subset}/{each.key}": msgspec.json.encode(each) + photo for each, photo in corpus.samples()
    }


def grow(root: Path, number: int, first: int = 0) -> dict:
    return write_coconut(root, number, 2, SIZE, first)


def finish(config: BuildConfig) -> None:
    driver.build(config, LocalEngine())


@pytest.mark.soak
def test_new_images_of_a_source_are_appended_and_no_old_byte_changes(tmp_path, caplog):
    root, out = tmp_path / "source", tmp_path / "out"
    config = config_of(out, coconut=grow(root, 6))
    finish(config)
    before, asked = committed(out), calls(tmp_path / "captioner.log")
    grow(root, 11)
    with caplog.at_level(logging.INFO):
        finish(config)
    assert "coconut: 5 images are new (000000000006," in caplog.text and "2 units are added" in caplog.text
    after = committed(out)
    assert {path: after[path] for path in before} == before
    assert len(calls(tmp_path / "captioner.log")) == len(asked) + 10
    (planned,) = [each for each in log.read_records(str(out)) if isinstance(each, Planned) and each.added]
    assert (planned.added, planned.images, planned.units) == (5, 11, 4)
    texts = [entry.text for entry in versions.list_versions(str(out))]
    assert "coconut: 11 images in 4 units; of these images 5 new" in texts
    assert verify.verify(out).ok, verify.verify(out).text()
    assert driver.is_finished(complete(config))
    (found,) = status.Watcher(str(out)).read().subsets
    assert (found.images, found.planned_images, found.units) == (11, 11, 4)
    at_once = config_of(tmp_path / "at once", coconut=grow(root, 11))
    finish(at_once)
    assert records(out) == records(at_once.out)


@pytest.mark.soak
def test_three_steps_give_the_records_of_one_build(tmp_path):
    root, tars, out = tmp_path / "source", tmp_path / "tars", tmp_path / "out"
    first = grow(root / "a", 5)
    finish(config_of(out, coconut=first))
    second = grow(root / "b", 4, first=5)
    both: dict[str, Any] = {"subsets": {"coconut": {"sources": [first, second]}}}
    for each in (first, second):
        each["source"] = "coconut"
    finish(config_of(out, **both))
    sa1b = write_sa1b(tars, 3, 2, SIZE)
    both["subsets"]["sa1b"] = {"sources": [{"source": "sa1b", **sa1b}]}
    finish(config_of(out, **both))
    grow(root / "a", 6)
    (root / "a/photos/000000000005.jpg").rename(root / "a/photos/kept.jpg")
    listed = json.loads((root / "a/panoptic.json").read_text())
    listed["images"][5]["file_name"] = "kept.jpg"
    (root / "a/panoptic.json").write_text(json.dumps(listed))
    finish(config_of(out, **both))
    assert verify.verify(out).ok, verify.verify(out).text()
    finish(config_of(tmp_path / "at once", **both))
    assert records(out) == records(tmp_path / "at once")
    assert samples(out) == samples(tmp_path / "at once")


def named(root: Path, *names: str, listed: str = "panoptic.json") -> dict:
    """A release with images of these names, which may have folders in them."""
    made = write_coconut(root / "made", len(names), 1, SIZE)
    text = json.loads((root / "made/panoptic.json").read_text())
    for number, name in enumerate(names):
        for folder, ending in (("photos", "jpg"), ("labels", "png")):
            to = root / folder / f"{name}.{ending}"
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(root / "made" / folder / f"{number:012d}.{ending}", to)
        text["images"][number]["file_name"] = f"{name}.jpg"
        text["annotations"][number]["file_name"] = f"{name}.png"
    (root / listed).write_text(json.dumps(text))
    return made | {
        "annotations": [str(root / listed)],
        "labels": str(root / "labels"),
        "photos": [str(root / "photos")],
    }


def keys_of(out: Path) -> dict[str, str]:
    """File name -> key of every image."""
    return {row["file_name"]: key for (_, key, _), row in records(out).items()}


def test_a_new_image_never_takes_the_key_of_an_old_one(tmp_path):
    root, out = tmp_path / "source", tmp_path / "out"
    old = named(root, "m/a", "m/b", listed="old.json")
    finish(config_of(out, coconut=old))
    before = committed(out)
    assert keys_of(out) == {"m/a.jpg": "a", "m/b.jpg": "b"}
    new = named(root, "c/a", listed="new.json")
    finish(config_of(out, coconut=old | {"annotations": [*new["annotations"], *old["annotations"]]}))
    found = keys_of(out)
    assert found.pop("c/a.jpg").startswith("c_a-") and found == {"m/a.jpg": "a", "m/b.jpg": "b"}
    assert {path: committed(out)[path] for path in before} == before


@pytest.mark.soak
def test_a_list_that_is_named_before_the_old_one_names_its_images_again_and_they_count_once(tmp_path):
    root, out = tmp_path / "source", tmp_path / "out"
    old = named(root, "a", "b", listed="old.json")
    finish(config_of(out, coconut=old))
    before = committed(out)
    new = named(root, "n", "a", listed="new.json")
    finish(config_of(out, coconut=old | {"annotations": [*new["annotations"], *old["annotations"]]}))
    rows = records(out)
    assert {key: row["drop_reason"] for (_, key, _), row in rows.items()} == {
        "a": None,
        "b": None,
        "n": None,
        "a-dup2": "duplicate_key",
    }
    assert {path: committed(out)[path] for path in before} == before


def test_images_that_are_gone_stay_and_are_reported(tmp_path, caplog):
    root, out = tmp_path / "source", tmp_path / "out"
    config = config_of(out, coconut=grow(root, 6))
    finish(config)
    before = committed(out)
    grow(root, 4, first=2)
    with caplog.at_level(logging.INFO):
        finish(config)
    assert (
        "2 images are gone from the source (000000000000, 000000000001) and stay in the corpus" in caplog.text
    )
    assert committed(out) == before and driver.is_finished(complete(config))
    (found,) = status.Watcher(str(out)).read().subsets
    assert (found.gone, found.gone_examples) == (2, ["000000000000", "000000000001"])
    assert verify.verify(out).ok


@pytest.mark.soak
def test_a_unit_with_images_that_are_gone_is_built_again_from_what_is_committed(tmp_path):
    root, out = tmp_path / "source", tmp_path / "out"
    config = config_of(out, coconut=grow(root, 6))
    stricter = config.model_copy(update={"text": config.text.model_copy(update={"min_words": 30})})
    at_once = stricter.model_copy(update={"out": str(tmp_path / "at once")})
    finish(config)
    finish(at_once)
    before, asked = records(out), len(calls(tmp_path / "captioner.log"))
    shutil.rmtree(root / "photos")
    shutil.rmtree(root / "labels")
    grow(root, 4, first=2)
    finish(config)
    (out / "coconut/manifests/coconut-000000.json").unlink()
    finish(config)
    assert records(out) == before
    finish(stricter)
    assert records(out) == records(at_once.out)
    assert len(calls(tmp_path / "captioner.log")) == asked
    finish(config)
    assert {place for place, row in records(out).items() if row["kept"]} == {
        place
        for place, row in before.items()
        if row["kept"] and place[1] not in ("000000000000", "000000000001")
    }
    assert verify.verify(out).ok, verify.verify(out).text()


@pytest.mark.soak
def test_a_changed_annotation_is_asked_about_again_and_nothing_else_is(tmp_path, caplog):
    root, out = tmp_path / "source", tmp_path / "out"
    config = config_of(out, coconut=grow(root, 6))
    finish(config)
    before, asked = committed(out), len(calls(tmp_path / "captioner.log"))
    listed = json.loads((root / "panoptic.json").read_text())
    listed["annotations"][1]["segments_info"].pop()
    (root / "panoptic.json").write_text(json.dumps(listed))
    with caplog.at_level(logging.INFO):
        finish(config)
    assert "1 image changed in the source (000000000001): 1 unit is built again" in caplog.text
    assert len(calls(tmp_path / "captioner.log")) == asked
    after = committed(out)
    assert {path for path in before if after[path] != before[path]} == {
        f"coconut/{name}"
        for name in (
            "ledger/coconut-000000.parquet",
            "manifests/coconut-000000.json",
            "shards/coconut-000000.tar",
        )
    }
    assert verify.verify(out).ok, verify.verify(out).text()
    finish(config_of(tmp_path / "at once", coconut=config.subsets["coconut"].sources[0]))
    assert records(out) == records(tmp_path / "at once")


def test_an_unfinished_corpus_grows_as_well(tmp_path):
    root, out = tmp_path / "source", tmp_path / "out"
    config = config_of(out, coconut=grow(root, 6))
    driver.prepare(config)
    grow(root, 9)
    build(config)
    assert len(reader.list_units(f"{out}/coconut")) == 3
    assert verify.verify(out).ok, verify.verify(out).text()


def test_a_source_that_is_moved_keeps_its_keys_although_a_later_one_has_an_image_of_the_same_name(tmp_path):
    first, out = tmp_path / "first", tmp_path / "out"
    later = {"source": "coconut", **named(tmp_path / "later", "a", "c", listed="list.json")}

    def build_from(root: Path) -> None:
        source = {"source": "coconut", **named(root, "a", "b", listed="list.json")}
        subset = {"sources": [source, later], "recipe": "verify"}
        finish(config_of(out, subsets={"coconut": subset}))

    build_from(first)
    before, rows = committed(out), records(out)
    assert {row["drop_reason"] for (_, key, _), row in rows.items() if key == "a-dup2"} == {"duplicate_key"}
    shutil.rmtree(first)
    build_from(tmp_path / "moved")
    assert records(out) == rows and {path: committed(out)[path] for path in before} == before


def test_an_option_that_makes_other_images_of_the_old_ones_is_refused(tmp_path):
    root, out = tmp_path / "source", tmp_path / "out"
    source = grow(root, 4)
    finish(config_of(out, coconut=source))
    before = committed(out)
    tars = {"source": "sa1b", **write_sa1b(tmp_path / "tars", 2, 2, SIZE)}
    swapped = {"coconut": {"sources": [tars, {"source": "coconut", **source}], "recipe": "identify"}}
    with pytest.raises(IntegrityError, match=r"source 1 of coconut is another one.*after the old ones"):
        finish(config_of(out, subsets=swapped))
    with pytest.raises(IntegrityError, match="images_per_shard was 4, is now 3"):
        finish(config_of(out, coconut=source, images_per_shard=3))
    assert committed(out) == before
