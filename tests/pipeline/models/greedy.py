"""What a model says when it must write one of two texts: the reference for verdicts and their margins."""

from __future__ import annotations

import math
from typing import Any


def greedy(model: Any, tokenizer: Any, prompt: list[int], texts: tuple[str, str]) -> tuple[int, float]:
    """From the raw logits of transformers' model: no schema, no vLLM, no code of ours.

    Every token of the vocabulary is tried at every step; of those with which one of the texts can go on, the
    likeliest is written.

    Returns:
        Which text it is, and log P(first) - log P(second) at the token that decides.
    """
    import torch

    spelt = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    written, tokens = "", list(prompt)
    while True:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1].double().tolist()
        fits = {
            token: [text.startswith(written + piece) for text in texts]
            for token, piece in enumerate(spelt)
            if piece and any(text.startswith(written + piece) for text in texts)
        }
        best = max(fits, key=lambda token: logits[token])
        if fits[best][0] != fits[best][1]:
            first, second = (
                [logits[token] for token, fit in fits.items() if fit[side] and not fit[1 - side]]
                for side in (0, 1)
            )
            return int(fits[best][1]), math.log(sum(map(math.exp, first))) - math.log(
                sum(map(math.exp, second))
            )
        written += spelt[best]
        tokens.append(best)
