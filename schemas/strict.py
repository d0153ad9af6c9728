"""The base of every configuration: an unknown key is an error, an old name is translated."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, NamedTuple, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from . import renames, secrets
from .errors import ConfigError


class FileContext(NamedTuple):
    """What is known of the file that is read: `model_validate(values, context=FileContext(...))`.

    Attributes:
        absolute: makes a path of the file absolute.
        options_of: the model of a source kind's options; raises ValueError for an unknown kind.
        recipe_of: the recipe of these sources; raises ValueError if none is the default of all.
        ours: whether ParaCaption wrote the file. Then nobody is warned of its old names, and a source may be
            of a kind that only whoever wrote the file knows.
    """

    absolute: Callable[[str], str] = str
    options_of: Callable[[str], type[Strict]] | None = None
    recipe_of: Callable[[Sequence[Mapping[str, Any]]], str] | None = None
    ours: bool = False


class Strict(BaseModel):
    """A part of a configuration file. It cannot be changed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    @classmethod
    def from_stored(cls, values: Any) -> Self:
        """Validate a configuration that a run has written into its output, possibly an earlier version's.

        Old names are translated without a warning: nobody has to change a file that a run wrote.

        Raises:
            ValidationError: these are not a configuration's values, or are in words of a version too old.
        """
        return cls.model_validate(values, context=FileContext(ours=True))

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        return renames.translate(cls.__name__, values, quiet=bool(info.context and info.context.ours))

    @classmethod
    def checked(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """An instance made of values that a user gave.

        Args:
            values: by key; a key that is not given has its default.
            where: what the message says before the key, such as a file or `captioner.options`.

        Raises:
            ConfigError: a key is unknown or a value does not suit it; a line for each.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(
                one_line_each(error, where, f"the keys are {', '.join(cls.model_fields)}", known=cls._keys_at)
            ) from error

    @classmethod
    def _keys_at(cls, _place: tuple[int | str, ...]) -> list[str]:
        return list(cls.model_fields)


class Published(Strict):
    """A whole configuration. It is published with what it makes, so one that holds a secret is refused.

    So is a number that is not finite, also among the options of a backend: it has no JSON, and a threshold
    that it stands for would drop everything or nothing.
    """

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any, info: ValidationInfo) -> Any:
        if info.context and info.context.ours:  # what an early release has written is read
            return values
        found = [
            InitErrorDetails(
                type=PydanticCustomError("secret", "{what}; {fix}", {"what": each.what, "fix": secrets.FIX}),
                loc=each.place,
                input=secrets.HIDDEN,
            )
            for each in secrets.find(values)
        ]
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found, hide_input=True)
        return values

    @model_validator(mode="before")
    @classmethod
    def _finite_numbers(cls, values: Any, info: ValidationInfo) -> Any:
        if info.context and info.context.ours:
            return values
        found = [mistake(place, value, "has to be a finite number") for place, value in _not_finite(values)]
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found, hide_input=True)
        return values


def _not_finite(
    values: Any, place: tuple[int | str, ...] = ()
) -> Iterator[tuple[tuple[int | str, ...], float]]:
    if isinstance(values, float) and not math.isfinite(values):
        yield place, values
    elif isinstance(values, Mapping):
        for name, value in values.items():
            yield from _not_finite(value, (*place, name if isinstance(name, int | str) else str(name)))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from _not_finite(value, (*place, number))


def _absolute(path: str, info: ValidationInfo) -> str:
    return info.context.absolute(path) if info.context else path


Location = Annotated[str, AfterValidator(_absolute)]
"""A path, or a URL that fsspec knows. A relative path starts at the folder of the configuration file."""


def _on_this_machine(path: str) -> str:
    if "://" in path and not path.startswith("file://"):
        raise ValueError(
            "has to be a folder that every node mounts; only a corpus may lie in a bucket: give a path"
        )
    return path


Folder = Annotated[Location, AfterValidator(_on_this_machine)]
"""A path to write to; a URL is refused."""


def locations(values: Strict) -> Iterator[tuple[str, str]]:
    """Every path among some values: (its key, the path), as often as a key has paths.

    Found by the type `Location`, also in lists, mappings and in parts of their own.
    """
    for key in type(values).model_fields:
        is_path = is_location(type(values), key)
        for found in _flat(getattr(values, key)):
            if isinstance(found, Strict):
                yield from ((f"{key}.{inner}", path) for inner, path in locations(found))
            elif is_path and isinstance(found, str):
                yield key, found


def is_location(model: type[Strict], key: str) -> bool:
    """Whether a key of a model is a path, or has paths in it."""
    field = model.model_fields[key]
    return any(map(_mentions_a_location, (*field.metadata, field.annotation)))


def _mentions_a_location(annotation: Any) -> bool:
    if annotation == get_args(Location)[1]:
        return True
    return any(map(_mentions_a_location, get_args(annotation)))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def mistake(place: tuple[int | str, ...], value: Any, message: str) -> InitErrorDetails:
    """What is wrong at a place below what a validator looks at, for `mistakes`."""
    error = PydanticCustomError("mistake", "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=place, input=value)


def mistakes(*found: InitErrorDetails) -> ValidationError:
    """The error to raise in a validator for several mistakes, or for one below what it looks at."""
    return ValidationError.from_exception_data("mistake", list(found))


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """The words "did you mean ..." if a known name is much like the one that was given; else none."""
    near = get_close_matches(str(given), list(known), n=1)
    return f"did you mean `{near[0]}`? " if near else ""


def _meant(given: str, known: list[str]) -> str:
    """The words "did you mean ..." also for a key that belongs into a section: `masks.min_area_px`."""
    *_, last = given.split(".")
    for key in known:
        *sections, name = key.split(".")
        if sections and name == last:
            written = f"{': {'.join([*sections, name])}: ...{'}' * len(sections)}"
            return f"did you mean `{written}`? "
    return did_you_mean(given, [key for key in known if "." not in key])


_TYPES = {
    **{"a valid integer": "a whole number", "a valid number": "a number", "a valid string": "a text"},
    **{"a valid boolean": "true or false", "a valid list": "a list", "a valid dictionary": "keys and values"},
}
"""What pydantic calls a type, and what we call it."""


def _in_our_words(text: str) -> str:
    """A message of pydantic's, said as in our own errors; another text as it is."""
    if text == "Field required":
        return "is missing; add it"
    if text.startswith("List should have at least 1 item"):
        return "has to have at least one entry"
    if not text.startswith("Input should be "):
        return text
    wanted = text.removeprefix("Input should be ").partition(", unable to parse")[0]
    wanted = wanted.partition(" or instance of ")[0]  # a section, which may be a model's object in Python
    return f"has to be {_TYPES.get(wanted, wanted)}"


_KIND = re.compile(r"(function-[a-z]+|list|dict|nullable|union)\[.*\]")
"""What pydantic puts into the place of a value that may be of several kinds: no key of the user's."""


def one_line_each(
    error: ValidationError,
    where: str,
    keys: str | Callable[[tuple[int | str, ...]], str],
    place_of: Callable[[tuple[int | str, ...]], tuple[int | str, ...]] = tuple,
    known: Callable[[tuple[int | str, ...]], Iterable[str]] | None = None,
) -> str:
    """What pydantic found wrong, a line for each mistake.

    Args:
        error: of a model's validation.
        where: what stands before the key on each line; may be empty.
        keys: what an unknown key's line says about those that are known, also by its place in the model.
        place_of: where the user wrote what is at a place of the model.
        known: the keys that there are besides an unknown one, by its place in the model; those of the
            sections below it as `section.key`.
    """
    lines = []
    for each in error.errors():
        place = ".".join(part for part in map(str, place_of(each["loc"])) if not _KIND.fullmatch(part))
        if each["type"] == "extra_forbidden":
            meant = _meant(str(each["loc"][-1]), list(known(each["loc"])) if known else [])
            wrong = f"unknown key; {meant}{keys(each['loc']) if callable(keys) else keys}"
        else:
            together = each["type"] == "value_error" and isinstance(each["input"], dict)  # of keys
            is_told = not together and each["type"] not in ("missing", "secret")
            said = _in_our_words(each["msg"].removeprefix("Value error, "))
            given = f" (given: {secrets.shorten(repr(each['input']))})" if is_told else ""
            wrong = secrets.shorten(said) + given
        lines.append(": ".join(filter(None, (where, place, wrong))))
    return "\n".join(lines)
