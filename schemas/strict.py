"""The base of every configuration: an unknown key is an error, an old name is translated."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from . import renames


class Strict(BaseModel):
    """A part of a configuration file. It cannot be changed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, values: Any) -> Any:
        return renames.translate(cls.__name__, values) if isinstance(values, dict) else values
