"""The configuration of `paracaption evaluate`: which captioner is measured, who judges it, and on what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from .config import Backend
from .strict import Location, Published, Strict

_FOLDER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Captioner(Strict):
    """The captioner that is measured."""

    name: str = Field(
        description="`perceptiondlm`, `predictions` (a JSON file of captions), or a captioner of `build`."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the captioner. `perceptiondlm` takes model, device, dtype, regions_per_call "
        "and decode; `predictions` takes path; the others take what they take in `build`.",
    )


class Judge(Published):
    """The language model that answers the benchmarks' questions."""

    name: Literal["vllm", "openai"] = Field(
        description="`vllm` runs the model in this process; `openai` asks a server."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the judge, as in `build`; `openai` also takes images."
    )


BenchmarkKind = Literal["paradlc", "dlc"]


PUBLISHED_PROMPT = "Describe the masked region in detail."
"""What the published commands of ParaDLC-Bench and of DLC-Bench ask."""

Grouping = Literal["published", "even"]


class Bench(Strict):
    """The files of one benchmark."""

    name: str = Field(pattern=_FOLDER_NAME, description="Name of the folder that its results get.")
    kind: BenchmarkKind = Field(description="Layout and protocol: ParaDLC-Bench's or DLC-Bench's.")
    folder: Location = Field(description="Folder with annotations.json, qa.json and class_names.json.")
    photos: Location | None = Field(
        default=None, description="Folder or URL of the photos; null takes `images` in `folder`."
    )
    images: PositiveInt | None = Field(
        default=None, description="Caption only the first N images; null captions all."
    )
    on_missing_photo: Literal["error", "skip"] = Field(
        default="error",
        description="What a missing photo is: an error, or regions that are left out and counted.",
    )
    prompt: str = Field(
        default=PUBLISHED_PROMPT,
        min_length=1,
        description="What a `perceptiondlm` is asked; the default is what the published commands ask. Other "
        "captioners have their own prompts.",
    )
    grouping: Grouping = Field(
        default="published",
        description="Which regions of a photo a `perceptiondlm` captions together. `published`: as the "
        "published commands do, ParaDLC-Bench in groups of as many as the model has prompts and the rest (6 "
        "and 1), DLC-Bench one by one. `even`: groups of about equal size. `regions_per_call` of the "
        "captioner limits both.",
    )


class ProfileConfig(Published):
    """What `paracaption profile` measures: the cost of captioning one photo after another."""

    corpus: Location = Field(description="Corpus whose photos are captioned.")
    images: PositiveInt = Field(default=4, description="Number of photos.")
    regions: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 3, 4, 5, 6, 7, 8), description="Numbers of regions in a photo to measure."
    )
    load: PositiveInt = Field(
        default=4, description="Number of regions in a photo while anything else is varied."
    )
    max_new_tokens: tuple[PositiveInt, ...] = Field(
        default=(32, 64), description="Lengths of a caption to measure, in tokens."
    )
    steps: tuple[PositiveInt, ...] = Field(
        default=(8, 16, 32, 64), description="Numbers of decoding steps to measure."
    )
    thresholds: tuple[float, ...] = Field(
        default=(0.5, 0.7, 0.9, 0.95), description="Thresholds of the `threshold` strategy to measure."
    )
    batches: tuple[PositiveInt, ...] = Field(
        default=(1, 4, 8), description="Numbers of sequences decoded at once to measure."
    )
    repeats: PositiveInt = Field(
        default=3, description="Number of times that each measurement is taken; the fastest counts."
    )


class EvaluateConfig(Published):
    """Everything that `paracaption evaluate` does. The results of all captioners gather in one folder."""

    out: Location = Field(description="Folder of the results and of history.jsonl.")
    label: str = Field(pattern=_FOLDER_NAME, description="Name of the captioner, and of its folder in `out`.")
    captioner: Captioner
    judge: Judge | None = Field(
        default=None, description="Null writes captions and measures them without a judge."
    )
    benchmarks: list[Bench] = Field(default_factory=list)
    toy: Location | None = Field(
        default=None, description="Corpus of a toy world: measures exactly right captions, and leakage."
    )
    profile: ProfileConfig | None = Field(default=None, description="Null does not measure costs.")

    @model_validator(mode="after")
    def _check_whole(self) -> EvaluateConfig:
        names = [bench.name for bench in self.benchmarks]
        if len(names) != len(set(names)):
            raise ValueError("benchmarks: two of them have the same name; rename one")
        if not (self.benchmarks or self.toy or self.profile):
            raise ValueError("nothing to do: name benchmarks, a toy corpus, or a profile")
        if (self.toy or self.profile) and self.captioner.name != "perceptiondlm":
            raise ValueError("toy and profile measure a perceptiondlm; name one, or leave them out")
        return self

    def backend(self) -> Backend:
        """The captioner as a backend of `build`."""
        return Backend(name=self.captioner.name, options=self.captioner.options)
