"""Subsets that share their pools: hours, the bottleneck, and who is idle for how long."""

from __future__ import annotations

import pytest

from paracaption.pipeline.executor.estimate.advice import advise, duration, short
from paracaption.pipeline.executor.estimate.pools import find_groups, find_pools
from paracaption.pipeline.executor.estimate.predict import Estimate, estimate_build
from paracaption.pipeline.executor.estimate.rates import StageRate
from paracaption.pipeline.executor.estimate.sizes import Size
from tests.pipeline.executor.estimate.cases import MIXED, config, measured, mixed_config, mixed_rates

TOGETHER_S = 2_000 + 600 / 25 + 1_500 / 25
"""The captioners' time, and a unit of SA-1B through judge and segmenter."""

APART_S = (1_000 + 500 / 100) + (1_500 + 5_000 / 25 + 600 / 25)
"""COCONut waits for the captioners, SA-1B for the segmenter."""


def idle(estimated: Estimate) -> dict[str, float]:
    """GPU seconds without work by pool."""
    return {use.title: use.idle_s for use in estimated.pools if use.gpus}


def test_side_by_side_a_pool_has_the_work_of_all_subsets_and_the_slowest_decides():
    estimated = estimate_build(mixed_config(), mixed_rates(), MIXED)
    (stream,) = estimated.streams
    work = {each.pool.title: each.work_s for each in stream.pools}
    assert work == pytest.approx(
        {"reading": 0, "captioner": 10_000, "judge": 1_100, "segmenter": 1_500, "writing": 0}
    )
    assert stream.subsets == ["coconut", "sa1b"] and stream.bottleneck == "captioner"
    assert estimated.wall_s == pytest.approx(TOGETHER_S)
    assert estimated.apart_s == pytest.approx(APART_S)
    assert estimated.gpus == 7 and estimated.held_gpu_s == pytest.approx(7 * TOGETHER_S)


def test_what_a_pool_does_not_work_it_is_idle():
    estimated = estimate_build(mixed_config(), mixed_rates(), MIXED)
    assert idle(estimated) == pytest.approx(
        {
            "captioner": 5 * TOGETHER_S - 10_000,
            "judge": TOGETHER_S - 1_100,
            "segmenter": TOGETHER_S - 1_500,
        }
    )
    shares = {use.title: use.idle_share for use in estimated.pools}
    assert shares["captioner"] == pytest.approx(1 - 2_000 / TOGETHER_S) and shares["captioner"] < 0.05
    assert shares["segmenter"] == pytest.approx(1 - 1_500 / TOGETHER_S)


def test_a_gpu_is_idle_while_a_stage_does_something_else_than_asking_its_model():
    known = mixed_rates()
    known.subsets["sa1b"].stages["agree_with_segmenter"].busy_share = 0.8
    estimated = estimate_build(mixed_config(), known, MIXED)
    assert estimated.wall_s == pytest.approx(TOGETHER_S)
    assert idle(estimated)["segmenter"] == pytest.approx(TOGETHER_S - 0.8 * 1_500)
    assert estimated.subsets[1].gpu_s == pytest.approx(5_000 + 600 + 0.8 * 1_500)


def test_one_after_the_other_a_pool_is_idle_while_a_subset_without_it_is_built():
    estimated = estimate_build(mixed_config(), mixed_rates(), MIXED, apart=True)
    assert [stream.bottleneck for stream in estimated.streams] == ["captioner", "segmenter"]
    assert estimated.wall_s == estimated.apart_s == pytest.approx(APART_S)
    assert idle(estimated) == pytest.approx(
        {"captioner": 5 * APART_S - 10_000, "judge": APART_S - 1_100, "segmenter": APART_S - 1_500}
    )


def test_idle_time_counts_from_the_end_of_the_first_start_up_and_later_ones_are_idle():
    plain = estimate_build(mixed_config(), mixed_rates(), MIXED)
    slow = estimate_build(mixed_config(), mixed_rates(load_s=60), MIXED)
    assert slow.wall_s == pytest.approx(plain.wall_s + 60) and idle(slow) == pytest.approx(idle(plain))
    plain = estimate_build(mixed_config(), mixed_rates(), MIXED, apart=True)
    slow = estimate_build(mixed_config(), mixed_rates(load_s=60), MIXED, apart=True)
    assert slow.wall_s == pytest.approx(plain.wall_s + 120)
    more = {title: seconds - idle(plain)[title] for title, seconds in idle(slow).items()}
    assert more == pytest.approx({"captioner": 5 * 60, "judge": 60, "segmenter": 60})


def test_a_gpu_that_another_subset_uses_meanwhile_is_not_idle():
    """Two captioners of which the one GPU holds one at a time."""
    own = [{"stage": "caption", "captioner": {"name": "gar", "num_gpus": 1, "options": {"seed": 1}}}]
    source = {"source": "sa1b", "paths": ["/a.tar"]}
    subsets = {"one": {"sources": source, "recipe": own}, "two": {"sources": source, "recipe": ["caption"]}}
    two = config(coconut=None, subsets=subsets, captioner={"name": "gar", "num_gpus": 1})
    known = mixed_rates()
    caption = {name: StageRate(1, 0, 0.05 * (name == "caption")) for name in ("source", "caption", "write")}
    for name in subsets:
        known.subsets[name] = mixed_rates().subsets["sa1b"]
        known.subsets[name].stages = caption
    estimated = estimate_build(two, known, dict.fromkeys(subsets, Size(100, 4_000)), gpus=1)
    assert [stream.subsets for stream in estimated.streams] == [["one"], ["two"]]
    assert idle(estimated) == {"subsets.one.recipe.caption.captioner": 0, "captioner": 0}


def test_subsets_follow_one_another_where_the_gpus_do_not_hold_all_pools():
    names = list(MIXED)
    assert find_groups(mixed_config(), names, 7, None, balanced=False) == [names]
    other = {"stage": "caption", "captioner": {"name": "gar", "num_gpus": 2, "concurrency": [1, 1]}}
    large = mixed_config(
        sa1b=None,
        subsets={"big": {"sources": {"source": "sa1b", "paths": ["/a.tar"]}, "recipe": [other]}},
    )
    assert find_groups(large, ["coconut", "big"], 7, None, balanced=False) == [["coconut"], ["big"]]
    assert find_groups(large, ["coconut", "big"], 8, None, balanced=False) == [["coconut", "big"]]
    assert find_groups(large, ["coconut", "big"], 4, None, balanced=True) == [["coconut", "big"]]


def test_cores_are_those_of_the_cluster_but_at_least_what_each_subset_needs():
    own = {"stage": "caption", "captioner": {"name": "classical", "num_cpus": 3, "concurrency": [1, 1]}}
    two = config(
        captioner={"name": "classical", "num_cpus": 4, "concurrency": [1, 1]},
        judge={"name": "lexical"},
        subsets={"other": {"sources": {"source": "sa1b", "paths": ["/a.tar"]}, "recipe": [own]}},
    )
    names = ["coconut", "other"]
    assert find_groups(two, names, 0, 2, balanced=False) == [["coconut"], ["other"]]
    assert find_groups(two, names, 0, 16, balanced=False) == [names]
    assert find_groups(two, names, 0, None, balanced=False) == [names]


def test_the_pools_of_both_recipes_are_one_chain():
    pools = find_pools(mixed_config(), list(MIXED))
    assert [pool.title for pool in pools] == ["reading", "captioner", "judge", "segmenter", "writing"]
    judge = pools[2]
    assert judge.stages == {"coconut": ("verify_category",), "sa1b": ("extract_category",)}
    assert (judge.num_gpus, judge.min_actors, judge.max_actors, judge.places) == (1, 1, 1, ("judge",))


def test_a_subset_alone_is_estimated_as_in_a_build_of_its_own():
    size = {"sa1b": MIXED["sa1b"]}
    alone = estimate_build(mixed_config(), mixed_rates(), size)
    both = estimate_build(mixed_config(), mixed_rates(), MIXED)
    assert alone.wall_s == alone.apart_s == alone.subsets[0].wall_s == both.subsets[1].wall_s


def test_advice_says_how_to_share_out_the_gpus():
    wasteful = mixed_config(
        captioner={"name": "gar", "num_gpus": 1, "concurrency": [3, 3]},
        segmenter={"name": "sam3", "num_gpus": 1, "concurrency": [3, 3]},
    )
    configured = estimate_build(wasteful, mixed_rates(), MIXED)
    balanced = estimate_build(wasteful, mixed_rates(), MIXED, balanced=True)
    first, *rest = advise(configured, balanced)
    assert first == (
        f"Give captioner 5, judge 1 and segmenter 1 of the 7 GPUs: the build then takes "
        f"{duration(balanced.wall_s)} instead of {duration(configured.wall_s)}."
    )
    assert not rest


def test_advice_lets_two_models_that_are_mostly_idle_share_a_gpu():
    known = mixed_rates()
    known.subsets["sa1b"].stages["agree_with_segmenter"] = StageRate(1.0, 0.0, 0.003)
    configured = estimate_build(mixed_config(), known, MIXED)
    (line,) = advise(configured, configured)
    assert line == (
        "If judge and segmenter fit into the memory of one GPU together, give each half of one "
        f"(`num_gpus: 0.5`), and captioner 6: that saves about {duration(10_000 / 5 - 10_000 / 6)}."
    )
    known.subsets["sa1b"].stages["agree_with_segmenter"] = StageRate(1.0, 0.0, 0.005)
    full = estimate_build(mixed_config(), known, MIXED)
    assert advise(full, full) == [], "1,600 s of 1,667 s leave too little to spare"


def test_nothing_is_advised_that_saves_less_than_a_twentieth():
    configured = estimate_build(mixed_config(), mixed_rates(), MIXED)
    assert advise(configured, configured) == []


def test_advice_names_the_gpus_with_which_subsets_are_built_side_by_side():
    apart = estimate_build(mixed_config(), mixed_rates(), MIXED, apart=True)
    together = estimate_build(mixed_config(), mixed_rates(), MIXED)
    (line,) = advise(apart, apart, together)
    assert line == "With 7 GPUs the subsets are built side by side, in 35 min instead of 45 min."


def test_pools_without_a_gpu_have_no_share_of_the_gpus_and_titles_are_short():
    known = measured(caption=StageRate(1.0, 0.0, 0.1))
    plain = config(captioner={"name": "classical"}, judge={"name": "lexical"})
    estimated = estimate_build(plain, known, {"coconut": Size(100, 1_000)})
    assert not estimated.gpus and advise(estimated, estimated) == []
    assert (
        short("subsets.mine.recipe.again.judge") == "again.judge"
        and short("captioner+judge") == "captioner + judge"
    )
