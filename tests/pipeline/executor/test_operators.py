"""Which stages share a pool of actors, in one recipe and in several, without Ray."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.executor.operators import (
    find_places,
    group_subsets,
    interleave,
    merge_orders,
    name_of_stage,
    needed_resources,
    operators_of,
    steps_of,
)
from paracaption.pipeline.stages.recipes import recipe_of
from paracaption.schemas.config import BuildConfig
from tests.building import config_of
from tests.pipeline.executor.conformance import SAMPLE

FREE: dict[str, tuple[float, float]] = dict.fromkeys("abcdefgh", (0.0, 1.0))


def is_subsequence(order: list[str], merged: list[str]) -> bool:
    rest = iter(merged)
    return all(key in rest for key in order)


orders = st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), min_size=1, max_size=4)


@given(orders)
@settings(deadline=None)
def test_the_merged_order_contains_every_recipe_and_uses_all_that_it_has(given):
    merged = merge_orders(given, FREE)
    assert all(is_subsequence(order, merged) for order in given)
    used = {place for order in given for place in find_places(order, merged)}
    assert used == set(range(len(merged)))
    assert len(merged) >= max(map(len, given))


@given(st.permutations("abcdef"), st.lists(st.sets(st.sampled_from("abcdef")), min_size=1, max_size=5))
@settings(deadline=None)
def test_no_pool_is_there_twice_where_the_orders_agree(whole, parts):
    given = [[key for key in whole if key in part] for part in parts]
    merged = merge_orders(given, FREE)
    assert sorted(merged) == sorted(set().union(*parts))


@given(orders)
@settings(deadline=None)
def test_recipes_that_are_too_many_for_the_shortest_order_are_merged_too(given):
    many = [*given, *([*order, letter] for order in given for letter in "abcdef"), *map(list, FREE)]
    merged = merge_orders(many, FREE)
    assert all(is_subsequence(order, merged) for order in many)


def test_where_orders_conflict_the_pool_that_is_there_twice_is_the_one_without_a_gpu():
    costs = {"captioner": (6.0, 6.0), "judge": (0.0, 1.0)}
    given = [["captioner", "judge"], ["judge", "captioner"]]
    assert merge_orders(given, costs) == ["judge", "captioner", "judge"]


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 30), max_size=3))
@settings(deadline=None)
def test_units_of_all_subsets_are_spread_evenly(counts):
    turns = list(interleave(counts))
    for subset, count in counts.items():
        assert [number for each, number in turns if each == subset] == list(range(count))
    for start in range(len(turns) + 1):
        for subset, count in counts.items():
            taken = sum(each == subset for each, _ in turns[:start])
            assert abs(taken - count * start / len(turns)) <= len(counts) if turns else True


# Recipes.


def entry(name: str, kind: str, protocol: str = "", **backend: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"stage": kind, "id": name}
    if protocol:
        cls = {"captioner": "InstantCaptioner", "judge": "InstantJudge", "segmenter": "InstantSegmenter"}
        made[protocol] = {"name": f"tests.backends:{cls[protocol]}", "options": {"log": name}, **backend}
    return made


def with_gpus(config: BuildConfig, **recipes: list[Any]) -> BuildConfig:
    """Two subsets whose models hold a GPU each, with recipes of their own where these are given."""
    values = config.model_dump(mode="json")
    for protocol in ("captioner", "judge", "segmenter"):
        values[protocol] |= {"num_gpus": 1, "concurrency": [1, 2]}
    for subset, recipe in recipes.items():
        values["subsets"][subset]["recipe"] = recipe
    return BuildConfig.model_validate(values)


@pytest.fixture
def both(tmp_path, coconut, sa1b) -> BuildConfig:
    return config_of(tmp_path / "out", coconut=coconut, sa1b=sa1b)


def chain(config: BuildConfig) -> list[dict[str, str]]:
    """The operators of all subsets: by subset, the stages in words."""
    recipes = {subset: recipe_of(config, subset) for subset in config.subsets}
    return [
        {subset: " ".join(map(name_of_stage, step)) for subset, step in operator.steps.items()}
        for operator in operators_of(recipes, config)
    ]


def needed(config: BuildConfig) -> float:
    return needed_resources(operators_of({each: recipe_of(config, each) for each in config.subsets}, config))[
        "GPU"
    ]


def test_the_papers_two_recipes_share_captioner_and_judge_and_one_passes_the_segmenter(both):
    assert chain(with_gpus(both)) == [
        {"coconut": "source usable_masks", "sa1b": "source usable_masks whole_objects"},
        {"coconut": "caption", "sa1b": "caption"},
        {"coconut": "verify_category", "sa1b": "extract_category"},
        {"sa1b": "agree_with_segmenter"},
        {"coconut": "clean_text write", "sa1b": "clean_text write"},
    ]
    assert needed(with_gpus(both)) == 3


def test_on_cpus_alone_all_stages_of_all_subsets_are_one_pool():
    config = load_config(SAMPLE)
    (operator,) = chain(config)
    assert set(operator) == set(config.subsets)
    assert all(stages.startswith("source ") and stages.endswith(" write") for stages in operator.values())


def test_a_chain_of_one_subset_is_its_recipe(both):
    config = with_gpus(both)
    recipe = recipe_of(config, "sa1b")
    chain = operators_of({"sa1b": recipe}, config)
    assert [each.steps["sa1b"] for each in chain] == steps_of(recipe, config)


def test_recipes_in_another_order_each_keep_theirs_and_one_pool_is_there_twice(both):
    draft = entry("draft", "caption", "captioner", num_gpus=1)
    judged_first = [draft, "verify_category", "caption", "clean_text"]
    config = with_gpus(both, coconut=judged_first)
    found = chain(config)
    assert [each["coconut"] for each in found if "coconut" in each] == [
        "source",
        "draft",
        "verify_category",
        "caption",
        "clean_text write",
    ]
    assert [each["sa1b"] for each in found if "sa1b" in each] == [
        "source usable_masks whole_objects",
        "caption",
        "extract_category",
        "agree_with_segmenter",
        "clean_text write",
    ]
    assert needed(config) == len({"draft", "captioner", "judge", "segmenter"}) + 1


def test_a_captioner_of_its_own_is_a_pool_that_the_other_subset_passes(both):
    own = entry("own", "caption", "captioner", num_gpus=1)
    config = with_gpus(both, sa1b=["usable_masks", own, "extract_category", "clean_text"])
    found = chain(config)
    assert {"sa1b": "own"} in found and {"coconut": "caption"} in found
    assert {"coconut": "verify_category", "sa1b": "extract_category"} in found
    assert needed(config) == 3


def test_the_same_backend_is_one_pool_wherever_it_stands_in_the_configuration(both):
    config = with_gpus(both)
    same = {"stage": "caption", "captioner": config.captioner.model_dump(mode="json")}
    config = with_gpus(both, sa1b=[same, "extract_category"])
    assert {"coconut": "caption", "sa1b": "caption"} in chain(config)


# What is built side by side.


def groups(config: BuildConfig, gpus: float, cpus: float = 16) -> list[list[str]]:
    recipes = {subset: recipe_of(config, subset) for subset in config.subsets}
    return group_subsets(recipes, config, {"GPU": gpus, "CPU": cpus})


def test_subsets_that_need_more_gpus_together_than_there_are_follow_one_another(both):
    shared = with_gpus(both)
    assert groups(shared, 3) == [["coconut", "sa1b"]]
    own = entry("own", "caption", "captioner", num_gpus=2)
    config = with_gpus(both, sa1b=["usable_masks", own, "extract_category", "clean_text"])
    assert groups(config, 4) == [["coconut", "sa1b"]]
    assert groups(config, 3) == [["coconut"], ["sa1b"]]
    assert groups(config, 1) == [["coconut"], ["sa1b"]]
    assert groups(shared, 3, cpus=0) == [["coconut"], ["sa1b"]]


def test_of_three_subsets_those_are_side_by_side_that_fit(both):
    values = with_gpus(both).model_dump(mode="json")
    own = entry("own", "caption", "captioner", num_gpus=1)
    values["subsets"]["mine"] = {**values["subsets"]["sa1b"], "recipe": ["usable_masks", own]}
    values["subsets"]["again"] = values["subsets"]["coconut"]
    config = BuildConfig.model_validate(values)
    assert groups(config, 4) == [["coconut", "sa1b", "mine", "again"]]
    assert groups(config, 3) == [["coconut", "sa1b", "again"], ["mine"]]
