"""Every backend of ours, registered once. A backend is imported only when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import msgspec

from ...schemas.config import Backend
from ...schemas.errors import ConfigError, ParaCaptionError
from ...schemas.plain import words_of


class Registered(NamedTuple):
    """One backend of ours.

    Attributes:
        path: its class, as "package.module:Class".
        needs: distributions that it imports, beside those that every build needs.
        extra: the extra of paracaption that installs `needs`; None if the base package already does.
    """

    path: str
    needs: tuple[str, ...] = ()
    extra: str | None = None


BACKENDS: dict[str, dict[str, Registered]] = {
    "captioner": {
        "classical": Registered(
            "paracaption.pipeline.models.embedded.classical:ClassicalCaptioner", ("opencv-python-headless",)
        ),
        "gar": Registered(
            "paracaption.pipeline.models.gar.captioner:GarCaptioner",
            ("torch", "transformers", "vllm"),
            extra="vllm",
        ),
        "openai": Registered(
            "paracaption.pipeline.models.openai_compatible:OpenAICaptioner",
            ("httpx", "opencv-python-headless"),
        ),
    },
    "judge": {
        "lexical": Registered("paracaption.pipeline.models.embedded.lexical:LexicalJudge", ("simplemma",)),
        "openai": Registered(
            "paracaption.pipeline.models.openai_compatible:OpenAIJudge", ("httpx", "opencv-python-headless")
        ),
        "vllm": Registered(
            "paracaption.pipeline.models.vllm_judge:VllmJudge",
            ("torch", "transformers", "vllm"),
            extra="vllm",
        ),
    },
    "segmenter": {
        "grabcut": Registered(
            "paracaption.pipeline.models.embedded.grabcut:GrabCutSegmenter", ("opencv-python-headless",)
        ),
        "sam": Registered(
            "paracaption.pipeline.models.sam:SamSegmenter",
            ("torch", "torchvision", "segment-anything"),
            extra="models",
        ),
        "sam3": Registered(
            "paracaption.pipeline.models.sam3:Sam3Segmenter",
            ("torch", "torchvision", "transformers"),
            extra="models",
        ),
    },
}
"""Protocol -> name of the backend in the configuration -> the backend."""


def find_registered(protocol: str, backend: Backend) -> Registered:
    """The registration of a configured backend; for one that is not ours its name as the path, no more."""
    return BACKENDS[protocol].get(backend.name, Registered(backend.name))


_MOVED = {"model_training.toy:TruthCaptioner": "paracaption.model_training.toy.world:TruthCaptioner"}
"""Where backends that version 0.1 wrote into configurations are now. Evidence digests keep their names."""


def find_backend(protocol: str, backend: Backend) -> type[Any]:
    """The backend's class, imported but not instantiated; see `protocols` for what it has.

    Args:
        protocol: "captioner", "judge" or "segmenter".
        backend: its name is looked up; its options are not read.

    Raises:
        ConfigError: there is no such backend, or it cannot be imported.
    """
    path = find_registered(protocol, backend).path
    module, _, name = _MOVED.get(path, path).partition(":")
    if not name:
        raise ConfigError(
            f"{protocol}.name: no backend {backend.name!r}; choose from {sorted(BACKENDS[protocol])} "
            "or name your own as 'package.module:Class'"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{protocol}.name: {backend.name!r} cannot be imported: {error}") from error


def load_backend(protocol: str, backend: Backend) -> Any:
    """Instantiate the backend. Call it in the actor that has the backend's resources."""
    return find_backend(protocol, backend)(**backend.options)


def backend_identity(protocol: str, backend: Backend) -> dict[str, str]:
    """What the backend's answers depend on, for the evidence digest.

    The class says so by its method `identity`; without one, all options and the class's `version` count.

    Raises:
        ConfigError: there is no such backend, its options do not suit it, or what it says cannot be stored.
    """
    cls = find_backend(protocol, backend)
    try:
        if hasattr(cls, "identity"):
            found = {"backend": backend.name, **cls.identity(**backend.options)}
        else:
            options = msgspec.json.encode(backend.options, order="deterministic").decode()
            found = {"backend": backend.name, "options": options, "version": str(getattr(cls, "version", 0))}
        msgspec.json.encode(found)
    except ParaCaptionError:
        raise
    except Exception as error:
        detail = f"what its answers depend on cannot be written down: {words_of(error)}"
        raise ConfigError(
            f"{protocol}: {backend.name!r}: {detail}; correct its options, or its `identity`"
        ) from error
    return found
