"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

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
