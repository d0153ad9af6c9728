"""The operators of the stream that builds a subset, known without weights or the packages of models."""

from __future__ import annotations

import msgspec

from ....schemas.config import BuildConfig
from ...sources.protocols import SOURCE_STAGE
from ...stages.base import ModelStage
from ...stages.recipes import recipe_of
from .. import operators


class Pool(msgspec.Struct, frozen=True):
    """One operator of the stream: a pool of equal actors.

    Attributes:
        name: its model stages joined by "+", or else "source" or "write".
        stages: the names of all its stages, in order.
        places: where the backends of its model stages stand in the configuration, in order.
        num_gpus, num_cpus: what one actor holds.
        min_actors, max_actors: bounds from the configuration.
    """

    name: str
    stages: tuple[str, ...]
    places: tuple[str, ...]
    num_gpus: float
    num_cpus: float
    min_actors: int
    max_actors: int


def find_pools(config: BuildConfig, subset: str) -> list[Pool]:
    """The pools that build a subset, in the stream's order."""
    pools = []
    for step in operators.steps_of(recipe_of(config, subset), config):
        resources = operators.resources_of(step, config)
        names = tuple(stage if isinstance(stage, str) else stage.name for stage in step)
        models = [stage for stage in step if isinstance(stage, ModelStage)]
        name = "+".join(stage.name for stage in models)
        pools.append(
            Pool(
                name=name or (names[0] if names[0] == SOURCE_STAGE else names[-1]),
                stages=names,
                places=tuple(stage.place for stage in models),
                num_gpus=float(resources["num_gpus"]),
                num_cpus=float(resources["num_cpus"]),
                min_actors=resources["concurrency"][0],
                max_actors=resources["concurrency"][1],
            )
        )
    return pools
