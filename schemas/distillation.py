"""The `distillation` part of a training configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from .strict import Location, Strict


class Distillation(Strict):
    """Distill a teacher's decoding paths, so that more tokens can be kept in a decoding step.

    `paracaption models paths CONFIG` decodes the captions of all regions of `corpora` with the model that the
    run starts from, one token a step, and records tokens and order. The run then learns these captions
    instead of the corpora's, from states of the teacher's decoding: the tokens of the first steps are there,
    all others are masked, and those of the next steps, as many as the window has, are learned
    (pseudo-trajectories as in d3LLM, arXiv 2601.07568). Of the tokens that it has right, also the entropy is
    lowered (certainty forcing as in dParallel, arXiv 2509.26488).

    `noise.level` and `noise.stratified` apply, the rest of `noise` does not. It needs `data.caption_length:
    fixed`, `data.labels: captions` and no `conversations`.
    """

    paths: Location = Field(description="Folder of the decoding paths. `paracaption models paths` writes it.")
    order: Literal["confidence", "left-to-right"] = Field(
        default="confidence",
        description="Order in which the model decodes captions while its paths are recorded.",
    )
    window_start: PositiveInt = Field(
        default=8,
        description="How many of the teacher's next steps are learned at once at the start of the run.",
    )
    window_end: PositiveInt = Field(
        default=32, description="The same at the end of the curriculum, and after it."
    )
    curriculum_ratio: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the run's steps in which the window grows from `window_start` to `window_end`.",
    )
    certainty_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the entropy of tokens that are predicted right; 0 switches certainty forcing "
        "off.",
    )
    certainty_temperature: float = Field(
        default=0.5,
        gt=0,
        description="Temperature of the probabilities whose entropy is lowered. Below 1, tokens that are "
        "nearly certain count little.",
    )

    @model_validator(mode="after")
    def _window_grows(self) -> Distillation:
        if self.window_end < self.window_start:
            raise ValueError("window_end has to be at least window_start; raise it")
        return self
