"""The command `init`: a configuration to start from, with every key, its default and what it does."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from ...schemas.errors import ConfigError
from .arguments import suggest

_WIDTH = 100
_PLACEHOLDERS = {
    "coconut": {"annotations": "[panoptic.json]", "labels": "labels", "photos": "[photos]"},
    "sa1b": {"paths": '["sa_*.tar"]'},
    "masks": {"photos": "[photos]", "masks": "masks", "names": "names.csv"},
    "webdataset": {"paths": '["shards/*.tar"]'},
    "automatic": {"photos": "[photos]"},
    "coco": {"annotations": "[instances.json]", "photos": "[photos]"},
    "boxes": {"annotations": "[boxes.json]", "photos": "[photos]"},
}
"""What stands for the paths of a source, by its kind and key, until they are replaced."""

_HEAD = """\
# The configuration of a corpus. Paths are relative to this file.
#
#   paracaption audit {name}     reads the sources and reports every problem
#   paracaption build {name}     builds the corpus; the same command resumes

# Folder of the corpus, which every node of a cluster must see under this path; or a URL, such as
# s3://bucket/corpus.
out: corpus

# Parts of the corpus by name, in the order in which they are built.
subsets:
  {kind}:
    sources:
      - source: {kind}
{options}
# Everything below has its default. Remove the `#` before a key, and before the name of the
# section that it is in, to change it.
"""


def init(
    config: Annotated[Path, typer.Argument(help="The YAML file to write.")] = Path("corpus.yaml"),
    source: Annotated[str, typer.Option(help="Kind of the source; `config` lists them.")] = "sa1b",
) -> None:
    """Write a configuration to start from: every key with its default and a comment that explains it."""
    from ...pipeline.io import files
    from ...pipeline.sources.registry import SOURCES

    if source not in SOURCES:
        raise ConfigError(f"init: unknown kind of source {source!r}; choose from {', '.join(SOURCES)}")
    if files.exists(str(config)):
        raise ConfigError(f"{config}: exists; name another file, or delete it first")
    with files.write_atomic(config) as file:
        file.write(commented_config(source, config.name).encode())
    print(config)
    suggest(f"edit {config}, and name your files in it", ("audit", config))


def commented_config(kind: str, name: str = "corpus.yaml") -> str:
    """A configuration with one source of a kind, as YAML.

    The keys that have to be given have placeholders. All other keys are comments with their defaults: without
    the `#` at the beginning of their lines they change nothing.

    Args:
        kind: of the source, as in the registry of sources.
        name: of the file, for the commands in its first lines.
    """
    from ...pipeline.config_file import describe
    from ...pipeline.sources.registry import find_options

    options: list[str] = []
    for key, field in find_options(kind).model_fields.items():
        indent = " " * 8
        options += textwrap.wrap(
            field.description or "",
            _WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
        )
        placeholder = _PLACEHOLDERS.get(kind, {}).get(key)
        shown = placeholder or ("REPLACE" if field.is_required() else None)
        options.append(f"{indent}{key}: {shown}" if shown else f"{indent}#{key}: {_written(field)}")
    lines: list[str] = []
    known = describe().splitlines()
    start = next(at for at, line in enumerate(known) if line.startswith("images_per_shard"))
    end = next(at for at, line in enumerate(known) if line.startswith("# Keys of captioner"))
    for line in known[start:end]:
        value, _, reason = line.partition("  # ")
        indent = value[: len(value) - len(value.lstrip())]
        if not indent:
            lines.append("")
        lines += _comment(reason, indent)
        lines.append(f"#{value}")
    lines += ["", *(line for line in known[end:] if not line.startswith("# Keys of a source"))]
    lines = lines[: next((at for at, line in enumerate(lines) if line.startswith("#   source:")), len(lines))]
    head = _HEAD.format(name=name, kind=kind, options="\n".join(options))
    return head + "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"# {indent}", subsequent_indent=f"# {indent}")


def _written(field: Any) -> str:
    import yaml

    default = field.get_default(call_default_factory=True)
    plain = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]
