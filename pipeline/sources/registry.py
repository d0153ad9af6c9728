"""The kinds of sources, and the source of a subset."""

from __future__ import annotations

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from .protocols import Source


def open_source(config: BuildConfig, subset: str) -> Source:
    """The source of a subset; reads nothing yet.

    Raises:
        ConfigError: the config has no such subset.
    """
    if subset == "coconut" and config.coconut:
        from .coconut import Coconut

        return Coconut(config.coconut)
    if subset == "sa1b" and config.sa1b:
        from .sa1b import Sa1b

        return Sa1b(config.sa1b)
    raise ConfigError(f"the config has no source under {subset!r}; add one, or build another subset")
