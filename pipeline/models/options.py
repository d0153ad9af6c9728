"""A backend's options, read into a struct."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ...schemas.errors import ConfigError

Options = TypeVar("Options", bound=msgspec.Struct)


def read_options(kind: type[Options], options: dict[str, Any], where: str) -> Options:
    """The backend's options, checked. The error never shows a value: someone may have put a key there.

    Args:
        kind: struct of the options, with `forbid_unknown_fields`.
        options: as the configuration has them.
        where: what the message calls them, such as "judge.options".

    Raises:
        ConfigError: one is unknown, missing, of the wrong type or out of range; names it and the choices.
    """
    try:
        return msgspec.convert(options, kind)
    except msgspec.ValidationError as error:
        choices = ", ".join(kind.__struct_fields__)
        raise ConfigError(f"{where}: {error}; the options are {choices}") from error
