"""What is known to fail before a build starts, checked in about a second, without torch, Ray or a network.

`doctor` checks more closely, and on the nodes of a cluster. `flows/preflight.py` checks training runs and
evaluations.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from ...schemas.config import Backend, BuildConfig
from ...schemas.errors import ConfigError
from ..io import bucket_checks, files
from ..io.location import is_bucket
from ..models import registry
from ..models.protocols import Checked
from ..models.vllm_engine import FORK_HANGS, START_METHOD
from ..sources.protocols import Catalog, Source
from ..sources.registry import open_source
from ..stages.base import ModelStage
from ..stages.recipes import recipe_of, used_backends
from .findings import FAIL, OK, Finding, try_check
from .packages import check_backend_packages
from .places import refuse_overlap

_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")


def check_build(config: BuildConfig) -> Iterator[Finding]:
    """Check the options of a build's backends, its sources and its output. Never raises for what it checks.

    Packages are not checked here but by `check_packages`, once it is known which models will be asked.
    """
    for place, (protocol, backend) in used_backends(config).items():
        yield check_backend(protocol, backend, place)
    yield from check_stages(config)
    yield from check_sources(config)
    yield check_output(config.out)
    yield from check_forks(config)
    yield try_check("out", "keep sources and output apart", _check_places, config)


def check_forks(config: BuildConfig) -> Iterator[Finding]:
    """A FAIL for each backend whose vLLM would fork, if the corpus is in a bucket.

    Of the nodes' own environment the engine itself says it, when it starts there.
    """
    if not is_bucket(config.out):
        return
    for place, (protocol, backend) in used_backends(config).items():
        with suppress(ConfigError):  # one that cannot be imported is found by `check_backend`
            if "vllm" in registry.find_registered(protocol, backend).needs:
                its_own = backend.runtime_env.get("env_vars", {})
                if its_own.get(START_METHOD, os.environ.get(START_METHOD)) == "fork":
                    found, _, fix = f"{START_METHOD}=fork: {FORK_HANGS}".partition("; ")
                    yield Finding(f"{place} {backend.name}", FAIL, found, fix)


def check_packages(config: BuildConfig, asked: Collection[str]) -> Iterator[Finding]:
    """Check that the models that will be asked find their packages on this machine.

    Args:
        config: of the build.
        asked: the places of those backends, as `driver.prepare` gives them.
    """
    for place, (protocol, backend) in used_backends(config).items():
        if place in asked and not backend.runtime_env:
            yield from check_backend_packages(protocol, backend)


def check_backend(protocol: str, backend: Backend, place: str = "") -> Finding:
    """Check that the backend exists, takes its options and finds its checkpoint.

    Args:
        protocol: a key of `registry.BACKENDS`, such as "captioner".
        backend: from the configuration.
        place: where it stands there; by default under the protocol's name.
    """
    fix = f"correct `{place or protocol}` in the configuration"
    return try_check(f"{place or protocol} {backend.name}", fix, _check_options, protocol, backend)


def check_stages(config: BuildConfig) -> Iterator[Finding]:
    """A FAIL for each backend that cannot answer its stage's questions; see `ModelStage.check_backend`."""
    stages = [stage for subset in config.subsets for stage in recipe_of(config, subset)]
    models = {(each.place, each.kind): each for each in reversed(stages) if isinstance(each, ModelStage)}
    for stage in models.values():
        with suppress(ConfigError):  # one that cannot be imported is found by `check_backend`
            registry.find_backend(stage.protocol, stage.backend)
            fix = f"correct `{stage.place}` in the configuration"
            finding = try_check(stage.place, fix, _check_stage, stage)
            if finding.state != OK:
                yield finding


def _check_stage(stage: ModelStage) -> str:
    stage.check_backend()
    return f"`{stage.name}` can ask it"


def _check_options(protocol: str, backend: Backend) -> str:
    cls = registry.find_backend(protocol, backend)
    registry.backend_identity(protocol, backend)
    if not hasattr(cls, "check"):
        _check_signature(protocol, cls, backend)
    check_tokenizer(protocol, backend)
    return "its options fit"


def inspect_backend(protocol: str, backend: Backend) -> Checked | None:
    """What the backend's own check reports; None if it has no check and its options fit its constructor.

    Raises:
        ConfigError: the backend or its checkpoint does not fit.
    """
    cls = registry.find_backend(protocol, backend)
    if hasattr(cls, "check"):
        return cls.check(**registry.options_of(backend))
    _check_signature(protocol, cls, backend)
    if hasattr(cls, "identity"):
        cls.identity(**registry.options_of(backend))
    return None


def _check_signature(protocol: str, cls: type, backend: Backend) -> None:
    try:
        signature = inspect.signature(cls)
    except ValueError:  # a class of an extension module may not have one
        return
    try:
        signature.bind(**registry.options_of(backend))
    except TypeError as error:
        raise ConfigError(f"{protocol}.options: {error}; correct the option") from error


def check_tokenizer(protocol: str, backend: Backend) -> None:
    """Refuse a language model's folder without its tokenizer.

    Raises:
        ConfigError: names the missing file.
    """
    if "vllm" in registry.find_registered(protocol, backend).needs and "model" in backend.options:
        folder = Path(str(registry.options_of(backend)["model"]))
        if not any((folder / name).is_file() for name in _TOKENIZERS):
            raise ConfigError(
                f"{protocol}.options.model: {folder / _TOKENIZERS[0]}: no such file; download the whole "
                "checkpoint again"
            )


def check_sources(config: BuildConfig) -> Iterator[Finding]:
    """Check that the lists of every source entry can be read; `paracaption audit` looks inside."""
    for subset in config.subsets:
        for index, source in enumerate(open_source(config, subset).sources):
            fix = "correct the path or the store's credentials, or mount the folder"
            yield try_check(f"{subset}[{index}]", fix, _list_source, source)


def _list_source(source: Source) -> str:
    return f"{len(source.fingerprint(Catalog()))} files and folders found"


def _check_url(out: str) -> str:
    bucket_checks.refuse_secrets(out)
    return f"{out} is a place in a bucket"


def _check_places(config: BuildConfig) -> str:
    refuse_overlap(config)
    return "the sources and `out` do not overlap"


def check_output(out: str) -> Finding:
    """Check that the output folder, or the nearest folder above it that exists, can be written.

    Of a bucket only that its URL says nothing that must not be in it: `check_store` asks the bucket.
    """
    if is_bucket(out):
        return try_check("out", "correct `out`", _check_url, out)
    path = Path(out)
    nearest = next(folder for folder in (path, *path.parents) if files.exists(folder))
    if files.is_folder(str(nearest)) and os.access(nearest, os.W_OK | os.X_OK):
        return Finding("out", OK, f"{out} can be written")
    problem = "cannot be written" if files.is_folder(str(nearest)) else "is a file"
    return Finding("out", FAIL, f"{nearest} {problem}", "name a folder that this user may write")
