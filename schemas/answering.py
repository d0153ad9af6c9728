"""How answers to questions about whole images are decoded: the options of `Chat`, declared once.

`paracaption ask`, the harness of benchmarks and the Python API make them from `AnswerOptions`. Nothing here
needs torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from .decoding import MAX_TOKENS, Compare, EndOfTextLast, Temperature, Threshold, TopP
from .strict import Strict

AnswerStrategy = Literal["confidence", "threshold", "factor", "left-to-right"]
AnswerCache = Literal["auto", "none", "exact", "approximate"]
TemplateName = Literal["auto", "trained", "released"]

_NUMBERS = ("max_new_tokens", "block_length", "steps", "threshold", "factor", "temperature", "top_p", "seed")


class AnswerOptions(Strict):
    """How the masked tokens of an answer are filled in.

    An answer starts as `max_new_tokens` mask tokens in blocks of `block_length`, which are decided one after
    the other (semi-autoregressive decoding). A step predicts the open tokens of the current block, and the
    strategy decides which predictions stay. What stays is never changed again:

    - "confidence", the strategy of the released code: the most confident predictions stay, as many in each
      step of a block; where that does not come out even, the first steps keep one more.
    - "threshold": every prediction stays whose confidence is at least `threshold`, and in any case as many as
      `steps` asks for.
    - "factor": as many stay as are sure enough to be kept together (see `factor`), and in any case as many as
      `steps` asks for.
    - "left-to-right": like "confidence", but the leftmost predictions stay. A `block_length` of 1 does the
      same.

    "exact" keeps keys and values of everything before the answer, and changes no token; it needs a layout
    that isolates the prefix. "approximate" computes the current block alone: it keeps keys and values of all
    other tokens, finished blocks among them, from the first step of each block, and computes them again
    after each `refresh_every` steps.
    """

    max_new_tokens: PositiveInt = Field(default=128, le=MAX_TOKENS, description="Most tokens of an answer.")
    block_length: PositiveInt = Field(
        default=32,
        le=MAX_TOKENS,
        description="Tokens of a block. All tokens of a block are decided before the next block is begun. "
        "1 answers from left to right; `max_new_tokens` or more makes the whole answer one block.",
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="Decoding steps of the whole answer, as many for each block; by default one for each "
        "token. Fewer are faster and give worse answers. The strategies `threshold` and `factor` may need "
        "fewer.",
    )
    strategy: AnswerStrategy = Field(
        default="confidence",
        description="Which predicted tokens of a block a step keeps: `confidence` (the most confident "
        "ones), `threshold` (all with a confidence of at least `threshold`), `factor` (as many as are "
        "sure enough to be kept together, see `factor`) or `left-to-right` (the leftmost ones).",
    )
    threshold: Threshold = 0.9
    factor: float = Field(
        default=1.0,
        ge=0,
        description="The strategy `factor` keeps the n most confident tokens of a block, n being the "
        "largest number with (n + 1)(1 - p) < `factor`, where p is the confidence of the n-th.",
    )
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: int = Field(
        default=0,
        ge=-(1 << 63),
        lt=1 << 63,
        description="Seed of sampling. An answer depends on the seed and its own question, not on the "
        "rest of the batch.",
    )
    stop: list[str] = Field(
        default_factory=list,
        description="Texts that end an answer, which does not have them. They are compared as runs of "
        "tokens, as the released code does. Repeat the option for more.",
    )
    early_exit: bool = Field(
        default=True,
        description="Stop decoding an answer when its end is decided and nothing before it is open. This "
        "changes no answer. The released code goes on to the last step.",
    )
    end_of_text_last: EndOfTextLast = False
    cache: AnswerCache = Field(
        default="auto",
        description="KV cache: `none`, `exact` (of what comes before the answer; changes no token; only "
        "for models whose config.json has the layout `corrected`), `approximate` (of everything but the "
        "current block; answers may differ) or `auto` (`exact` for models that allow it, else `none`).",
    )
    refresh_every: PositiveInt = Field(
        default=8,
        description="Number of steps within a block after which the cache `approximate` is computed again.",
    )
    compare: Compare = False
    suppress_special: bool | None = Field(
        default=None,
        description="Never predict tokens that no answer has: the mask, the starts of text and header, "
        "and others of the model's own. By default this is on; for models whose config.json has the "
        "layout `reference` it takes the five tokens that the released code takes.",
    )
    template: TemplateName = Field(
        default="auto",
        description="What stands around questions and answers: `trained` (what `paracaption train` "
        "writes: a system turn, and line breaks between turns), `released` (what the released code asks "
        "with: neither of both) or `auto` (`released` for models whose config.json has the layout "
        "`reference`, else `trained`).",
    )

    @field_validator(*_NUMBERS, "refresh_every", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("give a number, not true or false")
        return value

    @field_validator("stop")
    @classmethod
    def _no_blank_stop(cls, value: list[str]) -> list[str]:
        if any(not each for each in value):
            raise ValueError("an empty text ends every answer; leave it out")
        return value

    @model_validator(mode="after")
    def _as_many_steps_for_each_block(self) -> AnswerOptions:
        if self.steps is not None and self.steps % self.num_blocks:
            raise ValueError(
                f"steps: {self.steps} for {self.num_blocks} blocks of {self.block_length} tokens; give a "
                f"multiple of {self.num_blocks}, or another `block_length`"
            )
        return self

    @property
    def num_blocks(self) -> int:
        """Blocks of an answer. The last one is shorter where `block_length` does not divide
        `max_new_tokens`.
        """
        return -(-self.max_new_tokens // self.block_length)

    @property
    def block_steps(self) -> int:
        """Most steps of a block."""
        return (
            min(self.block_length, self.max_new_tokens)
            if self.steps is None
            else self.steps // self.num_blocks
        )
