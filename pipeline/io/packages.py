"""How to install the packages of paracaption that are missing.

Everything is read from the metadata of installed distributions; nothing is imported.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

_DISTRIBUTIONS = {
    **{"cv2": "opencv-python-headless", "segment_anything": "segment-anything", "PIL": "pillow"},
    **{"yaml": "pyyaml", "pynvml": "nvidia-ml-py", "multipart": "python-multipart"},
}
"""Module -> its distribution, where the names differ."""

_EXTRAS = ("models", "vllm", "remote")
"""The extras of paracaption; the first that requires a distribution is the one to install."""

_WITH_TRANSFORMERS = ("safetensors", "huggingface_hub", "tokenizers")
"""Modules that come with transformers."""

_PAGES = {
    "models": "README.md",
    "vllm": "docs/gpu.md",
    "remote": "docs/sources.md",
    "lmms": "docs/evaluation.md",
}
"""Extra -> the page that says how it is installed."""

AGAIN = "install paracaption again, with the packages that it requires (README.md)"
"""What to do about a missing package that every installation has."""


def how_to_install(module: str) -> str:
    """What to do about a module that is not installed, in one sentence."""
    distribution = _distribution_of(module)
    extra = _extra_of(module)
    if extra is not None:
        return how_to_install_extra(extra)
    return AGAIN if distribution in requirements(None) else install_with(distribution)


def install_with(what: str) -> str:
    """How to install a package into this environment, which has no pip if uv made it."""
    return f"install it with `uv pip install {what}` or `python -m pip install {what}`"


def how_to_install_extra(extra: str) -> str:
    """What to do about an extra of paracaption that is not installed, in one sentence."""
    clone = "`make models` in a clone, or " if extra == "models" else ""
    return f"{clone}install paracaption again with the extra `{extra}` ({_PAGES[extra]})"


def is_required(module: str) -> bool:
    """Whether a module comes with paracaption or one of its extras, so that the installation lacks it."""
    return _distribution_of(module) in requirements(None) or _extra_of(module) is not None


def _extra_of(module: str) -> str | None:
    """The extra that brings a module; None if there is none or the base package brings it."""
    if module in _WITH_TRANSFORMERS:
        module = "transformers"
    distribution = _distribution_of(module)
    if distribution in requirements(None):
        return None
    return next((extra for extra in _EXTRAS if distribution in requirements(extra)), None)


def _distribution_of(module: str) -> str:
    return _DISTRIBUTIONS.get(module, module)


def requirements(extra: str | None) -> dict[str, Any]:
    """What paracaption requires, always or under an extra: distribution -> version specifier."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("paracaption") or []
    except importlib.metadata.PackageNotFoundError:  # a folder on the path that nobody installed
        return {}
    found = {}
    for text in lines:
        requirement = Requirement(text)
        marker = requirement.marker
        wanted = marker is None or (extra is not None and marker.evaluate({"extra": extra}))
        if wanted and not (extra is not None and marker is None) and requirement.name != "paracaption":
            found[requirement.name] = requirement.specifier
    return found
