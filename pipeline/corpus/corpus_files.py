"""Reads single files of a corpus: configuration, statistics, manifests and ledgers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import yaml
from pydantic import ValidationError

from ...schemas import manifest as manifests
from ...schemas.config import BuildConfig
from ...schemas.errors import REBUILD, ConfigError, IntegrityError
from ...schemas.manifest import Manifest
from ...schemas.records import Blob
from ...schemas.summary import CorpusSummary
from ..io import files, yaml_text
from ..io.disk_errors import fix_of
from ..io.failures import describe
from ..io.location import Location
from ..io.tables import TableFile
from ..sources.registry import file_context
from . import log
from .ledger import align_ledger

if TYPE_CHECKING:
    import pyarrow as pa

CONFIG = "config.yaml"
STATS = "stats.json"


_OF_YAML = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What PyYAML raises on damaged text besides its own errors; a `ValidationError` is a ValueError."""


def read_config(corpus: str | Location) -> BuildConfig:
    """The resolved configuration that a corpus was built with, from its `config.yaml`.

    Raises:
        ConfigError: the file is missing.
        IntegrityError: it is not what a build writes.
    """
    path = log.place_of(str(corpus), CONFIG)
    try:
        values = yaml_text.parse(files.read(Blob(path)))
        return BuildConfig.model_validate(values, context=file_context(ours=True))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give the `out` of a build") from error
    except (OSError, yaml.YAMLError, *_OF_YAML) as error:
        what = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            what = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        fix = fix_of(error, "run `paracaption build CONFIG` again")
        raise IntegrityError(f"{path}: not what a build writes ({what}); {fix}") from error


def read_summary(corpus: str | Location) -> CorpusSummary:
    """The statistics of a merged corpus, from its `stats.json`.

    Raises:
        ConfigError: the corpus is not merged.
        IntegrityError: the file is not what a merge writes.
    """
    path = log.place_of(str(corpus), STATS)
    try:
        return msgspec.json.decode(files.read(Blob(path)), type=CorpusSummary)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; run `paracaption merge CONFIG`") from error
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        fix = fix_of(error, "run `paracaption merge CONFIG`")
        raise IntegrityError(f"{path}: not a corpus's statistics ({describe(error)}); {fix}") from error


def read_manifest(path: str | Location) -> Manifest:
    """The commit record of a unit.

    Raises:
        FileNotFoundError: the unit is not committed.
        IntegrityError: the file is not a manifest, or cannot be read.
    """
    try:
        data = files.read(Blob(str(path)))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    return decode_manifest(data, path)


def unreadable(path: str | Location, error: OSError) -> IntegrityError:
    """The error for a manifest that the disk or the store does not give."""
    what = (
        "run the same command again, or delete the file and run `paracaption build CONFIG` again, which "
        "rebuilds the unit"
    )
    return IntegrityError(f"{path}: not readable ({describe(error)}); {fix_of(error, what)}")


def decode_manifest(data: bytes, path: str | Location) -> Manifest:
    """A manifest from its bytes; `path` is for the message.

    Raises:
        IntegrityError: the bytes are not a manifest.
    """
    try:
        return manifests.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: not a manifest ({error}); delete it and run `paracaption build CONFIG` again, which "
            "rebuilds the unit"
        ) from error


def read_ledger(path: str | Location, columns: list[str] | None = None) -> pa.Table:
    """A unit's ledger, or some of its columns. Scores that an older release did not know are null.

    Raises:
        IntegrityError: the file is missing, or is not a ledger.
        ConfigError: there is no such column.
    """
    import pyarrow as pa

    try:
        table = TableFile(str(path)).read(columns)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise IntegrityError(f"{path}: not readable ({error}); {fix_of(error, REBUILD)}") from error
    return align_ledger(table, path, columns)
