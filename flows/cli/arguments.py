"""Arguments that several commands take, and options made from a schema."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

_Command = TypeVar("_Command", bound=Callable[..., Any])

Config = Annotated[
    Path, typer.Argument(help="The YAML file; `paracaption config` prints every key.", show_default=False)
]
Corpus = Annotated[
    Path, typer.Argument(help="The corpus: the `out` of its configuration.", show_default=False)
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="'auto' or host:port, from a node of the cluster; without it, this machine alone."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value for a key of the configuration, as in min_iou=0.6. May be given several times.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="Type of the computation: auto, float32, bfloat16 or float16.")]


def print_json(values: Any) -> None:
    """Print values as indented JSON. Structs and named tuples are objects."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(_named(values), enc_hook=str), indent=2).decode())


def _named(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _named(value) for key, value in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_asdict"):
        return _named(values._asdict())
    return [_named(each) for each in values] if isinstance(values, list | tuple) else values


def suggest(*commands: str) -> None:
    """Say on stderr what one may want to do next."""
    print("\n".join(["", "Next:", *(f"  {command}" for command in commands)]), file=sys.stderr)


def options_of(schema: type[BaseModel]) -> Callable[[_Command], _Command]:
    """Give a command an option for each field of a schema, with the field's type, default and description.

    The command takes their values as keyword arguments, under the names of the fields.
    """

    def add(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        for name, field in schema.model_fields.items():
            annotation = Annotated[field.annotation, typer.Option(help=field.description)]  # type: ignore[valid-type]
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
                )
            )
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return add
