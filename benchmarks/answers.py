"""Steps per second of a 256-token answer about a photo: ours by blocks of 32, against the released way.

Random weights at the mid size of `benchmarks.decoder`, float32. The released way runs on transformers' Llama
with the same weights, and does per step what the released code does: the whole sequence without a cache,
logits of the full vocabulary at every position, those of five tokens overwritten one by one, a softmax in
float64. All of its steps cost the same, so the first ones are enough.

    python -m benchmarks.answers                                  # 8 steps of the released way, all of ours
    python -m benchmarks.answers --vocabulary 126464 --steps 3    # LLaDA's vocabulary
"""

from __future__ import annotations

import argparse
import time
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from benchmarks.decoder import HEIGHT, WIDTH, Original, Processor, mid_size
from paracaption.model_training.decoding.blocks import Asked, answer_steps
from paracaption.model_training.model import conversation, tiling
from paracaption.model_training.model.batch import collate
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.schemas.answering import AnswerOptions

LENGTH, BLOCK = 256, 32
NEVER = (1, 5, 6, 7, 8)
"""The mask, and four tokens that stand for those that the released code names."""


def ask(model: PerceptionDLM, **fields: object) -> Asked:
    """A question about a photo of noise."""
    processor = Processor(model.config)
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    views, grids = conversation.cut_photos(processor, [pixels])
    counts = [tiling.num_views(grid) for grid in grids]
    encode = processor.tokenize
    [prefix] = conversation.lay_out(
        processor, ["Describe the image step by step."], counts, conversation.RELEASED, encode
    )
    slots = [model.config.mask_token_id] * LENGTH
    options = AnswerOptions(
        max_new_tokens=LENGTH,
        block_length=BLOCK,
        early_exit=False,
        **fields,  # pyright: ignore[reportArgumentType]
    )
    return Asked(conversation.make_example(processor, views, grids, prefix, slots), 0, options, NEVER)


@torch.inference_mode()
def released_way(model: PerceptionDLM, asked: Asked, num_steps: int) -> tuple[Tensor, float]:
    """The slots after some steps, and the seconds of a step."""
    llama, batch = Original(model).llama, collate([asked.example])
    tokens = batch.tokens()
    x_BLD = model.embed(tokens, *model.encode_images(batch.images))
    ids_BL, masked_BL = tokens.ids_BL.clone(), tokens.ids_BL == model.config.mask_token_id
    bias = torch.zeros(1, 1, ids_BL.shape[1], ids_BL.shape[1])
    first = batch.prefix.ids_BL.shape[1]
    start = time.process_time()
    for step in range(num_steps):
        hidden_BLD = llama(inputs_embeds=x_BLD, attention_mask=bias, use_cache=False).last_hidden_state
        logits_BLV = model.lm_head(hidden_BLD).float()
        for token in NEVER:
            logits_BLV[:, :, token] = torch.where(masked_BL, -torch.inf, logits_BLV[:, :, token])
        guess_BL = logits_BLV.argmax(-1)
        sure_BL = logits_BLV.double().softmax(-1).gather(-1, guess_BL[..., None])[..., 0]
        sure_BL[:, first + BLOCK * (1 + step // BLOCK) :] = -torch.inf
        best = sure_BL.masked_fill(~masked_BL, -torch.inf).argmax(-1)
        ids_BL[0, best], masked_BL[0, best] = guess_BL[0, best], False
        x_BLD[0, best] = model.get_input_embeddings()(ids_BL[0, best])
    return ids_BL[0, first:], (time.process_time() - start) / num_steps


def ours(model: PerceptionDLM, asked: Asked, num_steps: int | None = None) -> tuple[np.ndarray, int, float]:
    """The slots after some steps or all, forward passes, and the seconds of everything after the first
    state.
    """
    states = answer_steps(model, [asked])
    last = next(states)
    start = time.process_time()
    for state in islice(states, num_steps):
        last = state
    return last.tokens_BS[0], int(last.forwards_B[0]), time.process_time() - start


def main() -> int:
    """Print a row for each way; 1 if ours without a cache does not write the tokens of the released way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocabulary", type=int, choices=(8_192, 126_464), default=8_192)
    parser.add_argument("--steps", type=int, default=8, help="Steps that are measured of the released way.")
    parser.add_argument("--all", action="store_true", help="Measure all steps of ours, not as many.")
    arguments = parser.parse_args()
    count = None if arguments.all else max(arguments.steps, BLOCK)
    model = mid_size(arguments.vocabulary, "reference")
    theirs, step_s = released_way(model, ask(model), arguments.steps)
    found, _, _ = ours(model, ask(model, cache="none"), arguments.steps)
    same = bool((theirs.numpy() == found).all())
    print(
        f"{torch.get_num_threads()} threads, vocabulary {arguments.vocabulary:,}, "
        f"{LENGTH} tokens in blocks of {BLOCK}; by the processor's time"
    )
    print(f"the released way: {1 / step_s:.2f} steps/s; ours writes the same tokens: {same}")
    isolated = mid_size(arguments.vocabulary, "corrected")
    rows = {
        "no cache": (model, {"cache": "none"}),
        "exact cache of the prefix": (isolated, {"cache": "exact"}),
        "approximate cache, refreshed every 8 steps": (model, {"cache": "approximate", "refresh_every": 8}),
        "approximate cache, refreshed for each block": (
            model,
            {"cache": "approximate", "refresh_every": BLOCK},
        ),
    }
    for name, (network, fields) in rows.items():
        _, forwards, seconds = ours(network, ask(network, **fields), count)
        print(f"{name}: {forwards / seconds:.2f} steps/s, {forwards / seconds * step_s:.2f} times as many")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
