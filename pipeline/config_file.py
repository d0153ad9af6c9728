"""Reads and writes the configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ..schemas.config import Backend, BuildConfig
from ..schemas.errors import ConfigError
from ..schemas.evaluation import EvaluateConfig, Judge
from ..schemas.strict import one_line_each
from ..schemas.training import TrainConfig
from .io import files

_Config = TypeVar("_Config", BuildConfig, TrainConfig, EvaluateConfig, Judge)

_FLAGS = {TrainConfig: " --training", EvaluateConfig: " --evaluation", Judge: " --evaluation"}
"""Of the command that prints a configuration's keys."""

_PATHS = {"coconut": ("annotations", "photos", "labels", "categories"), "sa1b": ("paths",)}


def load_config(config: str | Path | Mapping[str, Any] | BuildConfig) -> BuildConfig:
    """A build configuration with absolute paths.

    Args:
        config: a YAML file, in which relative paths are seen from its folder; or the keys and values, or the
            configuration itself, in which they are seen from the current folder.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or a wrong value; a line for each, with its place.
    """
    if isinstance(config, str | Path):
        return absolute(_read(Path(config), BuildConfig), Path(config).parent.resolve())
    if isinstance(config, Mapping):
        config = _check(dict(config), BuildConfig, "config")
    return absolute(config, Path.cwd())


def load_training(path: str | Path) -> TrainConfig:
    """Read a training configuration, likewise."""
    config, root = _read(Path(path), TrainConfig), Path(path).parent.resolve()
    values = config.model_dump()
    values["out"] = _absolute(values["out"], root)
    model = values["model"]
    model["path"] = _absolute(model["path"], root)
    if model["tokenizer"] not in (None, "toy"):
        model["tokenizer"] = _absolute(model["tokenizer"], root)
    for source in values["corpora"]:
        source["corpus"] = _absolute(source["corpus"], root)
    for source in values["conversations"]:
        source["path"] = _absolute(source["path"], root)
        source["images"] = _absolute(source["images"] or None, root) or ""
    if values["evaluation"]:
        values["evaluation"]["corpus"] = _absolute(values["evaluation"]["corpus"], root)
    values["data"]["cache"] = _absolute(values["data"]["cache"], root)
    _refuse_url(values["out"])
    return TrainConfig.model_validate(values)


def load_evaluation(path: str | Path) -> EvaluateConfig:
    """Read the configuration of an evaluation, likewise; `model` and `path` among options are paths, too."""
    config, root = _read(Path(path), EvaluateConfig), Path(path).parent.resolve()
    values = config.model_dump()
    values["out"] = _absolute(values["out"], root)
    for bench in values["benchmarks"]:
        bench["folder"] = _absolute(bench["folder"], root)
        bench["photos"] = _absolute(bench["photos"], root)
    values["toy"] = _absolute(values["toy"], root)
    if values["profile"]:
        values["profile"]["scenes"] = _absolute(values["profile"]["scenes"], root)
    values["captioner"]["options"] = _local_options(values["captioner"], root)
    if values["judge"]:
        values["judge"]["options"] = _local_options(values["judge"], root)
    _refuse_url(values["out"])
    return EvaluateConfig.model_validate(values)


def load_judge(path: str | Path) -> Judge:
    """Read a judge's `name` and `options` from a file of their own, likewise."""
    judge, root = _read(Path(path), Judge), Path(path).parent.resolve()
    return judge.model_copy(update={"options": _local_options(judge.model_dump(), root)})


def _local_options(backend: dict[str, Any], root: Path) -> dict[str, Any]:
    """A backend's options with their paths seen from `root`; a server's model is a name, and no path."""
    paths = () if backend["name"] == "openai" else ("model", "path")
    options = backend["options"]
    return options | {name: _absolute(options[name], root) for name in paths if name in options}


def _read(path: Path, kind: type[_Config]) -> _Config:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(raw).__name__}")
    return _check(raw, kind, str(path))


def _check(raw: dict[str, Any], kind: type[_Config], where: str) -> _Config:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        keys = f"see `paracaption config{_FLAGS.get(kind, '')}` for all keys"
        raise ConfigError(one_line_each(error, where, keys)) from error


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
    _refuse_url(values["out"])
    return BuildConfig.model_validate(values)


def dump_config(config: BuildConfig) -> str:
    """The resolved configuration as YAML, keys in the order of the model."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _absolute(path: Any, root: Path) -> Any:
    if path is None or files.is_url(path):
        return path
    return str((root / Path(files.local(path)).expanduser()).resolve())


def _refuse_url(out: str) -> None:
    if files.is_url(out):
        raise ConfigError(f"out: {out} is a URL; name a folder that every node mounts")


def describe(kind: type[BaseModel] = BuildConfig) -> str:
    """Every key with its default and its reason, as a commented YAML file."""
    lines: list[str] = []
    _describe(kind, "", lines)
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
            kind = _KINDS.get(get_origin(field.annotation) or BaseModel, "or none")
            lines.append(f"{indent}{name}:  # {kind + '; ' if kind else ''}{_summary(nested)}")
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


_KINDS = {list: "a list", BaseModel: ""}
"""How a nested model is announced; one that can be left out is neither."""


def _model_of(annotation: Any) -> type[BaseModel] | None:
    inner = (get_args(annotation) or (annotation,))[0]
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0].rstrip(".")
