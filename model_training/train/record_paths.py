"""Records how a model decodes the captions of a corpus, one token a step, for `distillation`.

    paracaption models paths configs/train/distill.yaml

The model is the one that the run starts from. Parts of the work can be done at the same time, by processes
that do not know of each other, and what is recorded is not computed again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ...pipeline.corpus.reader import Corpus
from ...pipeline.io import files
from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError
from ...schemas.training import TrainConfig
from ..data.decoding_paths import ABOUT, DecodingPath, facts_of, write_paths
from ..data.loader import Loader
from ..data.samples import FILLER, TrainBatch
from ..decoding.buckets import one_token_a_step
from ..decoding.sampler import DecodeState, decode_steps
from ..model.attention import TokenRoles
from ..model.batch import Batch, Tokens
from ..model.perceptiondlm import PerceptionDLM
from . import build

_log = logging.getLogger(__name__)

_BATCHES_PER_FILE = 16


class Recorded(NamedTuple):
    """What a call has done: the folder, and how many regions were decoded now."""

    folder: Path
    regions: int


def record_paths(config: TrainConfig, part: int = 0, num_parts: int = 1) -> Recorded:
    """Decode the captions of all regions of a run's corpora, and write their paths to `distillation.paths`.

    Args:
        config: the run that will be trained on the paths; its `model` decodes.
        part: which part of the batches this process decodes, from 0 on.
        num_parts: number of parts. The paths are complete when all of them have been recorded.

    Raises:
        ConfigError: the run has no `distillation`, or the folder has paths of another model or length.
        IntegrityError: a corpus is damaged.
    """
    if config.distillation is None:
        raise ConfigError("distillation: the run has none; say under `distillation.paths` where the paths go")
    model, processor = build.open_model(config, "sdpa")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    model.eval()
    if on_gpu:
        precision = torch.float32 if config.precision == "float32" else torch.bfloat16
        torch.nn.Module.to(model, torch.device("cuda"), precision)
    data = config.data.model_copy(update={"packed": False})
    evaluated = Corpus(config.evaluation.corpus, confined=True).held_out_share if config.evaluation else 0.0
    loader = Loader(config.corpora, processor, data, config.seed, part, num_parts, held_out_share=evaluated)
    slots, folder = config.data.max_new_tokens, Path(config.distillation.paths)
    folder.mkdir(parents=True, exist_ok=True)
    strategy = "per-region" if config.distillation.order == "confidence" else "left-to-right"
    options = one_token_a_step(model, strategy, slots)
    facts = {"model": str(config.model.path), "order": config.distillation.order, "cache": options.cache}
    _check_about(folder, facts_of(processor, slots) | facts)
    decoded = 0
    try:
        stream = iter(loader)
        for number in count():
            batches = list(islice(stream, _BATCHES_PER_FILE))
            if not batches:
                break
            path = folder / f"paths-{part}of{num_parts}-{number:05d}.npy"
            if path.exists():
                continue
            found = [pair for batch in batches for pair in decode_paths(model, batch, options)]
            if found:
                write_paths(path, *zip(*found, strict=True))
                decoded += len(found)
                _log.info("%s: %d of %d batches", path, loader.position // num_parts, len(loader))
    finally:
        loader.close()
    return Recorded(folder, decoded)


def _check_about(folder: Path, facts: dict[str, str | int]) -> None:
    about = folder / ABOUT
    if about.is_file():
        # Early folders note neither. With "none", theirs may have a caption's tokens all in one step.
        known = {"order": "confidence", "cache": "exact"} | json.loads(about.read_text())
        if changed := [name for name, value in known.items() if facts[name] != value]:
            raise ConfigError(
                f"distillation.paths: {folder}: has the paths of another {changed[0]}; name another folder"
            )
        return
    with files.write_atomic(about) as file:
        file.write(json.dumps(facts).encode() + b"\n")


def decode_paths(
    model: PerceptionDLM, batch: TrainBatch, options: DecodeOptions
) -> Iterator[tuple[tuple[str, str, int], DecodingPath]]:
    """Decode the captions of a batch of region groups.

    Yields:
        (subset, key of the image, id of the region) and the path of each region.
    """
    if all(key == FILLER for key in batch.keys):
        return
    masked = masked_batch(batch, options.max_new_tokens, model.config.mask_token_id)
    states = list(decode_steps(model, masked, options))
    tokens_BNS, step_BNS = states[-1].tokens_BNS.numpy(), _closed_in(states)
    for row, name in enumerate(batch.keys):
        image, _, ids = name.rpartition("#")
        subset, _, key = image.partition("/")
        for region, number in enumerate(ids.split(",")):
            yield (
                (subset, key, int(number)),
                DecodingPath(tokens_BNS[row, region].astype(np.int64), step_BNS[row, region]),
            )


def _closed_in(states: list[DecodeState]) -> np.ndarray:
    """The step in which each slot was decoded, (B, N, S) int64."""
    return torch.stack([state.open_BNS for state in states[1:]]).sum(0).numpy()


def masked_batch(batch: TrainBatch, num_slots: int, mask: int) -> Batch:
    """The batch as a decoder takes it: all slots masked, prefix and captions apart.

    A caption's block is the token that opens it, its slots, and the token that closes it.
    """
    ids_BL, position_BL, roles = batch.tokens
    start = int(roles.caption_BL.any(0).int().argmax())
    halves = (slice(None), slice(start)), (slice(None), slice(start, None))
    prefix, captions = (
        Tokens(ids_BL[half], position_BL[half], TokenRoles(*roles.at(half))) for half in halves
    )
    blocks = captions.ids_BL.unflatten(1, (-1, num_slots + 2)).clone()
    blocks[..., 1:-1] = mask
    return Batch(batch.images, prefix, captions._replace(ids_BL=blocks.flatten(1)))
