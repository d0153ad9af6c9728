"""The regions of a photo that comes without masks: a mask generator of the pipeline makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...pipeline.io import variables
from ...pipeline.models import answers
from ...pipeline.models.registry import load_backend
from ...schemas.config import Backend, BuildConfig
from ...schemas.errors import BadRecord, ConfigError
from .read_regions import PhotoRegions, Region, read_pixels

OPTION = "mask_generator"


def generator_of(given: str | Mapping[str, Any] | Backend | None) -> Backend:
    """The generator that a caller names.

    Args:
        given: a backend or its name; or its name and options, as a mapping such as
            `{"name": "sam", "options": {"model": "sam.pth"}}`. None takes the one that needs no weights.

    Raises:
        ConfigError: it is something else.
    """
    if given is None or isinstance(given, Backend):
        return given or BuildConfig.model_fields[OPTION].default
    backend = Backend.checked({"name": given} if isinstance(given, str) else given, OPTION)
    return backend.model_copy(update={"options": variables.take_all(backend.options)})


def generate_regions(
    image: str | Path, generator: str | Mapping[str, Any] | Backend | None = None
) -> PhotoRegions:
    """Read a photo and make its regions, in the order of `answers.generated`: larger ones first.

    Args:
        image: path of the photo.
        generator: see `generator_of`.

    Raises:
        ConfigError: there is no such photo or generator, an option is wrong, or the generator fails on the
            photo or finds nothing to mask.
    """
    backend = generator_of(generator)
    pixels = read_pixels(str(image))
    found = answers.generated(load_backend(OPTION, backend).generate(pixels), pixels.shape[:2])
    if isinstance(found, BadRecord):
        raise ConfigError(f"{image}: the mask generator `{backend.name}`: {found.detail}; take another one")
    if not found:
        raise ConfigError(
            f"{image}: the mask generator `{backend.name}` finds nothing to mask; give masks, or another "
            "generator"
        )
    regions = [Region(f"{backend.name}: mask {number}", mask) for number, (mask, _) in enumerate(found, 1)]
    return PhotoRegions(str(image), pixels, regions, [])
