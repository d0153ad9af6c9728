"""How much likelier one choice is than the other, from the log-probabilities of the tokens that decide.

The margin is log P(first choice) - log P(second choice) at the token that decides between them, everything
before it given. Tokens that fit both choices ("a" of "agree" and "against") decide nothing and are passed by;
tokens that spell the same choice differently ("yes", "ye", "y") count together. Whatever scales all tokens'
probabilities alike (the mask of structured outputs, a softmax over fewer tokens) drops out of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...schemas.errors import StageFailed

MASKED = -1_000.0
"""A log-probability below this is a token that a schema forbids; servers write -9999 for minus infinity."""


class ChoiceTokens:
    """The tokens of a vocabulary with which one of two choices can begin or go on.

    Args:
        choices: two texts of lower-case letters; neither begins the other.
        vocab: token -> id; tokens of letters are spelled as they are, as byte-level vocabularies do.

    Raises:
        ValueError: a choice cannot be spelled at all.
    """

    def __init__(self, choices: Sequence[str], vocab: Mapping[str, int]):
        self.choices = tuple(choices)
        self.after: dict[str, dict[int, str]] = {}
        for choice in choices:
            for start in range(len(choice)):
                spelled = self.after.setdefault(choice[:start], {})
                for end in range(start + 1, len(choice) + 1):
                    if choice[start:end] in vocab:
                        spelled[vocab[choice[start:end]]] = choice[start:end]
        for choice in choices:
            if not any(choice.startswith(text) for text in self.after[""].values()):
                raise ValueError(f"no token of the vocabulary begins {choice!r}")

    @property
    def ids(self) -> list[int]:
        """All of them: those whose log-probabilities are needed."""
        return sorted({token for tokens in self.after.values() for token in tokens})

    def margin(self, tokens: Sequence[int], logprobs: Sequence[Mapping[int, float]]) -> float | None:
        """The margin of the first choice, from what was generated and what could have been.

        Args:
            tokens: ids of the generated tokens.
            logprobs: of each position, id -> log-probability, all of `ids` among them.

        Returns:
            None if the tokens spell neither choice.

        Raises:
            StageFailed: a log-probability that decides is NaN.
        """
        written = ""
        for token, row in zip(tokens, logprobs, strict=False):
            options = self.after.get(written, {})
            if token not in options:
                return None
            first, second = ([], [])
            for option, text in options.items():
                fits = [choice.startswith(written + text) for choice in self.choices]
                if option in row and fits[0] != fits[1]:
                    (first if fits[0] else second).append(row[option])
            written += options[token]
            if sum(choice.startswith(written) for choice in self.choices) == 1:
                return _difference(first, second)
        return None


def margin_of_text(
    choices: Sequence[str], before: str, alternatives: Sequence[tuple[str, float]]
) -> float | None:
    """The margin of the first choice at one position, from the token texts that a server lists there.

    A choice that is not listed is less likely than all that are: it counts as the least likely of them, and
    the margin is then a lower bound of its size.

    Args:
        choices: two texts; neither begins the other.
        before: what of the choice was written before this position.
        alternatives: (text, log-probability) of every listed token.

    Returns:
        None if the position does not decide, or no listed token fits either choice.

    Raises:
        StageFailed: a log-probability is NaN.
    """
    _check([logprob for _, logprob in alternatives])
    found: tuple[list[float], list[float]] = ([], [])
    least = math.inf
    for text, logprob in alternatives:
        if logprob <= MASKED:
            continue
        least = min(least, logprob)
        written = before + text.partition('"')[0]
        fits = [len(written) > len(before) and choice.startswith(written) for choice in choices]
        if fits[0] != fits[1]:
            found[0 if fits[0] else 1].append(logprob)
    if not found[0] and not found[1]:
        return None
    return _difference(found[0] or [least], found[1] or [least])


def _difference(first: list[float], second: list[float]) -> float | None:
    _check([*first, *second])
    left, right = _logsumexp(first), _logsumexp(second)
    return None if math.isinf(left) or math.isinf(right) else left - right


def _check(logprobs: list[float]) -> None:
    """A margin of NaN would be below every threshold, and so a verdict."""
    if any(math.isnan(logprob) for logprob in logprobs):
        raise StageFailed(
            "judge: a log-probability is NaN, so its answers mean nothing; the model's weights are damaged, "
            "or its numbers overflow: download it again, or run it in float32 or bfloat16"
        )


def _logsumexp(values: list[float]) -> float:
    top = max(values, default=-math.inf)
    return top if math.isinf(top) else top + math.log(sum(math.exp(value - top) for value in values))
