"""What a row says that has left the last worker: a written unit, or the error that ends its subset."""

from __future__ import annotations

from typing import Any

import msgspec

from ...schemas import errors as error_types
from ...schemas.errors import ParaCaptionError, StageFailed
from ..corpus.writer import Draft


def error_text(error: ParaCaptionError) -> str:
    """An error in words that any process understands: its type, or the known one above, and its message."""
    known = next(kind.__name__ for kind in type(error).__mro__ if hasattr(error_types, kind.__name__))
    return f"{known}: {error}"


def outcome_of(row: dict[str, Any]) -> Draft | ParaCaptionError:
    """The written unit in a row that has passed through all stages, or the error that a worker put into it.

    The error is one of its own type.
    """
    if "failed" in row:
        kind, _, message = row["failed"].partition(": ")
        return getattr(error_types, kind)(message)
    return msgspec.msgpack.decode(row["draft"], type=Draft)


def left(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a unit that is left because its subset is given up."""
    return {"unit": row["unit"], "failed": error_text(StageFailed("its subset was given up"))}
