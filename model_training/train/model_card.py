"""The card of a model repository, `README.md`, in the form that hubs read. What is not known is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ...pipeline.io import tensor_files
from ...schemas.published import published
from ...schemas.training import CorpusSource, TrainConfig

SUBJECT = {
    "library_name": "paracaption",
    "pipeline_tag": "image-to-text",
    "tags": ["region-captioning", "dense-captioning", "masks", "diffusion-language-model", "perceptiondlm"],
}

_MEANINGS = {
    "images": "images that were captioned",
    "regions": "regions that were captioned",
    "exact": "share of captions that equal the corpus's",
    "empty": "share of captions without a word",
    "words": "mean number of words in a caption",
    "forwards": "forward passes of the language model per image",
    "tokens_per_forward": "tokens decoded by one forward pass",
}
"""Numbers of an evaluation that do not depend on the machine."""


class Stated(NamedTuple):
    """What whoever publishes the model says of it.

    Attributes:
        title: of the card.
        license: identifier of its license on the hub; None if it is not stated.
        base_model: name on the hub of the model that it was trained from.
        datasets: names on the hub of what it was trained on.
    """

    title: str
    license: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()


class ModelFacts(NamedTuple):
    """What the files of a saved model say of it.

    Attributes:
        parameters: number of weights.
        dtypes: their types, as safetensors calls them.
        num_prompts: most regions that are captioned together.
        layout: of the tokens.
    """

    parameters: int
    dtypes: list[str]
    num_prompts: int | None
    layout: str | None


class RunFacts(NamedTuple):
    """What the folder of a training run says of a model.

    Attributes:
        config: of the run.
        steps: number of steps that the run has a record of.
        averaged: whether the model has the moving average of the weights.
        left_out: number of images that were not trained on, by reason.
        evaluation: numbers of the run's evaluation of this model; None if there is none.
    """

    config: TrainConfig
    steps: int
    averaged: bool
    left_out: dict[str, int]
    evaluation: dict[str, Any] | None


def read_facts(folder: Path) -> ModelFacts:
    """What the files of a saved model say of it.

    Raises:
        ConfigError: a file of weights is missing or broken.
    """
    tensors = tensor_files.list_tensors(folder).values()
    config = json.loads((folder / "config.json").read_text())
    return ModelFacts(
        sum(math.prod(each.shape) for each in tensors),
        sorted({each.dtype for each in tensors}),
        config.get("num_prompts"),
        config.get("layout"),
    )


def render(stated: Stated, facts: ModelFacts, run: RunFacts | None) -> str:
    """The card. Equal models give an equal card."""
    values = yaml.safe_dump(_front_matter(stated), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{values}---\n", _head(stated, facts), _USE, _training(run)]
    if run is not None:
        parts += [_evaluation(run), _configuration(run.config)]
    return "\n".join(filter(None, parts))


def _front_matter(stated: Stated) -> dict[str, Any]:
    named = {"license": stated.license, "base_model": stated.base_model, "datasets": list(stated.datasets)}
    return {name: value for name, value in named.items() if value} | SUBJECT


def _head(stated: Stated, facts: ModelFacts) -> str:
    size = f"{facts.parameters / 1e9:,.2f} billion" if facts.parameters >= 1e9 else f"{facts.parameters:,}"
    text = f"A PerceptionDLM with {size} parameters ({', '.join(facts.dtypes)}). "
    text += "It describes the masked regions of a photo in parallel"
    text += f", up to {facts.num_prompts} of them together." if facts.num_prompts else "."
    text += f" Layout of its tokens: `{facts.layout}`." if facts.layout else ""
    terms = "" if stated.license else "\nThe license of this model is not stated here.\n"
    return f"# {stated.title}\n\n{text}\n{terms}"


_USE = """## Use it

ParaCaption, installed with its extra `models`, loads the model. No code from this repository runs.

```python
from huggingface_hub import snapshot_download
from paracaption import RegionCaptioner

captioner = RegionCaptioner.load(snapshot_download("REPOSITORY"))
captioner.caption("photo.jpg", ["mask.png"])  # a caption for each mask
```

Or in a shell: `paracaption caption --model FOLDER --image photo.jpg --masks mask.png`.
"""


def _training(run: RunFacts | None) -> str:
    if run is None:
        return "## Training\n\nThe files do not say how the model was trained.\n"
    config = run.config
    if config.model.path:
        start = f"the saved model `{published(config.model.path)}`"
    else:
        start = f"random weights, with the tokenizer `{published(config.model.tokenizer)}`"
    text = [f"## Training\n\nTrained with ParaCaption for {run.steps:,} steps from {start}."]
    if run.averaged:
        text.append(f"The weights are a moving average (decay {config.ema_decay:g}).")
    rows = [_source_row(each) for each in (*config.corpora, *config.conversations)]
    lines = [" ".join(text), "", "| trained on | subsets | weight |", "| --- | --- | ---: |", *rows]
    if left_out := {reason: number for reason, number in run.left_out.items() if number}:
        listed = ", ".join(f"{reason.replace('_', ' ')} {number:,}" for reason, number in left_out.items())
        lines += ["", f"Images that were left out of training: {listed}."]
    return "\n".join(lines) + "\n"


def _source_row(source: Any) -> str:
    if isinstance(source, CorpusSource):
        return f"| corpus `{published(source.corpus)}` | {_subsets(source)} | {source.weight:g} |"
    return f"| conversations `{published(source.path)}` | - | {source.weight:g} |"


def _subsets(source: CorpusSource) -> str:
    return ", ".join(source.subsets) if source.subsets else "all"


def _evaluation(run: RunFacts) -> str:
    found = {name: run.evaluation[name] for name in _MEANINGS if run.evaluation and name in run.evaluation}
    if not found or run.config.evaluation is None:
        return ""
    corpus = published(run.config.evaluation.corpus)
    rows = [
        f"| `{name}` | {value:.4g} | {_MEANINGS[name]} |"
        if isinstance(value, float)
        else f"| `{name}` | {value:,} | {_MEANINGS[name]} |"
        for name, value in found.items()
    ]
    head = (
        f"## Evaluation\n\nOn images of the corpus `{corpus}` that were not trained on. The numbers compare "
        "the model's captions with those of the corpus.\n\n| number | value | meaning |\n"
        "| --- | ---: | --- |\n"
    )
    return head + "\n".join(rows) + "\n"


def _configuration(config: TrainConfig) -> str:
    values = {**published(config.model_dump(mode="json")), "out": "."}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"## Configuration\n\nPaths are shortened to their last part.\n\n```yaml\n{text}```\n"
