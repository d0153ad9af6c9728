"""The configuration of a build: one YAML file, checked before the start. An unknown key is an error.

Paths may be local or any fsspec URL (`s3://...`, `http://...`); `out` is a folder that every node mounts, or
a place in a bucket. Relative paths are relative to the configuration file.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, cast

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from .recipe import EntryError, parse, plain
from .strict import Location, Published, Strict, mistake, mistakes

SHORTHANDS = ("coconut", "sa1b")
"""Keys that stand for a subset of that name whose sources are of that kind: `sa1b: [{paths: ...}]`."""

_RESERVED = (
    *("README.md", "beat", "config.yaml", "corpus.json", "events", "index.parquet", "log", "plots"),
    *("report.html", "review", "stats.json"),
)
"""What a corpus holds besides the folders of its subsets."""


def _subset_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name in _RESERVED:
        raise ValueError(
            "a subset is a folder of the corpus; name it with at most 64 letters, digits, `.`, `_` and `-`, "
            f"and not {', '.join(_RESERVED)}"
        )
    return name


def _checked_source(entry: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """The entry with all options of its kind, if whoever reads the configuration knows the kinds."""
    kind = entry.get("source")
    if not isinstance(kind, str):
        raise mistakes(mistake(("source",), kind, "name the kind of this source, as in `source: coconut`"))
    if not info.context or info.context.options_of is None:
        return entry
    try:
        options = info.context.options_of(kind)
    except ValueError as error:
        if info.context.ours:
            return entry
        raise mistakes(mistake(("source",), kind, str(error))) from error
    given = {name: value for name, value in entry.items() if name != "source"}
    try:
        return {"source": kind, **options.model_validate(given, context=info.context).model_dump()}
    except ValidationError as error:
        unknown = f"unknown option; `{kind}` takes {', '.join(sorted(options.model_fields))}"
        raise mistakes(
            *(
                mistake(each["loc"][:1], each["input"], unknown)
                if each["type"] == "extra_forbidden"
                else cast("InitErrorDetails", each)
                for each in error.errors()
            )
        ) from error


class Subset(Strict):
    """A name of your choice. A subset has sources, and a recipe that makes and checks their captions."""

    sources: list[Annotated[dict[str, Any], AfterValidator(_checked_source)]] = Field(
        min_length=1,
        description="Where images and masks come from. A single source may stand without a list. The keys "
        "of a source are below.",
    )
    recipe: str | list[Any] | None = Field(
        default=None,
        validate_default=True,
        description="`verify` for sources that name a category for each region, `identify` for sources "
        "that do not, or a list of stages (docs/recipes.md); `paracaption config --recipes` prints both as "
        "lists. null takes the default of the source's kind.",
    )

    @field_validator("recipe", mode="before")
    @classmethod
    def _written_out(cls, recipe: Any) -> Any:
        """A list with the id of each stage; whether there are such stages is not known here."""
        if not isinstance(recipe, list):
            if recipe is None or isinstance(recipe, str):
                return recipe
            raise ValueError("a recipe is a name or a list of stages")
        try:
            return plain(parse(recipe))
        except EntryError as error:
            raise mistakes(mistake(error.place, error.given, error.what)) from error

    @field_validator("recipe")
    @classmethod
    def _default(cls, recipe: str | list[Any] | None, info: ValidationInfo) -> str | list[Any] | None:
        sources = info.data.get("sources")
        if recipe is not None or sources is None or not info.context or info.context.recipe_of is None:
            return recipe
        try:
            return info.context.recipe_of(sources)
        except ValueError:
            if info.context.ours:
                return None
            raise

    @field_validator("sources", mode="before")
    @classmethod
    def _one_needs_no_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value


class Limits(Strict):
    """Limits of the input. An image that exceeds one is dropped and reported."""

    max_pixels: PositiveInt = Field(
        default=200_000_000,
        description="Largest photo in pixels, as a guard against decompression bombs. SA-1B's original "
        "photos have 8 million.",
    )
    max_masks: PositiveInt = Field(
        default=2_000, description="Most masks of one image. SA-1B's largest image has about 700."
    )
    max_record_bytes: PositiveInt = Field(
        default=64 << 20, description="Longest annotation of one image. SA-1B's largest is below 1 MB."
    )


class Masks(Strict):
    """Thresholds of the mask filters. Shares are between 0 and 1, areas in pixels of the stored photo."""

    min_area_px: int = Field(
        default=256, ge=0, description="Smallest area. 256 is 16 x 16, one patch of the vision tower."
    )
    duplicate_iou: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="A mask is dropped as a duplicate if its IoU with a better mask that is kept is at least "
        "this. The better mask has the higher `predicted_iou`; if these are equal or missing, the"
        " higher `stability_score`, and then the larger area.",
    )
    min_visible_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="A mask is dropped as occluded if no more than this share of it is visible. 0 drops "
        "only masks that are hidden completely.",
    )
    part_container_share: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="A mask is dropped as a part if at least this share of it lies inside a larger mask, "
        "its container.",
    )
    part_max_area_ratio: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="A mask is dropped as a part only if its area is at most this share of its container's "
        "area. If it is larger, both masks show about the same object, and the mask is kept.",
    )
    container_max_image_share: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="A mask that covers more than this share of the image is a scene, and never a container.",
    )


class Text(Strict):
    """Rules for captions. Words are runs of letters or digits; in Chinese and Japanese, single characters."""

    min_words: int = Field(
        default=5, ge=0, description="Fewest words. Shorter captions say no more than the category."
    )
    max_words: int = Field(
        default=160,
        ge=1,
        description="Most words. Six captions of this length (about 1,300 tokens) and a photo (up to 1,800 "
        "tokens) fit into the 4,096 tokens of PerceptionDLM's context.",
    )
    min_chars: int = Field(
        default=12, ge=0, description="Fewest characters. This also drops captions of five one-letter words."
    )
    max_chars: int = Field(
        default=1_200, ge=1, description="Most characters. 160 English words have about 950."
    )
    min_letter_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Smallest share of letters among the visible characters. "
        "Prose with prices and dates has 0.6.",
    )
    min_content_words: int = Field(
        default=2,
        ge=0,
        description="Fewest content words: words other than function words and phrases such as 'the image "
        "shows'. A single content word says no more than the category.",
    )
    max_repeat_share: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="Largest share of 4-grams that repeat an earlier one. Of the captions that we labeled "
        "(docs/experiments.md), those that run in a loop have a share of 0.46 or more, and good "
        "ones that repeat a phrase on purpose have 0.33 or less.",
    )
    max_phrase_loops: int = Field(
        default=3, ge=1, description="Most times that a short phrase may occur back to back."
    )
    max_loop_words: int = Field(
        default=3,
        ge=0,
        description="A phrase of at most this many words is short (`max_phrase_loops`). A longer phrase "
        "may not repeat back to back at all.",
    )
    max_copied_words: int = Field(
        default=15,
        ge=4,
        description="Length in words of the longest phrase that may occur twice. Good captions repeat "
        "phrases of up to 11 words.",
    )
    max_doubled: int = Field(
        default=0,
        ge=0,
        description="Most doubled marks and function words, such as ',,' or 'the the'. Of other words, one "
        "more may be doubled, because it may be a name ('a pom pom'). None of 776 good captions "
        "has a doubled mark or function word; they are a typical failure of diffusion decoding.",
    )
    max_list_items: int = Field(
        default=15,
        ge=2,
        description="Most short list items in a row, and most numbers that count up. A caption with more is "
        "dropped as a runaway list.",
    )
    max_same_sentence: int = Field(
        default=1, ge=1, description="Most times that one sentence may occur in a caption."
    )
    min_confidence: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Least confidence of the captioner in its caption, 0 to 1. Captions whose captioner "
        "gives no confidence are kept; of ours, `perceptiondlm` gives one. null, the default, drops none.",
    )


class Backend(Strict):
    """A model behind one of the four protocols, and the resources of its actors.

    `name` is one of ours (`classical`, `lexical`, `grabcut`, ...) or `package.module:Class` of your own.
    """

    name: str = Field(
        description="Name of a backend in the lists below, or `package.module:Class` of your own "
        "(docs/backends.md)."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the backend, which the page named below describes. If you change an option "
        "that affects the answers, the model is asked again, and its saved answers are not used.",
    )
    num_gpus: float = Field(default=0, ge=0, description="GPUs of one actor.")
    num_cpus: float = Field(default=1, ge=0, description="CPU cores of one actor.")
    concurrency: tuple[int, int] = Field(
        default=(1, 1),
        description="Fewest and most actors. Between these numbers, Ray Data starts as many as the load "
        "needs.",
    )
    batch_images: PositiveInt = Field(
        default=64,
        description="Most images in one call of the backend. A batch that fails is split in halves until "
        "the image at fault is found. `gar` and `vllm` batch by themselves: a call has all images of a unit.",
    )
    runtime_env: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray's runtime environment of the actors: py_executable, env_vars, ... A change of this "
        "key rebuilds nothing.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Backend:
        low, high = self.concurrency
        if not 1 <= low <= high:
            raise ValueError(f"concurrency is (min, max) with 1 <= min <= max, not {self.concurrency}")
        return self


class Io(Strict):
    """Actors that read sources and write shards. Actors of models on CPUs may do both (see `concurrency`)."""

    num_cpus: float = Field(default=1, gt=0, description="CPU cores of one actor.")
    concurrency: tuple[int, int] | None = Field(
        default=None,
        description="Fewest and most actors of the pool that reads, and of the pool that writes. With null, "
        "the actors of the captioner also read, and those of the segmenter also write, if they "
        "run on CPUs with this `num_cpus` and without a `runtime_env`; otherwise each pool has 1 "
        "to 8 actors.",
    )


class Failures(Strict):
    """What is tried again after a failure, how often, and when the build gives up."""

    unit_retries: int = Field(
        default=2, ge=0, description="How often a unit in which every image fails is tried again."
    )
    crash_attempts: PositiveInt = Field(
        default=3,
        description="An image that kills its worker this many times, while it is alone in its batch, is "
        "dropped.",
    )
    stop_after_units: PositiveInt = Field(
        default=3,
        description="The build stops when a stage fails on all images of this many units in a row, or when "
        "this many units in a row are held back (see `max_failed_share`).",
    )
    read_retry_s: float = Field(
        default=60,
        ge=0,
        description="A read of a source that fails for a passing reason (a timeout, a 503, a stale handle) "
        "is tried again for this many seconds. 0 reads once.",
    )
    max_failed_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="A unit is held back if more than this share of its images, and more than one image, "
        "could not be read. It is then not committed, and the next build reads it again. 1 holds "
        "no unit back.",
    )
    stall_s: float = Field(
        default=1_800,
        gt=0,
        description="The build stops, and shows the stacks of its workers, when no stage reports progress "
        "for this many seconds.",
    )
    save_every_s: float = Field(
        default=10,
        ge=0,
        description="The answers of the models are saved when this many seconds have passed since the last "
        "time, also within a unit. A worker that is killed loses no more than that. 0 saves after"
        " each batch.",
    )
    lease_s: float = Field(
        default=60,
        gt=0,
        description="A driver (the process that runs the build) that gives no sign of life for this many "
        "seconds may be replaced by another one. A driver that died on the same machine is "
        "replaced at once.",
    )
    keep_replaced_days: float = Field(
        default=7,
        ge=0,
        description="Files that a rebuild replaced are kept for this many days. Until then `paracaption "
        "undo` can restore them, and programs that read the corpus do not lose them.",
    )
    min_free_gb: float = Field(
        default=1,
        ge=0,
        description="Free disk space in GB that the build has to leave. The space that it will need is "
        "estimated before the start.",
    )


class Benchmarks(Strict):
    """What happens to photos of ParaDLC-Bench and DLC-Bench, which come from COCO and Objects365."""

    leave_out: bool | None = Field(
        default=None,
        description="true leaves the photos out, by file name and id; false keeps them. null leaves them out "
        "of a new corpus; in a corpus that was planned before, they stay in or out as planned.",
    )
    photos: list[Location] = Field(
        default_factory=list,
        description="Folders of the benchmarks' photos, if you have them. Each photo of the sources is then "
        "also compared with these photos, by its bytes and by its look, which finds copies under "
        "other names. For this, every photo is read and decoded.",
    )


class BuildConfig(Published):
    """Everything that decides what is built. The resolved form is written into the output."""

    out: Location = Field(
        description="Folder of the corpus, on a file system that every node mounts, or a URL in a bucket, "
        "such as s3://bucket/corpus."
    )
    subsets: dict[Annotated[str, AfterValidator(_subset_name)], Subset] = Field(
        description="Parts of the corpus by name, in the order in which they are built. `coconut: [...]` at "
        "the top level is short for a subset named `coconut` whose sources are all of the kind "
        "`coconut`; these sources need no key `source`. `sa1b: [...]` is the same for the kind "
        "`sa1b`."
    )
    images_per_shard: PositiveInt = Field(
        default=512,
        description="Images per shard. A shard and its ledger (the table of all regions of these images, kept"
        " or dropped) are one unit, which is committed as a whole. 512 photos of COCO make a "
        "shard of about 100 MB.",
    )
    held_out_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        exclude_if=lambda share: not share,  # so that a configuration without one is written as before
        description="Share of the images to hold out for evaluation; training and exports leave them out. "
        "The key of an image decides whether it is held out (docs/training.md), and `split` in "
        "the index says so. After a change of this share, `paracaption merge` is enough.",
    )
    limits: Limits = Limits()
    masks: Masks = Masks()
    min_iou: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Least IoU of the source's mask with the segmenter's. At 0.5 both show the same "
        "object, loosely outlined.",
    )
    min_verdict_margin: float | None = Field(
        default=None,
        description="A caption is accepted if log P(yes) - log P(no) of the judge is at least this "
        "(docs/judges.md). null takes the judge's answer, yes or no.",
    )
    text: Text = Text()
    captioner: Backend = Field(
        default=Backend(name="classical"),
        description="The model that captions each region. The keys of this section are below.",
    )
    judge: Backend = Field(
        default=Backend(name="lexical"),
        description="The model that says whether a caption fits its category (recipe `verify`), or names "
        "the category of a caption (`identify`).",
    )
    segmenter: Backend = Field(
        default=Backend(name="grabcut"),
        description="The model that finds a region again from the category of its caption, and makes the "
        "masks of sources that have boxes only.",
    )
    mask_generator: Backend = Field(
        default=Backend(name="color_regions"),
        exclude_if=lambda each: each == Backend(name="color_regions"),  # as before there was this key
        description="The model that makes the masks of photos that have none (docs/mask-generators.md).",
    )
    benchmarks: Benchmarks = Benchmarks()
    io: Io = Io()
    failures: Failures = Failures()
    audit_images: int = Field(
        default=256,
        ge=0,
        description="Number of images that are read before the build starts, so that a wrong folder is "
        "found in seconds. 0 reads none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _write_shorthands_out(cls, values: Any) -> Any:
        """`sa1b: [...]` becomes `subsets: {sa1b: {sources: [{source: sa1b, ...}]}}`; subsets follow."""
        if not isinstance(values, dict):
            return values
        given = {name: values[name] for name in SHORTHANDS if values.get(name)}
        subsets = values.get("subsets") or {}
        if not isinstance(subsets, dict):
            return values
        if twice := sorted(given.keys() & subsets.keys()):
            raise ValueError(f"`{twice[0]}` is given twice; keep the one under `subsets`")
        written = {name: {"sources": _with_kind(name, value)} for name, value in given.items()}
        if not written and not subsets:
            raise ValueError("name at least one source under `subsets`")
        rest = {name: value for name, value in values.items() if name not in SHORTHANDS}
        return rest | {"subsets": written | subsets}


def _with_kind(kind: str, sources: Any) -> Any:
    """The sources of a shorthand as `subsets` has them; what is no mapping is left for its error."""
    listed = [sources] if isinstance(sources, dict) else sources
    if not isinstance(listed, list):
        return listed
    return [{"source": kind, **each} if isinstance(each, dict) else each for each in listed]


def dump_config(config: BuildConfig) -> str:
    """The configuration as YAML, keys in the order of the model: what a build keeps as OUT/config.yaml."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def written_place(place: tuple[int | str, ...], values: dict[str, Any]) -> tuple[int | str, ...]:
    """Where the file has what is at a place of the configuration: a shorthand has its sources at the top."""
    match place:
        case ("subsets", str(name), "sources", *rest) if name in SHORTHANDS and name in values:
            return (name, *rest)
    return place
