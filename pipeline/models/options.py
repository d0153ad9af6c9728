"""The options of a backend: declared once, as a struct next to its class, and read by `read_options`."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ...schemas.errors import ConfigError


class BackendOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every backend's options: a field for each, with its type, its bounds and its default."""

    def check(self, where: str) -> None:
        """Refuse what types cannot express; does nothing by default.

        Args:
            where: what messages call the options, such as "judge.options".

        Raises:
            ConfigError: names the option and what to do.
        """


Options = TypeVar("Options", bound=BackendOptions)


def read_options(kind: type[Options], options: dict[str, Any], where: str) -> Options:
    """The options of a backend, checked. An error never shows a value: it may be a key.

    Args:
        kind: struct of the options.
        options: as the configuration has them.
        where: what messages call them, such as "judge.options".

    Raises:
        ConfigError: an option is unknown, missing, of the wrong type or out of range; the message names it
            and the known ones.
    """
    try:
        given = msgspec.convert(options, kind)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        choices = _choices(kind, place.strip(".`"))
        if choices:
            problem = f"choose from {', '.join(choices)}"
        known = ", ".join(kind.__struct_fields__)
        known = f"the options are {known}" if known else "it takes no options"
        raise ConfigError(f"{where}{place.rstrip('`')}: {problem}; {known}") from error
    given.check(where)
    return given


def _choices(kind: type[BackendOptions], name: str) -> list[str]:
    """The values of an option that has only a few."""
    hint = get_type_hints(kind).get(name)
    literals = [each for each in (hint, *get_args(hint)) if get_origin(each) is Literal]
    return [value for each in literals for value in get_args(each)]
