"""The operators of a Ray Data stream: which stages share a pool of actors, in one recipe and in several.

    coconut:  [source ...] -> [captioner] -> [judge] ----------------> [text + write]
    sa1b:     [source ...] -> [captioner] -> [judge] -> [segmenter] -> [text + write]
    both:     [source ...] -> [captioner] -> [judge] -> [segmenter] -> [text + write]

Subsets that are built side by side share one chain of operators, which has the pools of each recipe in that
recipe's order. A unit passes a pool that its recipe does not use as it is. Nothing here needs Ray, so whoever
estimates a build sees the same pools.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from typing import Any, NamedTuple, TypeVar

from ...schemas.config import BuildConfig
from ..corpus import writer
from ..sources.protocols import SOURCE_STAGE
from ..stages.base import ModelStage, Stage
from ..stages.evidence import digest

Step = list[Stage | str]
"""Stages that run one after the other in the same actors; "source" and "write" are the ends of a recipe."""

IO_CONCURRENCY = (1, 8)
"""Actors that read and write next to models on GPUs, where `io.concurrency` says nothing."""

_MOST_STATES = 50_000
"""Of the search for the shortest chain; above that, recipes are merged one after the other."""

Key = TypeVar("Key")


class Operator(NamedTuple):
    """A pool of equal actors.

    Attributes:
        steps: by subset, the stages that the actors run on its units; the units of other subsets pass.
        resources: Ray's arguments for the actors; see `resources_of`.
    """

    steps: dict[str, Step]
    resources: dict[str, Any]

    @property
    def stages(self) -> Step:
        """All stages, the first subset's first; of stages with the same name, the first."""
        found = {name_of_stage(stage): stage for step in self.steps.values() for stage in step}
        return list(found.values())


def name_of_stage(stage: Stage | str) -> str:
    """A stage's id in its recipe, or the word for an end of a recipe."""
    return stage if isinstance(stage, str) else stage.name


def operators_of(recipes: Mapping[str, Sequence[Stage]], config: BuildConfig) -> list[Operator]:
    """The chain of operators that builds these subsets side by side.

    Args:
        recipes: the stages of each subset, by its name.
        config: of the build.

    Returns:
        Of all chains that have the pools of each recipe in its order, one with the fewest GPUs, and of
        those one with the fewest pools. Of one subset, the chain is that of its recipe.
    """
    steps = {subset: steps_of(stages, config) for subset, stages in recipes.items()}
    resources: dict[str, dict[str, Any]] = {}
    orders: dict[str, list[str]] = {}
    for subset, own in steps.items():
        orders[subset] = [_key_of(step, config) for step in own]
        resources |= {_key_of(step, config): resources_of(step, config) for step in own}
    costs = {key: _cost(asked) for key, asked in resources.items()}
    merged = merge_orders(list(orders.values()), costs)
    operators = [Operator({}, resources[key]) for key in merged]
    for subset, order in orders.items():
        for place, step in zip(find_places(order, merged), steps[subset], strict=True):
            operators[place].steps[subset] = step
    return [each for each in operators if each.steps]


def steps_of(stages: Sequence[Stage], config: BuildConfig) -> list[Step]:
    """Group a recipe into the steps that actors of their own run.

    Each model stage starts a step of its own, and filters join the one before them. Neighbors without a
    GPU that ask for the same resources and the same environment share their actors: on CPUs alone a unit then
    runs through all stages in one process, and nothing is sent between them. Reading and writing take the
    number of actors of their neighbor, unless `io.concurrency` says how many they have.
    """
    apart: list[Step] = [[SOURCE_STAGE]]
    for stage in [*stages, writer.WRITE_STAGE]:
        if isinstance(stage, ModelStage) or (isinstance(apart[-1][-1], ModelStage)):
            apart.append([stage])
        else:
            apart[-1].append(stage)
    steps: list[Step] = []
    for step in apart:
        if steps and _shares_actors(steps[-1], step, config):
            steps[-1] += step
        else:
            steps.append(step)
    return steps


def _shares_actors(before: Step, after: Step, config: BuildConfig) -> bool:
    first, second = resources_of(before, config), resources_of(after, config)
    if config.io.concurrency is None and not (_has_model(before) and _has_model(after)):
        first = first | {"concurrency": second["concurrency"]}
    return not second["num_gpus"] and first == second


def _has_model(step: Step) -> bool:
    return any(isinstance(stage, ModelStage) for stage in step)


def resources_of(step: Step, config: BuildConfig) -> dict[str, Any]:
    """Ray's arguments for the actors of a step: those of its model, or those for reading and writing."""
    model = next((stage for stage in step if isinstance(stage, ModelStage)), None)
    asks = config.io if model is None else model.backend
    return {
        "runtime_env": getattr(asks, "runtime_env", {}),
        "num_cpus": asks.num_cpus,
        "num_gpus": getattr(asks, "num_gpus", 0),
        "concurrency": tuple(asks.concurrency or IO_CONCURRENCY),
    }


def _key_of(step: Step, config: BuildConfig) -> str:
    """Steps with the same key can have the same actors: one backend on GPUs, or equal resources without."""
    for stage in step:
        if isinstance(stage, ModelStage) and stage.backend.num_gpus:
            return digest(stage.protocol, stage.backend.model_dump(mode="json"))
    return digest(resources_of(step, config))


def _cost(resources: Mapping[str, Any]) -> tuple[float, float]:
    """GPUs that the smallest pool holds, and CPUs."""
    fewest = resources["concurrency"][0]
    return resources["num_gpus"] * fewest, resources["num_cpus"] * fewest


# One order for several.


def merge_orders(orders: Sequence[Sequence[Key]], costs: Mapping[Key, tuple[float, float]]) -> list[Key]:
    """The cheapest sequence that contains each of the given ones in its order (a common supersequence).

    A key is in it twice only where an order has it twice, or where the orders of two keys conflict.

    Args:
        orders: sequences of keys.
        costs: of a key, GPUs and CPUs. GPUs are saved first, then keys, then CPUs.
    """
    distinct = list(dict.fromkeys(tuple(order) for order in orders))
    if len(distinct) > 2 and math.prod(len(order) + 1 for order in distinct) > _MOST_STATES:
        return reduce(lambda before, order: merge_orders([before, order], costs), map(list, distinct))

    @cache
    def cheapest(at: tuple[int, ...]) -> tuple[tuple[float, int, float], list[Key]]:
        """The rest of the sequence, with its cost, when that many keys of each order are in it."""
        waiting = dict.fromkeys(
            order[place] for order, place in zip(distinct, at, strict=True) if place < len(order)
        )
        found = []
        for key in waiting:
            then = tuple(
                place + (place < len(order) and order[place] == key)
                for order, place in zip(distinct, at, strict=True)
            )
            (gpus, keys, cpus), rest = cheapest(then)
            more_gpus, more_cpus = costs[key]
            found.append(((gpus + more_gpus, keys + 1, cpus + more_cpus), [key, *rest]))
        return min(found, key=lambda each: each[0]) if found else ((0.0, 0, 0.0), [])

    return cheapest((0,) * len(distinct))[1]


def find_places(order: Sequence[Key], merged: Sequence[Key]) -> list[int]:
    """Where each key of an order is in a sequence that contains the order: the earliest place."""
    places: list[int] = []
    for key in order:
        start = places[-1] + 1 if places else 0
        places.append(next(place for place in range(start, len(merged)) if merged[place] == key))
    return places


def interleave(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """(subset, number of its unit), so that each subset is spread evenly over the whole.

    Args:
        counts: units of each subset.
    """
    turns = [
        ((2 * number + 1) / (2 * count), subset, number)
        for subset, count in counts.items()
        for number in range(count)
    ]
    order = list(counts)
    for _, subset, number in sorted(turns, key=lambda turn: (turn[0], order.index(turn[1]))):
        yield subset, number


# What fits at once.


def needed_resources(operators: Sequence[Operator]) -> dict[str, float]:
    """CPUs and GPUs that the smallest pools of all operators hold at once."""
    costs = [_cost(operator.resources) for operator in operators]
    return {"CPU": sum(cpus for _, cpus in costs), "GPU": sum(gpus for gpus, _ in costs)}


def fits(needed: Mapping[str, float], available: Mapping[str, float]) -> bool:
    """Whether there is at least as much of everything as is needed."""
    return all(amount <= available.get(name, 0) + 1e-6 for name, amount in needed.items())


def group_subsets(
    recipes: Mapping[str, Sequence[Stage]], config: BuildConfig, available: Mapping[str, float]
) -> list[list[str]]:
    """Which subsets are built side by side: as many as there are resources for, in the order of the subsets.

    A subset for which there is not enough is a group of its own.

    Args:
        recipes: the stages of each subset, by its name.
        config: of the build.
        available: the "CPU" and "GPU" that the cluster has.
    """
    groups: list[list[str]] = []
    for subset in recipes:
        for group in groups:
            together = {each: recipes[each] for each in [*group, subset]}
            if fits(needed_resources(operators_of(together, config)), available):
                group.append(subset)
                break
        else:
            groups.append([subset])
    return groups
