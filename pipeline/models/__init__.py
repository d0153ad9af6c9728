"""Models behind three small protocols. `load` finds a backend by its name without importing the others.

A backend may have a method `report() -> dict[str, float]`: numbers since its start that are worth an event
(the share of a prefix cache's hits, requests tried again). It may return a `BadRecord` in the place of one
region's answer: that region is dropped with its reason, nothing is stored for it, and the others stand.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import msgspec
import numpy as np

from ...schemas.config import Backend
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.records import ImageRecord, Rle


class Question(msgspec.Struct, frozen=True):
    """What a judge is asked about one region.

    Attributes:
        kind: "verify" (does the caption describe the category? answers "yes" or "no") or
            "extract" (which category does it describe? answers a short noun phrase, or "" for none).
        caption: the captioner's text.
        category: plain category name; set for "verify".
    """

    kind: str
    caption: str
    category: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """A judge's answer. `margin` above 0 speaks for it; None if the judge has no such number."""

    text: str
    margin: float | None = None


class Candidate(msgspec.Struct, frozen=True):
    """A mask the segmenter predicts, the size of the image, with the segmenter's own score in 0..1."""

    rle: Rle
    score: float


class Checked(msgspec.Struct, frozen=True):
    """What `paracaption doctor` learns of a backend without loading it.

    Attributes:
        what: the model in a few words, such as "GAR: vision 47 x 1536, language model 32 x 4096".
        weight_bytes: memory of the weights on the device, in the dtype they will have there.
        notes: what is worth knowing and no error.
    """

    what: str
    weight_bytes: int = 0
    notes: list[str] = []


class Captioner(Protocol):
    """Describes regions. Sees many images at once, so that it can keep its engine full."""

    def caption(self, images: list[ImageRecord]) -> list[list[str | BadRecord | None]]:
        """One caption per live region of each image, in the order of `live()`; None for "nothing to say".

        Raises:
            BadRecord: an image cannot be read. Any other exception is bisected down to the image.
        """
        ...


class Judge(Protocol):
    """Answers questions about captions."""

    def ask(self, questions: list[Question]) -> list[Answer | BadRecord]:
        """One answer per question, in order; a `BadRecord` for one that has no answer."""
        ...


class Segmenter(Protocol):
    """Predicts masks anew."""

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> list[list[Candidate]]:
        """Candidates for each region.

        Args:
            photo: (H, W, 3) uint8 RGB.
            phrases: N core categories.
            boxes: (N, 4) float32 x1, y1, x2, y2 in pixels, exclusive at the far edge, of the original masks.

        Returns:
            N lists, best first; an empty list if nothing was found.
        """
        ...


BACKENDS = {
    "captioner": {
        "classical": "paracaption.pipeline.models.embedded.classical:ClassicalCaptioner",
        "gar": "paracaption.pipeline.models.gar.captioner:GarCaptioner",
        "openai": "paracaption.pipeline.models.openai_compatible:OpenAICaptioner",
    },
    "judge": {
        "lexical": "paracaption.pipeline.models.embedded.lexical:LexicalJudge",
        "openai": "paracaption.pipeline.models.openai_compatible:OpenAIJudge",
        "vllm": "paracaption.pipeline.models.vllm_judge:VllmJudge",
    },
    "segmenter": {
        "grabcut": "paracaption.pipeline.models.embedded.grabcut:GrabCutSegmenter",
        "sam": "paracaption.pipeline.models.sam:SamSegmenter",
        "sam3": "paracaption.pipeline.models.sam3:Sam3Segmenter",
    },
}


def find(protocol: str, backend: Backend) -> type[Any]:
    """The backend's class, imported but not built.

    A backend's constructor takes the config's `options` as keywords. Its class method `identity(**options) ->
    dict[str, str]` names what its answers depend on (versions, weights, prompts) without loading any of it;
    it becomes part of the evidence digest, so options that change no answer (batch sizes, devices) stay out
    of it. A class without one is known by all its options and its `version` attribute.

    Args:
        protocol: "captioner", "judge" or "segmenter".
        backend: its name is looked up, its options are not.

    Raises:
        ConfigError: no such backend, or it cannot be imported; the message lists the choices.
    """
    target = BACKENDS[protocol].get(backend.name, backend.name)
    module, _, name = target.partition(":")
    if not name:
        raise ConfigError(
            f"{protocol}.name: no backend {backend.name!r}; choose from {sorted(BACKENDS[protocol])} "
            "or name your own as 'package.module:Class'"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{protocol}.name: {backend.name!r} cannot be imported: {error}") from error


def load(protocol: str, backend: Backend) -> Any:
    """Build the backend; in the actor, where its resources are."""
    return find(protocol, backend)(**backend.options)


def identity(protocol: str, backend: Backend) -> dict[str, str]:
    """What the backend's answers depend on, for the evidence digest: by its class, or else all options."""
    cls = find(protocol, backend)
    if hasattr(cls, "identity"):
        return {"backend": backend.name, **cls.identity(**backend.options)}
    options = msgspec.json.encode(backend.options, order="deterministic").decode()
    return {"backend": backend.name, "options": options, "version": str(getattr(cls, "version", 0))}
