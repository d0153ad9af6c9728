"""What a run of a served flow may name: whoever reaches Prefect's API chooses its parameters.

A run loads the backends and sources of this package. Anything else that would run code, or send photos and
keys elsewhere, has to be named where `paracaption deploy` starts: `--allow`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..pipeline.io import own_modules, variables
from ..pipeline.models.registry import BACKENDS
from ..pipeline.sources.registry import SOURCES, allow_kinds
from ..pipeline.stages.registry import STAGES, allow_stages
from ..schemas.config import Backend, BuildConfig
from ..schemas.errors import ConfigError
from ..schemas.evaluation import EvaluateConfig
from ..schemas.recipe import parse, stages_in
from ..schemas.training import TrainConfig

ALLOWED = "PARACAPTION_SERVED_ALLOWED"
"""The environment variable that hands what is allowed to the process of each run: a JSON list."""

FOLDER = "PARACAPTION_SERVED_FOLDER"
"""The environment variable that says where modules lie that are allowed and not installed."""

OF_EVALUATION = ("perceptiondlm", "predictions")
"""Captioners of an evaluation that are no backends of a build."""

_TYPES = ("dtype", "kv_cache_dtype", "quantization")
"""vLLM's arguments that are a word. Its other texts may name classes, plugins and files."""

_WORD = re.compile(r"[A-Za-z0-9_]{1,32}")


def allow(names: Collection[str], folder: str | Path = ".") -> None:
    """Let the runs that this process starts name these backends, Pythons, servers, variables, addresses.

    Args:
        names: what is allowed.
        folder: where the modules of allowed classes lie that are not installed.
    """
    os.environ[ALLOWED] = json.dumps(sorted(names))
    os.environ[FOLDER] = str(Path(folder).resolve())


def is_served() -> bool:
    """Whether the flow that calls this runs because a deployment was asked for it."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def check_run(config: BuildConfig | EvaluateConfig | TrainConfig, ray_address: str | None = None) -> None:
    """Refuse what a served run may not name; a flow that was called, and not served, may name anything.

    Nothing that the configuration names has been imported or started yet.

    Raises:
        ConfigError: a line for each thing that is not allowed.
    """
    if is_served():
        refuse(config, ray_address, frozenset(json.loads(os.environ.get(ALLOWED) or "[]")))
        if folder := os.environ.get(FOLDER):
            own_modules.look_in(folder)
    if isinstance(config, BuildConfig):
        allow_kinds(config.subsets.values())
        allow_stages(config.subsets.values())


def refuse(
    config: BuildConfig | EvaluateConfig | TrainConfig, ray_address: str | None, allowed: Collection[str]
) -> None:
    """See `check_run`.

    Args:
        config: the parameter of the run.
        ray_address: the parameter of the run.
        allowed: what `deploy` was started with.
    """
    wrong = [f"{where}: {what!r}" for where, what in _unusual(config) if what not in allowed]
    if ray_address not in (None, "auto", *allowed):
        wrong.append(f"ray_address: {ray_address!r}")
    if wrong:
        hint = (
            "is not allowed in a served flow; to allow it, start `paracaption deploy` again with "
            "`--allow VALUE` (docs/cluster.md)"
        )
        raise ConfigError("\n".join(f"{each} {hint}" for each in wrong))


def _unusual(config: BuildConfig | EvaluateConfig | TrainConfig) -> Iterator[tuple[str, str]]:
    """(key, what it names) of everything that is no part of this package and may run or send something."""
    for name, value in _leaves(config.model_dump(mode="json"), ""):
        for variable in variables.names(value) if isinstance(value, str) else ():
            yield name.removeprefix("."), f"${{{variable}}}"
    if isinstance(config, BuildConfig):
        for protocol in BACKENDS:
            yield from _of_backend(protocol, getattr(config, protocol), BACKENDS[protocol])
        for name, subset in config.subsets.items():
            yield from _of_recipe(f"subsets.{name}.recipe", subset.recipe)
            for number, entry in enumerate(subset.sources):
                kind = entry.get("source")
                if kind not in SOURCES:
                    yield f"subsets.{name}.sources.{number}.source", _text(kind)
    elif isinstance(config, EvaluateConfig):
        known = (*BACKENDS["captioner"], *OF_EVALUATION)
        yield from _of_backend("captioner", config.backend(), known)
        if config.judge:
            judge = Backend(name=config.judge.name, options=config.judge.options)
            yield from _of_backend("judge", judge, BACKENDS["judge"])
        for task in config.harness.tasks if config.harness else ():
            if task.include is not None:  # a task of lmms-eval is Python
                yield f"harness.tasks.{task.name}.include", task.include
    else:
        for name, value in _leaves(config.model.config, "model.config"):
            if "implementation" in name and isinstance(value, str) and not _WORD.fullmatch(value):
                yield name, value


def _of_recipe(where: str, recipe: Any) -> Iterator[tuple[str, str]]:
    """The stages of a recipe that are not ours, and what their own backends name."""
    for entry in stages_in(parse(recipe)) if isinstance(recipe, list) else ():
        at = f"{where}.{entry.id}"
        if entry.kind not in STAGES:
            yield f"{at}.stage", entry.kind
        for protocol in BACKENDS:
            if protocol in entry.options:
                backend = Backend.checked(entry.options[protocol], f"{at}.{protocol}")
                yield from _of_backend(f"{at}.{protocol}", backend, BACKENDS[protocol])


def _of_backend(where: str, backend: Backend, known: Collection[str]) -> Iterator[tuple[str, str]]:
    if backend.name not in known:
        yield f"{where}.name", backend.name
    for name, value in backend.runtime_env.items():
        is_python = name == "py_executable" and isinstance(value, str)
        yield f"{where}.runtime_env.{name}", value if is_python else f"{name}={_text(value)}"
    options = backend.options
    for name in ("base_url", "api_key_env"):
        if name in options and (name, options[name]) != ("api_key_env", "OPENAI_API_KEY"):
            yield f"{where}.options.{name}", _text(options[name])
    for name, value in _leaves(options.get("engine"), f"{where}.options.engine"):
        is_word = name.rpartition(".")[2] in _TYPES and isinstance(value, str) and _WORD.fullmatch(value)
        if isinstance(value, str) and not is_word:
            yield name, value


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of every value in an option, however deep; the keys of mappings count as values, too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, dict | list) and not _WORD.fullmatch(str(key)):
                yield name, str(key)
            yield from _leaves(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
