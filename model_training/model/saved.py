"""Opens a saved model, whole: transformers draws weights that a folder lacks at random, and only warns."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...pipeline.io import tensor_files, weights
from ...schemas.errors import ConfigError, ParaCaptionError, one_line
from .config import PerceptionDLMConfig
from .perceptiondlm import PerceptionDLM

_MOST = {"num_hidden_layers": 1_000, "max_tiles": 1_000, "num_prompts": 10_000, "image_size": 1 << 14}
_MOST |= {"patch_size": 1 << 14, "replay_size": 1_000}
_MOST_OF_ALL = 1 << 31
"""Larger numbers no model has: they would take all memory before anything is compared."""

_TOKENS = ("image_token_id", "mask_token_id", "eot_token_id", "newline_token_id")


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Make a ConfigError of whatever the files of a model's folder raise.

    What transformers, torch and safetensors raise for odd ones is no closed list.
    """
    try:
        yield
    except ParaCaptionError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{folder}: not readable ({one_line(error)[:300]}); copy, convert or save the model again"
        ) from error


def read_model_config(folder: Path) -> PerceptionDLMConfig:
    """The config of a folder, whose numbers are those of a model.

    Raises:
        ConfigError: it cannot be read, or no model can have one of its numbers; names file and field.
    """
    path = folder / "config.json"
    _check_numbers(path, weights.read_json(path))
    weights.refuse_code(folder)
    with refusing(folder):
        config = PerceptionDLMConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _check_tokens(path, config)
    return config


def load_model(folder: Path, config: PerceptionDLMConfig | None = None, **options: Any) -> PerceptionDLM:
    """The model of a folder, with every one of its weights from there.

    Args:
        folder: what `save_pretrained` wrote.
        config: what `read_model_config` read there, perhaps with changes; None reads it.
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        ConfigError: weights cannot be read, are missing, unknown or of another shape, and it names them; or
            the folder asks for code.
    """
    weights.refuse_code(folder)
    config = config or read_model_config(folder)
    with refusing(folder):
        _compare_shapes(folder, config)
        with _silent():
            loaded: Any = PerceptionDLM.from_pretrained(
                folder,
                config=config,
                **options,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    model, report = loaded
    _refuse(
        folder,
        report["missing_keys"],
        report["unexpected_keys"],
        [_of_shape(*each) for each in report["mismatched_keys"]],
    )
    return model


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' table of what a folder lacks: we refuse such a folder in a line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _compare_shapes(folder: Path, config: PerceptionDLMConfig) -> None:
    """Compare names and shapes before anything takes memory: a config may ask for any amount of it."""
    stored = {name: each.shape for name, each in tensor_files.list_tensors(folder).items()}
    with torch.device("meta"):
        wanted = {
            name: tuple(each.shape)
            for name, each in PerceptionDLM(copy.deepcopy(config)).state_dict().items()
        }
    shapes = [
        _of_shape(name, stored[name], wanted[name])
        for name in stored.keys() & wanted.keys()
        if stored[name] != wanted[name]
    ]
    _refuse(folder, wanted.keys() - stored.keys(), stored.keys() - wanted.keys(), shapes)


def _refuse(folder: Path, missing: Any, unknown: Any, mismatched: list[str]) -> None:
    problems = {
        "missing": sorted(missing),
        "unknown": sorted(unknown),
        "of another shape": sorted(mismatched),
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ConfigError(
            f"{folder}: its weights are not those of its config.json; {listed}; copy or convert "
            "the model again"
        )


def _check_numbers(path: Path, values: dict[str, Any], where: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _check_numbers(path, value, f"{where}{name}.")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and not abs(each) <= _MOST.get(name, _MOST_OF_ALL):
                raise ConfigError(
                    f"{path}: {where}{name} is {str(each)[:40]}, which no model has; copy, convert or save "
                    "the model again"
                )


def _check_tokens(path: Path, config: PerceptionDLMConfig) -> None:
    """Whether every token that the layout needs is named and has a row in the embedding."""
    rows = config.text.vocab_size
    for name in _TOKENS:
        _check_token(path, name, getattr(config, name), rows)
    for name in ("region_token_ids", "caption_token_ids"):
        ids = getattr(config, name)
        if not isinstance(ids, list | tuple) or len(ids) < config.num_prompts:
            what = f"{name} names no token for each of {config.num_prompts} regions"
            raise ConfigError(f"{path}: {what}; copy, convert or save the model again")
        for number, each in enumerate(ids):
            _check_token(path, f"{name}[{number}]", each, rows)


def _check_token(path: Path, name: str, value: Any, rows: int) -> None:
    if not isinstance(value, int) or not 0 <= value < rows:
        what = f"{name} is {str(value)[:40]}, but the model has only {rows} tokens"
        raise ConfigError(f"{path}: {what}; copy, convert or save the model again")


def _of_shape(name: str, found: Any, wanted: Any) -> str:
    return f"{name} is {_sizes(found)}, not {_sizes(wanted)}"


def _sizes(shape: Any) -> str:
    return "x".join(map(str, shape))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
