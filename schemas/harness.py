"""The questions that lmms-eval asks a PerceptionDLM-Base: the section `harness` of `paracaption evaluate`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from .answering import AnswerOptions
from .strict import Location, Strict

ColumnName = Literal["released", "lmms-eval"]
HarnessJudge = Literal["none", "lmms-eval", "contains"]


class Asking(Strict):
    """How the questions of a task are asked and its answers read. The defaults change nothing."""

    prompt: str | None = Field(
        default=None,
        description="Jinja template of the question. It has lmms-eval's own prompt as `text`, and the fields "
        "of the document as `doc`; the filter `lettered` writes a list of choices as lines `A. ...`. null "
        "takes lmms-eval's own.",
    )
    number_images: bool = Field(
        default=False, description="Write `Image-1:`, `Image-2:` and so on before each of several images."
    )
    scale_first_image: PositiveInt = Field(
        default=1, description="Factor by which the first image of a question is enlarged."
    )
    short_answer: bool = Field(
        default=False,
        description="Cut answers of up to four characters with a Yes or No in them to that word, and "
        "answers such as `B. a dog` to the letter.",
    )
    most_new_tokens: PositiveInt | None = Field(
        default=None,
        description="Most tokens of an answer, for tasks that ask for more than a diffusion model can place. "
        "null leaves the task's own number.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="How answers are decoded: options of `paracaption ask`, such as `max_new_tokens`, "
        "`steps` and `block_length`. They count more than what the task says.",
    )

    @field_validator("options")
    @classmethod
    def _check_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        AnswerOptions.checked(value)
        return value


class HarnessColumn(Strict):
    """How a task is run for one column of the table."""

    task: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the task or group in lmms-eval."
    )
    metric: str = Field(min_length=1, description="Name of the number in its results.")
    percent: bool = Field(default=False, description="true: the number is 0 to 100, not 0 to 1.")
    judge: HarnessJudge = Field(
        default="none",
        description="Who compares answers: `none` (a rule of lmms-eval's), `lmms-eval` (the model that "
        "lmms-eval asks; it reads OPENAI_API_KEY, OPENAI_API_URL and MODEL_VERSION from the environment) or "
        "`contains` (the `judge` of this configuration is asked whether the answer contains the right one).",
    )
    asking: Asking = Asking()


class HarnessTask(Strict):
    """A row of the table."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._*-]*$", description="Name of the benchmark.")
    paper: float | None = Field(default=None, description="The paper's number, in percent.")
    questions: PositiveInt | None = Field(
        default=None, description="Number of its questions, for an estimate of the time. null: not known."
    )
    include: Location | None = Field(
        default=None, description="Folder with tasks of your own, as of lmms-eval's --include_path."
    )
    note: str = Field(default="", description="What a reader of the number has to know.")
    columns: dict[ColumnName, HarnessColumn] = Field(
        min_length=1,
        description="How the task is run: `released` (prompts and settings of PerceptionDLM's released code) "
        "and `lmms-eval` (lmms-eval's own).",
    )


class Harness(Strict):
    """Benchmarks of whole images, which lmms-eval asks."""

    columns: list[ColumnName] = Field(
        default=["released", "lmms-eval"], min_length=1, description="Columns to run, in their order."
    )
    only: list[str] | None = Field(default=None, description="Names of the rows to run; null runs all.")
    batch_size: PositiveInt = Field(default=8, description="Questions that are answered at once.")
    limit: PositiveInt | None = Field(
        default=None,
        description="Number of questions of each task, from the first on, for a trial; null: all.",
    )
    tasks: list[HarnessTask] = Field(min_length=1, description="The rows of the table.")

    @model_validator(mode="after")
    def _check_names(self) -> Harness:
        names = [task.name for task in self.tasks]
        if len(names) != len(set(names)):
            raise ValueError("tasks: two of them have the same name; rename one")
        for name in self.only or ():
            if name not in names:
                raise ValueError(f"only: no task is called {name!r}; the tasks are {', '.join(names)}")
        return self

    def chosen(self) -> list[HarnessTask]:
        """The rows to run."""
        return [task for task in self.tasks if self.only is None or task.name in self.only]


class Settings(Strict):
    """What our plugin for lmms-eval reads from the file that `settings=FILE` names."""

    model: str = Field(description="Folder of a saved model.")
    device: str = "auto"
    dtype: str = "auto"
    weights: str = Field(default="", description="Identity of its weights, so that a cache knows them.")
    asking: Asking = Asking()
