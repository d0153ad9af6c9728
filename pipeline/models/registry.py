"""Every backend of ours, registered once. A backend is imported only when it is asked for."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import msgspec

from ...schemas.config import Backend
from ...schemas.errors import ConfigError, ParaCaptionError
from ...schemas.plain import words_of
from ..io import files, own_modules, variables


class Registered(NamedTuple):
    """One backend of ours.

    Attributes:
        path: its class, as "package.module:Class".
        needs: distributions that it imports, besides those that every build needs.
        extra: the extra of paracaption that installs `needs`; None if the base package already does.
        page: the page that describes its options.
        paths: options that are paths. A relative one starts at the configuration's folder; those of other
            backends are as they are given.
    """

    path: str
    needs: tuple[str, ...] = ()
    extra: str | None = None
    page: str = "docs/backends.md"
    paths: tuple[str, ...] = ()


BACKENDS: dict[str, dict[str, Registered]] = {
    "captioner": {
        "classical": Registered(
            "paracaption.pipeline.models.embedded.classical:ClassicalCaptioner",
            ("opencv-python-headless",),
            page="docs/embedded-backends.md",
        ),
        "gar": Registered(
            "paracaption.pipeline.models.gar.captioner:GarCaptioner",
            ("torch", "transformers", "vllm"),
            extra="vllm",
            page="docs/gar.md",
        ),
        "openai": Registered(
            "paracaption.pipeline.models.openai_compatible:OpenAICaptioner",
            ("httpx", "opencv-python-headless"),
            page="docs/judges.md",
        ),
        "perceptiondlm": Registered(  # by its path alone: a build imports it only if it is named
            "paracaption.model_training.decoding.corpus_captioner:PerceptionDLMCaptioner",
            ("torch", "transformers"),
            extra="models",
            page="docs/perceptiondlm.md",
            paths=("model",),
        ),
    },
    "judge": {
        "lexical": Registered(
            "paracaption.pipeline.models.embedded.lexical:LexicalJudge",
            ("simplemma",),
            page="docs/embedded-backends.md",
        ),
        "openai": Registered(
            "paracaption.pipeline.models.openai_compatible:OpenAIJudge",
            ("httpx", "opencv-python-headless"),
            page="docs/judges.md",
        ),
        "vllm": Registered(
            "paracaption.pipeline.models.vllm_judge:VllmJudge",
            ("torch", "transformers", "vllm"),
            extra="vllm",
            page="docs/judges.md",
        ),
    },
    "segmenter": {
        "grabcut": Registered(
            "paracaption.pipeline.models.embedded.grabcut:GrabCutSegmenter",
            ("opencv-python-headless",),
            page="docs/embedded-backends.md",
        ),
        "sam": Registered(
            "paracaption.pipeline.models.sam:SamSegmenter",
            ("torch", "torchvision", "segment-anything"),
            extra="models",
            page="docs/segmenters.md",
        ),
        "sam3": Registered(
            "paracaption.pipeline.models.sam3:Sam3Segmenter",
            ("torch", "torchvision", "transformers"),
            extra="models",
            page="docs/segmenters.md",
        ),
    },
    "mask_generator": {
        "color_regions": Registered(
            "paracaption.pipeline.models.embedded.color_regions:ColorRegions",
            ("opencv-python-headless",),
            page="docs/mask-generators.md",
        ),
        "sam": Registered(
            "paracaption.pipeline.models.sam_generator:SamMaskGenerator",
            ("torch", "torchvision", "segment-anything"),
            extra="models",
            page="docs/mask-generators.md",
        ),
        "sam3": Registered(
            "paracaption.pipeline.models.sam3_generator:Sam3MaskGenerator",
            ("torch", "torchvision", "transformers", "segment-anything"),
            extra="models",
            page="docs/mask-generators.md",
        ),
    },
}
"""Protocol -> name of the backend in the configuration -> the backend."""


def find_registered(protocol: str, backend: Backend) -> Registered:
    """The registration of a configured backend; for one that is not ours its name as the path, no more."""
    return BACKENDS[protocol].get(backend.name, Registered(backend.name))


_MOVED = {"model_training.toy:TruthCaptioner": "paracaption.model_training.toy.world:TruthCaptioner"}
"""Where backends that version 0.1 wrote into configurations are now. Evidence digests keep their names."""


METHODS = {
    "captioner": ("caption", ("images",)),
    "judge": ("ask", ("questions",)),
    "segmenter": ("segment", ("photo", "phrases", "boxes")),
    "mask_generator": ("generate", ("photo",)),
}
"""Protocol -> the method that a backend of it has, and what the method is called with; see `protocols`."""


def find_backend(protocol: str, backend: Backend) -> type[Any]:
    """The backend's class, imported but not instantiated; see `protocols` for what it has.

    A class of the user's own is installed, or lies next to the configuration (`own_modules`).

    Args:
        protocol: a key of `BACKENDS`, such as "captioner".
        backend: its name is looked up; its options are not read.

    Raises:
        ConfigError: there is no such backend, it cannot be imported, or it lacks the protocol's method.
    """
    refuse_unknown(protocol, backend, protocol)
    path = find_registered(protocol, backend).path
    path = _MOVED.get(path, path)
    found = own_modules.load_class(path, f"{protocol}.name")
    if backend.name not in BACKENDS[protocol]:
        _check_method(protocol, backend.name, found)
    return found


def refuse_unknown(protocol: str, backend: Backend, where: str) -> None:
    """Refuse a name that does not name one of our backends or a class of the user's own. Imports nothing.

    Raises:
        ConfigError: it does not; names the choices.
    """
    if ":" not in find_registered(protocol, backend).path:
        raise ConfigError(
            f"{where}.name: no backend {backend.name!r}; choose from {sorted(BACKENDS[protocol])} "
            "or name your own as 'package.module:Class'"
        )


def _check_method(protocol: str, name: str, cls: type[Any]) -> None:
    """Refuse a class without the protocol's method, or with one that takes something else."""
    method, takes = METHODS[protocol]
    wanted = f"a {protocol} has `{method}({', '.join(takes)})`"
    where = f"{protocol}.name: {name!r} in {own_modules.file_of(cls)}"
    found = getattr(cls, method, None)
    if not callable(found):
        raise ConfigError(f"{where} has no method `{method}`; {wanted} (docs/backends.md)")
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        raise ConfigError(f"{where}: `{method}` is async; {wanted}, without async (docs/backends.md)")
    own = isinstance(inspect.getattr_static(cls, method), staticmethod | classmethod)
    try:
        inspect.signature(found).bind(*takes, *(() if own else ("self",)))
    except ValueError:  # a method of an extension module may not have a signature
        return
    except TypeError as error:
        raise ConfigError(
            f"{where}: `{method}` does not take the arguments that it is called with ({error}); {wanted} "
            "(docs/backends.md)"
        ) from error


def load_backend(protocol: str, backend: Backend) -> Any:
    """Instantiate the backend. Call it in the actor that has the backend's resources."""
    return find_backend(protocol, backend)(**options_of(backend))


def options_of(backend: Backend) -> dict[str, Any]:
    """The backend's options, with the values of the environment variables that they name.

    Raises:
        ConfigError: a URL is given as the files of one of our models.
    """
    options = variables.expand_all(backend.options)
    for name in _FILES if ":" not in backend.name and backend.name != "openai" else ():
        given = options.get(name)
        if isinstance(given, str) and files.is_url(given):
            raise ConfigError(
                f"{backend.name}: options.{name}: {given} is a URL; download the model, and give its folder"
            )
    return options


_FILES = ("model", "language_model")
"""Options of our backends that are folders or files on this machine."""


def backend_identity(protocol: str, backend: Backend) -> dict[str, str]:
    """What the backend's answers depend on, for the evidence digest.

    The class says so by its method `identity`; without one, all options and the class's `version` count.

    Raises:
        ConfigError: there is no such backend, its options do not suit it, or what it says cannot be stored.
    """
    cls = find_backend(protocol, backend)
    try:
        if hasattr(cls, "identity"):
            found = {"backend": backend.name, **cls.identity(**options_of(backend))}
        else:
            options = msgspec.json.encode(backend.options, order="deterministic").decode()
            found = {"backend": backend.name, "options": options, "version": str(getattr(cls, "version", 0))}
        msgspec.json.encode(found)
    except ParaCaptionError:
        raise
    except Exception as error:
        detail = f"its options or the result of `identity` cannot be stored as JSON: {words_of(error)}"
        raise ConfigError(f"{protocol}: {backend.name!r}: {detail}; use plain values") from error
    return found
