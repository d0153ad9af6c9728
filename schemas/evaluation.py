"""The configuration of `paracaption evaluate`: which captioner is measured, who judges it, and on what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from .config import Backend
from .harness import Harness
from .strict import Folder, Location, Published, Strict

_FOLDER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Captioner(Strict):
    """The captioner that is measured."""

    name: str = Field(
        description="`perceptiondlm`, `predictions` (captions from a JSON file), or a captioner of `build`, "
        "which `paracaption config` lists."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the captioner. `perceptiondlm` takes model, device, dtype, regions_per_call "
        "and decode. `decode` is a section with the decoding keys, from `strategy` to "
        "`suppress_special`, that `paracaption config --training` prints under `evaluation`. "
        "`predictions` takes path, a file with captions or a list of files, and keys "
        "(docs/evaluation.md); {benchmark} in them stands for the name of the benchmark. A captioner of "
        "`build` has the same options as there.",
    )


class Judge(Published):
    """The language model that answers the benchmarks' questions."""

    name: Literal["vllm", "openai"] = Field(
        description="`vllm` runs the model in this process; `openai` asks a server with the OpenAI API."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the judge, the same as in `build` (docs/judges.md). `openai` also has "
        "`images`: true shows the judge a crop around the region and its mask.",
    )


BenchmarkKind = Literal["paradlc", "dlc"]


PUBLISHED_PROMPT = "Describe the masked region in detail."
"""The prompt in the published commands of ParaDLC-Bench and of DLC-Bench."""

Grouping = Literal["published", "even"]


class Paper(Strict):
    """What a paper reports of the captioner on a benchmark, to be shown next to what is measured."""

    average: float | None = Field(default=None, ge=0, le=100, description="Average score in percent.")
    positive: float | None = Field(default=None, ge=0, le=100, description="Positive score in percent.")
    negative: float | None = Field(default=None, ge=0, le=100, description="Negative score in percent.")
    tokens_per_forward: float | None = Field(
        default=None, gt=0, description="Tokens decoded by a forward pass of the language model."
    )
    seconds: float | None = Field(default=None, gt=0, description="Seconds for all captions.")


class Bench(Strict):
    """The files of one benchmark."""

    name: str = Field(
        pattern=_FOLDER_NAME, description="Name of the benchmark, and of the folder for its results."
    )
    kind: BenchmarkKind = Field(
        description="Whose files and protocol the benchmark has: `paradlc` (ParaDLC-Bench) or `dlc` "
        "(DLC-Bench)."
    )
    folder: Location = Field(description="Folder with annotations.json, qa.json and class_names.json.")
    photos: Location | None = Field(
        default=None, description="Folder or URL of the photos; null takes the folder `images` in `folder`."
    )
    images: PositiveInt | None = Field(
        default=None, description="Number of images to caption, from the first on; null captions all."
    )
    on_missing_photo: Literal["error", "skip"] = Field(
        default="error",
        description="What happens if a photo is missing: `error` stops the evaluation; `skip` leaves the "
        "regions of the photo out and counts them.",
    )
    prompt: str = Field(
        default=PUBLISHED_PROMPT,
        min_length=1,
        description="Prompt for the captioner `perceptiondlm`. The default is that of the benchmarks' "
        "published commands. Other captioners have their own prompts.",
    )
    grouping: Grouping = Field(
        default="published",
        description="Which regions of a photo the captioner `perceptiondlm` captions together. `published` "
        "groups them like the benchmarks' published commands: with ParaDLC-Bench, groups of as "
        "many regions as the model can caption together, and one group of the rest (a model that "
        "can caption 6 splits 7 regions into 6 and 1); with DLC-Bench, one region at a time. "
        "`even` makes groups of about equal size. In both cases, no group has more regions than "
        "`regions_per_call` of the captioner.",
    )
    judge: Judge | None = Field(
        default=None, description="Another judge for this benchmark; null takes that of the evaluation."
    )
    paper: Paper | None = Field(
        default=None, description="Published numbers of the captioner, which results are compared with."
    )


class ProfileConfig(Published):
    """What `paracaption profile` measures: the cost of captioning one photo after another."""

    corpus: Location = Field(description="Folder or URL of the corpus with the photos to caption.")
    images: PositiveInt = Field(default=4, description="Number of photos to caption.")
    regions: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 3, 4, 5, 6, 7, 8),
        description="Numbers of regions per photo for which the cost is measured.",
    )
    load: PositiveInt = Field(
        default=4, description="Number of regions per photo in all measurements but those of `regions`."
    )
    max_new_tokens: tuple[PositiveInt, ...] = Field(
        default=(32, 64), description="Caption lengths for which the cost is measured, in tokens."
    )
    steps: tuple[PositiveInt, ...] = Field(
        default=(8, 16, 32, 64), description="Numbers of decoding steps for which the cost is measured."
    )
    thresholds: tuple[float, ...] = Field(
        default=(0.5, 0.7, 0.9, 0.95),
        description="Confidence thresholds of the strategy `threshold` to measure.",
    )
    batches: tuple[PositiveInt, ...] = Field(
        default=(1, 4, 8),
        description="Batch sizes for which the cost is measured: numbers of sequences that are decoded at "
        "once.",
    )
    repeats: PositiveInt = Field(
        default=3, description="How often each measurement is taken; the fastest counts."
    )


class EvaluateConfig(Published):
    """Everything that `paracaption evaluate` does. The results of all captioners gather in one folder."""

    out: Folder = Field(
        description="Folder of the results and of history.jsonl. Results of several captioners may be in "
        "one folder."
    )
    label: str = Field(
        pattern=_FOLDER_NAME,
        description="Name of the captioner in the results, and of its folder in `out`.",
    )
    captioner: Captioner
    judge: Judge | None = Field(
        default=None,
        description="null, the default, asks no questions: captions are written and measured (how many are "
        "empty, how long decoding takes), but get no scores.",
    )
    benchmarks: list[Bench] = Field(default_factory=list, description="Benchmarks to caption and score.")
    toy: Location | None = Field(
        default=None,
        description="Corpus of synthetic scenes, whose right captions are known. It measures the share of "
        "captions that are exactly right, and how many wrong attributes are those of another "
        "region of the photo (leaked). null measures none.",
    )
    profile: ProfileConfig | None = Field(default=None, description="null, the default, measures no costs.")
    harness: Harness | None = Field(
        default=None,
        description="Benchmarks of whole images, whose questions lmms-eval asks (docs/evaluation.md). null, "
        "the default, asks none.",
    )

    @model_validator(mode="after")
    def _check_whole(self) -> EvaluateConfig:
        names = [bench.name for bench in self.benchmarks]
        if len(names) != len(set(names)):
            raise ValueError("benchmarks: two of them have the same name; rename one")
        if not (self.benchmarks or self.toy or self.profile or self.harness):
            raise ValueError("nothing to do: name benchmarks, a toy corpus, a profile, or a harness")
        if (self.toy or self.profile or self.harness) and self.captioner.name != "perceptiondlm":
            raise ValueError("toy, profile and harness measure a perceptiondlm; name one, or leave them out")
        return self

    def judge_of(self, bench: Bench) -> Judge | None:
        """The judge of a benchmark: its own, or that of all."""
        return bench.judge or self.judge

    def backend(self, bench: Bench | None = None) -> Backend:
        """The captioner as a backend of `build`, for one benchmark or for all.

        Of `predictions`, `{benchmark}` in `path` and `keys` stands for the benchmark's name.
        """
        options = self.captioner.options
        if bench and self.captioner.name == "predictions":
            options = {name: _named(value, bench.name) for name, value in options.items()}
        return Backend(name=self.captioner.name, options=options)


def _named(value: Any, benchmark: str) -> Any:
    if isinstance(value, list):
        return [_named(each, benchmark) for each in value]
    return value.replace("{benchmark}", benchmark) if isinstance(value, str) else value
