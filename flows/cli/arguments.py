"""Arguments that several commands take, and options made from a schema."""

import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

from ...pipeline.io.location import Location, locate
from ...schemas.errors import ConfigError, ParaCaptionError

if TYPE_CHECKING:
    Place = Location
else:  # typer takes no union; this is what the help calls it
    Place = type("path or URL", (), {})


def to_location(text: str) -> Location:
    """The location that an argument names.

    Raises:
        ParaCaptionError: it names none. This is no `ValueError`, of which typer would draw a box.
    """
    try:
        return locate(text)
    except ConfigError as error:
        raise ParaCaptionError(str(error)) from error


_Command = TypeVar("_Command", bound=Callable[..., Any])

Config = Annotated[
    Path, typer.Argument(help="The YAML file; `paracaption config` prints every key.", show_default=False)
]
Corpus = Annotated[
    Place,
    typer.Argument(
        parser=to_location,
        help="The corpus: the `out` of its configuration, a folder or a URL such as s3://bucket/corpus.",
        show_default=False,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Connect to a running Ray cluster: host:port, or 'auto' on a node of the cluster.",
        show_default="use this machine only",
    ),
]


def changes_of(*examples: str) -> Any:
    """The option `--set` of a command that reads a configuration.

    Args:
        examples: keys of that configuration with values, at least one of them in a section.
    """
    written = " or ".join(f"--set {example}" for example in examples)
    text = f"Override a key of the configuration, for example {written}. Repeat the option for more keys."
    return typer.Option("--set", metavar="KEY=VALUE", help=text)


Changes = Annotated[list[str] | None, changes_of("min_iou=0.6", "text.min_words=8")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Device = Annotated[
    str,
    typer.Option(
        help="Device to compute on: cpu, cuda, cuda:1, ..., or auto, which takes a GPU if there is one."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Data type to compute in: float32, bfloat16, float16, or auto, which is bfloat16 on GPUs and "
        "float32 elsewhere."
    ),
]


def print_json(values: Any) -> None:
    """Print values as indented JSON. Structs and named tuples are objects."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(_named(values), enc_hook=str), indent=2).decode())


def _named(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _named(value) for key, value in values.items()}
    if callable(as_dict := getattr(values, "_asdict", None)):
        return _named(as_dict())
    return [_named(each) for each in values] if isinstance(values, list | tuple) else values


def suggest(*commands: str | tuple[object, ...]) -> None:
    """Say on stderr which commands may come next.

    Args:
        commands: the words after `paracaption`, which are quoted for a shell; a text is printed as it is.
    """
    lines = [
        each if isinstance(each, str) else shlex.join(["paracaption", *map(str, each)]) for each in commands
    ]
    print("\n".join(["", "Next:", *(f"  {line}" for line in lines)]), file=sys.stderr)


def written(changes: list[str] | None) -> tuple[str, ...]:
    """The words that change the configuration of a command, for `suggest`."""
    return tuple(word for change in changes or () for word in ("--set", change))


def options_of(schema: type[BaseModel]) -> Callable[[_Command], _Command]:
    """Give a command an option for each field of a schema, with the field's type, default and description.

    The command takes their values as keyword arguments, under the names of the fields.
    """

    def add(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        for name, field in schema.model_fields.items():
            annotation = Annotated[field.annotation, typer.Option(help=field.description)]  # type: ignore[valid-type]
            default, kind = field.get_default(call_default_factory=True), inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return add
