"""A build in one call: what can be known beforehand is checked before an engine starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...schemas.config import BuildConfig
from ..config_file import load_config
from ..corpus.reader import Corpus, open_corpus
from ..io.activity import NOW
from . import driver, preflight
from .engine import Engine
from .findings import refuse_failures
from .local import LocalEngine
from .progress import Progress
from .ray_data import RayEngine
from .stalls import telling


def build(
    config: str | Path | Mapping[str, Any] | BuildConfig,
    *,
    ray_address: str | None = None,
    limit_images: int | None = None,
    retry_failed: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Corpus:
    """Build a corpus, or resume it: whatever is committed is not built again.

    Does what `paracaption build` does, without Prefect.

    Args:
        config: a YAML file, its keys and values, or a `BuildConfig`. Relative paths are seen from the file's
            folder, or from the current one.
        ray_address: "auto" or "host:port" of a Ray cluster, or "local" to start Ray on this machine; None
            builds in this process, one unit after the other.
        limit_images: build only the first N images of each subset (a pilot; give it an `out` of its own).
        retry_failed: also build committed units again that hold drops by error.
        on_progress: called about twice a second for each subset that is being built, and after each unit.

    Returns:
        The corpus, opened for reading.

    Raises:
        ConfigError: the configuration cannot work here, or another build holds the folder.
        IntegrityError: the sources are not those that the corpus was planned with.
        StageFailed: a stage fails on everything, a backend cannot start, or the disk is full.
        StageStalled: nothing moved for `failures.stall_s`.
    """
    loaded = load_config(config)
    engine = (
        LocalEngine() if ray_address is None else RayEngine(None if ray_address == "local" else ray_address)
    )

    def run(config: BuildConfig, engine: Engine, **asked: Any) -> None:
        driver.build(config, engine, on_progress=on_progress, **asked)

    build_checked(loaded, engine, run, limit_images=limit_images, retry_failed=retry_failed)
    return open_corpus(loaded.out, confined=False)


def build_checked(config: BuildConfig, engine: Engine, run: Callable[..., Any], **asked: Any) -> bool:
    """Build, starting no engine where there is nothing to do or only to merge.

    Args:
        config: the resolved configuration.
        engine: runs the units.
        run: called with `config`, `engine` and `asked` if units are to be built.
        asked: `limit_images` and `retry_failed`, as `driver.build` takes them.

    Returns:
        Whether anything was done.

    Raises:
        ConfigError: the configuration cannot work here; a line for each problem.
    """
    if driver.is_finished(config, **asked):
        return False
    if not driver.is_built(config, **asked):
        with telling(config.failures.stall_s), NOW.during("checking the configuration"):
            refuse_failures(preflight.check_build(config))
        engine.check(config)
        models = driver.prepare(config, **asked)
        if not isinstance(engine, RayEngine) or engine.address is None:
            refuse_failures(preflight.check_packages(config, models))
    if driver.is_built(config, **asked):  # perhaps from other places than it was planned with
        driver.build(config, engine, **asked)
    else:
        run(config, engine, **asked)
    return True
