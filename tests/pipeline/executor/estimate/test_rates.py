"""Rates from event logs."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.pipeline.corpus import writer
from paracaption.pipeline.corpus.events import EventLog
from paracaption.pipeline.executor.estimate import rates
from paracaption.pipeline.executor.estimate.rates import StageRate
from paracaption.schemas.errors import ConfigError
from tests.pipeline.executor.estimate.cases import measured


def run(out, number: int, units, subset="coconut", ray_s=6.0):
    """Write a run's events: `units` are (worker, stage, unit, images, regions, asked, seconds)."""
    folder = out / "events" / f"2026010{number}-000000-{subset}-x"
    folder.mkdir(parents=True)
    driver = EventLog(folder, "driver")
    driver.emit("ray", seconds=ray_s)
    driver.emit("begun")
    logs = {}
    for worker, stage, unit, images, regions, asked, seconds in units:
        if worker not in logs:
            logs[worker] = EventLog(folder, worker)
            if asked:
                logs[worker].emit("started", stage=stage, seconds=3.0)
            logs[worker].emit("ready", stage=stage, seconds=3.0 if asked else 0.0)
        told = {"asked": asked, "busy": seconds} if asked else {}
        logs[worker].emit(
            "unit",
            stage=stage,
            unit=unit,
            images=images,
            regions=regions,
            seconds=seconds,
            cpu=seconds / 2,
            **told,
        )
    writer.prepare(out / subset)
    return out


def test_rates_are_seconds_of_what_was_asked_over_all_runs(tmp_path):
    run(tmp_path, 1, [("s", "source", "u0", 10, 100, 0, 5), ("c", "caption", "u0", 10, 80, 80, 40.0)])
    run(
        tmp_path,
        2,
        [("s", "source", "u1", 10, 120, 0, 5), ("c", "caption", "u1", 10, 96, 96, 48.0)],
        ray_s=8.0,
    )
    # a third run has the evidence and asks nothing: its seconds are of reading files
    run(tmp_path, 3, [("s", "source", "u1", 10, 120, 0, 5), ("x", "caption", "u1", 10, 96, 0, 0.01)])
    found = rates.measure_rates(tmp_path)
    known = found.subsets["coconut"]
    caption = known.stages["caption"]
    assert caption.region_s == pytest.approx(0.5) and caption.image_s == 0
    assert caption.reach == pytest.approx(176 / 220) and caption.load_s == 3.0
    assert caption.cpu_share == pytest.approx(0.5)
    assert known.stages["source"].image_s == pytest.approx(0.5)
    assert (known.images, known.regions, found.ray_s) == (20, 220, pytest.approx(20 / 3))


def test_what_a_model_stage_does_besides_asking_its_model_leaves_the_gpu_idle(tmp_path):
    units = [("s", "source", "u0", 10, 100, 0, 5), ("c", "caption", "u0", 10, 100, 100, 40.0)]
    folder = run(tmp_path, 1, units)
    (path,) = (folder / "events").glob("*/c-*.jsonl")
    path.write_text(path.read_text().replace('"busy":40.0', '"busy":30.0'))
    stages = rates.measure_rates(folder).subsets["coconut"].stages
    assert stages["caption"].busy_share == pytest.approx(0.75) and stages["caption"].region_s == 0.4
    assert stages["source"].busy_share == 1.0


def test_an_actors_first_unit_is_not_taken_for_the_rule(tmp_path):
    units = [("c", "caption", f"u{i}", 10, 100, 100, 30.0 if not i else 10.0) for i in range(5)]
    found = rates.measure_rates(run(tmp_path, 1, units)).subsets["coconut"].stages["caption"]
    assert found.region_s == pytest.approx(0.1) and found.first_s == pytest.approx(20)


def test_costs_per_image_and_per_region_are_told_apart_where_units_differ():
    rng = np.random.default_rng(0)
    images, regions = np.full(40, 10.0), rng.integers(50, 400, 40).astype(float)
    seconds = 0.5 * images + 0.02 * regions + rng.normal(0, 0.05, 40)
    both = rates.fit_two_costs(images, regions, seconds)
    assert both == (pytest.approx(0.5, rel=0.1), pytest.approx(0.02, rel=0.1))
    assert both[0] * images.sum() + both[1] * regions.sum() == pytest.approx(seconds.sum())


def test_costs_are_not_told_apart_from_noise_or_equal_units():
    rng = np.random.default_rng(0)
    images, regions = np.full(40, 10.0), rng.integers(95, 105, 40).astype(float)
    assert rates.fit_two_costs(images, regions, 0.02 * regions + rng.normal(0, 0.5, 40)) is None
    assert rates.fit_two_costs(images, np.full(40, 100.0), np.full(40, 3.0)) is None
    assert rates.fit_two_costs(images[:3], regions[:3], regions[:3]) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=2, max_size=30))
def test_the_pilots_own_size_costs_what_the_pilot_took(units):
    found = rates._fit_rate(
        [rates._Unit(10, regions, seconds, 0.0, False) for regions, seconds in units], False
    )
    total = found.seconds(10 * len(units), sum(regions for regions, _ in units))
    assert total == pytest.approx(sum(seconds for _, seconds in units), rel=1e-6)


def test_a_folder_without_events_says_how_to_run_a_pilot(tmp_path):
    with pytest.raises(ConfigError, match=r"no events of a build; run a pilot.*--limit-images"):
        rates.measure_rates(tmp_path)


def test_runs_of_a_subset_that_is_gone_are_left_out(tmp_path):
    units = [("c", "caption", "u0", 10, 100, 100, 30.0)]
    run(tmp_path, 1, units)
    run(tmp_path, 2, units, subset="old")
    shutil.rmtree(tmp_path / "old")
    assert list(rates.measure_rates(tmp_path).subsets) == ["coconut"]


def test_rates_survive_their_file_and_a_wrong_key_is_named(tmp_path):
    known = measured(ray_s=6.0, caption=StageRate(0.9, 0.25, 0.125, 0.5, 30.0, 2.0))
    path = tmp_path / "rates.yaml"
    path.write_text(rates.format_rates(known))
    assert rates.read_rates(path) == known
    values = yaml.safe_load(path.read_text())
    values["subsets"]["coconut"]["stages"]["caption"]["region"] = 1
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"rates.yaml: not rates: .*`region`.*--write-rates"):
        rates.read_rates(path)
    with pytest.raises(ConfigError, match="no such file"):
        rates.read_rates(tmp_path / "none.yaml")
