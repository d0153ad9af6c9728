"""The decoder said again, slowly: one image, no cache, every logit at every step, loops over slots."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from paracaption.model_training.model.batch import Example, collate
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.schemas.answering import AnswerOptions
from paracaption.schemas.decoding import DecodeOptions

Slots = list[list]
"""Of one image: something for each slot of each region."""


def choose(
    options: DecodeOptions,
    step: int,
    tokens: Slots,
    opens: Slots,
    guesses: Slots,
    confidences: Slots,
    eot: int | None,
) -> tuple[Slots, Slots]:
    """Which guesses stay after a step: (tokens, what is open) of one image."""
    regions = range(len(tokens))
    length = options.max_new_tokens
    settled = [
        options.settled is not None
        and all(sure >= options.settled for sure, waiting in zip(*row, strict=True) if waiting)
        for row in zip(confidences, opens, strict=True)
    ]
    confidences = [
        [counted(options, eot, *each) for each in zip(*row, strict=True)]
        for row in zip(guesses, confidences, strict=True)
    ]
    tokens, opens = [list(row) for row in tokens], [list(row) for row in opens]
    if options.strategy == "remask":
        if not any(map(any, opens)):
            return tokens, opens
        places = [(region, slot) for region in regions for slot in range(length)]
        for region, slot in places:
            if opens[region][slot]:
                tokens[region][slot] = guesses[region][slot]
        doubtful_first = sorted(places, key=lambda place: confidences[place[0]][place[1]])
        again = [] if all(settled) else doubtful_first[: still_open(len(places), options.steps, step)]
        return tokens, [[(region, slot) in again for slot in range(length)] for region in regions]
    for region in regions:
        waiting = [slot for slot in range(length) if opens[region][slot]]
        best_first = sorted(waiting, key=lambda slot: -confidences[region][slot])
        if options.strategy == "threshold":
            stay = set(best_first[: math.ceil(length / options.steps)])
            least = options.position_thresholds or [options.threshold] * length
            stay |= {slot for slot in waiting if confidences[region][slot] >= least[slot]}
        elif options.strategy == "factor":
            stay = set(best_first[: math.ceil(length / options.steps)])
            for n, slot in enumerate(best_first, 1):
                if (n + 1) * (1 - confidences[region][slot]) < options.factor:
                    stay = stay | set(best_first[:n])
        else:
            own_step = step - region * options.steps if options.strategy == "sequential" else step
            count = len(waiting) - (still_open(length, options.steps, own_step) if own_step >= 0 else length)
            order = waiting if options.strategy == "left-to-right" else best_first
            stay = set(order[: max(0, count)])
        if settled[region] and (options.strategy != "sequential" or step >= region * options.steps):
            stay = set(waiting)
        for slot in stay:
            tokens[region][slot], opens[region][slot] = guesses[region][slot], False
    return tokens, opens


def still_open(slots: int, steps: int, step: int) -> int:
    """The linear schedule in exact numbers. Those of the released code may differ by one for many slots."""
    return max(0, math.floor(slots * Fraction(steps - 1 - step, steps)))


def end(tokens: Slots, opens: Slots, eot: int) -> None:
    """Behind a region's first end of text with nothing open before it, everything is end of text."""
    for row, waiting in zip(tokens, opens, strict=True):
        for slot, token in enumerate(row):
            if waiting[slot]:
                break
            if token == eot:
                row[slot:], waiting[slot:] = [eot] * len(row[slot:]), [False] * len(row[slot:])
                break


def counted(options: DecodeOptions | AnswerOptions, eot: int | None, token: int, confidence: float) -> float:
    """How sure a guess counts as."""
    return 0.0 if options.end_of_text_last and token == eot else confidence


def guess(logits_V: Tensor, suppressed: list[int]) -> tuple[int, float]:
    """The likeliest token and its probability, in float64."""
    logits_V = logits_V.double().clone()
    logits_V[suppressed] = -torch.inf
    token = int(logits_V.argmax())
    return token, float(logits_V.softmax(-1)[token])


@torch.inference_mode()
def decode_plainly(
    model: PerceptionDLM, example: Example, options: DecodeOptions, suppressed: list[int]
) -> tuple[Slots, int]:
    """The tokens of an image's slots, and the passes whose outcome was not known beforehand."""
    config, regions, length = model.config, range(len(example.order)), options.max_new_tokens
    batch = collate([example])
    tokens_of = batch.tokens()
    embeds_BLD = model.embed(tokens_of, *model.encode_images(batch.images))
    first = batch.prefix.ids_BL.shape[1]
    place = [[first + region * (length + 2) + 1 + slot for slot in range(length)] for region in regions]
    tokens: Slots = [[config.mask_token_id] * length for _ in regions]
    opens: Slots = [[True] * length for _ in regions]
    forwards, step, seen = 0, 0, {}
    while any(map(any, opens)):
        turn = step // options.steps if options.strategy == "sequential" else None
        wanted = [region for region in regions if any(opens[region]) and turn in (None, region)]
        if options.strategy == "remask":
            wanted = list(regions)
        ids_BL = tokens_of.ids_BL.clone()
        for region in regions:
            ids_BL[0, place[region]] = torch.tensor(tokens[region])
        embeds_BLD[:, first:] = model.get_input_embeddings()(ids_BL[:, first:])
        logits_LV = model(tokens_of, inputs_embeds=embeds_BLD)[0]
        found = [[guess(logits_LV[at], suppressed) for at in places] for places in place]
        sees = {  # what a region's guesses depend on
            region: str(tokens[region] if model.layout.isolate_prefix else tokens) for region in wanted
        }
        forwards += any(seen.get(region) != what for region, what in sees.items())
        seen |= sees
        guesses = [[token for token, _ in row] for row in found]
        confidences = [[confidence for _, confidence in row] for row in found]
        tokens, opens = choose(options, step, tokens, opens, guesses, confidences, config.eot_token_id)
        if options.early_exit and options.strategy != "remask":
            end(tokens, opens, config.eot_token_id)
        tokens = [
            [config.mask_token_id if waiting else token for token, waiting in zip(*rows, strict=True)]
            for rows in zip(tokens, opens, strict=True)
        ]
        step += 1
    return tokens, forwards
