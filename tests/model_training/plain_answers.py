"""The sampler of answers said again, slowly: one question, no cache, every logit at every step, loops over
slots."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from paracaption.model_training.decoding.blocks import Asked
from paracaption.model_training.model.batch import collate
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from tests.model_training.plain_decoder import counted, guess


class Plain(NamedTuple):
    """An answer: its tokens, None where they are open, where a stop string begins, and how many passes it
    took."""

    tokens: list[int | None]
    end: int
    forwards: int


@torch.inference_mode()
def answer_plainly(model: PerceptionDLM, asked: Asked) -> Plain:
    options, eot = asked.options, model.config.eot_token_id
    batch = collate([asked.example])
    everything = batch.tokens()
    x_BLD = model.embed(everything, *model.encode_images(batch.images))
    first = batch.prefix.ids_BL.shape[1] + asked.first
    length = options.max_new_tokens
    tokens: list[int | None] = [None] * length
    end, forwards = length, 0
    for start in range(0, length, options.block_length):
        block = range(start, min(start + options.block_length, length))
        step = 0
        while opens := [slot for slot in block if tokens[slot] is None and slot < end]:
            logits_LV = model(everything, inputs_embeds=x_BLD)[0]
            forwards += 1
            found = {slot: guess(logits_LV[first + slot], list(asked.never)) for slot in opens}
            sure = {slot: counted(options, eot, *each) for slot, each in found.items()}
            for slot in choose(asked, step, len(block), sure):
                tokens[slot] = found[slot][0]
                x_BLD[0, first + slot] = model.get_input_embeddings()(torch.tensor(found[slot][0]))
            step += 1
            end = min([end, *(where for stop in asked.stops if (where := find(tokens, stop)) is not None)])
            before = tokens[: tokens.index(None)] if None in tokens else tokens
            if options.early_exit and eot in before[:end]:
                return Plain(tokens, end, forwards)
    return Plain(tokens, end, forwards)


def choose(asked: Asked, step: int, width: int, sure: dict[int, float]) -> list[int]:
    """The open slots of a block whose guesses stay."""
    options = asked.options
    best_first = sorted(sure, key=lambda slot: -sure[slot])
    least = best_first[: math.ceil(width / options.block_steps)]
    if options.strategy == "threshold":
        return [slot for slot in sure if sure[slot] >= options.threshold or slot in least]
    if options.strategy == "factor":
        most = [n for n, slot in enumerate(best_first, 1) if (n + 1) * (1 - sure[slot]) < options.factor]
        return best_first[: max([*most, len(least)])]
    share = [width // options.block_steps] * options.block_steps
    for early in range(width % options.block_steps):
        share[early] += 1
    order = sorted(sure) if options.strategy == "left-to-right" else best_first
    return order[: share[step]]


def find(tokens: Sequence[int | None], run: Sequence[int]) -> int | None:
    """Where a run of tokens begins first."""
    places = [at for at in range(len(tokens)) if list(tokens[at : at + len(run)]) == list(run)]
    return min(places, default=None)
