"""How a model's captions are decoded: the options of the sampler, declared once.

The sampler, `evaluation` in a training configuration, `captioner.options.decode` in an evaluation and the
options of `paracaption caption` are all made from `DecodeOptions`. Nothing here needs torch: options are
checked before a model is loaded.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from .strict import Strict

Strategy = Literal["remask", "per-region", "threshold", "factor", "sequential", "left-to-right"]
Cache = Literal["auto", "none", "exact", "approximate"]


MAX_TOKENS = 4_096
"""Most tokens of a caption, and most steps: what LLaDA's positions were trained for."""

Threshold = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="The strategy `threshold` keeps tokens with at least this confidence, 0 to 1.",
    ),
]
Temperature = Annotated[
    float, Field(ge=0, description="Temperature of sampling; 0 takes the most likely token.")
]
TopP = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Sample from the fewest most likely tokens whose probabilities add up to this (nucleus "
        "sampling); 1 samples from all.",
    ),
]
EndOfTextLast = Annotated[
    bool,
    Field(
        description="Count the confidence of end of text as 0 when a step chooses what to keep, so that "
        "words are kept first. For models that end too early: they predict end of text for most places at "
        "once, and are sure of it. This has no effect with the strategy `left-to-right`.",
    ),
]
Compare = Annotated[
    bool,
    Field(
        description="With the cache `approximate`, also decode without a cache, and report the share of "
        "tokens that are equal.",
    ),
]

_NUMBERS = ("max_new_tokens", "steps", "threshold", "factor", "temperature", "top_p", "seed", "refresh_every")


AUTO_CACHE: dict[str, Any] = {"cache": "approximate", "refresh_every": 8, "redo_below": 0.99, "settled": 0.9}
"""What "auto" means in layouts in which the prefix sees the captions, chosen by `benchmarks.caches`."""

REFRESH_EVERY = 4
"""`refresh_every` of the cache "approximate"; digests of files on disk have it where none is given."""


class DecodeOptions(Strict):
    """How the masked tokens of captions are filled in.

    Every caption starts as `max_new_tokens` mask tokens. A step predicts a token for each of them, and the
    strategy decides which predictions stay:

    - "remask", the strategy of PerceptionDLM's released code: all are written, then the least confident
      tokens of the whole image are masked again, fewer at each step. Tokens that an earlier step wrote may
      be among them.
    - "per-region": each region keeps its most confident predictions, as many as its own schedule asks for.
    - "threshold": each region keeps every prediction whose confidence is at least `threshold`, and in any
      case its best `max_new_tokens / steps`, so that it ends after `steps`. With `position_thresholds`, each
      position of the caption has a threshold of its own.
    - "factor": factor-based parallel decoding (Fast-dLLM, arXiv 2505.22618). Each region keeps its n most
      confident predictions, where n is the largest number with (n + 1)(1 - p) < `factor` for the least
      confident of them, whose probability is p; and as many as "threshold" keeps in any case. So the more are
      kept together, the surer each of them has to be.
    - "sequential": like "per-region", but one region after the other, with `steps` steps for each.
    - "left-to-right": like "per-region", but the leftmost predictions stay, not the most confident ones.

    The cache holds keys and values of the prompt, the image and the replayed regions, so that a step
    computes the captions alone. "exact" changes no caption, and needs a layout that isolates the prefix.
    "approximate" is for the other layouts, in which what comes before the captions depends on them: it is
    computed again every `refresh_every` steps and, with `redo_below`, whenever a step is not sure of what it
    would keep. "auto" is "exact" where the layout allows it. Elsewhere it is "approximate" with a
    `refresh_every` of 8, a `redo_below` of 0.99 and a `settled` of 0.9 unless you give others: a model
    that is never sure is then decoded almost as without a cache, and at that cost.
    """

    strategy: Strategy = Field(
        default="remask",
        description="Which predicted tokens a step keeps: `remask` (all, after which the least confident are "
        "masked again), `per-region` (the most confident of each region), `threshold` (all with a"
        " confidence of at least `threshold`), `factor` (as many as are sure enough to be kept "
        "together, see `factor`), `sequential` (the same as `per-region`, but one "
        "region after the other) or `left-to-right` (the leftmost of each region).",
    )
    max_new_tokens: PositiveInt = Field(
        default=32,
        le=MAX_TOKENS,
        description="Most tokens of a caption. The released code of PerceptionDLM decodes 32.",
    )
    steps: PositiveInt = Field(
        default=32,
        le=MAX_TOKENS,
        description="Decoding steps; fewer are faster and give worse captions. The strategies `threshold` "
        "and `factor` may end earlier.",
    )
    threshold: Threshold = 0.9
    position_thresholds: list[float] | None = Field(
        default=None,
        description="For the strategy `threshold`: a confidence for each position of a caption, "
        "`max_new_tokens` numbers, instead of `threshold` for all of them.",
    )
    factor: float = Field(
        default=1.0,
        ge=0,
        description="The strategy `factor` keeps the n most confident tokens of a region, n being the "
        "largest number with (n + 1)(1 - p) < `factor`, where p is the confidence of the n-th. A larger "
        "factor is faster and gives worse captions.",
    )
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: int = Field(
        default=0,
        ge=-(1 << 63),
        lt=1 << 63,
        description="Seed of sampling. A caption depends on the seed and its own image, not on the rest of "
        "the batch.",
    )
    cache: Cache = Field(
        default="auto",
        description="KV cache of the tokens before the captions: `none`, `exact` (changes no caption; only "
        "for models whose config.json has the layout `corrected`), `approximate` (computed again "
        "every `refresh_every` steps) or `auto` (`exact` for models that allow it, else `approximate` with "
        "`refresh_every` 8, `redo_below` 0.99 and `settled` 0.9).",
    )
    refresh_every: int | None = Field(
        default=None,
        ge=1,
        description="Number of steps after which the cache `approximate` is computed again. By default "
        "4, and 8 where `auto` chooses that cache.",
    )
    redo_below: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With the cache `approximate`: a step that would keep a token with a confidence below "
        "this is done again over the whole sequence, and so are the next ones until one is sure.",
    )
    settled: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="End a region at once when the predictions for all of its open tokens have at least "
        "this confidence; with the strategy `remask`, all regions when those for all open tokens have.",
    )
    compare: Compare = False
    early_exit: bool = Field(
        default=True,
        description="Stop decoding a region when its caption has ended. This has no effect with the strategy "
        "`remask`.",
    )
    end_of_text_last: EndOfTextLast = False
    suppress_special: bool | None = Field(
        default=None,
        description="Never predict special tokens (mask, image, region, caption). By default this is on, "
        "except for models whose config.json has the layout `reference`.",
    )

    @field_validator("position_thresholds", mode="before")
    @classmethod
    def _none_given(cls, value: Any) -> Any:
        return value or None  # the command line gives an empty list

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("give a number, not true or false")
        return value

    @model_validator(mode="after")
    def _a_threshold_for_each_position(self) -> DecodeOptions:
        given = self.position_thresholds
        if given is None:
            return self
        if self.strategy != "threshold":
            raise ValueError(
                "position_thresholds: only the strategy `threshold` has them; leave them out or set "
                "`strategy: threshold`"
            )
        if len(given) != self.max_new_tokens:
            raise ValueError(
                f"position_thresholds: {len(given)} numbers for {self.max_new_tokens} positions; give as "
                "many as `max_new_tokens`"
            )
        if any(not 0 <= each <= 1 for each in given):
            raise ValueError("position_thresholds: a confidence is a number from 0 to 1; correct the others")
        return self

    def resolved(self, isolated: bool) -> DecodeOptions:
        """Options in which the cache "auto" is replaced by what it means for captions.

        A `redo_below`, `settled` or `refresh_every` that is given stays.

        Args:
            isolated: whether the model's layout isolates the prefix; "auto" is then left, and is "exact".
        """
        if self.cache != "auto" or isolated:
            return self
        own = {name: getattr(self, name) for name in ("refresh_every", "redo_below", "settled")}
        return self.model_copy(
            update=AUTO_CACHE | {name: value for name, value in own.items() if value is not None}
        )

    def stored(self) -> dict[str, Any]:
        """The options under their names in files on disk, where `max_new_tokens` is still `length`.

        What is stored enters digests. So options that release 0.1 did not have are left out at their default,
        and `refresh_every` is 4 where none is given. What "auto" means is up to the model, see `resolved`.
        """
        fields = type(self).model_fields
        values = self.model_dump() | {"refresh_every": self.refresh_every or REFRESH_EVERY}
        return {
            _STORED_NAMES.get(name, name): value
            for name, value in values.items()
            if name not in _NEWER or value != fields[name].default
        }


def stored_names() -> dict[str, str]:
    """The options, and under which name `stored` has each of them."""
    return {name: _STORED_NAMES.get(name, name) for name in DecodeOptions.model_fields}


_STORED_NAMES = {"max_new_tokens": "length"}
_NEWER = {"position_thresholds", "factor", "redo_below", "settled", "end_of_text_last"}
