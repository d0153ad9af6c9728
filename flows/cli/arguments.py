"""Arguments that several commands take, and options made from a schema."""

import inspect
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
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="Type of the computation: auto, float32, bfloat16 or float16.")]


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
