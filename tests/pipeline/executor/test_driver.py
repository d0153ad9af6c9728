"""What the driver does whichever engine runs the units: order, resume, refusals, sweeping."""

import json
import os
import shutil

import pytest

from paracaption.pipeline.corpus import writer
from paracaption.pipeline.executor import driver, findings, preflight
from paracaption.pipeline.executor.build import build_checked
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.models import registry
from paracaption.schemas.errors import ConfigError, StageFailed
from tests.building import build, calls, committed, config_of
from tests.pipeline.executor.conformance import started
from tests.synthetic import write_coconut


class Recording(LocalEngine):
    """Knows which units it was given."""

    def __init__(self):
        self.given: list[list[int]] = []

    def drafts(self, parts, tick):
        self.given += [part.units for part in parts]
        return super().drafts(parts, tick)


@pytest.mark.soak
def test_the_steps_come_in_their_order_for_each_subset_and_a_second_build_takes_none(tmp_path, coconut, sa1b):
    taken, engine = [], Recording()

    def step(function):
        def run(*arguments):
            subsets = next((each for each in arguments if isinstance(each, dict)), [])
            subset = [each for each in arguments if isinstance(each, str)]
            taken.append(" ".join([function.__name__, *subset, *subsets]))
            return function(*arguments)

        return run

    config = config_of(tmp_path / "out", coconut=coconut, sa1b=sa1b)
    summary = driver.build(config, engine, step=step)
    each = ["prepare_work_list", "find_pending"]
    steps = [f"{name} {subset}" for subset in ("coconut", "sa1b") for name in each]
    steps += ["group_subsets coconut sa1b", "build_units coconut", "build_units sa1b"]
    assert taken == [*steps, "write_config", "merge_corpus"]
    assert engine.given == [[0, 1, 2], [0, 1]]
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in paths}
    asked = len(calls(tmp_path / "captioner.log"))
    assert driver.build(config, engine, step=step) == summary
    assert len(taken) == 4 + 3 + 2 and len(engine.given) == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == len(paths)
    assert len(calls(tmp_path / "captioner.log")) == asked == 64


@pytest.mark.soak
def test_a_build_that_lost_its_index_merges_and_builds_no_unit(tmp_path, coconut):
    config, engine = config_of(tmp_path / "out", coconut=coconut), Recording()
    driver.build(config, engine)
    index = (tmp_path / "out" / "index.parquet").read_bytes()
    (tmp_path / "out" / "index.parquet").unlink()
    driver.build(config, engine)
    assert (tmp_path / "out" / "index.parquet").read_bytes() == index
    assert engine.given == [[0, 1, 2]]


@pytest.mark.soak
def test_a_changed_threshold_rebuilds_the_shards_and_loads_no_model(tmp_path, sa1b):
    out = tmp_path / "out"
    loose = config_of(out, sa1b=sa1b, min_iou=0.5)
    build(loose)
    paid = {name: len(calls(tmp_path / f"{name}.log")) for name in ("captioner", "judge", "segmenter")}
    assert paid == {"captioner": 24, "judge": 24, "segmenter": 24}
    loose_files = committed(out)
    strict = loose.model_copy(
        update={"min_iou": 1.0, "text": loose.text.model_copy(update={"min_words": 60})}
    )
    assert build(strict)["sa1b"].dropped == {"clean_text/text_too_short": 24}
    assert started(out) == [{"caption", "extract_category", "agree_with_segmenter"}, set()]
    assert {name: len(calls(tmp_path / f"{name}.log")) for name in paid} == paid
    build(loose)
    assert committed(out) == loose_files


@pytest.mark.soak
def test_another_model_is_asked_anew_and_the_old_evidence_stays(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    build(config)
    other = config.captioner.model_copy(update={"options": {**config.captioner.options, "version": "2"}})
    build(config.model_copy(update={"captioner": other}))
    assert len(calls(tmp_path / "captioner.log")) == 80
    folders = {path.name.partition("-")[0] for path in (tmp_path / "out" / "coconut" / "evidence").iterdir()}
    assert folders == {"caption", "verify_category"}
    assert len(list((tmp_path / "out" / "coconut" / "evidence").iterdir())) == 4


@pytest.mark.soak
def test_an_image_that_is_gone_from_its_source_stays_in_the_corpus(tmp_path):
    source = write_coconut(tmp_path / "source", num_images=4)
    config = config_of(tmp_path / "out", coconut=source)
    build(config)
    before = committed(tmp_path / "out")
    path = tmp_path / "source" / "panoptic.json"
    content = json.loads(path.read_text())
    content["images"], content["annotations"] = content["images"][:3], content["annotations"][:3]
    path.write_text(json.dumps(content))
    os.remove(tmp_path / "source" / "labels" / "000000000003.png")
    build(config)
    assert committed(tmp_path / "out") == before


def test_two_drivers_cannot_write_to_the_same_folder(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    often = config.failures.model_copy(update={"lease_s": 1.0})  # the other one waits for a sign of life
    with (
        driver.owned(config.model_copy(update={"failures": often}), "build"),
        pytest.raises(ConfigError, match=r"`build` of process \d+ on .* is writing"),
    ):
        build(config.model_copy(update={"failures": config.failures.model_copy(update={"lease_s": 30})}))


def test_a_read_only_output_is_one_clear_error(tmp_path, coconut):
    target = tmp_path / "out" / "coconut"
    target.mkdir(parents=True)
    (target / "shards").write_text("a file where the folder should be")
    with pytest.raises(StageFailed, match=r"shards: "):
        build(config_of(tmp_path / "out", coconut=coconut))


def test_lost_evidence_is_paid_for_again_and_only_that(tmp_path, coconut):
    out = tmp_path / "out"
    config = config_of(out, coconut=coconut)
    build(config)
    before = committed(out)
    shutil.rmtree(out / "coconut" / "manifests")
    lost = next((out / "coconut" / "evidence").glob("caption-*/coconut-000001.parquet"))
    lost.unlink()
    paid = len(calls(tmp_path / "captioner.log"))
    build(config)
    assert committed(out) == before
    assert len(calls(tmp_path / "captioner.log")) - paid == 16


def test_temporary_files_are_swept(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    writer.prepare(tmp_path / "out" / "coconut")
    stray = tmp_path / "out" / "coconut" / "shards" / ".tmp-coconut-000000-dead.tar"
    stray.write_bytes(b"half a shard")
    late = stray.with_name(".tmp-coconut-000001-late.tar")  # by a dying worker of the run before
    build(config, on_progress=lambda _: late.write_bytes(b"half a shard"))
    assert not stray.exists()
    assert not late.exists()


def test_only_models_that_will_be_asked_need_their_packages(tmp_path, coconut, monkeypatch):
    config = config_of(tmp_path / "out", coconut=coconut)
    assert driver.prepare(config) == {"captioner", "judge"}
    build(config)
    strict = config.model_copy(update={"text": config.text.model_copy(update={"min_words": 60})})
    assert driver.prepare(strict) == set()
    rare = registry.Registered(strict.judge.name, ("a-package-that-nobody-has",))
    monkeypatch.setitem(registry.BACKENDS["judge"], strict.judge.name, rare)
    assert list(preflight.check_packages(strict, set())) == []
    (line,) = preflight.check_packages(strict, {"judge"})
    assert line.state == findings.FAIL and "a-package-that-nobody-has is not installed" in line.found


def test_a_work_list_that_is_damaged_is_made_anew_and_the_build_goes_on(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    build_checked(config, LocalEngine(), driver.build, limit_images=None, retry_failed=False)
    before = committed(tmp_path / "out")
    folder = tmp_path / "out" / "coconut"
    good = {path: path.read_bytes() for path in (folder / "plan").iterdir()}
    for path, data in good.items():
        for finished in (True, False):
            path.write_bytes(data[: len(data) // 2] + b"?" + data[len(data) // 2 + 1 :])
            if not finished:
                (folder / "manifests" / "coconut-000001.json").unlink()
            build_checked(config, LocalEngine(), driver.build, limit_images=None, retry_failed=False)
            assert {each: each.read_bytes() for each in good} == good
            assert committed(tmp_path / "out") == before


def test_a_source_without_an_image_is_refused_before_anything_is_built(tmp_path, coconut):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    empty = {**coconut, "annotations": [str(path)]}
    with pytest.raises(ConfigError, match="no image was found"):
        driver.build(config_of(tmp_path / "out", coconut=empty), LocalEngine())
    assert not (tmp_path / "out").exists()
