"""Which cache rows are decoded with, and which bucket they share: it follows from model and options."""

from __future__ import annotations

from typing import cast

from ...schemas.decoding import REFRESH_EVERY, Cache, DecodeOptions, Strategy
from ...schemas.errors import ConfigError
from ..model.config import PerceptionDLMConfig
from ..model.perceptiondlm import PerceptionDLM
from .rows import Bucket

PLAIN = {"cache": "none", "settled": None, "compare": False}
"""What `compare` compares with: every step is computed whole, and no region ends before all its slots."""

_PREFIX_STEP = 64
"""On a GPU, prefixes are padded to a multiple of this many tokens, so that batches share buckets."""


def choose_cache(model: PerceptionDLM, options: DecodeOptions) -> str:
    """The cache that a model decodes with: "none", "exact" or "approximate".

    Raises:
        ConfigError: as `resolve_cache`.
    """
    cache = resolve_cache(model, resolve_options(model, options).cache, "captions")
    return "exact" if cache == "approximate" and model.layout.isolate_prefix else cache


def resolve_options(model: PerceptionDLM, options: DecodeOptions) -> DecodeOptions:
    """Options in which the cache "auto" is replaced by what it means for a model's captions."""
    return options.resolved(model.layout.isolate_prefix)


def resolve_cache(model: PerceptionDLM, cache: str, decoded: str) -> str:
    """A cache that a model can decode with: "auto" is "exact" where the layout allows it, else "none".

    Captions have more for such layouts, see `resolve_options`.

    Args:
        model: the network.
        cache: as the options have it.
        decoded: what is decoded, for the message.

    Raises:
        ConfigError: "exact" is asked for, and in this model's layout the prefix sees what is decoded.
    """
    isolated = model.layout.isolate_prefix
    if cache == "exact" and not isolated:
        raise ConfigError(
            f"cache 'exact' needs a layout that isolates the prefix, and in this model {decoded} change what "
            "comes before them; choose 'approximate' or 'none'"
        )
    if cache == "auto":
        return "exact" if isolated else "none"
    return cache


def one_token_a_step(model: PerceptionDLM, strategy: Strategy, num_slots: int) -> DecodeOptions:
    """How captions are decoded one token a step, each token from all that were there before it."""
    cache = cast(Cache, resolve_cache(model, "auto", "captions"))  # never "approximate", nor ended when sure
    return DecodeOptions(strategy=strategy, max_new_tokens=num_slots, steps=num_slots, cache=cache)


def kind_of(model: PerceptionDLM, options: DecodeOptions) -> tuple:
    """What rows must have in common to share passes: cache, its refresh, suppression, and drawing."""
    cache = choose_cache(model, options)
    every = resolve_options(model, options).refresh_every or REFRESH_EVERY if cache == "approximate" else 0
    return cache, every, bool(suppressed(model, options)), options.temperature > 0


def bucket_of(model: PerceptionDLM, options: list[DecodeOptions], prefix_len: int, regions: int) -> Bucket:
    """The bucket of rows of one kind: their own shape on a CPU, on GPUs one that other batches have, too."""
    num_rows = len(options)
    if model.device.type != "cpu":
        num_rows = 1 << (num_rows - 1).bit_length()
        prefix_len = -(-prefix_len // _PREFIX_STEP) * _PREFIX_STEP
    return Bucket(
        num_rows,
        prefix_len,
        regions,
        max(each.max_new_tokens for each in options),
        max(each.steps for each in options),
        *kind_of(model, options[0]),
        strategies=frozenset(each.strategy for each in options),
        may_exit=any(each.early_exit and each.strategy != "remask" for each in options),
        may_settle=any(each.settled is not None for each in options),
        may_wait=any(each.end_of_text_last for each in options),
        redoes=kind_of(model, options[0])[0] == "approximate"
        and any(each.redo_below is not None for each in options),
    )


def suppressed(model: PerceptionDLM, options: DecodeOptions) -> list[int]:
    """The tokens that are never predicted, ascending."""
    config = model.config
    suppress = options.suppress_special
    if suppress is None:
        suppress = config.layout != "reference"
    return sorted(special_tokens(config)) if suppress else []


def special_tokens(config: PerceptionDLMConfig) -> set[int]:
    """The tokens that stand for something other than text: mask, image, regions, captions."""
    return {
        config.mask_token_id,
        cast(int, config.image_token_id),
        *(config.region_token_ids or ()),
        *(config.caption_token_ids or ()),
    }
