"""Sources and output of a build lie apart: it never writes where it reads, and never reads what it wrote."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from ...schemas.secrets import shorten
from ...schemas.strict import locations
from ..io import addresses, backends, files, variables
from ..sources.registry import open_source

_FILES = (
    *("config.yaml", "corpus.json", "index.parquet", "stats.json", "README.md"),
    *("log/000000000000.json", "beat/000001", "plots/funnel.pdf", "events/run/driver.jsonl"),
)


def refuse_overlap(config: BuildConfig) -> None:
    """Refuse a source inside `out`, and an `out` inside a folder that a source reads as a whole.

    A build removes what it left behind in its own folders, and replaces files there; a source that reads its
    own corpus grows with every unit. Links are followed. Of a pattern counts the folder before it, and what
    it would match of a corpus. In a bucket, names are compared as they are written.

    Raises:
        ConfigError: names the option, both paths, and what to do.
    """
    is_url = files.is_url(config.out)
    out = _named(config.out) if is_url else Path(os.path.realpath(backends.local(config.out)))
    for subset in config.subsets:
        for source in open_source(config, subset).sources:
            for option, given in locations(source.options):
                if files.is_url(given) == is_url:
                    _refuse(f"{source.where}.{option}", given, out, config)


def _refuse(where: str, given: str, out: Path, config: BuildConfig) -> None:
    given_is_url = files.is_url(given)
    plain, pattern = _split_url(given) if given_is_url else _split(backends.local(variables.expand(given)))
    if plain == out or out in plain.parents:
        raise ConfigError(
            f"{where}: {shorten(given)} is inside `out` ({config.out}), where a build writes and cleans up; "
            "move the source, or choose another `out`"
        )
    if not pattern and plain in out.parents:
        raise ConfigError(
            f"{where}: {shorten(given)} is read with all that is in it, and `out` ({config.out}) is inside "
            "it; choose an `out` outside of it"
        )
    if pattern and plain in out.parents:
        for path in _written(out, config):
            if _matches(path.relative_to(plain).parts, pattern):
                raise ConfigError(
                    f"{where}: {shorten(given)} matches what a build writes into `out` ({config.out}); "
                    "narrow the pattern, or choose another `out`"
                )


def _named(url: str) -> Path:
    """A URL as a path of scheme, bucket and what is below it, however the scheme is written."""
    scheme, _, rest = variables.expand(url).partition("://")
    bucket, _, key = rest.partition("/")
    scheme = addresses.OTHER_NAMES.get(scheme, scheme)
    if scheme == "az":  # abfs://container@account.dfs.core.windows.net/key
        bucket = bucket.partition("@")[0]
    return Path(scheme, bucket, key.strip("/"))


def _split_url(url: str) -> tuple[Path, tuple[str, ...]]:
    """The prefix before the first part of a URL that is a pattern, and the parts after it."""
    parts = _named(url).parts
    at = next((at for at, part in enumerate(parts) if backends.has_magic(part)), len(parts))
    return Path(*parts[:at]), parts[at:]


def _split(path: str) -> tuple[Path, tuple[str, ...]]:
    """The folder before the first part of a path that is a pattern, without links, and the parts after it."""
    parts = Path(path).parts
    at = 0
    while at < len(parts) and not (
        backends.has_magic(parts[at]) and not files.exists(Path(*parts[: at + 1]))
    ):
        at += 1
    return Path(os.path.realpath(Path(*parts[:at]))), parts[at:]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a pattern matches a path or one of the folders that it is in."""
    return len(parts) >= len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))


def _written(out: Path, config: BuildConfig) -> Iterator[Path]:
    """A path of each kind that a build writes."""
    for name in _FILES:
        yield out / name
    for subset in config.subsets:
        for name in ("shards/{}.tar", "ledger/{}.parquet", "manifests/{}.json", "evidence/stage/{}.parquet"):
            yield out / subset / name.format(f"{subset}-000000")
        yield out / subset / "plan" / "plan.parquet"
        yield out / subset / "plan" / "plan.json"
