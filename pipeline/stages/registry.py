"""Every stage, registered once. Who shows a corpus finds titles, reasons, scores and thresholds here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from ...schemas.recipe import EntryError, parse, stages_in
from ...schemas.records import SCORES
from ...schemas.strict import did_you_mean
from ..io import own_modules
from .agreement import AgreeWithSegmenter
from .automatic_masks import AutomaticMasks
from .base import FilterStage, ModelStage, Stage, Threshold
from .box_masks import BoxMasks
from .caption import Caption
from .category import ExtractCategory, VerifyCategory
from .composite import COMPOSITES
from .masks import UsableMasks, WholeObjects
from .text import CleanText

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        AutomaticMasks,
        BoxMasks,
        UsableMasks,
        WholeObjects,
        Caption,
        VerifyCategory,
        ExtractCategory,
        AgreeWithSegmenter,
        CleanText,
    )
}
"""By name, in an order in which recipes may use them."""

THRESHOLDS: dict[str, Threshold] = {each.key: each for stage in STAGES.values() for each in stage.thresholds}
"""Every threshold that a stage decides by, by its key in the configuration."""

FIELDS = ("mask", "caption", "category", "core_category")
"""What stages may need and give: fields of a region, and its mask."""

_ALLOWED: set[str] = set()


def allow_stages(configured: Iterable[Any]) -> None:
    """Let stages of the user's own, such as "mystages:Sharp", be imported from now on.

    Whoever reads a configuration that the user has given says so. A corpus that somebody else has built names
    stages as well, and reading it must run no code.

    Args:
        configured: the subsets of a configuration, or what stands in their place in a file.
    """
    for subset in configured:
        recipe = subset.get("recipe") if isinstance(subset, dict) else getattr(subset, "recipe", None)
        if isinstance(recipe, list):
            try:
                kinds = {entry.kind for entry in stages_in(parse(recipe))}
            except EntryError:  # said where the configuration is checked
                continue
            _ALLOWED.update(kind for kind in kinds if ":" in kind)


def find_stage(kind: str, where: str = "recipe") -> type[Stage]:
    """The class of a kind: one of ours, or a class of the user's own as `module:Class` (`own_modules`).

    Raises:
        ConfigError: there is no such stage, and it names the choices; or the class is no whole stage.
    """
    if kind in STAGES:
        return STAGES[kind]
    if kind not in _ALLOWED:
        raise ConfigError(
            f"{where}: unknown stage {kind!r}; {did_you_mean(kind, STAGES)}choose from {', '.join(STAGES)}, "
            "or give your own as 'package.module:Class' (docs/recipes.md)"
        )
    found = own_modules.load_class(kind, where)
    at = f"{where}: {kind!r} in {own_modules.file_of(found)}"
    if not issubclass(found, FilterStage | ModelStage):
        raise ConfigError(f"{at} is not a stage; derive it from FilterStage or ModelStage (docs/recipes.md)")
    lacking = sorted(found.__abstractmethods__)
    if issubclass(found, ModelStage):
        lacking += [name for name in ("protocol", "evidence") if not hasattr(found, name)]
    if inspect.isabstract(found) or lacking:
        named = ", ".join(f"`{name}`" for name in lacking)
        raise ConfigError(f"{at} has no {named}; add what is missing (docs/recipes.md)")
    for attribute, known in (("needs", FIELDS), ("gives", FIELDS), ("scores", tuple(SCORES))):
        if unknown := [each for each in getattr(found, attribute) if each not in known]:
            raise ConfigError(
                f"{at}: `{attribute}` has {unknown[0]!r}, but it may only have {', '.join(known)}"
            )
    return found


def known_stage(kind: str) -> type[Stage] | None:
    """The class of a kind for whoever shows a corpus; None for one that is not ours: it is not imported."""
    return STAGES.get(kind) or COMPOSITES.get(kind)


def stage_title(name: str) -> str:
    """A stage's name or id as people read it; also that of the ends of a recipe, `source` and `write`."""
    stage = known_stage(name)
    return (stage and stage.title) or name.replace("_", " ")


def configured_kinds(config: BuildConfig, subset: str) -> dict[str, str]:
    """The kind of each stage of a subset by its id, of a recipe that is a list; empty for another one.

    Nothing is imported. Members of composites are there too.
    """
    recipe = config.subsets[subset].recipe if subset in config.subsets else None
    return {each.id: each.kind for each in stages_in(parse(recipe))} if isinstance(recipe, list) else {}
