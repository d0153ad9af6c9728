"""Reads configuration files, and describes their keys."""

from __future__ import annotations

import copy
import os
import stat
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ..schemas.config import Backend, BuildConfig, written_place
from ..schemas.errors import ConfigError, one_line
from ..schemas.evaluation import Captioner, EvaluateConfig, Judge
from ..schemas.strict import one_line_each
from ..schemas.training import TrainConfig
from .io import addresses, bucket_checks, failures, files, own_modules, variables, yaml_text
from .io.file_kinds import what_is
from .models.registry import BACKENDS, find_registered
from .sources.registry import SOURCES, allow_kinds, file_context, find_options, find_source
from .stages.composite import COMPOSITES
from .stages.options import option_names
from .stages.recipes import RECIPES, recipe_of, write_out
from .stages.registry import STAGES, allow_stages

_Config = TypeVar("_Config", BuildConfig, TrainConfig, EvaluateConfig, Judge)

_Backend = TypeVar("_Backend", Captioner, Judge)

_FLAGS = {TrainConfig: " --training", EvaluateConfig: " --evaluation", Judge: " --evaluation"}
"""Options of `paracaption config`, which prints the keys of a configuration."""


def load_config(
    config: str | Path | Mapping[str, Any] | BuildConfig, changes: Sequence[str] = ()
) -> BuildConfig:
    """The configuration of a build, with absolute paths and every option of its sources.

    Args:
        config: a YAML file, in which relative paths start at its folder; or the keys and values, or the
            configuration itself, in which they start at the current folder.
        changes: `KEY=VALUE` for each key that gets another value. A key of a section is `section.key`, an
            element of a list has its number, and a value is YAML.

    Raises:
        ConfigError: there is no such file, it is not YAML, a key is unknown or a value does not suit it; a
            line for each mistake, with its place.
    """
    if isinstance(config, str | Path):
        return _read_file(config, BuildConfig, changes)
    values = config.model_dump() if isinstance(config, BuildConfig) else dict(config)
    return _check(_changed(values, changes, BuildConfig), BuildConfig, "config", Path.cwd())


def load_training(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read the configuration of a training run; see `load_config`."""
    return _read_file(path, TrainConfig, changes)


def load_evaluation(path: str | Path, changes: Sequence[str] = ()) -> EvaluateConfig:
    """Read the configuration of an evaluation; see `load_config`. Options `model` and `path` are paths."""
    config, file = _read_file(path, EvaluateConfig, changes), Path(path)
    judge = config.judge and _with_absolute_options(config.judge, file, "judge.")
    captioner = _with_absolute_options(config.captioner, file, "captioner.")
    benchmarks = [
        bench.model_copy(update={"judge": _with_absolute_options(bench.judge, file, f"{bench.name}.judge.")})
        if bench.judge
        else bench
        for bench in config.benchmarks
    ]
    return config.model_copy(update={"captioner": captioner, "judge": judge, "benchmarks": benchmarks})


def load_judge(path: str | Path) -> Judge:
    """Read a judge's `name` and `options` from a file of their own; see `load_evaluation`."""
    return _with_absolute_options(_read_file(path, Judge), Path(path))


def _with_absolute_options(backend: _Backend, file: Path, where: str = "") -> _Backend:
    """A backend whose options have their paths seen from its file. A server's model is a name and no path."""
    paths = () if backend.name == "openai" else ("model", "path", "keys")
    given, home = backend.options, file.parent.resolve()
    changed: dict[str, Any] = {}
    for name in paths:
        try:  # what is neither a text nor a list of texts is refused with the other options
            if isinstance(given.get(name), str):
                changed[name] = _absolute(home, given[name])
            elif isinstance(given.get(name), list):
                changed[name] = [_absolute(home, x) if isinstance(x, str) else x for x in given[name]]
        except ValueError as error:
            raise ConfigError(f"{file}: {where}options.{name}: {error}") from error
    return backend.model_copy(update={"options": given | changed})


def _read_file(path: str | Path, kind: type[_Config], changes: Sequence[str] = ()) -> _Config:
    path = Path(path)
    data = _bytes_of(path)
    try:
        raw = yaml_text.parse(data.decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        told = isinstance(error, UnicodeDecodeError) and (what_is(data, "YAML") or "save it as UTF-8")
        told = told or " ".join(str(error).replace('in "<unicode string>", ', "").split())
        fix = "" if "UTF-8" in told else "; correct the file"
        raise ConfigError(f"{path}: not a YAML file: {told}{fix}") from error
    if raw is None:
        raise ConfigError(
            f"{path}: the file is empty; `paracaption config{_FLAGS.get(kind, '')}` prints all keys"
        )
    if not isinstance(raw, dict):
        found = "a list" if isinstance(raw, list) else "a single value"
        raise ConfigError(
            f"{path}: the file has to be a mapping of keys to values, but it is {found}; "
            f"`paracaption config{_FLAGS.get(kind, '')}` prints all keys"
        )
    return _check(_changed(raw, changes, kind), kind, str(path), path.parent.resolve())


def _changed(values: dict[str, Any], changes: Sequence[str], kind: type[_Config]) -> dict[str, Any]:
    """A copy of a configuration's values in which `KEY=VALUE` holds."""
    example = (
        f"give a key that `paracaption config{_FLAGS.get(kind, '')}` prints and its value as YAML, as in "
        "--set KEY=3 or --set SECTION.KEY=3"
    )
    if changes:
        values = copy.deepcopy(values)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: it has no `=`; {example}")
        *sections, last = (int(part) if part.isdecimal() else part for part in key.split("."))
        try:
            place: Any = values
            for section in sections:
                missing = isinstance(place, dict) and place.get(section) is None
                place = place.setdefault(section, {}) if missing else place[section]
            place[last] = yaml_text.parse(text)
        except yaml.YAMLError as error:
            what = f"the value is not YAML ({one_line(error)})"
            raise ConfigError(f"--set {change}: {what}; {example}") from error
        except (TypeError, LookupError) as error:
            raise ConfigError(f"--set {change}: the configuration has no `{key}`; {example}") from error
    return values


def _bytes_of(path: Path) -> bytes:
    """What the file holds, or somewhat more of it than may be: it may be a device without an end."""
    try:
        # One that a shell makes for `<(...)` is there to be read.
        if stat.S_ISFIFO(path.stat().st_mode) and not str(path).startswith(("/dev/", "/proc/")):
            raise ConfigError(f"{path} is a pipe; give the YAML file")
        with path.open("rb") as file:
            return file.read(yaml_text.MAX_BYTES + 1)
    except ConfigError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{path}: no such file; correct the path, or write one with `paracaption init {path}`"
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; give the YAML file in it") from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({failures.describe(error)}); correct its permissions"
        ) from error
    except ValueError as error:  # a NUL in its name
        raise ConfigError(f"{str(path)!a}: no file can have this name ({error})") from error


def _check(values: dict[str, Any], kind: type[_Config], where: str, root: Path) -> _Config:
    own_modules.look_in(root)
    if kind is BuildConfig and isinstance(subsets := values.get("subsets"), dict):
        allow_kinds(subsets.values())
        allow_stages(subsets.values())
    seen = _stored if kind is BuildConfig else _absolute
    try:
        config = kind.model_validate(values, context=file_context(partial(seen, root)))
    except ValidationError as error:
        keys = f"see `paracaption config{_FLAGS.get(kind, '')}` for all keys"
        place_of = partial(written_place, values=values) if kind is BuildConfig else tuple
        known = partial(_keys_at, kind)
        raise ConfigError(one_line_each(error, where, keys, place_of, known)) from error
    if not isinstance(config, Judge | BuildConfig) and files.is_url(config.out):
        raise ConfigError(f"{where}: out: {config.out} is a URL; name a folder that every node mounts")
    if isinstance(config, BuildConfig):
        config = _with_variables(config, root)
        try:
            bucket_checks.refuse_secrets(config.out)
            config = write_out(config)
            for subset in config.subsets:
                recipe_of(config, subset)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return config


def _with_variables(config: BuildConfig, root: Path) -> BuildConfig:
    """A build's configuration with the place of `out`, and options of backends that may name variables."""
    update: dict[str, Any] = {"out": _absolute(root, config.out)}
    for protocol in BACKENDS:
        backend: Backend = getattr(config, protocol)
        options = variables.take_all(backend.options)
        for name in find_registered(protocol, backend).paths:
            if isinstance(options.get(name), str):  # what is no text is refused with the other options
                options = options | {name: _stored(root, options[name])}
        if options != backend.options:
            update[protocol] = backend.model_copy(update={"options": options})
    update["subsets"] = {
        name: subset.model_copy(update={"recipe": variables.take_all(subset.recipe)})
        if isinstance(subset.recipe, list)
        else subset
        for name, subset in config.subsets.items()
    }
    return config.model_copy(update=update)


def _keys_at(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys that a model has at a place, whose last part is a key that it does not have.

    Those of its sections follow, as `section.key`.
    """
    for part in place[:-1]:
        if part == "sources":  # of any kind
            return [key for source in SOURCES for key in find_options(source).model_fields]
        field = kind.model_fields.get(str(part))
        kind = (field and _model_of(field.annotation)) or kind
    return [*kind.model_fields, *_keys_of_sections(kind)]


def _keys_of_sections(kind: type[BaseModel]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        nested = _model_of(field.annotation)
        if nested is not None and get_origin(field.annotation) not in (dict, list):
            yield from (f"{name}.{key}" for key in (*nested.model_fields, *_keys_of_sections(nested)))


def _absolute(root: Path, path: str) -> str:
    """A path with the values of its variables, seen from a folder."""
    return _resolved(root, variables.expand(variables.take(path)))


def _stored(root: Path, path: str) -> str:
    """A path as a corpus stores it, with its variables, seen from a folder; without any it is `_absolute`."""
    path = variables.take(path)
    expanded = variables.expand(path)
    if expanded == path:
        return _resolved(root, path)
    at_home = files.is_url(expanded) or os.path.isabs(expanded)
    return path if at_home else f"{root}/{path}"


def _resolved(root: Path, path: str) -> str:
    if not path or files.is_url(path):
        return path
    addresses.check_path(path)
    try:
        found = str((root / Path(files.local(path)).expanduser()).resolve())
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"not a valid path ({one_line(error)}); correct it") from error
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a name on its path is not UTF-8, and cannot be stored; rename it") from error
    return found


_HEAD = """\
# Every key with its default. A key whose value is `required` has no default: give it.
"""
_HEAD_OFF = """\
# Lines that begin with `#` are keys of a section that is null by default, or of an entry of a list that is
# empty by default. To have it, remove the `#` of each line and the `null` or `[]` above them.
"""
_HEAD_TRAINING = """\
# The released code is that of PerceptionDLM (github.com/MSALab-PKU/PerceptionDLM).
"""


def describe(kind: type[BaseModel] = BuildConfig) -> str:
    """Every key with its default and its meaning, as a commented YAML file.

    The keys of a section that is null by default, and of an entry of a list that is empty by default, are
    comments, so that the values of the file are the defaults.
    """
    lines: list[str] = []
    _describe(kind, "", lines)
    head = _HEAD + (_HEAD_OFF if any(line.startswith("#") for line in lines) else "")
    head += _HEAD_TRAINING if kind is TrainConfig else ""
    if kind is BuildConfig:
        *first, last = BACKENDS
        lines.append(f"# Keys of {', '.join(first)} and {last}:")
        _describe(Backend, "#   ", lines)
        lines.append("# Names of backends, and the pages that describe their options:")
        for protocol, known in BACKENDS.items():
            named = ", ".join(f"{name} ({each.page})" for name, each in known.items())
            lines.append(f"#   {protocol}: {named}")
        for source in SOURCES:
            lines.append(f"# Keys of a source of the kind `{source}`. {_summary(find_options(source))}")
            found = find_source(source)
            first = f", after `{found.mask_stage}`, which makes the masks" if found.mask_stage else ""
            said = f"Its default recipe is `{found.recipe}`{first}."
            lines.append(f"#   source: {source}  # The kind of the source. {said}")
            _describe(find_options(source), "#   ", lines)
    return head + "\n".join(lines)


_HEAD_RECIPES = """\
# The paper's recipes. A subset takes one by its name, as in `recipe: verify`,
# or a list of its own: copy one of these lists under `recipe:` and change it
# (docs/recipes.md). A stage with options is a mapping:
#   - stage: caption
#     id: second_caption
#     captioner: {name: gar, options: {model: /models/GAR-8B}}
# Two that ask other stages:
#   - vote:
#       - verify_category
#       - {stage: verify_category, id: second_judge, judge: {name: vllm}}
#     at_least: 2
#   - fallback:
#       - caption
#       - {stage: caption, id: second_caption, captioner: {name: gar}}
"""


def describe_recipes() -> str:
    """The paper's recipes as YAML, and in comments every stage with its options."""
    lines = [_HEAD_RECIPES]
    for name, recipe in RECIPES.items():
        lines.append(yaml.safe_dump({name: list(recipe)}, sort_keys=False))
    made = {source: find_source(source).mask_stage for source in SOURCES}
    lines += [
        f"# For sources of the kind `{source}`, the stage `{stage}` comes first.\n# It makes the masks."
        for source, stage in made.items()
        if stage
    ]
    lines.append(
        "# Stages, with what each needs from a stage before it or from the source,\n# and its options:"
    )
    for name, stage in STAGES.items():
        needs = f" Needs {' and '.join(stage.needs)}." if stage.needs else ""
        gives = f" Gives {' and '.join(stage.gives)}." if stage.gives else ""
        options = f"Options: {', '.join(option_names(stage))}."
        lines += _comment(f"{name}: {stage.does}.{needs}{gives} {options}")
    for name, stage in COMPOSITES.items():
        lines += _comment(f"{name}: {stage.does}.")
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    """A paragraph of a comment in 80 columns."""
    return textwrap.wrap(text, 79, initial_indent="#   ", subsequent_indent="#     ")


def _describe(model: type[BaseModel], indent: str, lines: list[str]) -> None:
    for name, field in model.model_fields.items():
        nested, kind = _model_of(field.annotation), get_origin(field.annotation)
        meaning = " ".join(filter(None, (field.description, _choices(field))))
        if type(field.default) is Backend:
            lines.append(f"{indent}{name}: {{name: {field.default.name}}}  # {meaning}")
        elif nested is None:
            default = (
                "required" if field.is_required() else yaml.safe_dump(_plain(field), default_flow_style=True)
            )
            value = default.splitlines()[0]
            lines.append(f"{indent}{name}: {value}  # {meaning}".rstrip(" #"))
        elif kind is dict:
            lines += [f"{indent}{name}:  # {meaning}", f"{indent}  NAME:  # {_summary(nested)}"]
            _describe(nested, indent + "    ", lines)
        elif kind is list:  # empty by default
            lines.append(f"{indent}{name}: []  # {meaning} None by default. An entry has these keys:")
            at = len(lines)
            _describe(nested, f"#{indent}    ", lines)
            lines[at] = f"#{indent}  - {lines[at][1:].lstrip()}"
        elif field.default is None:
            lines.append(f"{indent}{name}: null  # {_summary(nested)} {meaning}")
            _describe(nested, f"#{indent}  ", lines)
        else:
            needed = "Required." if field.is_required() else ""
            said = " ".join(filter(None, (needed, _summary(nested), meaning)))
            lines.append(f"{indent}{name}:  # {said}")
            _describe(nested, indent + "  ", lines)


def _choices(field: Any) -> str:
    """The values of a key that takes few, unless its description names all of them."""
    parts = [field.annotation, *get_args(field.annotation)]
    values = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    if not values or all(f"`{value}`" in (field.description or "") for value in values):
        return ""
    *first, last = (f"`{value}`" for value in values)
    if not first:
        return ""
    return f"One of {', '.join(first)} or {last}."


def _plain(field: Any) -> Any:
    value = field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _model_of(annotation: Any) -> type[BaseModel] | None:
    parts = get_args(annotation) or (annotation,)
    return next((each for each in parts if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]
