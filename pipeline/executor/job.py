"""What every worker of a subset's build knows; it is sent to each of them."""

from __future__ import annotations

import msgspec

from ...schemas.config import BuildConfig
from ..io import own_modules


class Job(msgspec.Struct, frozen=True):
    """What every worker of a subset knows.

    Attributes:
        config: the whole configuration.
        subset: name of the subset.
        folder: OUT/<subset>.
        plan: content hash of the work list.
        plans: of units that were planned or changed by an earlier step of it, the hash of that step.
        recipe: digest of the recipe.
        run: OUT/events/<run>, where the events of this run are; its stacks are in `run_folders.run_folder`.
        idle: model stages that have evidence of every unit; their models are loaded only if some is stale.
        modules: what backends and sources of the user's own are imported from.
        variables: the environment variables that paths of the configuration name, with their values.
        versions: of files of the source behind URLs, when they were listed; see `source_versions`.
        bucket_variables: names, and names alone, of those with which the driver reaches the bucket of `out`.
    """

    config: BuildConfig
    subset: str
    folder: str
    plan: str
    recipe: str
    run: str
    idle: list[str] = []
    plans: dict[str, str] = {}
    modules: list[own_modules.OwnModule] = []
    variables: dict[str, str] = {}
    versions: dict[str, str] = {}
    bucket_variables: list[str] = []
