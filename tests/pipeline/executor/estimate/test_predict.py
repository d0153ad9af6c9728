"""Hours from rates, sizes and actors."""

from __future__ import annotations

import pytest

from paracaption.pipeline.executor.estimate.pools import find_pools
from paracaption.pipeline.executor.estimate.predict import estimate_build
from paracaption.pipeline.executor.estimate.rates import StageRate
from paracaption.pipeline.executor.estimate.report import suggest_concurrency
from paracaption.pipeline.executor.estimate.sizes import Size
from paracaption.schemas.errors import ConfigError
from tests.pipeline.executor.estimate.cases import COCONUT, actors, config, measured


def test_the_wall_is_start_up_plus_the_slowest_pool_plus_one_unit_through_the_others():
    known = measured(
        ray_s=7,
        launch_s=5,
        caption=StageRate(1.0, 0.0, 0.1, load_s=30, first_s=2),
        verify_category=StageRate(0.5, 0.0, 0.04, load_s=60),
        source=StageRate(1.0, 0.01, 0.0),
    )
    estimated = estimate_build(config(), known, {"coconut": Size(1_000, 10_000)}, gpus=2)
    (subset,) = estimated.subsets
    assert actors(estimated) == {"source": 1, "caption": 1, "verify_category": 1, "write": 1}
    assert subset.units == 10 and subset.bottleneck == "captioner"
    assert subset.startup_s == 5 + 60
    one_unit = 200 / 10 + 10 / 10  # of the judge and the source
    assert subset.wall_s == pytest.approx(65 + 1_000 + 2 + one_unit)
    assert estimated.wall_s == pytest.approx(subset.wall_s + 7)
    assert subset.gpu_s == pytest.approx(1_000 + 200)
    assert estimated.held_gpu_s == pytest.approx(2 * subset.wall_s)
    assert (subset.kept, subset.shard_bytes, subset.ledger_bytes) == (8_000, 1e8, 5e5)


def test_balanced_gpus_follow_the_regions_that_reach_a_stage():
    known = measured(
        caption=StageRate(1.0, 0.0, 0.3), verify_category=StageRate(0.5, 0.0, 0.2), write=StageRate(0.5, 0, 0)
    )
    estimated = estimate_build(config(), known, {"coconut": Size(100_000, 1_000_000)}, gpus=8, balanced=True)
    assert actors(estimated) == {"source": 1, "caption": 6, "verify_category": 2, "write": 1}
    assert estimated.gpus == 8


def test_pools_without_gpus_get_as_many_actors_as_keep_up():
    known = measured(caption=StageRate(1.0, 0.0, 0.1), source=StageRate(1.0, 0.1, 0.0))
    size = {"coconut": Size(10_000, 100_000)}
    many = estimate_build(config(), known, size, gpus=8, balanced=True)
    assert actors(many)["caption"] == 7 and actors(many)["source"] == 1
    slow = measured(caption=StageRate(1.0, 0.0, 0.1), source=StageRate(1.0, 1.0, 0.0))
    assert actors(estimate_build(config(), slow, size, gpus=8, balanced=True))["source"] == 7


def test_stages_without_gpus_that_share_their_actors_are_one_pool():
    plain = {"num_cpus": 1, "concurrency": [1, 1]}
    shared = config(
        captioner={"name": "classical", **plain},
        judge={"name": "lexical", **plain},
        io={"num_cpus": 1, "concurrency": [1, 1]},
    )
    (pool,) = find_pools(shared, ["coconut"])
    assert pool.stages == {"coconut": tuple(COCONUT)} and pool.name == "caption+verify_category"
    known = measured(caption=StageRate(1, 0, 0.1), verify_category=StageRate(1, 0, 0.2))
    estimated = estimate_build(shared, known, {"coconut": Size(100, 1_000)})
    assert estimated.subsets[0].wall_s == pytest.approx(100 + 200)
    apart = config(judge={"name": "lexical", "runtime_env": {"env_vars": {"A": "b"}}, **plain})
    assert [pool.name for pool in find_pools(apart, ["coconut"])] == [
        "source",
        "caption",
        "verify_category",
        "write",
    ]


def test_no_pool_is_faster_than_the_cores():
    known = measured(caption=StageRate(1.0, 0.0, 0.1, cpu_share=4.0))
    size = {"coconut": Size(1_000, 10_000)}
    estimated = estimate_build(config(), known, size, gpus=2, cpus=2)
    assert estimated.subsets[0].bottleneck == "CPU cores"
    assert estimated.subsets[0].wall_s == pytest.approx(4_000 / 2)


def test_units_are_whole():
    known = measured(caption=StageRate(1.0, 0.0, 0.1))
    estimated = estimate_build(config(), known, {"coconut": Size(300, 3_000)}, gpus=3)
    assert actors(estimated)["caption"] == 2
    assert estimated.subsets[0].wall_s == pytest.approx(200)  # two rounds of 100 s, the second with one actor


def test_the_configured_pools_bound_the_estimate_and_the_balanced_one_says_what_to_set():
    known = measured(caption=StageRate(1.0, 0.0, 0.3), verify_category=StageRate(1.0, 0.0, 0.1))
    narrow = config(captioner={"name": "gar", "num_gpus": 1, "concurrency": [1, 2]})
    size = {"coconut": Size(100_000, 1_000_000)}
    assert actors(estimate_build(narrow, known, size, gpus=8))["caption"] == 2
    best = estimate_build(narrow, known, size, gpus=8, balanced=True)
    assert suggest_concurrency(best) == "captioner [6, 6], judge [2, 2]"


def test_too_few_gpus_and_missing_rates_are_errors_that_say_what_to_do():
    known = measured(caption=StageRate(1, 0, 0.1))
    size = {"coconut": Size(100, 1_000)}
    with pytest.raises(ConfigError, match=r"1 GPUs do not hold.*caption: 1 x 1, verify_category: 1 x 1"):
        estimate_build(config(), known, size, gpus=1)
    with pytest.raises(ConfigError, match=r"no rates of 'sa1b', only of coconut: run a pilot"):
        estimate_build(config(sa1b=[{"paths": ["/a.tar"]}]), known, {"sa1b": Size(1, 1)}, gpus=9)
    del known.subsets["coconut"].stages["write"]
    with pytest.raises(ConfigError, match="no rate of the stage 'write'"):
        estimate_build(config(), known, size, gpus=2)
