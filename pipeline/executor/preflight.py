"""What is known to fail before a build starts: a look of a second or so, without torch, Ray or a network.

`doctor` looks closer, and on the nodes of a cluster.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from ...schemas.config import Backend, BuildConfig
from ...schemas.errors import ConfigError, ParaCaptionError
from ..models import registry
from ..models.protocols import Checked
from ..sources.registry import open_source
from .findings import CPU_VLLM, FAIL, OK, Finding, built_for_gpus, installed

_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")


def examine(config: BuildConfig) -> Iterator[Finding]:
    """What stands in the way of a build, and what does not. Never raises for what it looks at.

    Whether the packages of its models are installed, `packages` says, once it is known which are asked.
    """
    for protocol in protocols(config):
        yield backend_options(protocol, getattr(config, protocol))
    yield from read_sources(config)
    yield output_folder(config.out)


def packages(config: BuildConfig, asked: Collection[str]) -> Iterator[Finding]:
    """Whether the models that will be asked find their packages on this machine.

    Args:
        config: of the build.
        asked: protocols of those models, as `driver.prepare` gives them.
    """
    for protocol in protocols(config):
        backend = getattr(config, protocol)
        if protocol in asked and not backend.runtime_env:
            yield from backend_packages(protocol, backend)


def protocols(config: BuildConfig) -> list[str]:
    """Those that the configured subsets use."""
    return ["captioner", "judge", *(["segmenter"] if config.sa1b else [])]


def backend_packages(protocol: str, backend: Backend) -> Iterator[Finding]:
    """Whether what one of our backends imports is installed."""
    registered = registry.find_registered(protocol, backend)
    extra = CPU_VLLM if registered.extra == "vllm" and not backend.num_gpus else registered.extra
    for name in registered.needs:
        for each in [*installed(name, extra), *built_for_gpus(name, backend)]:
            yield Finding(f"{protocol} {backend.name}", each.state, each.said, each.mend)


def backend_options(protocol: str, backend: Backend) -> Finding:
    """Whether the backend exists, takes its options, and finds its checkpoint."""
    title = f"{protocol} {backend.name}"
    try:
        cls = registry.find_backend(protocol, backend)
        registry.backend_identity(protocol, backend)
        if not hasattr(cls, "check"):
            _fits(protocol, cls, backend)
        tokenizer(protocol, backend)
    except Exception as error:  # noqa: BLE001 - a backend of the user's may raise anything
        return _failed(title, error, f"correct `{protocol}` in the configuration")
    return Finding(title, OK, "its options fit")


def check(protocol: str, backend: Backend) -> Checked | None:
    """What the backend's own check says; None if it has none and its options fit its constructor.

    Raises:
        ConfigError: the backend or its checkpoint does not fit.
    """
    cls = registry.find_backend(protocol, backend)
    if hasattr(cls, "check"):
        return cls.check(**backend.options)
    _fits(protocol, cls, backend)
    if hasattr(cls, "identity"):
        cls.identity(**backend.options)
    return None


def _fits(protocol: str, cls: type, backend: Backend) -> None:
    try:
        signature = inspect.signature(cls)
    except ValueError:  # a class of an extension module need not say what it takes
        return
    try:
        signature.bind(**backend.options)
    except TypeError as error:
        raise ConfigError(f"{protocol}.options: {error}; correct the option") from error


def tokenizer(protocol: str, backend: Backend) -> None:
    """Refuse a language model's folder without its tokenizer.

    Raises:
        ConfigError: names the file.
    """
    if registry.find_registered(protocol, backend).extra == "vllm" and "model" in backend.options:
        folder = Path(str(backend.options["model"]))
        if not any((folder / name).is_file() for name in _TOKENIZERS):
            raise ConfigError(
                f"{protocol}.options.model: {folder / _TOKENIZERS[0]}: no such file; download it, too"
            )


def read_sources(config: BuildConfig) -> Iterator[Finding]:
    """Whether the lists of every source entry can be had; `paracaption audit` looks inside."""
    for subset in config.subsets:
        for index, entry in enumerate(getattr(config, subset)):
            alone = config.model_copy(update={subset: [entry]})
            title = f"{subset}[{index}]"
            try:
                names = open_source(alone, subset).fingerprint()
                yield Finding(title, OK, f"{len(names)} files and folders are there")
            except Exception as error:  # noqa: BLE001 - a store may raise anything
                said, _, mend = one_line(error).partition("; ")
                yield Finding(title, FAIL, said, mend or "correct the path, or the store's credentials")


def output_folder(out: str) -> Finding:
    """Whether the folder of the output, or the one that it will be made in, can be written."""
    path = Path(out)
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding("out", OK, f"{out} can be written")
    what = "cannot be written" if there.is_dir() else "is a file"
    return Finding("out", FAIL, f"{there} {what}", "name a folder that this user may write")


def _failed(title: str, error: Exception, advice: str) -> Finding:
    said, _, mend = (str(error) if isinstance(error, ParaCaptionError) else one_line(error)).partition("; ")
    return Finding(title, FAIL, said, mend or advice)


def one_line(error: BaseException) -> str:
    """The error in one line; of what Ray wraps in a traceback, its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[-1] if lines else ""
    if isinstance(error, ParaCaptionError):
        return " ".join(lines)
    return f"{type(error).__name__}: {told}"
