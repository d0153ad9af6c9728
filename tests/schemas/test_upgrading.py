"""docs/upgrading.md has every name of schemas/renames.py, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel
from typer.main import get_command

from paracaption.flows.cli.app import app
from paracaption.pipeline.sources.registry import SOURCES, find_options
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.evaluation import EvaluateConfig
from paracaption.schemas.renames import RENAMED, Renamed
from paracaption.schemas.training import TrainConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "upgrading.md"
CONFIGS = {"build": BuildConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
OPTIONS = {"DecodeOptions": ("`evaluate`", "captioner.options.decode.")}
"""Where the options of a backend or a source stand, whose class the configuration does not name."""
OPTIONS |= {find_options(kind).__name__: ("`build`", f"{kind}[].") for kind in SOURCES}


def models_of(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_of(inner)


def places(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Each class of a configuration with the key that holds it, as `corpora[].`."""
    yield kind.__name__, prefix, kind
    for name, each in kind.model_fields.items():
        many = "[]" if "tuple[" in str(each.annotation) or "list[" in str(each.annotation) else ""
        for nested in models_of(each.annotation):
            yield from places(nested, f"{prefix}{name}{many}.")


def rows(renamed: Renamed) -> Iterator[str]:
    """The rows of the page's table: one for each place in which the old name stood."""
    if renamed.where in ("command", "option"):
        found = [("command line", "paracaption ")]
    elif renamed.where in OPTIONS:
        found = [OPTIONS[renamed.where]]
    else:
        found = [
            (f"`{name}`", prefix)
            for name, kind in CONFIGS.items()
            for where, prefix, _ in places(kind)
            if where == renamed.where
        ]
    assert found, f"no configuration holds a {renamed.where}"
    for where, prefix in dict.fromkeys(found):
        old, new = f"{prefix}{renamed.old}", f"{prefix}{renamed.new}"
        yield f"| {where} | `{old}` | `{new}` | {renamed.until} |"
        for before, after in renamed.values.items():
            yield f"| {where} | `{old}: {before}` | `{new}: {after}` | {renamed.until} |"


def test_the_page_has_a_row_for_every_renamed_thing_and_no_other():
    wanted = sorted({row for each in RENAMED for row in rows(each)})
    page = PAGE.read_text()
    found = [line for line in page.splitlines() if line.startswith("| ") and line.count("|") == 5]
    assert found[0] == "| where | old | new | old name is removed in |"
    assert found[2:] == wanted, "write these rows into docs/upgrading.md:\n" + "\n".join(wanted)


def test_every_new_name_exists():
    fields = {where: kind.model_fields for each in CONFIGS.values() for where, _, kind in places(each)}
    fields |= {find_options(kind).__name__: find_options(kind).model_fields for kind in SOURCES}
    for each in RENAMED:
        if each.where in fields:
            assert each.new in fields[each.where], each
        if each.where in ("command", "option"):
            command = get_command(app)
            *names, last = each.new.split()
            for name in [*names, *([last] if each.where == "command" else [])]:
                command = command.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
            assert each.where == "command" or last in {o for p in command.params for o in p.opts}, each
