"""Options of a stage: those of its entry in the recipe, in the place of those of the whole configuration."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

from pydantic import BaseModel, ValidationError, create_model

from ...schemas.config import Backend, BuildConfig
from ...schemas.errors import ConfigError
from ...schemas.recipe import StageEntry
from ...schemas.strict import Strict, one_line_each


class Taken(NamedTuple):
    """What an entry's options make of a configuration.

    Attributes:
        config: with the options in the place of the configuration's own.
        own: the options that are of the stage alone; None if it has no such options.
        given: the options that the entry has, and those of the stage alone with their defaults.
    """

    config: BuildConfig
    own: Strict | None
    given: dict[str, Any]


def places_of(stage: type[Any]) -> dict[str, tuple[str, ...]]:
    """Each option of a stage that the configuration has too -> its place there."""
    found: dict[str, tuple[str, ...]] = {}
    protocol: str = getattr(stage, "protocol", "")
    keys: list[str] = [*([protocol] if protocol else []), *stage.sections]
    for key in keys:
        section = BuildConfig.model_fields[key].annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and section is not Backend:
            found |= {name: (key, name) for name in section.model_fields}
        else:
            found[key] = (key,)
    return found


def option_names(stage: type[Any]) -> list[str]:
    """The options that an entry of this stage may have."""
    own = stage.options_type
    return [*places_of(stage), *(own.model_fields if own else ())]


@cache
def _shared_type(stage: type[Any]) -> type[Strict]:
    """The model of the options that the configuration has too."""
    fields: dict[str, Any] = {}
    for name, place in places_of(stage).items():
        field = BuildConfig.model_fields[place[0]]
        if len(place) > 1:
            field = cast("type[BaseModel]", field.annotation).model_fields[name]
        fields[name] = (field.annotation, field)
    return create_model(f"Options_{stage.__name__}", __base__=Strict, **fields)


def take_options(stage: type[Any], config: BuildConfig, entry: StageEntry, where: str) -> Taken:
    """Check the options of an entry.

    Args:
        stage: the class of the entry's kind.
        config: of the build.
        entry: of the recipe.
        where: what stands before its id in messages.

    Raises:
        ConfigError: an option is unknown, or a value does not suit it; a line for each.
    """
    places, own_type = places_of(stage), stage.options_type
    own_names = set(own_type.model_fields) if own_type else set()
    at = f"{where}.{entry.id}"
    own = _checked(own_type, {k: v for k, v in entry.options.items() if k in own_names}, stage, at)
    given = {k: v for k, v in entry.options.items() if k not in own_names}
    if not given:
        return Taken(config, own, {} if own is None else dict(own))
    found = _checked(_shared_type(stage), given, stage, at)
    update: dict[str, Any] = {}
    for name in given:
        key, *inner = places[name]
        value = getattr(found, name)
        section = update.get(key, getattr(config, key))
        update[key] = section.model_copy(update={inner[0]: value}) if inner else value
    whole = {name: getattr(found, name) for name in given}
    return Taken(config.model_copy(update=update), own, whole | ({} if own is None else dict(own)))


def _checked(
    kind: type[Strict] | None, values: dict[str, Any], stage: type[Any], where: str
) -> Strict | None:
    if kind is None:
        return None
    names = option_names(stage)

    def takes(place: tuple[int | str, ...]) -> str:
        if len(place) > 1:
            return f"the keys of a {place[0]} are {', '.join(Backend.model_fields)}"
        return f"its options are {', '.join(names)}" if names else "it takes no options"

    try:
        return kind.model_validate(values)
    except ValidationError as error:

        def known(place: tuple[int | str, ...]) -> list[str]:
            return list(Backend.model_fields) if len(place) > 1 else names

        raise ConfigError(one_line_each(error, where, takes, known=known)) from error
