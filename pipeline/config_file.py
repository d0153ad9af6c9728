"""Reads and writes the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline import files
from schemas.config import Backend, BuildConfig
from schemas.errors import ConfigError

_PATHS = {"coconut": ("annotations", "photos", "labels", "categories"), "sa1b": ("paths",)}


def load_config(path: str | Path) -> BuildConfig:
    """Read a build configuration; relative paths in it become absolute, seen from its folder.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or a wrong value; a line for each, with its place.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(raw).__name__}")
    try:
        config = BuildConfig.model_validate(raw)
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'config'}: {_mend(e)}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    return absolute(config, path.parent.resolve())


def absolute(config: BuildConfig, root: Path) -> BuildConfig:
    """The configuration with its relative paths seen from `root`."""
    values = config.model_dump()
    values["out"] = _absolute(values["out"], root)
    for subset, names in _PATHS.items():
        for source in values[subset]:
            for name in names:
                given = source[name]
                source[name] = (
                    [_absolute(p, root) for p in given]
                    if isinstance(given, list | tuple)
                    else _absolute(given, root)
                )
    if files.is_url(values["out"]):
        raise ConfigError(f"out: {values['out']} is a URL; name a folder that every node mounts")
    return BuildConfig.model_validate(values)


def dump_config(config: BuildConfig) -> str:
    """The resolved configuration as YAML, keys in the order of the model."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _absolute(path: Any, root: Path) -> Any:
    if path is None or files.is_url(path):
        return path
    return str((root / Path(files.local(path)).expanduser()).resolve())


def _mend(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key; see `paracaption config` for all keys"
    given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
    return f"{error['msg']}{given}"


def describe() -> str:
    """Every key with its default and its reason, as a commented YAML file."""
    lines: list[str] = []
    _describe(BuildConfig, "", lines)
    return "\n".join(lines)


def _describe(model: type[BaseModel], indent: str, lines: list[str]) -> None:
    for name, field in model.model_fields.items():
        nested = _model_of(field.annotation)
        if isinstance(field.default, BaseModel):
            if type(field.default) is Backend:
                lines.append(
                    f"{indent}{name}: {{name: {field.default.name}}}"
                    f"  # {_summary(Backend)}; its keys are below"
                )
                continue
            lines.append(f"{indent}{name}:  # {_summary(type(field.default))}")
            _describe(type(field.default), indent + "  ", lines)
        elif nested is not None:
            lines.append(f"{indent}{name}:  # a list; {_summary(nested)}")
            _describe(nested, indent + "  ", lines)
        else:
            default = (
                "required" if field.is_required() else yaml.safe_dump(_plain(field), default_flow_style=True)
            )
            value = default.splitlines()[0]
            lines.append(f"{indent}{name}: {value}  # {field.description or ''}".rstrip(" #"))
    if model is BuildConfig:
        lines.append("# keys of captioner, judge and segmenter:")
        _describe(Backend, "#   ", lines)


def _plain(field: Any) -> Any:
    value = field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _model_of(annotation: Any) -> type[BaseModel] | None:
    inner = get_args(annotation)
    return inner[0] if inner and isinstance(inner[0], type) and issubclass(inner[0], BaseModel) else None


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0].rstrip(".")
