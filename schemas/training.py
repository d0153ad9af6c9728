"""The configuration of a training run: a YAML file, checked before the start. An unknown key is an error.

"The released code" is PerceptionDLM's (github.com/MSALab-PKU/PerceptionDLM); its numbers are those of its
training scripts. Relative paths are relative to the configuration file; every node mounts `out`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from .decoding import DecodeOptions
from .distillation import Distillation
from .strict import Folder, Location, Published, Strict


class Model(Strict):
    """Where the weights come from: a saved model, or random weights of a new model."""

    path: Location | None = Field(
        default=None,
        description="Folder of a saved PerceptionDLM, as `paracaption models convert` writes it. Give this "
        "or `tokenizer`.",
    )
    tokenizer: Literal["toy"] | Location | None = Field(
        default=None,
        union_mode="left_to_right",
        description="For a new model: the folder of its tokenizer, or `toy` for the words of the synthetic "
        "scenes.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the model's config.json to change, for example max_tiles: 1.",
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
        default=None, description="Subsets to train on; null trains on all of them."
    )


class ConversationSource(Strict):
    """Questions and answers to train on, in the form of LLaVA's data, or the released code's region data.

    The files hold records of {id, image, conversations: [{from, value}, ...]}, or of {image, mask_rles,
    captions}. `image` is a path below `images`, the photo in base64, or in Parquet its bytes, alone or as
    {bytes, path}; `images` is a list of these. Turns may also be {role, content}.
    """

    path: Location = Field(
        description="A .json, .jsonl or .parquet file, a folder of Parquet files, or a glob; or a fsspec URL."
    )
    images: Location = Field(
        default="", description="Folder of the photos. Leave it empty if the files contain the photos."
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="Passes over the source in an epoch; 0.25 takes a different quarter of it in each epoch.",
    )


class DataOptions(Strict):
    """How batches are made, and what happens to samples that are too long or damaged."""

    packed: bool = Field(
        default=True,
        description="true puts examples one after the other into a row without padding; false gives each "
        "example a padded row of its own.",
    )
    max_tokens: PositiveInt = Field(
        default=4096,
        description="Most tokens of a batch, padding included. The released code's sequence length is 4096.",
    )
    max_examples: PositiveInt | None = Field(
        default=None, description="Most examples of a batch; null takes as many as fit into `max_tokens`."
    )
    regions_per_group: float = Field(
        default=3.5,
        ge=1,
        description="Regions per group, on average. An image with m regions gives at most ceil(m / "
        "`regions_per_group`) groups in a pass, and each group is a training example. The "
        "released code has 3.5.",
    )
    group_sizes: Literal["varied", "even"] = Field(
        default="varied",
        description="How many regions the groups of an image have. `varied`: any number from 1 to the most "
        "that the model can caption together (the number of its region prompts, 6 in the released"
        " model). `even`: all groups of an image have about the same number, as in the released "
        "code; the model then captions no more regions together than it was trained with (4 with "
        "3.5 regions per group). This key is for `corpora`: region data in `conversations` always"
        " have even groups.",
    )
    caption_length: Literal["natural", "fixed"] = Field(
        default="natural",
        description="`natural` trains on captions as they are, as the released code does. `fixed` fills "
        "them up to `max_new_tokens` with the end token, as in decoding.",
    )
    max_new_tokens: PositiveInt = Field(
        default=32,
        description="Tokens of a caption if `caption_length` is `fixed`. The released code decodes 32.",
    )
    max_caption_tokens: PositiveInt | None = Field(
        default=None,
        description="A caption with more tokens than this is too long (see `on_too_long`). With null, only "
        "the size of the batch limits a caption.",
    )
    labels: Literal["answer", "captions"] = Field(
        default="answer",
        description="Which tokens are masked and learned. `answer`: also the tokens that open and close a "
        "caption, as in the released code. `captions`: only the text of the captions, which is "
        "what decoding fills in.",
    )
    on_too_long: Literal["error", "skip"] = Field(
        default="error",
        description="What happens to a caption or sample that is too long: `error` stops the run; `skip` "
        "leaves the caption or sample out and counts it.",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error",
        description="What happens to a sample with a damaged shard, photo or mask: `error` stops the run; "
        "`skip` leaves the sample out and counts it.",
    )
    max_dropped_share: float | None = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Stop the run when `skip` leaves out more than this share of an epoch's items (groups "
        "of an image's regions, and conversations), counted over all ranks; null sets no "
        "limit. If nothing is left of an epoch, the run always stops.",
    )
    benchmark_photos: Literal["leave_out", "keep"] = Field(
        default="leave_out",
        description="`leave_out` skips the photos of ParaDLC-Bench and DLC-Bench, which come from COCO and "
        "Objects365: the scores of a model that was trained on them are not valid. `keep` "
        "trains on them too.",
    )
    max_pixels: PositiveInt = Field(
        default=200_000_000, description="Most pixels of a photo, as a guard against decompression bombs."
    )
    workers: int = Field(
        default=4,
        ge=0,
        description="Processes per rank that prepare batches; 0 prepares each batch in the training process "
        "itself, when the batch is needed.",
    )
    prefetch: PositiveInt = Field(
        default=2,
        description="Batches that each worker process prepares ahead. A batch of 4096 tokens takes up to 13 "
        "MB of /dev/shm.",
    )
    read_retry_s: float = Field(
        default=300,
        ge=0,
        description="A read of a corpus that fails for a passing reason (a timeout, a 503, a stale handle) "
        "is tried again for this many seconds, while the GPUs wait. Then the run ends with a checkpoint. "
        "0 reads once.",
    )
    cache: Location | None = Field(
        default=None,
        description="Local folder for tables that are made once from the training data; null takes "
        "~/.cache/paracaption/training.",
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
        description="`example` draws one noise level per example, as LLaDA and the released code do. "
        "`region` draws one per region, because in decoding some regions are finished before "
        "others.",
    )
    eps: float = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="Probability with which a token is masked at noise level 0. It has to be above 0, so "
        "that the weight 1/t is finite. LLaDA and the released code use the same value.",
    )
    stratified: bool = Field(
        default=False,
        description="true spreads the noise levels of a batch evenly; false draws each by itself. Even levels"
        " make the loss less noisy.",
    )
    loss_weighting: LossWeighting = Field(
        default="1/t",
        description="`1/t`: a masked token is weighted by 1/t, where t is the probability with which it "
        "was masked, as in LLaDA's bound on the likelihood and in the released code. `none`: "
        "all masked tokens have the same weight.",
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
        description="The projector. In stage 1, which trains only the projector, the paper of PerceptionDLM "
        "has 1e-3.",
    )
    language: float = Field(default=4e-5, ge=0, description="The language model and its head.")
    prompts: float = Field(
        default=4e-5, ge=0, description="The region prompts: embeddings that mark which region is which."
    )

    @model_validator(mode="after")
    def _something_moves(self) -> LearningRate:
        if not any((self.vision, self.projector, self.language, self.prompts)):
            raise ValueError("every part is frozen; give one of them a rate above 0")
        return self


class Lora(Strict):
    """LoRA: train low-rank matrices that are added to those of the language model, which stay fixed."""

    rank: PositiveInt = Field(default=16, description="Rank of the LoRA matrices.")
    alpha: float = Field(
        default=32, gt=0, description="The product of the LoRA matrices is scaled by alpha / rank."
    )
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Names of the layers of the language model to which LoRA is applied.",
    )


class Spike(Strict):
    """When a step is skipped because its gradient is too large, and when the run stops for that reason."""

    factor: float | None = Field(
        default=20,
        gt=1,
        description="Skip a step whose gradient norm is this many times the median of recent norms; null "
        "skips none. Choose a factor above 10: a single masked token with a small t (see "
        "`loss_weighting`) can make the norm 10 times the median.",
    )
    window: PositiveInt = Field(
        default=64,
        description="Number of recent gradient norms that the median is taken over. Until there are that "
        "many, no step is skipped.",
    )
    stop_after: PositiveInt = Field(
        default=3, description="Stop the run after this many skipped steps in a row."
    )


class Checkpoint(Strict):
    """How often checkpoints are saved, from which a run is resumed."""

    every: PositiveInt = Field(
        default=500, description="Steps between checkpoints. The last step always gets one."
    )
    keep: PositiveInt = Field(default=3, description="Number of checkpoints to keep; older ones are removed.")
    asynchronous: bool = Field(default=True, description="Continue training while a checkpoint is written.")


class Log(Strict):
    """How metrics are logged. metrics.jsonl and files for TensorBoard are always written."""

    every: PositiveInt = Field(
        default=10, description="Steps between lines on the terminal. The files have all steps."
    )
    samples: bool = Field(
        default=False, description="Write the names of the examples of each step to metrics.jsonl."
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Peak TFLOPS of one device. The metric MFU is the share of this peak that the training "
        "reaches. null measures the peak with a matrix product.",
    )
    wandb: str | None = Field(
        default=None, description="Project in Weights & Biases to log to; null logs nothing there."
    )


class Ray(Strict):
    """Training with Ray Train on several GPUs or nodes."""

    workers: int = Field(
        default=0, ge=0, description="Number of workers (ranks); 0 trains in this process, without Ray."
    )
    gpus: int = Field(default=1, ge=0, le=1, description="GPUs per worker; 0 trains on CPUs.")
    cpus: float = Field(default=4, gt=0, description="CPU cores per worker, with its data processes.")
    max_failures: int = Field(
        default=3,
        ge=-1,
        description="How often the workers may be restarted from the last checkpoint; -1 sets no limit.",
    )


class Evaluation(DecodeOptions):
    """After the training, caption images that the model was not trained on."""

    corpus: Location = Field(
        description="Folder or fsspec URL of a corpus. If it was built with a `held_out_share`, the images "
        "held out of training are captioned, and it may be one of `corpora`; otherwise it has to be another."
    )
    images: PositiveInt | None = Field(
        default=200, description="Number of images to caption, from the first on; null captions all."
    )
    pictures: int = Field(
        default=8, ge=0, description="Save pictures of the first N of these images with their captions."
    )
    batch_size: PositiveInt = Field(
        default=8, description="Number of sequences that are decoded in one batch."
    )
    regions_per_call: PositiveInt | None = Field(
        default=None,
        description="Most regions that are captioned together, in one sequence; 1 captions them one by "
        "one, null takes as many as the model can.",
    )


class TrainConfig(Published):
    """Everything that decides what is trained. The resolved form is written into the output."""

    out: Folder = Field(description="Folder of the checkpoints, the metrics and the trained model.")
    model: Model
    corpora: list[CorpusSource] = Field(default_factory=list, description="Corpora to train on.")
    conversations: list[ConversationSource] = Field(
        default_factory=list,
        description="Questions and answers to train on, in the form of LLaVA's data or of the region data of "
        "the released code.",
    )
    data: DataOptions = DataOptions()
    noise: NoiseOptions = NoiseOptions()
    distillation: Distillation | None = Field(
        default=None,
        description="null, the default, learns the captions of the data by masked diffusion. Otherwise, the "
        "decoding paths of a teacher are distilled.",
    )
    steps: PositiveInt | None = Field(
        default=None, description="Steps of the optimizer. Give this or `epochs`."
    )
    epochs: PositiveInt | None = Field(
        default=None,
        description="Number of epochs. In an epoch each source is passed over `weight` times. Give this or "
        "`steps`. The released code trains one epoch.",
    )
    gradient_accumulation_steps: PositiveInt = Field(
        default=4, description="Batches per rank and step of the optimizer. The released code has 4."
    )
    learning_rate: LearningRate = LearningRate()
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the steps over which the learning rate rises at the start. The released code "
        "has 0.03.",
    )
    min_lr_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="After the warmup, the learning rate falls along a cosine to this share of its highest "
        "value.",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="Weight decay of matrices; vectors have none. The released code has 0."
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="Betas of AdamW, as in the released code."
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Clip gradients to this norm. The released code has 1."
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the weights; null keeps none.",
    )
    lora: Lora | None = Field(
        default=None, description="null, the default, trains the language model's own matrices."
    )
    spike: Spike = Spike()
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of new weights, of the order of the examples, of the groups of regions, of the "
        "choice of region prompts, and of the noise.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device to train on; `auto` takes a GPU if torch sees one."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Data type to compute in; `auto` is bfloat16 on GPUs and float32 on CPUs. Weights are "
        "kept in float32 in each case.",
    )
    shard: Literal["auto", "full", "none"] = Field(
        default="auto",
        description="`full` shards the weights over the ranks with FSDP2, `none` keeps all of them on every "
        "rank; `auto` shards on GPUs.",
    )
    sync_each_batch: bool | None = Field(
        default=None,
        description="Sum the gradients of a sharded model over all ranks after each batch (true), or once a "
        "step (false), which is faster between machines, but each rank then holds the gradients of all "
        "trained weights in float32 (32 GB for 8 billion) and not only its share. null: once a step where "
        "they take at most a quarter of the GPU's memory.",
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
        default="auto",
        description="When layers are compiled with torch.compile: `always`, `never`, or `auto`, which "
        "compiles on GPUs.",
    )
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Data type of the exported model's weights; `auto` takes the type that the training "
        "computes in.",
    )
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    evaluation: Evaluation | None = Field(
        default=None, description="null, the default, exports the model without an evaluation."
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
        if self.distillation:
            if self.conversations:
                raise ValueError("distillation: conversations have no decoding paths; leave them out")
            if self.data.caption_length != "fixed" or self.data.labels != "captions":
                raise ValueError(
                    "distillation: set data.caption_length to fixed and data.labels to captions, which is "
                    "what decoding fills in"
                )
        return self
