"""The configuration of a build: one flat YAML file, checked before the start. An unknown key is an error.

Paths may be local or any fsspec URL (`s3://...`, `http://...`), except `out`, which is a folder that every
node of the cluster mounts. Relative paths are relative to the configuration file.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from .strict import Strict


class CoconutSource(Strict):
    """One release in the COCONut layouts: COCO-panoptic JSON and PNGs, or Parquet with embedded PNGs."""

    layout: Literal["panoptic", "parquet"] = Field(
        "panoptic", description="JSON and a folder of PNGs, or `parquet`: the hub's rows with the PNG inside"
    )
    annotations: list[str] = Field(description="panoptic JSON files, or Parquet files; globs allowed")
    labels: str | None = Field(default=None, description="folder of the label PNGs; needed for `panoptic`")
    photos: list[str] = Field(description="folders searched for the photo by its file name, in order")
    categories: str | None = Field(
        default=None, description="category list (JSON); default: the JSON's own, or COCO's 133"
    )
    license: str = Field("unknown", description="shown in the dataset card")

    @model_validator(mode="after")
    def _labels_given(self) -> CoconutSource:
        if self.layout == "panoptic" and self.labels is None:
            raise ValueError("layout 'panoptic' needs `labels`, the folder of the label PNGs")
        return self


class Sa1bSource(Strict):
    """One part of SA-1B: tars of photo + JSON pairs, read in place by offset, or a folder of such pairs."""

    paths: list[str] = Field(description="sa_*.tar files or folders of pairs; globs allowed")
    license: str = Field("unknown", description="shown in the dataset card")


class Limits(Strict):
    """What input may look like before it is refused."""

    max_pixels: PositiveInt = Field(
        default=200_000_000, description="decompression bombs; SA-1B's originals have 8 M"
    )
    max_masks: PositiveInt = Field(default=2_000, description="per image; SA-1B's largest has about 700")
    max_record_bytes: PositiveInt = Field(
        default=64 << 20, description="one image's annotation; SA-1B's largest is < 1 MB"
    )


class Masks(Strict):
    """Thresholds of the mask filters. Shares are between 0 and 1, areas in pixels of the stored photo."""

    min_area_px: int = Field(default=256, ge=0, description="16 x 16: one patch of the vision tower")
    duplicate_iou: float = Field(
        default=0.9, gt=0, le=1, description="at least this IoU with a better mask: the same object"
    )
    min_visible_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="occluded if no more than this is visible; 0: only if nothing at all is",
    )
    part_container_share: float = Field(
        default=0.9, gt=0, le=1, description="at least this much inside a larger mask: a part"
    )
    part_max_area_ratio: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="a part is at most this share of its container; above, it is the same object",
    )
    container_max_image_share: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="a mask covering more of the image is a scene, not an object with parts",
    )


class Text(Strict):
    """Rules for captions. Words are runs of letters or digits; in Chinese and Japanese, single characters."""

    min_words: int = Field(default=5, ge=0, description="shorter says no more than the category")
    max_words: int = Field(default=160, ge=1, description="the model's 4096-token context holds 6 regions")
    min_chars: int = Field(default=12, ge=0, description="five words of one letter are no caption either")
    max_chars: int = Field(default=1_200, ge=1, description="likewise; 160 English words have about 950")
    min_letter_share: float = Field(
        default=0.5, ge=0, le=1, description="of visible characters; prose with prices and dates has 0.6"
    )
    min_content_words: int = Field(
        default=2,
        ge=0,
        description="besides function words and 'the image shows'; one is no more than the category",
    )
    max_repeat_share: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="of 4-grams; labelled loops start at 0.46, natural parallels end at 0.33",
    )
    max_phrase_loops: int = Field(
        default=3, ge=1, description="the same short phrase this many times back to back is natural"
    )
    max_loop_words: int = Field(
        default=3, ge=0, description="of a short phrase; a longer one stands back to back only in loops"
    )
    max_copied_words: int = Field(
        default=15,
        ge=4,
        description="longest phrase that may occur twice; natural parallels share up to 11 words",
    )
    max_doubled: int = Field(
        default=0,
        ge=0,
        description="'the the', ',,': none in 776 good captions; how diffusion decoding fails",
    )
    max_list_items: int = Field(
        default=15, ge=2, description="short items in a row, or numbers counting up; above: runaway list"
    )
    max_same_sentence: int = Field(default=1, ge=1, description="times that one sentence may occur")


class Backend(Strict):
    """A model behind one of the three protocols, and the resources of its actors.

    `name` is one of ours (`classical`, `lexical`, `grabcut`, ...) or `package.module:Class` of your own.
    """

    name: str
    options: dict[str, Any] = Field(
        default_factory=dict, description="given to the backend; part of the evidence digest"
    )
    num_gpus: float = Field(default=0, ge=0, description="per actor")
    num_cpus: float = Field(default=1, ge=0, description="per actor")
    concurrency: tuple[int, int] = Field(
        default=(1, 1), description="actors: (min, max); Ray Data scales between them"
    )
    batch_images: PositiveInt = Field(
        default=64, description="images given to the backend at once; a failing batch is bisected"
    )

    runtime_env: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray's, for the actors: py_executable, env_vars, ...; decides no answer",
    )

    @field_validator("runtime_env")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value.get("env_vars") or {}:
            if _SECRET & set(name.upper().split("_")):
                raise ValueError(
                    f"{name} looks like a secret, and the configuration is published with the corpus; "
                    "set it in the nodes' environment"
                )
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Backend:
        low, high = self.concurrency
        if not 1 <= low <= high:
            raise ValueError(f"concurrency is (min, max) with 1 <= min <= max, not {self.concurrency}")
        return self


_SECRET = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS"}


class Io(Strict):
    """The actors that read sources and write shards; beside models on GPUs they are two pools."""

    num_cpus: float = Field(default=1, gt=0, description="per actor")
    concurrency: tuple[int, int] | None = Field(
        default=None,
        description="actors: (min, max); null: those of a neighboring model without a GPU, else (1, 8)",
    )


class Failures(Strict):
    """What is tried again, how often, and when the build gives up."""

    unit_retries: int = Field(
        default=2, ge=0, description="a unit on which every image fails is tried again this often"
    )
    crash_attempts: PositiveInt = Field(
        default=3, description="an image alone in its batch may kill its worker this often"
    )
    stop_after_units: PositiveInt = Field(
        default=3, description="units in a row on which a stage fails entirely: stop"
    )
    stall_s: float = Field(
        default=1_800, gt=0, description="no stage reports anything for this long: stop with the stacks"
    )
    min_free_gb: float = Field(
        default=1, ge=0, description="free space on top of the estimate, checked before the start"
    )


class BuildConfig(Strict):
    """Everything that decides what is built. The resolved form is written into the output."""

    out: str = Field(description="folder of the corpus, on a file system that all nodes mount")
    coconut: list[CoconutSource] = Field(default_factory=list)
    sa1b: list[Sa1bSource] = Field(default_factory=list)
    images_per_shard: PositiveInt = Field(
        default=512, description="a unit; about 100 MB of COCO photos per shard"
    )
    limits: Limits = Limits()
    masks: Masks = Masks()
    min_iou: float = Field(
        default=0.5, ge=0, le=1, description="with the segmenter's mask; the same object, loosely outlined"
    )
    min_verdict_margin: float | None = Field(
        default=None,
        description="margins (docs/judges.md) from here on are a yes; none: the judge decides",
    )
    text: Text = Text()
    captioner: Backend = Backend(name="classical")
    judge: Backend = Backend(name="lexical")
    segmenter: Backend = Backend(name="grabcut")
    io: Io = Io()
    failures: Failures = Failures()
    audit_images: int = Field(
        default=256, ge=0, description="read before the start: a wrong folder costs seconds, not a night"
    )

    @model_validator(mode="after")
    def _has_a_source(self) -> BuildConfig:
        if not self.coconut and not self.sa1b:
            raise ValueError("name at least one source under `coconut` or `sa1b`")
        return self

    @property
    def subsets(self) -> list[str]:
        """The configured subsets, in the order in which they are built."""
        return [name for name in ("coconut", "sa1b") if getattr(self, name)]
