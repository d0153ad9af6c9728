"""Recipes: ordered lists of stages. `verify` and `identify` are the paper's; a subset may have its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ...schemas.config import Backend, BuildConfig, Text
from ...schemas.errors import ConfigError
from ...schemas.recipe import CompositeEntry, Entry, EntryError, StageEntry, parse, plain, stages_in, walk
from ..io import benchmark_photos
from ..models.registry import METHODS
from ..sources.registry import find_mask_stage, find_source, recipe_name
from .base import ModelStage, Stage
from .composite import COMPOSITES
from .evidence import digest
from .options import take_options
from .registry import STAGES, find_stage, known_stage
from .text import CleanText

RECIPES: dict[str, tuple[Any, ...]] = {
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
without one: only whole objects, the category is named from the caption, and a segmenter has to find it.

For sources without masks, the stage that makes them comes first (`Source.mask_stage`)."""

RECIPE_VERSION = 1
"""Raised when a filter's or a writer's code changes what is kept; units of another version are rebuilt."""

_Read = dict[str, tuple[ModelStage, ...]]
"""What a region has at a point of a recipe: a field -> the model stages whose answers it may be from."""


def build_recipe(name: str, config: BuildConfig) -> list[Stage]:
    """The stages of one of `RECIPES`, in order."""
    return _Builder(config, "recipe").build(parse(RECIPES[name]))


def recipe_of(config: BuildConfig, subset: str) -> list[Stage]:
    """The stages that a subset's units pass through: those of its recipe, or its sources' default.

    The members of a composite stage come before it. `shown_stages` leaves them out.

    Raises:
        ConfigError: there is no such recipe, the sources have different defaults, a stage or an option is
            unknown, or a stage needs what no stage before it gives.
    """
    builder = _Builder(config, f"subsets.{subset}.recipe")
    entries, mask_stage = entries_of(config, subset), find_mask_stage(config, subset)
    return builder.build(entries, _without_categories(config, subset), mask_stage)


def entries_of(config: BuildConfig, subset: str) -> list[Entry]:
    """The entries of a subset's recipe: of one that is a name, with the stage that makes the masks if the
    sources bring none. No stage of the user's own is imported.

    Raises:
        ConfigError: there is no such recipe, or the sources have different defaults, or only some have masks.
    """
    mask_stage, _ = find_mask_stage(config, subset)
    found = recipe_name(config, subset)
    if isinstance(found, list):
        try:
            return parse(found)
        except EntryError as error:
            raise ConfigError(f"subsets.{subset}.{error}") from error
    if found not in RECIPES:
        raise ConfigError(
            f"subsets.{subset}.recipe: unknown recipe {found!r}; choose from {', '.join(RECIPES)}, or list "
            "its stages (docs/recipes.md)"
        )
    return parse([mask_stage, *RECIPES[found]] if mask_stage else RECIPES[found])


def shown_stages(config: BuildConfig, subset: str) -> dict[str, str]:
    """The lines of a subset's funnel: the id of each stage that is no member of another -> its kind.

    Raises:
        ConfigError: see `entries_of`.
    """
    return {entry.id: entry.kind for entry in entries_of(config, subset)}


def stage_kinds(config: BuildConfig, subset: str) -> dict[str, str]:
    """The kind of every stage of a subset by its id, members too, in the order in which they run.

    Raises:
        ConfigError: see `entries_of`.
    """
    return {entry.id: entry.kind for entry in walk(entries_of(config, subset))}


def text_rules(config: BuildConfig, subset: str) -> Text | None:
    """The rules that the kept captions of a subset obey: those of the last `clean_text` of its recipe.

    None if there is none, or if a captioner comes after it. Those of the configuration if it does not say how
    the subset was built.
    """
    try:
        entries = entries_of(config, subset)
    except ConfigError:
        return config.text
    rules = None
    for entry in entries:
        if isinstance(entry, StageEntry) and STAGES.get(entry.kind) is CleanText:
            rules = take_options(CleanText, config, entry, f"subsets.{subset}.recipe").config.text
        elif any(_may_write_caption(each) for each in walk([entry])):
            rules = None
    return rules


def _may_write_caption(entry: Entry) -> bool:
    stage = known_stage(entry.kind)
    return stage is None or "caption" in stage.gives


def gpus_of_stages(config: BuildConfig, subset: str) -> dict[str, float]:
    """GPUs of one actor of each stage of a subset that asks a model, by its id, as far as that is known.

    No stage of the user's own is imported: of one, only the backend that its entry names is known.
    """
    found: dict[str, float] = {}
    try:
        entries = stages_in(entries_of(config, subset))
    except ConfigError:
        return found
    for entry in entries:
        protocol = getattr(known_stage(entry.kind), "protocol", None)
        for name in METHODS if protocol is None else (protocol,):
            if name in entry.options:
                found[entry.id] = Backend.checked(entry.options[name], f"{entry.id}.{name}").num_gpus
            elif protocol is not None:
                found[entry.id] = getattr(config, name).num_gpus
    return found


def members_of(config: BuildConfig, subset: str) -> dict[str, list[str]]:
    """The ids of the members of each composite stage of a subset, by its id; sequences are flat in it.

    Raises:
        ConfigError: see `entries_of`.
    """
    found = {}
    for entry in walk(entries_of(config, subset)):
        if isinstance(entry, CompositeEntry):
            found[entry.id] = [each.id for member in entry.members for each in member]
    return found


def write_out(config: BuildConfig) -> BuildConfig:
    """The configuration with every recipe that is a list written out: ids, and whole options.

    A name is written as a list if a stage makes the masks first, so that whoever reads the corpus without its
    sources knows that stage.

    Raises:
        ConfigError: see `recipe_of`.
    """
    subsets = {}
    for name, subset in config.subsets.items():
        if isinstance(subset.recipe, list) or find_mask_stage(config, name)[0]:
            entries = _written_out(entries_of(config, name), config, f"subsets.{name}.recipe")
            subset = subset.model_copy(update={"recipe": plain(entries)})
        subsets[name] = subset
    return config.model_copy(update={"subsets": subsets})


def used_backends(config: BuildConfig) -> dict[str, tuple[str, Backend]]:
    """The backends that the recipes of the subsets ask, by their place: (protocol, backend).

    They are in the order of their stages; one that several stages ask is there once.
    """
    stages = [stage for subset in config.subsets for stage in recipe_of(config, subset)]
    return {stage.place: (stage.protocol, stage.backend) for stage in stages if isinstance(stage, ModelStage)}


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


def _without_categories(config: BuildConfig, subset: str) -> str:
    """A kind among a subset's sources of which not every region has a category; "" if none is known."""
    if subset not in config.subsets:
        return ""
    for each in config.subsets[subset].sources:
        try:
            if not find_source(each["source"]).has_categories(each):
                return each["source"]
        except ConfigError:  # a kind that only whoever made the corpus has
            continue
    return ""


def _written_out(entries: Sequence[Entry], config: BuildConfig, where: str) -> list[Entry]:
    found: list[Entry] = []
    for entry in entries:
        if isinstance(entry, CompositeEntry):
            members = [_written_out(each, config, where) for each in entry.members]
            found.append(entry._replace(members=members))
            continue
        kind = find_stage(entry.kind, f"{where}.{entry.id}")
        given = take_options(kind, config, entry, where).given
        dumped = {k: v.model_dump(mode="json") if hasattr(v, "model_dump") else v for k, v in given.items()}
        found.append(entry._replace(options=dumped))
    return found


class _Builder:
    """Makes the stages of a recipe, and sees to it that each is given what it needs."""

    def __init__(self, config: BuildConfig, where: str):
        self.config, self.where = config, where
        self.stages: list[Stage] = []
        self._without, self._mask_stage = "", ("", "")

    def build(
        self,
        entries: Sequence[Entry],
        without_categories: str = "",
        mask_stage: tuple[str, str] = ("", ""),
    ) -> list[Stage]:
        """All stages in the order in which they run.

        Args:
            entries: of the recipe.
            without_categories: a kind of source whose regions have no category; "" for none.
            mask_stage: the stage that makes masks and the kind of source that has none; see
                `find_mask_stage`.
        """
        self._without, self._mask_stage = without_categories, mask_stage
        self._refuse_names(entries)
        start: _Read = {} if without_categories else {"category": ()}
        if not mask_stage[0]:
            start["mask"] = ()
        _, end = self._sequence(entries, start)
        if "mask" not in end:
            raise ConfigError(f"{self.where}: {self._lacks_masks('the recipe')}")
        if "caption" not in end:
            raise ConfigError(
                f"{self.where}: no stage gives a caption; add `caption`, which asks the captioner"
            )
        return self.stages

    def _refuse_names(self, entries: Sequence[Entry]) -> None:
        for entry in walk(entries):
            if entry.id != entry.kind and (entry.id in STAGES or entry.id in COMPOSITES):
                raise ConfigError(
                    f"{self.where}.{entry.id}: the id of a stage of the kind `{entry.kind}` cannot be the "
                    "name of another kind; give it another `id`"
                )

    def _sequence(self, entries: Sequence[Entry], read: _Read) -> tuple[list[Stage], _Read]:
        found: list[Stage] = []
        for entry in entries:
            if isinstance(entry, CompositeEntry):
                stage, read = self._composite(entry, read)
            else:
                stage, read = self._stage(entry, read)
            found.append(stage)
        return found, read

    def _stage(self, entry: StageEntry, read: _Read) -> tuple[Stage, _Read]:
        kind = find_stage(entry.kind, f"{self.where}.{entry.id}")
        for need in kind.needs:
            if need not in read:
                raise ConfigError(f"{self.where}.{entry.id}: {self._lacks(entry, need)}")
        if "mask" in kind.gives and "mask" in read and "mask" not in kind.needs:
            raise ConfigError(
                f"{self.where}.{entry.id}: `{entry.id}` makes masks, and every region has one before it; "
                "leave the stage out"
            )
        self._refuse_other_maker(entry, kind)
        stage = kind(self.config, entry, read, self.where)
        self.stages.append(stage)
        answered = (stage,) if isinstance(stage, ModelStage) else ()
        return stage, read | dict.fromkeys(kind.gives, answered)

    def _refuse_other_maker(self, entry: StageEntry, kind: type[Stage]) -> None:
        """Masks of boxes are not made of a photo without any, nor regions where the source has them."""
        needed, source = self._mask_stage
        if not needed or not issubclass(kind, ModelStage) or "mask" not in kind.gives or "mask" in kind.needs:
            return
        declared = find_source(source).declares_regions
        if kind.makes_regions == declared:
            has = "has a box for each region" if declared else "has no boxes"
            raise ConfigError(
                f"{self.where}.{entry.id}: `{entry.id}` makes no masks for the source `{source}`, "
                f"which {has}; use `{needed}`"
            )

    def _lacks(self, entry: StageEntry, need: str) -> str:
        name = f"`{entry.id}`" if entry.id == entry.kind else f"`{entry.id}` ({entry.kind})"
        if need == "category" and self._without:
            return (
                f"{name} needs the category of each region, and the source `{self._without}` does not name "
                "all; use `recipe: identify`, or leave the stage out"
            )
        if need == "mask":
            return self._lacks_masks(name)
        givers = [f"`{kind}`" for kind, stage in STAGES.items() if need in stage.gives]
        return f"{name} needs a {need}, and no stage before it gives one; put {' or '.join(givers)} before it"

    def _lacks_masks(self, name: str) -> str:
        stage, source = self._mask_stage
        return (
            f"{name} needs the mask of each region, and the source `{source}` brings none; put `{stage}`, "
            "which makes them, before it"
        )

    def _composite(self, entry: CompositeEntry, read: _Read) -> tuple[Stage, _Read]:
        members: list[list[Stage]] = []
        ends: list[_Read] = []
        start = dict(read)
        for each in entry.members:
            stages, end = self._sequence(each, dict(start))
            for stage in stages:
                if "mask" in stage.gives:
                    raise ConfigError(
                        f"{self.where}.{entry.id}: `{stage.name}` makes masks, which is no member's task; "
                        f"put it before the {entry.kind}"
                    )
            if entry.kind == "vote":
                self._refuse_gifts(entry, stages)
            else:  # what a member has written stays where the next one writes nothing
                start = {field: _union(start[field], end[field]) for field in start}
            members.append(stages)
            ends.append(end)
        composite = COMPOSITES[entry.kind](self.config, entry, members)
        self.stages.append(composite)
        given = set.intersection(*(set(end) for end in ends))
        return composite, {field: _union(*(end[field] for end in ends)) for field in sorted(given)}

    def _refuse_gifts(self, entry: CompositeEntry, stages: Collection[Stage]) -> None:
        for stage in stages:
            if gifts := _gives(stage, self.stages):
                raise ConfigError(
                    f"{self.where}.{entry.id}: `{stage.name}` gives a {gifts[0]}, and the members of a vote "
                    "only decide; put it before the vote, or use `fallback`"
                )


def _gives(stage: Stage, stages: Sequence[Stage]) -> list[str]:
    """The fields that a stage gives; of a composite, those that a stage in it gives."""
    inner = [each for each in stages if each.within is stage]
    return [*stage.gives, *(field for each in inner for field in _gives(each, stages))]


def _union(*stages: Sequence[ModelStage]) -> tuple[ModelStage, ...]:
    return tuple(dict.fromkeys(each for some in stages for each in some))
