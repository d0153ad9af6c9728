"""Lets transformers' Auto classes say what to do with a PerceptionDLM in the published layout.

Without it, `AutoProcessor` returns a bare tokenizer for such a folder, and `AutoModel` asks to run its code.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
)

from ...schemas.errors import ConfigError


class PublishedConfig(PreTrainedConfig):
    """The config of the published layout, of which nothing is read."""

    model_type = "pdmllm"


class PublishedLayout:
    """Stands for the model and the processor of the published layout, and refuses to be either."""

    config_class = PublishedConfig

    @classmethod
    def from_pretrained(cls, path: Any, *_: Any, **__: Any) -> Any:
        """Raise a `ConfigError` that says how the folder is converted."""
        raise ConfigError(
            f"{path}: a PerceptionDLM in the published layout; convert it with `paracaption models convert "
            f"{path} --to FOLDER`, and load that folder"
        )


def register() -> None:
    """Make the Auto classes answer with that error, unless they are asked to run the folder's code."""
    AutoConfig.register(PublishedConfig.model_type, PublishedConfig, exist_ok=True)
    AutoProcessor.register(PublishedConfig, PublishedLayout, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(PublishedConfig, PublishedLayout, exist_ok=True)
