"""What a row says that has left the last worker: a written unit, or the error that ends the build."""

from __future__ import annotations

from typing import Any

import msgspec

from ...schemas import errors as error_types
from ...schemas.errors import ParaCaptionError
from ..corpus.writer import Draft


def error_text(error: ParaCaptionError) -> str:
    """An error in words that any process understands: its type, or the known one above, and its message."""
    known = next(kind.__name__ for kind in type(error).__mro__ if hasattr(error_types, kind.__name__))
    return f"{known}: {error}"


def draft_of(row: dict[str, Any]) -> Draft:
    """The written unit in a row that has passed through all stages.

    Raises:
        ParaCaptionError: the error that a worker put into the row, by its own type.
    """
    if "failed" in row:
        kind, _, message = row["failed"].partition(": ")
        raise getattr(error_types, kind)(message)
    return msgspec.msgpack.decode(row["draft"], type=Draft)
