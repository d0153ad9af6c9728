"""The configuration of `paracaption evaluate`: who is examined, by whom, and on what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from .config import Backend
from .strict import Location, Strict


class Captioner(Strict):
    """Who is examined."""

    name: str = Field(
        description="`perceptiondlm`, `predictions` (a JSON of captions by key), or of the pipeline"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="of perceptiondlm: model, device, dtype, regions_per_call, decode; of predictions: path",
    )


class Judge(Strict):
    """Who answers the questions."""

    name: Literal["vllm", "openai"] = Field(description="in this process, or behind a server")
    options: dict[str, Any] = Field(default_factory=dict, description="as the pipeline's judge takes them")


class Bench(Strict):
    """A benchmark's files."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of its folder among the results")
    kind: Literal["paradlc", "dlc"] = Field(description="whose layout and protocol it has")
    folder: Location = Field(description="with annotations.json, qa.json and class_names.json")
    photos: Location | None = Field(default=None, description="their folder; none: `images` in `folder`")
    images: PositiveInt | None = Field(default=None, description="of it, the first ones; none: all")
    on_missing_photo: Literal["error", "skip"] = Field(
        default="error", description="`skip` leaves its regions out, and counts them"
    )


class ProfileConfig(Strict):
    """What `paracaption profile` measures: a PerceptionDLM's cost on one photo after another."""

    scenes: Location = Field(description="a corpus, whose photos are captioned")
    images: PositiveInt = Field(default=4, description="of it")
    regions: tuple[PositiveInt, ...] = Field(default=(1, 2, 3, 4, 5, 6, 7, 8), description="of an image")
    load: PositiveInt = Field(default=4, description="regions of an image while the parallelism varies")
    max_new_tokens: tuple[PositiveInt, ...] = Field(default=(32, 64), description="tokens of a caption")
    steps: tuple[PositiveInt, ...] = Field(default=(8, 16, 32, 64), description="of the decoder")
    thresholds: tuple[float, ...] = Field(default=(0.5, 0.7, 0.9, 0.95), description="of `threshold`")
    batches: tuple[PositiveInt, ...] = Field(default=(1, 4, 8), description="images decoded at once")
    repeats: PositiveInt = Field(default=3, description="of each measurement; the fastest counts")


class EvaluateConfig(Strict):
    """Everything that `paracaption evaluate` does; results of all models gather in one folder."""

    out: Location = Field(description="folder of the results, and of history.jsonl")
    label: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the model's name; its results have a folder of it",
    )
    captioner: Captioner
    judge: Judge | None = Field(default=None, description="none: captions are written, and not judged")
    benchmarks: list[Bench] = Field(default_factory=list)
    toy: Location | None = Field(default=None, description="a toy world's corpus: exact captions and leakage")
    profile: ProfileConfig | None = Field(default=None, description="none: costs are not measured")

    @model_validator(mode="after")
    def _whole(self) -> EvaluateConfig:
        names = [bench.name for bench in self.benchmarks]
        if len(names) != len(set(names)):
            raise ValueError("benchmarks: two of them have the same name")
        if not (self.benchmarks or self.toy or self.profile):
            raise ValueError("nothing to do: name benchmarks, a toy corpus, or a profile")
        if (self.toy or self.profile) and self.captioner.name != "perceptiondlm":
            raise ValueError("toy and profile examine a perceptiondlm")
        return self

    def backend(self) -> Backend:
        """The captioner as the pipeline names one."""
        return Backend(name=self.captioner.name, options=self.captioner.options)
