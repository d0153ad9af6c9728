"""The commands that make and use models: those of `models`, `train`, `caption`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ...pipeline.io import files
from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError, one_line
from .. import stopping
from .arguments import Device, Dtype, RayAddress, changes_of, options_of, suggest
from .caption_many import caption_many
from .examples import example
from .help import Command, Group
from .progress import TrainingView, count

TrainingConfig = Annotated[
    Path,
    typer.Argument(
        help="The YAML file; configs/train has an example for each training stage.", show_default=False
    ),
]

models = typer.Typer(
    cls=Group,
    help="Convert, prepare and publish models, and record decoding paths.",
    no_args_is_help=True,
)


@models.command(cls=Command, epilog=example("models prepare"))
def prepare(
    model: Annotated[str, typer.Argument(help="Kind of the model: gar.")],
    path: Annotated[Path, typer.Argument(help="Folder of the published checkpoint.")],
    to: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="next to the checkpoint")
    ] = None,
) -> None:
    """Export a checkpoint's language model for vLLM. Does nothing if the export already exists."""
    if model != "gar":
        raise ConfigError(f"models prepare: {model!r} needs no preparation; only gar does")
    from ...pipeline.models.gar import export as language_model

    print(language_model.prepare(path, to))


@models.command(cls=Command, epilog=example("models convert"))
def convert(
    to: Annotated[
        Path, typer.Option(help="Folder to write. It appears only when all of its files are written.")
    ],
    path: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of a PerceptionDLM to convert. Leave it out with --language.",
            show_default=False,
        ),
    ] = None,
    language: Annotated[Path | None, typer.Option(help="Folder of LLaDA, for a new model.")] = None,
    vision: Annotated[
        Path | None,
        typer.Option(
            help="Folder of SigLIP 2. It is needed for a new model, and to convert a model without a folder "
            "unused/ to the published file format. A conversion to our format writes the weights that our "
            "model does not use to that folder.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Token layout of the converted or new model: corrected or reference "
            "(docs/perceptiondlm.md). Not for a conversion to the published file format.",
            show_default="corrected for a new model, reference for a published one",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights that are drawn at random.")] = 0,
) -> None:
    """Convert a PerceptionDLM to our file format or back, or make one from LLaDA and SigLIP 2.

    A folder in the published file format is converted to ours, and one in our format to the published one.
    """
    from ...model_training.convert import published as converting

    if path is not None and language is None:
        report = converting.convert(path, to, vision=vision, layout=layout, seed=seed)
    elif path is not None or language is None:
        raise ConfigError("models convert: name a PerceptionDLM's folder, or LLaDA's with --language")
    elif vision is None:
        raise ConfigError("models convert: --language needs a SigLIP 2 too: --vision DIR")
    else:
        report = converting.from_parts(language, vision, to, layout or "corrected", seed)
    print(report.text())


@models.command(cls=Command, epilog=example("models publish"))
def publish(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Folder of a training run, whose model/ is taken, or of a saved model.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path, typer.Option(help="Folder to write. It appears only when all of its files are written.")
    ],
    title: Annotated[
        str | None, typer.Option(help="Title of the card.", show_default="the name of the folder")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            help="License of the model, as the hub calls it, such as apache-2.0.",
            show_default="none: the card says that it is not stated",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Name on the hub of the model that this one was trained from.", show_default="none"
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Name on the hub of a dataset that the model was trained on. Repeat the option for more.",
            show_default="none",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files and the card, and write nothing.")
    ] = False,
) -> None:
    """Lay a trained model out as a model repository with a model card, to upload to a hub.

    The card says only what the run and the model's files say, and what the options add.
    """
    from . import publishing

    stated = {"license": license, "base_model": base_model, "datasets": dataset or ()}
    publishing.publish_model(path, to, title or to.resolve().name, stated, dry_run)


@models.command(cls=Command, epilog=example("models paths"))
def paths(
    config: TrainingConfig,
    part: Annotated[
        str, typer.Option(help="Decode only part I of N, as I/N from 1/N to N/N; for several GPUs.")
    ] = "1/1",
    changes: Annotated[list[str] | None, changes_of("distillation.paths=out/paths")] = None,
) -> None:
    """Record how a model decodes the captions of a run's corpora, for `distillation` in training.

    The model is `model.path` of the configuration, and the paths go into `distillation.paths`. What is
    already recorded is not decoded again.
    """
    from ...pipeline.config_file import load_training

    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if not match or int(match[1]) > int(match[2]):
        raise ConfigError(f"--part: {part!r}; give I/N, from 1/N to N/N")
    loaded = load_training(config, changes or ())
    from ...model_training.train.record_paths import record_paths

    done = record_paths(loaded, int(match[1]) - 1, int(match[2]))
    print(f"{done.regions:,} regions decoded: {done.folder}")


def train(
    config: TrainingConfig,
    ray_address: RayAddress = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Wait until the builds of the corpora have ended. Otherwise, train on what is committed.",
        ),
    ] = False,
    changes: Annotated[list[str] | None, changes_of("seed=1", "data.workers=8")] = None,
) -> None:
    """Train a model, or resume from the last checkpoint. `config --training` prints every key."""
    from ...pipeline.config_file import load_training
    from ...pipeline.executor import ray_data
    from ...pipeline.executor.findings import refuse_failures
    from .. import launch, preflight

    loaded = load_training(config, changes or ())
    refuse_failures(preflight.check_training(loaded, wait, on_cluster=ray_address is not None))
    ray_data.check_address(ray_address)
    stopping.say(lambda: _what_is_trained(Path(loaded.out)))
    done = launch.train(loaded, ray_address, wait, TrainingView(loaded.log.every).show)
    print(f"{done['steps']:,} steps, {done['skipped']:,} of them skipped: {done['model']}")
    for reason, number in done["left_out"].items():
        print(f"left out of training: {number:,} images ({reason.replace('_', ' ')})")
    if found := done.get("evaluation"):
        print(
            f"{found['regions']:,} regions of {found['images']:,} images: {Path(loaded.out) / 'evaluation'}"
        )
        print(
            f"{found['exact']:.1%} of the captions equal those of the corpus, "
            f"{found['empty']:.1%} are empty; {found['tokens_per_forward']:.1f} tokens per forward pass"
        )
    suggest(
        ("caption", "--model", done["model"], "--image", "PHOTO", "--masks", "MASKS"),
        ("config", "--evaluation"),
    )


def _what_is_trained(out: Path) -> str:
    """What a stopped training says."""
    from ...model_training.train import checkpoints

    last = checkpoints.latest_checkpoint(out / "checkpoints")
    if last is None:
        return "there is no checkpoint yet; run the same command to begin again"
    return f"the last checkpoint is {last.name}; run the same command to continue from it"


def _generator_of(text: str) -> str | dict[str, Any]:
    """The value of --mask-generator, which is YAML: a name, or a name with options."""
    import yaml

    from ...pipeline.io import yaml_text

    try:
        value = yaml_text.parse(text) if text.lstrip().startswith("{") else text
    except yaml.YAMLError as error:
        raise ConfigError(f"--mask-generator {text}: not YAML ({one_line(error)}); correct it") from error
    return value


class ManyMasks(Command):
    """Takes any number of paths after `--masks`, such as a shell makes of `*.png`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        listing = False
        for arg in args:
            if arg.startswith("-") and arg != "-":
                listing = arg == "--masks" or arg.startswith("--masks=")
                spread.append(arg)
            else:
                spread += ["--masks", arg] if listing and spread[-1] != "--masks" else [arg]
        return super().parse_args(ctx, spread)


def _only_masks(masks: list[str] | None, key: str | None, *others: Any) -> str:
    """The only path of --masks, where no option is given that is for one photo."""
    if key is not None or any(each is not None for each in others):
        raise ConfigError(
            "--out captions many photos; --key, --mask-generator, --json, --picture and --trace are for one"
        )
    if masks is None or len(masks) != 1:
        raise ConfigError("--out needs --masks with one path: a folder, a JSON, or a corpus")
    return masks[0]


def _only_prompt(prompt: list[str] | None) -> str | None:
    if prompt and len(prompt) > 1:
        raise ConfigError("--out asks all regions the same; give --prompt once")
    return prompt[0] if prompt else None


@options_of(DecodeOptions)
def caption(
    model: Annotated[Path, typer.Option(help="Folder of a saved PerceptionDLM.", show_default=False)],
    masks: Annotated[
        list[str] | None,
        typer.Option(
            help="Mask images, folders of mask images, or a JSON of COCO or SA-1B; or a corpus, together "
            "with --key. Several paths may follow. Without this option, a mask generator makes the masks. "
            "With --out: a folder that has an image, a JSON or a folder of masks for each photo, under its "
            "name without the ending; a JSON for all photos; or a corpus, whose images are all captioned.",
            show_default=False,
        ),
    ] = None,
    mask_generator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What makes the masks of a photo without --masks: a name, or a name with options such as "
            "'{name: sam, options: {model: sam_vit_h_4b8939.pth}}' (docs/mask-generators.md).",
            show_default="color_regions, which needs no weights",
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="The photo; with --out, a folder of photos. Not needed with a corpus."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File of JSON lines to write, one for each photo of a folder or a corpus. The same command "
            "continues a file that it began: photos that have a line are skipped.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Key of the image in the corpus. With a JSON of masks in which the photo has another name "
            "than the file of --image, give the photo's name or id in that JSON."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT",
            help="What the model is asked about a region. Give one prompt for all regions, or repeat the "
            "option once for each region, in the order of the regions.",
            show_default="the prompt of the training",
        ),
    ] = None,
    json: Annotated[
        str | None, typer.Option(help="JSON file to write; - prints the JSON and nothing else.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="PNG, JPEG or WebP file to write, with masks, numbers and captions.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="GIF or HTML file to write, with every decoding step.")
    ] = None,
    regions_per_call: Annotated[
        int | None,
        typer.Option(
            help="Most regions to caption together in one sequence.",
            show_default="as many as the model takes",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(help="Sequences, each with regions of one photo, that are decoded at once."),
    ] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **decoding: Any,
) -> None:
    """Caption the regions of a photo, all in parallel, or of many photos."""
    if out is not None:
        raise typer.Exit(
            caption_many(
                model,
                image,
                _only_masks(masks, key, mask_generator, json, picture, trace),
                out,
                DecodeOptions.checked(decoding),
                _only_prompt(prompt),
                regions_per_call,
                batch_size,
                device,
                dtype,
            )
        )
    from rich.console import Console

    from ...model_training.decoding import caption_photo as captioning
    from ...model_training.decoding.generate_regions import generate_regions
    from ...model_training.decoding.read_regions import read_photo_regions
    from ...model_training.decoding.region_captioner import RegionCaptioner

    if image is not None and files.is_folder(image):
        raise ConfigError(f"--image {image}: a folder; caption its photos into a file with --out")
    options = DecodeOptions.checked(decoding)
    captioning.check_outputs(picture, trace, json)
    generator = None if mask_generator is None else _generator_of(mask_generator)
    if masks:
        if generator is not None:
            raise ConfigError("--mask-generator makes the masks of a photo without any; leave out --masks")
        photo = read_photo_regions(image, masks, key)
    elif image is None:
        raise ConfigError("give the photo with --image; its masks, or a corpus with --key, with --masks")
    elif key is not None:
        raise ConfigError("--key names an image in what --masks gives; give --masks too, or leave it out")
    else:
        photo = generate_regions(image, generator)
    notices = Console(stderr=True)
    for line in photo.left_out:
        notices.print(f"left out: {line}", markup=False, highlight=False, soft_wrap=True)
    with notices.status("loading the model"):
        captioner = RegionCaptioner.load(model, device, dtype)
    with notices.status(f"captioning {count('region', len(photo.regions))}"):
        captioned = captioning.caption_regions(
            captioner, photo, options, regions_per_call, prompt or (), batch_size
        )
        if trace is not None:
            traced = captioning.trace_photo(captioner, captioned, regions_per_call, batch_size)
            captioning.write_trace(traced, trace)
    if picture is not None:
        captioning.write_picture(captioned, picture)
    if json == "-":
        print(captioning.to_json(captioned), end="")
        return
    if json is not None:
        captioning.write_record(captioned, json)
    Console().print(captioning.render_captions(captioned))
    for path in filter(None, (json, picture, trace)):
        print(path)
