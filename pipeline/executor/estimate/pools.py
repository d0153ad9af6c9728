"""The operators of the streams that build the subsets, known without weights or the packages of models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from ....schemas.config import BuildConfig
from ...corpus.writer import WRITE_STAGE
from ...sources.protocols import SOURCE_STAGE
from ...stages.base import ModelStage
from ...stages.recipes import recipe_of
from ..operators import group_subsets, name_of_stage, needed_resources, operators_of

READING, WRITING = "reading", "writing"
"""Titles of the pools that ask no model."""


class Pool(msgspec.Struct, frozen=True):
    """One operator of a stream: a pool of equal actors.

    Attributes:
        name: its model stages joined by "+", or else "source" or "write".
        title: the places of its models joined by "+", or else "reading" or "writing"; the same in every
            stream that has the pool, and unique within a stream.
        stages: by subset, the names of the stages that its actors run, in order.
        places: where the backends of its model stages stand in the configuration, in order.
        num_gpus, num_cpus: what one actor holds.
        min_actors, max_actors: bounds from the configuration.
    """

    name: str
    title: str
    stages: dict[str, tuple[str, ...]]
    places: tuple[str, ...]
    num_gpus: float
    num_cpus: float
    min_actors: int
    max_actors: int


def find_pools(config: BuildConfig, subsets: Sequence[str]) -> list[Pool]:
    """The pools of the stream that builds these subsets side by side, in the stream's order."""
    pools: list[Pool] = []
    titles: Counter[str] = Counter()
    for operator in operators_of({subset: recipe_of(config, subset) for subset in subsets}, config):
        models = [stage for stage in operator.stages if isinstance(stage, ModelStage)]
        places = tuple(dict.fromkeys(stage.place for stage in models))
        reads = any(SOURCE_STAGE in step for step in operator.steps.values())
        title = "+".join(places) or (READING if reads else WRITING)
        titles[title] += 1
        fewest, most = operator.resources["concurrency"]
        pools.append(
            Pool(
                name="+".join(stage.name for stage in models) or (SOURCE_STAGE if reads else WRITE_STAGE),
                title=title if titles[title] == 1 else f"{title} ({titles[title]})",
                stages={each: tuple(map(name_of_stage, step)) for each, step in operator.steps.items()},
                places=places,
                num_gpus=float(operator.resources["num_gpus"]),
                num_cpus=float(operator.resources["num_cpus"]),
                min_actors=fewest,
                max_actors=most,
            )
        )
    return pools


def find_groups(
    config: BuildConfig, subsets: Sequence[str], gpus: float, cpus: float | None, balanced: bool
) -> list[list[str]]:
    """Which subsets are built side by side, in the order of the build; groups follow one another.

    Args:
        config: gives the recipes and the smallest pools.
        subsets: to build, in order.
        gpus: of the cluster.
        cpus: cores of the cluster; None has as many as the pools ask for. On one machine Ray admits the
            smallest pools of each subset alone however few cores it has.
        balanced: the smallest pools have one actor each, instead of the least of `concurrency`.
    """
    if balanced and sum(pool.num_gpus for pool in find_pools(config, subsets)) <= gpus:
        return [list(subsets)]
    recipes = {subset: recipe_of(config, subset) for subset in subsets}
    alone = [needed_resources(operators_of({subset: recipes[subset]}, config)) for subset in subsets]
    cores = math.inf if cpus is None else max([cpus, *(needed["CPU"] for needed in alone)])
    return group_subsets(recipes, config, {"GPU": gpus, "CPU": cores})
