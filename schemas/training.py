"""The configuration of a training run: a YAML file, checked before the start. An unknown key is an error.

"The released code" is PerceptionDLM's (github.com/MSALab-PKU/PerceptionDLM); its numbers are those of its
training scripts. Relative paths are relative to the configuration file; every node mounts `out`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from .decoding import DecodeOptions
from .strict import Location, Published, Strict


class Model(Strict):
    """Where the weights come from: a saved model, or random ones for a new model."""

    path: Location | None = Field(
        default=None,
        description="Folder of a saved PerceptionDLM, as `paracaption models convert` writes it.",
    )
    tokenizer: Literal["toy"] | Location | None = Field(
        default=None,
        union_mode="left_to_right",
        description="For a new model: the folder of its tokenizer, or `toy` for the toy world's words.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the model's config to change, for example max_tiles: 1."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Model:
        if (self.path is None) == (self.tokenizer is None):
            raise ValueError("give `path`, or for a new model `tokenizer`")
        return self


class CorpusSource(Strict):
    """A corpus to train on."""

    corpus: Location = Field(description="Folder or fsspec URL of a corpus, the `out` of its build.")
    weight: float = Field(
        default=1.0,
        gt=0,
        description="Passes over the source in an epoch; 0.25 takes a different quarter of it in each epoch.",
    )
    subsets: tuple[str, ...] | None = Field(
        default=None, description="Train on these subsets only; null trains on all of them."
    )


class ConversationSource(Strict):
    """Questions and answers, in the form of LLaVA's data, or the released code's region data.

    The files hold records of {id, image, conversations: [{from, value}, ...]}, or of {image, mask_rles,
    captions}. `image` is a path below `images`, the photo in base64, or in Parquet its bytes, alone or as
    {bytes, path}; `images` is a list of these. Turns may also be {role, content}.
    """

    path: Location = Field(
        description="A .json, .jsonl or .parquet file, a folder of Parquet files, or a glob; or a fsspec URL."
    )
    images: Location = Field(
        default="", description="Folder of the photos; leave it empty if the files hold them."
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="Passes over the source in an epoch; 0.25 takes a different quarter of it in each epoch.",
    )


class DataOptions(Strict):
    """How batches are made, and what happens to samples that do not fit or are damaged."""

    packed: bool = Field(
        default=True,
        description="Examples follow one another in one row; false gives each a padded row of its own.",
    )
    max_tokens: PositiveInt = Field(
        default=4096,
        description="Most tokens of a batch, padding included; the released code's sequence length is 4096.",
    )
    max_examples: PositiveInt | None = Field(
        default=None, description="Most examples of a batch; null takes as many as fit."
    )
    regions_per_group: float = Field(
        default=3.5,
        ge=1,
        description="An image with m regions is visited at most ceil(m / this) times in a pass; the "
        "released code has 3.5.",
    )
    group_sizes: Literal["varied", "even"] = Field(
        default="varied",
        description="`varied`: a visit has any number of regions up to the model's prompts. `even`: the "
        "visits of an image have equally many, as in the released code; the model then captions no more "
        "regions together than it has seen together (4 with 3.5 regions per group). Of corpora; region data "
        "among `conversations` always have even groups.",
    )
    caption_length: Literal["natural", "fixed"] = Field(
        default="natural",
        description="`natural` trains on captions as they are, as the released code does; `fixed` fills "
        "them up to `max_new_tokens` with the end token, which is what decoding sees.",
    )
    max_new_tokens: PositiveInt = Field(
        default=32,
        description="Tokens of a caption if `caption_length` is `fixed`; the released code decodes 32.",
    )
    max_caption_tokens: PositiveInt | None = Field(
        default=None,
        description="Captions with more tokens are too long; null sets no limit besides the batch's.",
    )
    labels: Literal["answer", "captions"] = Field(
        default="answer",
        description="Which tokens are masked and learned. `answer` includes those that open and close "
        "captions, as in the released code; `captions` is only what decoding fills in.",
    )
    on_too_long: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a caption or sample that is too long; `skip` counts it and goes on.",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a damaged shard, photo or mask; `skip` counts the sample and goes on.",
    )
    max_dropped_share: float | None = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Stop the run when more than this share of an epoch's items (groups of an image's "
        "regions, conversations) is left out by `skip`, counted over all ranks; null sets no limit. An epoch "
        "of which everything is left out stops the run in any case.",
    )
    benchmark_photos: Literal["leave_out", "keep"] = Field(
        default="leave_out",
        description="`leave_out` does not train on the photos of ParaDLC-Bench and DLC-Bench, which are of "
        "COCO and Objects365: a benchmark does not measure a model that has seen them. `keep` does.",
    )
    max_pixels: PositiveInt = Field(
        default=200_000_000, description="Most pixels of a photo, as a guard against decompression bombs."
    )
    workers: int = Field(
        default=4,
        ge=0,
        description="Processes per rank that make batches; 0 makes them when they are needed.",
    )
    prefetch: PositiveInt = Field(
        default=2,
        description="Batches each of these processes makes ahead; one of 4096 tokens takes up to 13 MB of "
        "/dev/shm.",
    )
    cache: Location | None = Field(
        default=None,
        description="Local folder for tables of the data; null means ~/.cache/paracaption/training.",
    )

    def caption_limit(self) -> int | None:
        """The most tokens that a caption may have; None if only its batch limits it."""
        fixed = self.max_new_tokens if self.caption_length == "fixed" else None
        limits = [limit for limit in (fixed, self.max_caption_tokens) if limit is not None]
        return min(limits, default=None)


LossWeighting = Literal["1/t", "none"]


class NoiseOptions(Strict):
    """How captions are masked, and how much each masked token counts."""

    level: Literal["example", "region"] = Field(
        default="example",
        description="Draw one noise level per example, as LLaDA and the released code do, or one per "
        "region: decoding meets finished regions next to unfinished ones.",
    )
    eps: float = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="Probability of masking at level 0, above 0 so that 1/t is finite; LLaDA's and the "
        "released code's.",
    )
    stratified: bool = Field(
        default=False,
        description="Spread the levels of a batch evenly instead of drawing each by itself, which gives a "
        "less noisy loss.",
    )
    loss_weighting: LossWeighting = Field(
        default="1/t",
        description="`1/t`: a masked token counts by one over its probability of masking t, as in LLaDA's "
        "bound on the likelihood and in the released code. `none`: all masked tokens count alike.",
    )


class LearningRate(Strict):
    """Highest learning rate of each part of the model; 0 freezes the part."""

    vision: float = Field(
        default=4e-5,
        ge=0,
        description="The vision tower. The released code has 4e-5 for all parts from stage 2 on.",
    )
    projector: float = Field(
        default=4e-5,
        ge=0,
        description="The projector. The paper has 1e-3 in stage 1, which trains nothing else.",
    )
    language: float = Field(default=4e-5, ge=0, description="The language model and its head.")
    prompts: float = Field(default=4e-5, ge=0, description="The embeddings of the region prompts.")

    @model_validator(mode="after")
    def _something_moves(self) -> LearningRate:
        if not any((self.vision, self.projector, self.language, self.prompts)):
            raise ValueError("every part is frozen; give one of them a rate above 0")
        return self


class Lora(Strict):
    """LoRA: train low-rank additions to the language model's matrices instead of the matrices."""

    rank: PositiveInt = Field(default=16, description="Rank of an addition.")
    alpha: float = Field(default=32, gt=0, description="An addition is scaled by alpha / rank.")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Names of the language model's layers that get an addition.",
    )


class Spike(Strict):
    """When a step is skipped instead of taken, and when the run stops."""

    factor: float | None = Field(
        default=20,
        gt=1,
        description="Skip a step whose gradient norm is this many times the median of recent ones; null "
        "skips none. A single masked token with a small t can give a factor of 10.",
    )
    window: PositiveInt = Field(
        default=64,
        description="Number of recent gradient norms the median is taken over. Until that many exist, no "
        "step is skipped.",
    )
    stop_after: PositiveInt = Field(
        default=3, description="Stop the run after this many skipped steps in a row: something is broken."
    )


class Checkpoint(Strict):
    """What is kept to resume from."""

    every: PositiveInt = Field(
        default=500, description="Steps between checkpoints. The last step always gets one."
    )
    keep: PositiveInt = Field(default=3, description="Keep this many checkpoints and remove older ones.")
    asynchronous: bool = Field(default=True, description="Continue training while a checkpoint is written.")


class Log(Strict):
    """Metrics: metrics.jsonl and TensorBoard always."""

    every: PositiveInt = Field(
        default=10, description="Steps between lines on the terminal. The files have every step."
    )
    samples: bool = Field(
        default=False, description="Write the names of each step's examples to metrics.jsonl."
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Peak of one device, which MFU is a share of; null measures it with a matrix product.",
    )
    wandb: str | None = Field(
        default=None, description="Project in Weights & Biases to log to; null does not use it."
    )


class Ray(Strict):
    """Ray Train's workers."""

    workers: int = Field(default=0, ge=0, description="Number of workers (ranks); 0 trains in this process.")
    gpus: int = Field(default=1, ge=0, le=1, description="GPUs per worker; 0 trains on CPUs.")
    cpus: float = Field(default=4, gt=0, description="CPU cores per worker, its data processes included.")
    max_failures: int = Field(
        default=3,
        ge=-1,
        description="How often the workers may be restarted from the last checkpoint; -1 sets no limit.",
    )


class Evaluation(DecodeOptions):
    """Captions of images that were not trained on, once the model is trained."""

    corpus: Location = Field(
        description="Folder or fsspec URL of a corpus. If it was built with a `held_out_share`, the images "
        "held out of training are captioned, and it may be one of `corpora`; otherwise it has to be another."
    )
    images: PositiveInt | None = Field(
        default=200, description="Caption only the first N images; null captions all."
    )
    pictures: int = Field(
        default=8, ge=0, description="Draw the first N of these images with their captions."
    )
    batch_size: PositiveInt = Field(default=8, description="Groups of regions that are decoded at once.")
    regions_per_call: PositiveInt | None = Field(
        default=None,
        description="Regions captioned together; 1 captions them one by one, null takes as many as the "
        "model can.",
    )


class TrainConfig(Published):
    """Everything that decides what is trained. The resolved form is written into the output."""

    out: Location = Field(description="Folder of the checkpoints, the metrics and the trained model.")
    model: Model
    corpora: list[CorpusSource] = Field(default_factory=list)
    conversations: list[ConversationSource] = Field(default_factory=list)
    data: DataOptions = DataOptions()
    noise: NoiseOptions = NoiseOptions()
    steps: PositiveInt | None = Field(
        default=None, description="Steps of the optimizer; give this or `epochs`."
    )
    epochs: PositiveInt | None = Field(
        default=None, description="Passes over the data by weight; the released code trains one epoch."
    )
    gradient_accumulation_steps: PositiveInt = Field(
        default=4, description="Batches of each rank that make one step; the released code has 4."
    )
    learning_rate: LearningRate = LearningRate()
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the steps over which the learning rate rises; the released code has 0.03.",
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Share of the learning rate at which the cosine ends."
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="Weight decay of matrices; vectors have none. The released code has 0."
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="AdamW's betas; the released code's."
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Clip gradients to this norm; the released code has 1."
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the weights; null keeps none.",
    )
    lora: Lora | None = Field(default=None, description="null trains the matrices themselves.")
    spike: Spike = Spike()
    seed: int = Field(
        default=0, ge=0, description="Seed of new weights, order, groups, region prompts and noise."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device to train on; `auto` takes a GPU if torch sees one."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Type to compute in; `auto` is bfloat16 on GPUs. Weights are kept in float32 either way.",
    )
    shard: Literal["auto", "full", "none"] = Field(
        default="auto",
        description="`full` shards the weights over the ranks with FSDP2, `none` keeps all of them on every "
        "rank; `auto` shards on GPUs.",
    )
    attention: Literal["auto", "sdpa", "flex_attention"] = Field(
        default="auto",
        description="Attention kernel; `auto` is flex_attention on GPUs, which needs no L x L mask, and "
        "sdpa on CPUs.",
    )
    activation_checkpointing: bool = Field(
        default=True,
        description="Recompute activations in the backward pass, which saves memory and costs time.",
    )
    compile: Literal["auto", "always", "never"] = Field(
        default="auto", description="Compile layers with torch.compile; `auto` compiles on GPUs."
    )
    export_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Type of the exported model's weights; `auto` is the type computed in."
    )
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    evaluation: Evaluation | None = Field(
        default=None, description="null exports the model without captioning anything."
    )
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
