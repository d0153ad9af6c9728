"""Recipes: ordered lists of stages, by name. `verify` and `identify` are the paper's two."""

from __future__ import annotations

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from ..io import benchmark_photos
from ..sources.registry import recipe_name
from .base import Stage
from .evidence import digest
from .registry import STAGES

RECIPES: dict[str, tuple[str, ...]] = {
    "verify": ("usable_masks", "caption", "verify_category", "clean_text"),
    "identify": (
        "usable_masks",
        "whole_objects",
        "caption",
        "extract_category",
        "agree_with_segmenter",
        "clean_text",
    ),
}
"""`verify` is for sources that annotate a category: the caption has to describe it. `identify` is for masks
without one: only whole objects, the category is named from the caption, and a segmenter has to find it."""

RECIPE_VERSION = 1
"""Raised when a filter's or a writer's code changes what is kept; units of another version are rebuilt."""


def build_recipe(name: str, config: BuildConfig) -> list[Stage]:
    """The stages of a recipe, in order."""
    stages: list[Stage] = []
    for stage in RECIPES[name]:
        stages.append(STAGES[stage](config, stages))
    return stages


def recipe_of(config: BuildConfig, subset: str) -> list[Stage]:
    """The stages that a subset's units pass through: those of its recipe, or its sources' default.

    Raises:
        ConfigError: there is no such recipe, or the sources have different defaults.
    """
    name = recipe_name(config, subset)
    if name not in RECIPES:
        raise ConfigError(
            f"subsets.{subset}.recipe: unknown recipe {name!r}; choose from {', '.join(RECIPES)}"
        )
    return build_recipe(name, config)


def recipe_digest(stages: list[Stage], config: BuildConfig) -> str:
    """Identifies everything that decides what a unit's shard holds, apart from the source.

    Raises:
        ConfigError: a backend cannot be imported, or its options or its checkpoint do not fit; or photos of
            benchmarks cannot be read.
    """
    parts = [RECIPE_VERSION, [stage.digest() for stage in stages], config.limits.model_dump()]
    if config.benchmarks.photos:
        known = benchmark_photos.load_pictures(tuple(config.benchmarks.photos), config.limits.max_pixels)
        parts.append(known.digest)
    return digest(*parts)
