"""Masks in, verified region captions out, and the parallel region captioner trained from them.

The names below are the public Python API (docs/api.md). Each is imported when it is first used: `import
paracaption` loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model_training.decoding.chat import Answer, Chat, Question
    from .model_training.decoding.region_captioner import RegionCaptioner
    from .model_training.model.perceptiondlm import PerceptionDLM
    from .model_training.model.processor import PerceptionDLMProcessor
    from .pipeline.corpus.reader import Corpus, open_corpus
    from .pipeline.corpus.shard_urls import list_shards
    from .pipeline.executor.build import build
    from .schemas.answering import AnswerOptions
    from .schemas.config import BuildConfig
    from .schemas.decoding import DecodeOptions
    from .schemas.errors import BadRecord, ConfigError, IntegrityError, ParaCaptionError, StageFailed

__all__ = [
    "Answer",
    "AnswerOptions",
    "BadRecord",
    "BuildConfig",
    "Chat",
    "ConfigError",
    "Corpus",
    "DecodeOptions",
    "IntegrityError",
    "ParaCaptionError",
    "PerceptionDLM",
    "PerceptionDLMProcessor",
    "Question",
    "RegionCaptioner",
    "StageFailed",
    "__version__",
    "build",
    "list_shards",
    "open_corpus",
]

_HOMES = {
    "build": ".pipeline.executor.build",
    "open_corpus": ".pipeline.corpus.reader",
    "list_shards": ".pipeline.corpus.shard_urls",
    "Corpus": ".pipeline.corpus.reader",
    "BuildConfig": ".schemas.config",
    "AnswerOptions": ".schemas.answering",
    **dict.fromkeys(("Answer", "Chat", "Question"), ".model_training.decoding.chat"),
    "DecodeOptions": ".schemas.decoding",
    "PerceptionDLM": ".model_training.model.perceptiondlm",
    "PerceptionDLMProcessor": ".model_training.model.processor",
    "RegionCaptioner": ".model_training.decoding.region_captioner",
    **dict.fromkeys(
        ("BadRecord", "ConfigError", "IntegrityError", "ParaCaptionError", "StageFailed"), ".schemas.errors"
    ),
}

__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        found: Any = metadata.version("paracaption")
    elif name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
