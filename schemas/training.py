"""The configuration of a training run: a YAML file, checked before the start. An unknown key is an error.

"the original" is MSALab-PKU/PerceptionDLM: its training scripts where a number is theirs, its paper where it
says so. Relative paths are relative to the configuration file; `out` is a folder that every node mounts.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from .decoding import DecodeOptions
from .strict import Strict


class Model(Strict):
    """Where the weights come from: a saved model, or random ones for a new model."""

    path: str | None = Field(
        default=None, description="folder of a saved PerceptionDLM, as `models convert` writes it"
    )
    tokenizer: str | None = Field(
        default=None, description="of a new model: a tokenizer's folder, or `toy` for the toy world's"
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the model's config that differ, as max_tiles: 1"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Model:
        if (self.path is None) == (self.tokenizer is None):
            raise ValueError("give `path`, or for a new model `tokenizer`")
        return self


class CorpusSource(Strict):
    """A corpus to train on."""

    out: str = Field(description="`out` of a build; a folder or an fsspec URL")
    weight: float = Field(default=1.0, gt=0, description="passes over it in an epoch")
    subsets: tuple[str, ...] | None = Field(default=None, description="some of its subsets; none: all")


class ConversationSource(Strict):
    """Questions and answers on whole images, in the form of LLaVA's data.

    The file holds records of {id, image, conversations: [{from, value}, ...]}. `image` is a path below
    `images`, or in Parquet the photo's bytes, alone or as {bytes, path}.
    """

    path: str = Field(description=".json, .jsonl or .parquet")
    images: str = Field(default="", description="the folder of the photos; none: they are in the Parquet")
    weight: float = Field(default=1.0, gt=0, description="passes over it in an epoch")


class DataOptions(Strict):
    """How batches are made."""

    packed: bool = Field(default=True, description="examples share a row; no padding is computed")
    max_tokens: PositiveInt = Field(default=4096, description="of a batch; the original's sequence length")
    max_examples: PositiveInt | None = Field(default=None, description="of a batch; none: what fits")
    regions_per_group: float = Field(
        default=3.5, ge=1, description="an image with m regions is visited at most ceil(m / this) times"
    )
    group_sizes: Literal["varied", "even"] = Field(
        default="varied", description="1 to as many regions as there are prompts; the original's are `even`"
    )
    caption_length: Literal["natural", "fixed"] = Field(
        default="natural", description="the original's; `fixed` fills up with eot, as decoding sees captions"
    )
    caption_slots: PositiveInt = Field(default=32, description="of a fixed caption; the original decodes 32")
    max_caption_tokens: PositiveInt | None = Field(default=None, description="longer ones are too long")
    labels: Literal["answer", "captions"] = Field(
        default="answer", description="the original's: also the tokens that open and close captions"
    )
    on_too_long: Literal["error", "skip"] = Field(default="error", description="`skip` counts them")
    on_bad_sample: Literal["error", "skip"] = Field(default="error", description="likewise")
    max_pixels: PositiveInt = Field(default=200_000_000, description="of a photo: decompression bombs")
    workers: int = Field(default=4, ge=0, description="processes that make batches, for each rank")
    prefetch: PositiveInt = Field(default=2, description="batches that each of them makes ahead")
    cache: str | None = Field(default=None, description="local; none: ~/.cache/paracaption/training")

    def caption_limit(self) -> int | None:
        """The most tokens that a caption may have; None if only its batch limits it."""
        fixed = self.caption_slots if self.caption_length == "fixed" else None
        limits = [limit for limit in (fixed, self.max_caption_tokens) if limit is not None]
        return min(limits, default=None)


Weighting = Literal["inverse", "none"]


class NoiseOptions(Strict):
    """How captions are masked."""

    level: Literal["example", "region"] = Field(
        default="example", description="one level for each; the original's"
    )
    lowest: float = Field(default=1e-3, gt=0, lt=1, description="the original's, as LLaDA's")
    stratified: bool = Field(default=False, description="levels of a batch are spread evenly: less noise")
    weighting: Weighting = Field(default="inverse", description="the original's: 1 / probability")


class LearningRate(Strict):
    """Highest learning rate of each part; 0: the part is frozen."""

    vision: float = Field(default=4e-5, ge=0, description="the original's, stages 2 to 4 and regions")
    projector: float = Field(default=4e-5, ge=0, description="likewise; 1e-3 in stage 1")
    language: float = Field(default=4e-5, ge=0, description="likewise")
    prompts: float = Field(default=4e-5, ge=0, description="likewise: the regions' prompts")

    @model_validator(mode="after")
    def _something_moves(self) -> LearningRate:
        if not any((self.vision, self.projector, self.language, self.prompts)):
            raise ValueError("every part is frozen; give one of them a rate above 0")
        return self


class Lora(Strict):
    """Train small additions to the language model's matrices instead of the matrices."""

    rank: PositiveInt = Field(default=16, description="of an addition")
    alpha: float = Field(default=32, gt=0, description="an addition counts alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="layers of the language model, by name",
    )


class Spike(Strict):
    """When a step is skipped instead of taken, and when the run stops."""

    factor: float | None = Field(
        default=20, gt=1, description="gradient norm over the median; one masked token at 1/p can give 10"
    )
    window: PositiveInt = Field(default=64, description="norms that the median is of; before: no rule")
    stop_after: PositiveInt = Field(default=3, description="skipped steps in a row: something is broken")


class Checkpoint(Strict):
    """What is kept to resume from."""

    every: PositiveInt = Field(default=500, description="steps; the last step is always kept")
    keep: PositiveInt = Field(default=3, description="older ones are removed")
    asynchronous: bool = Field(default=True, description="training goes on while it is written")


class Log(Strict):
    """Metrics: metrics.jsonl and TensorBoard always."""

    every: PositiveInt = Field(default=10, description="steps between lines on the terminal; files have all")
    samples: bool = Field(default=False, description="the names of each step's examples, in the JSONL")
    peak_tflops: float | None = Field(
        default=None, gt=0, description="of a device, for MFU; none: measured by a matrix product"
    )
    wandb: str | None = Field(default=None, description="project in Weights & Biases; none: not used")


class Ray(Strict):
    """Ray Train's workers."""

    workers: int = Field(default=0, ge=0, description="0: train in this process")
    gpus: int = Field(default=1, ge=0, le=1, description="of a worker; 0: on the CPU")
    cpus: float = Field(default=4, gt=0, description="of a worker, its data processes included")
    max_failures: int = Field(default=3, ge=-1, description="restarts from the last checkpoint; -1: no end")


class Evaluation(DecodeOptions):
    """Captions of images that were not trained on, when the model is there."""

    out: str = Field(description="`out` of a build with images that `corpora` does not have")
    images: PositiveInt | None = Field(default=200, description="of it, the first ones; none: all")
    pictures: int = Field(default=8, ge=0, description="of them that are drawn with their captions")
    batch_size: PositiveInt = Field(default=8, description="groups of regions decoded at once")
    regions_per_call: PositiveInt | None = Field(
        default=None, description="captioned together; 1: one by one; none: the most that the model can"
    )


class TrainConfig(Strict):
    """Everything that decides what is trained. The resolved form is written into the output."""

    out: str = Field(description="folder of checkpoints, metrics and the trained model")
    model: Model
    corpora: list[CorpusSource] = Field(default_factory=list)
    conversations: list[ConversationSource] = Field(default_factory=list)
    data: DataOptions = DataOptions()
    noise: NoiseOptions = NoiseOptions()
    steps: PositiveInt | None = Field(default=None, description="of the optimizer; or `epochs`")
    epochs: PositiveInt | None = Field(default=None, description="the original trains 1")
    accumulation: PositiveInt = Field(default=4, description="batches of a rank in a step; the original's")
    learning_rate: LearningRate = LearningRate()
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the steps; the original's")
    final_rate: float = Field(default=0.0, ge=0, le=1, description="where the cosine ends, as a share")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices; the original's")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's; the original's")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient; the original's")
    average: float | None = Field(
        default=None, gt=0, lt=1, description="decay of an average of the weights; none: no average"
    )
    lora: Lora | None = Field(default=None, description="none: the matrices themselves are trained")
    spike: Spike = Spike()
    seed: int = Field(default=0, ge=0, description="of weights, order, groups, prompts and noise")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto`: a GPU where there is one"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of computing; `auto`: bfloat16 on GPUs. Weights are kept in float32"
    )
    shard: Literal["auto", "full", "none"] = Field(
        default="auto", description="`full`: FSDP2. `auto`: on GPUs; on CPUs each rank has the whole model"
    )
    attention: Literal["auto", "sdpa", "flex_attention"] = Field(
        default="auto", description="`auto`: flex_attention on GPUs, which needs no L x L mask"
    )
    recompute: bool = Field(default=True, description="activations of layers, in backward: memory for time")
    compile: Literal["auto", "always", "never"] = Field(
        default="auto", description="layers, by torch.compile; `auto`: on GPUs"
    )
    export_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the trained model's file; `auto`: as computed"
    )
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    evaluation: Evaluation | None = Field(default=None, description="none: the model is not looked at")
    ray: Ray = Ray()

    @model_validator(mode="after")
    def _whole(self) -> TrainConfig:
        if not self.corpora and not self.conversations:
            raise ValueError("name something to train on, under `corpora` or `conversations`")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        if self.lora and not self.learning_rate.language:
            raise ValueError("lora trains the language model: learning_rate.language has to be above 0")
        return self
