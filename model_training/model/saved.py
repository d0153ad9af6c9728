"""Opens a saved model, whole: transformers draws weights that a folder lacks at random, and only warns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...pipeline.io import weights
from ...schemas.errors import ConfigError, one_line
from .perceptiondlm import PerceptionDLM


def load_model(folder: Path, **options: Any) -> PerceptionDLM:
    """The model of a folder, with every one of its weights from there.

    Args:
        folder: what `save_pretrained` wrote.
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        ConfigError: weights cannot be read, are missing, unknown or of another shape, and it names them; or
            the folder asks for code.
    """
    weights.refuse_code(folder)
    try:
        loaded: Any = PerceptionDLM.from_pretrained(
            folder,
            **options,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"{folder}: not readable ({one_line(error)[:300]}); save the model again"
        ) from error
    model, report = loaded
    mismatched = [_of_shape(*each) for each in report["mismatched_keys"]]
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unknown": sorted(report["unexpected_keys"]),
        "of another shape": sorted(mismatched),
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ConfigError(
            f"{folder}: its weights are not those of its config.json; {listed}; copy or convert "
            "the model again"
        )
    return model


def _of_shape(name: str, found: Any, wanted: Any) -> str:
    return f"{name} is {_sizes(found)}, not {_sizes(wanted)}"


def _sizes(shape: Any) -> str:
    return "x".join(map(str, shape))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
