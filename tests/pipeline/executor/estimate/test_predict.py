"""Rates from event logs, and plans from rates: by hand-made numbers that can be checked on paper."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from paracaption.pipeline.corpus import writer
from paracaption.pipeline.corpus.events import EventLog
from paracaption.pipeline.executor.estimate import predict as estimate
from paracaption.pipeline.executor.estimate import rates as estimate_rates
from paracaption.pipeline.executor.estimate import report as estimate_view
from paracaption.pipeline.executor.estimate.predict import Size, balance
from paracaption.pipeline.executor.estimate.rates import Rates, StageRate, SubsetRates
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError

COCONUT = ["source", "usable_masks", "caption", "verify_category", "clean_text", "write"]


def config(**changes) -> BuildConfig:
    values = {
        "out": "/nowhere/out",
        "coconut": [{"annotations": ["/a.json"], "labels": "/l", "photos": ["/p"]}],
        "images_per_shard": 100,
        "captioner": {"name": "gar", "num_gpus": 1, "concurrency": [1, 64]},
        "judge": {"name": "vllm", "num_gpus": 1, "concurrency": [1, 64]},
        "segmenter": {"name": "sam3", "num_gpus": 1, "concurrency": [1, 64]},
    }
    return BuildConfig.model_validate({**values, **changes})


def measured(ray_s=0.0, launch_s=0.0, **stages: StageRate) -> Rates:
    """COCONut's rates: nothing costs anything but what is given."""
    free = {name: StageRate(1.0, 0.0, 0.0) for name in COCONUT}
    known = SubsetRates(100, 1_000, 0.8, launch_s, 1e5, 50.0, 30.0, {**free, **stages})
    return Rates(ray_s, {"coconut": known})


def actors(planned, number=0) -> dict[str, int]:
    return {each.pool.name: each.actors for each in planned.subsets[number].pools}


# Sharing out.


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_other_allocation_is_faster(data):
    count = data.draw(st.integers(1, 3))
    work = data.draw(st.lists(st.floats(0.01, 1000), min_size=count, max_size=count))
    cost = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=count, max_size=count))
    budget = data.draw(st.integers(1, 12))
    found = balance(work, cost, budget)
    options = [range(1, int(budget / price) + 1) for price in cost]
    fitting = [
        counts
        for counts in itertools.product(*options)
        if sum(n * price for n, price in zip(counts, cost, strict=True)) <= budget
    ]
    if found is None:
        assert not fitting
        return
    assert sum(n * price for n, price in zip(found, cost, strict=True)) <= budget + 1e-6
    best = min(max(w / n for w, n in zip(work, counts, strict=True)) for counts in fitting)
    assert max(w / n for w, n in zip(work, found, strict=True)) <= best * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(
    work=st.lists(st.floats(0.01, 1e6), min_size=1, max_size=4),
    spare=st.integers(0, 40),
    high=st.integers(1, 9),
)
def test_bounds_hold_and_nothing_is_left_that_somebody_could_use(work, spare, high):
    found = balance(work, [1.0] * len(work), len(work) + spare, [1] * len(work), [high] * len(work))
    assert found is not None and all(1 <= n <= high for n in found)
    assert sum(found) == min(len(work) + spare, high * len(work))


def test_gpus_go_where_the_work_is():
    assert balance([60, 20, 20], [1, 1, 1], 10) == [6, 2, 2]
    assert balance([10, 1], [1, 1], 8) == [7, 1]
    assert balance([10, 10], [2, 0.5], 4) == [1, 4]  # a second actor of the first would leave the other none
    assert balance([1, 1], [1, 1], 1) is None
    assert balance([5, 5], [1, 1], 9, least=[3, 1]) == [5, 4]


# Predicting.


def test_the_wall_is_start_up_plus_the_slowest_pool_plus_one_unit_through_the_others():
    known = measured(
        ray_s=7,
        launch_s=5,
        caption=StageRate(1.0, 0.0, 0.1, load_s=30, first_s=2),
        verify_category=StageRate(0.5, 0.0, 0.04, load_s=60),
        source=StageRate(1.0, 0.01, 0.0),
    )
    planned = estimate.plan(config(), known, {"coconut": Size(1_000, 10_000)}, gpus=2)
    (subset,) = planned.subsets
    assert actors(planned) == {"source": 1, "caption": 1, "verify_category": 1, "write": 1}
    assert subset.units == 10 and subset.bottleneck == "caption"
    assert subset.startup_s == 5 + 60
    one_unit = 200 / 10 + 10 / 10  # of the judge and the source
    assert subset.wall_s == pytest.approx(65 + 1_000 + 2 + one_unit)
    assert planned.wall_s == pytest.approx(subset.wall_s + 7)
    assert subset.gpu_s == pytest.approx(1_000 + 200)
    assert subset.held_gpu_s == pytest.approx(2 * subset.wall_s)
    assert (subset.kept, subset.shard_bytes, subset.ledger_bytes) == (8_000, 1e8, 5e5)


def test_balanced_gpus_follow_the_regions_that_reach_a_stage():
    known = measured(
        caption=StageRate(1.0, 0.0, 0.3), verify_category=StageRate(0.5, 0.0, 0.2), write=StageRate(0.5, 0, 0)
    )
    planned = estimate.plan(config(), known, {"coconut": Size(100_000, 1_000_000)}, gpus=8, balanced=True)
    assert actors(planned) == {"source": 1, "caption": 6, "verify_category": 2, "write": 1}
    assert planned.subsets[0].gpus == 8


def test_pools_without_gpus_get_as_many_actors_as_keep_up():
    known = measured(caption=StageRate(1.0, 0.0, 0.1), source=StageRate(1.0, 0.1, 0.0))
    size = {"coconut": Size(10_000, 100_000)}
    many = estimate.plan(config(), known, size, gpus=8, balanced=True)
    assert actors(many)["caption"] == 7 and actors(many)["source"] == 1
    slow = measured(caption=StageRate(1.0, 0.0, 0.1), source=StageRate(1.0, 1.0, 0.0))
    assert actors(estimate.plan(config(), slow, size, gpus=8, balanced=True))["source"] == 7


def test_stages_without_gpus_that_share_their_actors_are_one_pool():
    plain = {"num_cpus": 1, "concurrency": [1, 1]}
    shared = config(
        captioner={"name": "classical", **plain},
        judge={"name": "lexical", **plain},
        io={"num_cpus": 1, "concurrency": [1, 1]},
    )
    (pool,) = estimate.pools_of(shared, "coconut")
    assert pool.stages == tuple(COCONUT) and pool.name == "caption+verify_category"
    known = measured(caption=StageRate(1, 0, 0.1), verify_category=StageRate(1, 0, 0.2))
    planned = estimate.plan(shared, known, {"coconut": Size(100, 1_000)})
    assert planned.subsets[0].wall_s == pytest.approx(100 + 200)
    apart = config(judge={"name": "lexical", "runtime_env": {"env_vars": {"A": "b"}}, **plain})
    assert [pool.name for pool in estimate.pools_of(apart, "coconut")] == [
        "source",
        "caption",
        "verify_category",
        "write",
    ]


def test_no_pool_is_faster_than_the_cores():
    known = measured(caption=StageRate(1.0, 0.0, 0.1, cpu_share=4.0))
    size = {"coconut": Size(1_000, 10_000)}
    planned = estimate.plan(config(), known, size, gpus=2, cpus=2)
    assert planned.subsets[0].bottleneck == "CPU cores"
    assert planned.subsets[0].wall_s == pytest.approx(4_000 / 2)


def test_units_are_whole():
    known = measured(caption=StageRate(1.0, 0.0, 0.1))
    planned = estimate.plan(config(), known, {"coconut": Size(300, 3_000)}, gpus=3)
    assert actors(planned)["caption"] == 2
    assert planned.subsets[0].wall_s == pytest.approx(200)  # two rounds of 100 s, the second with one actor


def test_the_configured_pools_bound_the_plan_and_the_balanced_one_says_what_to_set():
    known = measured(caption=StageRate(1.0, 0.0, 0.3), verify_category=StageRate(1.0, 0.0, 0.1))
    narrow = config(captioner={"name": "gar", "num_gpus": 1, "concurrency": [1, 2]})
    size = {"coconut": Size(100_000, 1_000_000)}
    assert actors(estimate.plan(narrow, known, size, gpus=8))["caption"] == 2
    best = estimate.plan(narrow, known, size, gpus=8, balanced=True)
    assert estimate_view.suggestion(narrow, best) == "coconut: captioner [6, 6], judge [2, 2]"


def test_too_few_gpus_and_missing_rates_are_errors_that_say_what_to_do():
    known = measured(caption=StageRate(1, 0, 0.1))
    size = {"coconut": Size(100, 1_000)}
    with pytest.raises(ConfigError, match=r"1 GPUs do not hold.*caption: 1 x 1, verify_category: 1 x 1"):
        estimate.plan(config(), known, size, gpus=1)
    with pytest.raises(ConfigError, match=r"no rates of 'sa1b', only of coconut: run a pilot"):
        estimate.plan(config(sa1b=[{"paths": ["/a.tar"]}]), known, {"sa1b": Size(1, 1)}, gpus=9)
    del known.subsets["coconut"].stages["write"]
    with pytest.raises(ConfigError, match="no rate of the stage 'write'"):
        estimate.plan(config(), known, size, gpus=2)


def test_the_plan_says_what_makes_it_doubtful():
    known = measured(caption=StageRate(1, 0, 0.1))
    said = estimate.doubts(
        config(), known, {"coconut": Size(100_000, 4_000_000)}, config(judge={"name": "openai"})
    )
    assert any("1,000 measured regions stand for 4,000,000" in line for line in said)
    assert any("verify_category" in line and "had no work" in line for line in said)
    assert any("10.0 regions an image, the plan 40.0" in line for line in said)
    assert any(line.startswith("judge: the pilot ran openai") for line in said)


# Measuring.


def run(out, number: int, units, subset="coconut", ray_s=6.0):
    """Write a run's events: `units` are (worker, stage, unit, images, regions, asked, seconds)."""
    folder = out / "events" / f"2026010{number}-{subset}-x"
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
    found = estimate_rates.measure(tmp_path)
    known = found.subsets["coconut"]
    caption = known.stages["caption"]
    assert caption.region_s == pytest.approx(0.5) and caption.image_s == 0
    assert caption.reach == pytest.approx(176 / 220) and caption.load_s == 3.0
    assert caption.cpu_share == pytest.approx(0.5)
    assert known.stages["source"].image_s == pytest.approx(0.5)
    assert (known.images, known.regions, found.ray_s) == (20, 220, pytest.approx(20 / 3))


def test_an_actors_first_unit_is_not_taken_for_the_rule(tmp_path):
    units = [("c", "caption", f"u{i}", 10, 100, 100, 30.0 if not i else 10.0) for i in range(5)]
    found = estimate_rates.measure(run(tmp_path, 1, units)).subsets["coconut"].stages["caption"]
    assert found.region_s == pytest.approx(0.1) and found.first_s == pytest.approx(20)


def test_costs_per_image_and_per_region_are_told_apart_where_units_differ():
    rng = np.random.default_rng(0)
    images, regions = np.full(40, 10.0), rng.integers(50, 400, 40).astype(float)
    seconds = 0.5 * images + 0.02 * regions + rng.normal(0, 0.05, 40)
    both = estimate_rates.apart(images, regions, seconds)
    assert both == (pytest.approx(0.5, rel=0.1), pytest.approx(0.02, rel=0.1))
    assert both[0] * images.sum() + both[1] * regions.sum() == pytest.approx(seconds.sum())


def test_costs_are_not_told_apart_from_noise_or_equal_units():
    rng = np.random.default_rng(0)
    images, regions = np.full(40, 10.0), rng.integers(95, 105, 40).astype(float)
    assert estimate_rates.apart(images, regions, 0.02 * regions + rng.normal(0, 0.5, 40)) is None
    assert estimate_rates.apart(images, np.full(40, 100.0), np.full(40, 3.0)) is None
    assert estimate_rates.apart(images[:3], regions[:3], regions[:3]) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=2, max_size=30))
def test_the_pilots_own_size_costs_what_the_pilot_took(units):
    found = estimate_rates._fit(
        [estimate_rates._Unit(10, regions, seconds, 0.0, False) for regions, seconds in units], False
    )
    total = found.seconds(10 * len(units), sum(regions for regions, _ in units))
    assert total == pytest.approx(sum(seconds for _, seconds in units), rel=1e-6)


def test_a_folder_without_events_says_how_to_run_a_pilot(tmp_path):
    with pytest.raises(ConfigError, match=r"no events of a build; run a pilot.*--limit-images"):
        estimate_rates.measure(tmp_path)


def test_rates_survive_their_file_and_a_wrong_key_is_named(tmp_path):
    known = measured(ray_s=6.0, caption=StageRate(0.9, 0.25, 0.125, 0.5, 30.0, 2.0))
    path = tmp_path / "rates.yaml"
    path.write_text(estimate_rates.dump(known))
    assert estimate_rates.read(path) == known
    values = yaml.safe_load(path.read_text())
    values["subsets"]["coconut"]["stages"]["caption"]["region"] = 1
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"rates.yaml: not rates: .*`region`.*--write-rates"):
        estimate_rates.read(path)
    with pytest.raises(ConfigError, match="no such file"):
        estimate_rates.read(tmp_path / "none.yaml")


# Sizes and the view.


def test_sizes_are_given_counted_or_the_papers():
    known = measured()
    sizes = estimate_view.sizes_of(config(), known, ["coconut=5_000/70_000"], False)
    assert sizes == {"coconut": Size(5_000, 70_000)}
    assert estimate_view.sizes_of(config(), known, ["coconut=50"], False) == {"coconut": Size(50, 500)}
    assert estimate_view.sizes_of(config(), known, [], False) == {"coconut": Size(334_000, 3_400_000)}
    for wrong in ("sa1b=5/5", "coconut=x", "coconut"):
        with pytest.raises(ConfigError, match="--images"):
            estimate_view.sizes_of(config(), known, [wrong], False)


def test_the_view_names_the_bottleneck_the_gpus_and_the_bytes():
    known = measured(
        caption=StageRate(1, 0, 0.5, load_s=60), verify_category=StageRate(0.9, 0, 0.05, load_s=90)
    )
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    sizes = {"coconut": estimate.PAPER["coconut"]}
    console.print(estimate_view.render(config(), known, sizes, 8, None, None))
    text = console.export_text()
    assert "bottleneck: caption" in text and "coconut: captioner [7, 7], judge [1, 1]" in text
    hours = 3_400_000 * (0.5 + 0.9 * 0.05) / 3600
    assert f"{hours:,.1f} in use" in text
    assert f"{math.ceil(334_000 / 100):,}" in text and "33.4 GB" in text
