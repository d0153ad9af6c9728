"""Opens a saved model, whole: transformers draws weights that a folder lacks at random, and only warns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...schemas.errors import ConfigError
from .perceptiondlm import PerceptionDLM


def load_model(folder: Path, **options: Any) -> PerceptionDLM:
    """The model of a folder, with every one of its weights from there.

    Args:
        folder: what `save_pretrained` wrote.
        options: of `from_pretrained`, such as `dtype`.

    Raises:
        ConfigError: weights are missing, unknown or of another shape; names them.
    """
    loaded: Any = PerceptionDLM.from_pretrained(
        folder, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
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
