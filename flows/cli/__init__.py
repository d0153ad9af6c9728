"""The command line: thin over the flows. Only this package prints."""

from __future__ import annotations

import os
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

from ...schemas.errors import ConfigError, ParaCaptionError
from .evaluate import benchmark, evaluate, profile
from .progress import BuildView, TrainingView, counting

if TYPE_CHECKING:
    from ...schemas.config import BuildConfig

app = typer.Typer(
    name="paracaption",
    help="Masks in, verified region captions out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path, typer.Argument(help="The YAML file; `paracaption config` prints every key.", show_default=False)
]
TrainingConfig = Annotated[
    Path, typer.Argument(help="The YAML file; configs/train has some for each stage.", show_default=False)
]
Out = Annotated[Path, typer.Argument(help="The corpus: the `out` of its configuration.", show_default=False)]
RayAddress = Annotated[
    str | None,
    typer.Option(help="'auto' or host:port, from a node of the cluster; none: this machine alone."),
]


@app.command()
def build(
    config: Config,
    ray_address: RayAddress = None,
    limit_images: Annotated[
        int | None, typer.Option(min=1, help="Only the first N images of each subset.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option(help="Also build units again that hold drops by error.")
    ] = False,
    local: Annotated[
        bool,
        typer.Option("--local", help="In this process, one unit after the other, without Ray and Prefect."),
    ] = False,
) -> None:
    """Build the corpus, or resume it: whatever is committed is not built again."""
    from ...pipeline.config_file import load_config

    if local and ray_address is not None:
        raise ConfigError("build: choose --local or --ray-address; the local engine uses no cluster")
    _build(load_config(config), local, ray_address, limit_images, retry_failed)


@app.command()
def audit(
    config: Config,
    parquet: Annotated[
        Path | None, typer.Option(help="Where the full list goes [default: OUT/audit.parquet].")
    ] = None,
) -> None:
    """Read the sources without any model and report every problem."""
    from ...pipeline import sources
    from ...pipeline.config_file import load_config
    from ...pipeline.executor import audit as auditing

    loaded = load_config(config)
    total = auditing.Found()
    for subset in loaded.subsets:
        with counting(f"{subset}: images read") as progress:
            report = auditing.audit(sources.open_source(loaded, subset), loaded.limits, progress=progress)
        total.add(report.found)
        print(report.text())
    target = parquet or Path(loaded.out) / "audit.parquet"
    auditing.AuditReport("all", total).write(target)
    print(f"full list: {target}")


@app.command()
def verify(out: Out) -> None:
    """Check every promise that a corpus makes; exit code 1 names what is broken."""
    from ...pipeline.corpus import verify as verifying

    report = verifying.verify(out)
    print(report.text())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def inspect(out: Out) -> None:
    """Show the funnel, and samples of what was kept and of what was dropped and why."""
    from rich.console import Console

    from ...pipeline.corpus import inspect as inspecting

    Console().print(inspecting.inspect(out))


@app.command()
def show(out: Out, key: str, picture: Annotated[Path, typer.Option("--out", help="PNG to write.")]) -> None:
    """Draw one image with its masks and captions."""
    from ...pipeline.io import draw

    draw.show(out, key, picture)
    print(picture)


@app.command()
def explore(
    out: Out,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free.")] = 8080,
    host: Annotated[
        str, typer.Option(help="To bind to; beyond this machine a token is asked for.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(help="Asked of every request [default: a random one beyond this machine].")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The `out` of a training run, to show too.")] = None,
    shards: Annotated[
        str | None, typer.Option(help="Folder or URL of the shards, if they are not in OUT.")
    ] = None,
) -> None:
    """Look at a corpus in the browser: the funnel, images with masks, other thresholds, reviews."""
    from ...pipeline.explorer.serve import serve

    serve(out, host, port, token, run, shards, lambda url: print(f"{url} (Ctrl-C ends it)", flush=True))


@app.command()
def report(
    out: Out,
    to: Annotated[Path | None, typer.Option(help="HTML file to write [default: OUT/report.html].")] = None,
) -> None:
    """Write the overview and samples of each drop reason as one HTML file, to send to someone."""
    from ...pipeline.explorer import report as reporting

    print(reporting.write(out, to))


@app.command()
def doctor(
    config: Config,
    ray_address: RayAddress = None,
    training: Annotated[bool, typer.Option("--training", help="CONFIG is one of `train`.")] = False,
    evaluation: Annotated[bool, typer.Option("--evaluation", help="CONFIG is one of `evaluate`.")] = False,
) -> None:
    """Check packages, GPUs, models, inputs and the output before a run; exit code 1 on a FAIL."""
    from rich.console import Console

    from ...pipeline import config_file
    from ...pipeline.executor import findings

    _one_kind("doctor", training, evaluation)
    if training:
        from .. import preflight

        loaded = config_file.load_training(config)
        found = list(preflight.training(loaded, on_cluster=ray_address is not None))
    elif evaluation:
        from .. import preflight

        found = list(preflight.evaluation(config_file.load_evaluation(config)))
    else:
        from ...pipeline.executor import doctor as examining

        found = examining.examine(config_file.load_config(config), ray_address)
    Console().print(findings.render(found))
    raise typer.Exit(1 if any(each.state == findings.FAIL for each in found) else 0)


def _one_kind(command: str, training: bool, evaluation: bool) -> None:
    if training and evaluation:
        raise ConfigError(f"{command}: choose --training or --evaluation, not both")


@app.command()
def plan(
    config: Config,
    run: Annotated[
        Path | None, typer.Option(help="The corpus of a pilot [default: the configuration's `out`].")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="Seconds a region, as --write-rates prints them.")
    ] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="Of the cluster.")] = None,
    cpus: Annotated[float | None, typer.Option(min=1, help="Cores of the cluster.")] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="SUBSET=IMAGES or SUBSET=IMAGES/MASKS; default: the paper's.")
    ] = None,
    corpus: Annotated[bool, typer.Option(help="The configured sources' own images.")] = False,
    write_rates: Annotated[bool, typer.Option(help="Print the measured rates as YAML, and no plan.")] = False,
) -> None:
    """Plan a build from a pilot: GPU-hours, wall time, the bottleneck, GPUs per stage, bytes."""
    from rich.console import Console

    from ...pipeline.config_file import load_config
    from ...pipeline.executor.estimate import rates as measuring
    from ...pipeline.executor.estimate import report as estimate_view

    loaded = load_config(config)
    pilot = run or Path(loaded.out)
    measured = measuring.read(rates) if rates else measuring.measure(pilot)
    if write_rates:
        print(measuring.dump(measured), end="")
        return
    known = None if rates or not (pilot / "config.yaml").exists() else load_config(pilot / "config.yaml")
    sizes = estimate_view.sizes_of(loaded, measured, images or [], corpus)
    Console().print(estimate_view.render(loaded, measured, sizes, gpus, cpus, known))


models = typer.Typer(help="Make checkpoints ready for the models that need it.", no_args_is_help=True)
app.add_typer(models, name="models")


@models.command()
def prepare(
    model: Annotated[str, typer.Argument(help="gar.")],
    path: Annotated[Path, typer.Argument(help="The published checkpoint's folder.")],
    to: Annotated[Path | None, typer.Option(help="Folder of the export [default: beside it].")] = None,
) -> None:
    """Export a checkpoint's language model once, for vLLM; nothing to do if it is there."""
    if model != "gar":
        raise ConfigError(f"models prepare: {model!r} needs no preparation; only gar does")
    from ...pipeline.models.gar import export as language_model

    print(language_model.prepare(path, to))


@models.command()
def convert(
    to: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")],
    path: Annotated[
        Path | None,
        typer.Argument(help="A PerceptionDLM: published, or ours. The other is made.", show_default=False),
    ] = None,
    language: Annotated[Path | None, typer.Option(help="LLaDA's folder, for a new model.")] = None,
    vision: Annotated[
        Path | None, typer.Option(help="SigLIP 2's folder: for a new model, or where unused/ is missing.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="corrected (default of a new model) or reference (of a published one).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights that are drawn.")] = 0,
) -> None:
    """Convert a PerceptionDLM between the published layout and ours, or make a new one of its parts."""
    from ...model_training.convert import published as converting

    if (path is None) == (language is None):
        raise ConfigError("models convert: name a PerceptionDLM's folder, or LLaDA's with --language")
    if path is not None:
        report = converting.convert(path, to, vision=vision, layout=layout, seed=seed)
    elif vision is None:
        raise ConfigError("models convert: --language needs a SigLIP 2 too: --vision DIR")
    else:
        report = converting.from_parts(language, vision, to, layout or "corrected", seed)
    print(report.text())


@app.command()
def train(
    config: TrainingConfig,
    ray_address: RayAddress = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until the corpora are built; else what is committed is taken.")
    ] = False,
) -> None:
    """Train a model, or go on from the last checkpoint; `config` with --training prints every key."""
    from ...pipeline.config_file import load_training
    from ...pipeline.executor import findings, ray_data
    from .. import launch, preflight

    loaded = load_training(config)
    findings.refuse(preflight.training(loaded, wait, on_cluster=ray_address is not None))
    ray_data.check_address(ray_address)
    done = launch.train(loaded, ray_address, wait, TrainingView(loaded.log.every).show)
    print(f"{done['steps']:,} steps, {done['skipped']:,} of them skipped: {done['model']}")
    if found := done.get("evaluation"):
        print(
            f"{found['regions']:,} regions of {found['images']:,} images: {Path(loaded.out) / 'evaluation'}"
        )
        print(
            f"{found['exact']:.1%} as the corpus has them, {found['tokens_per_forward']:.1f} tokens a forward"
        )


class _ManyMasks(TyperCommand):
    """Lets `--masks` be followed by any number of paths, as a shell's `*.png` gives them."""

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


@app.command(cls=_ManyMasks)
def caption(
    model: Annotated[Path, typer.Option(help="Folder of a saved PerceptionDLM.", show_default=False)],
    masks: Annotated[
        list[str],
        typer.Option(
            help="Any number: mask images, folders of them, a JSON of COCO or SA-1B; or a corpus and --key.",
            show_default=False,
        ),
    ],
    image: Annotated[Path | None, typer.Option(help="The photo; a corpus has its own.")] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Which image of a corpus, or of a JSON if the name differs."),
    ] = None,
    json: Annotated[str | None, typer.Option(help="File for the record, or - to print only that.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG, JPEG or WebP: masks, numbers, captions.")] = None,
    trace: Annotated[Path | None, typer.Option(help="GIF or HTML: every step of the decoder.")] = None,
    strategy: Annotated[
        str, typer.Option(help="remask, per-region, threshold, sequential or left-to-right.")
    ] = "remask",
    steps: Annotated[int, typer.Option(help="Of the decoder; fewer are faster and worse.")] = 32,
    length: Annotated[int, typer.Option(help="Slots of a caption, in tokens.")] = 32,
    threshold: Annotated[float, typer.Option(help="Confidence that is enough, for `threshold`.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    cache: Annotated[str, typer.Option(help="auto, none, exact or approximate.")] = "auto",
    refresh_every: Annotated[int, typer.Option(help="Steps between passes that renew `approximate`.")] = 4,
    compare: Annotated[bool, typer.Option(help="Also decode without `approximate`, and compare.")] = False,
    regions_per_call: Annotated[
        int | None, typer.Option(help="Regions captioned together; by default the most that it can.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Caption the regions of a photo, all in parallel."""
    from rich.console import Console

    from ...model_training.decoding import caption_photo, read_regions
    from ...model_training.decoding import trace as tracing

    options = {"strategy": strategy, "steps": steps, "length": length, "threshold": threshold}
    options |= {"temperature": temperature, "top_p": top_p, "seed": seed, "cache": cache}
    options |= {"refresh_every": refresh_every, "compare": compare}
    caption_photo.check_outputs(picture, trace, json)
    scene = read_regions.read(image, masks, key)
    notices = Console(stderr=True)
    for line in scene.left_out:
        notices.print(f"left out: {line}", markup=False, highlight=False, soft_wrap=True)
    with notices.status("loading the model"):
        loaded = caption_photo.load(model, device, dtype)
    with notices.status(f"captioning {len(scene.regions)} regions"):
        answer = caption_photo.describe(loaded, scene, options, regions_per_call)
        if trace is not None:
            tracing.write(caption_photo.trace_of(loaded, answer, regions_per_call), trace)
    if picture is not None:
        caption_photo.write_picture(answer, picture)
    if json == "-":
        print(caption_photo.to_json(answer), end="")
        return
    if json is not None:
        caption_photo.write_record(answer, json)
    Console().print(caption_photo.render(answer))
    for path in filter(None, (json, picture, trace)):
        print(path)


app.command()(evaluate)
app.command()(profile)
app.add_typer(benchmark, name="benchmark")


@app.command()
def export(
    out: Out,
    format: Annotated[str, typer.Option(help="perceptiondlm-json, coco or parquet.")],
    to: Annotated[Path, typer.Option(help="Folder for the export.")],
) -> None:
    """Write the corpus in another format; photos as files where the format names them by path."""
    from ...pipeline.corpus import export as exporting

    for path in exporting.export(out, format, to):
        print(path)


@app.command()
def merge(config: Config) -> None:
    """Make index, statistics, plots and dataset card anew; `build` does it at its end."""
    from ...pipeline.config_file import load_config
    from ...pipeline.corpus import merge as corpus
    from ...pipeline.executor import driver

    loaded = load_config(config)
    with driver.locked(Path(loaded.out)):
        corpus.merge(Path(loaded.out), loaded)
    print(Path(loaded.out) / "index.parquet")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the corpus goes.")] = Path("out/demo"),
) -> None:
    """Build both subsets of the bundled sample and draw a contact sheet."""
    from ...pipeline.config_file import load_config
    from ...pipeline.io import draw

    sample = Path(str(resources.files("paracaption") / "samples" / "build.yaml")).resolve()
    loaded = load_config(sample).model_copy(update={"out": str(out.resolve())})
    _build(loaded)
    sheet = out / "contact-sheet.png"
    draw.contact_sheet(out, sheet)
    rows = [
        (f"paracaption explore {out}", "a page for the browser: masks, captions, drops"),
        (f"paracaption inspect {out}", "the funnel and samples, again"),
        (f"paracaption verify {out}", "every promise of the corpus, checked"),
        ("paracaption config", "every key of a configuration of your own"),
        (f"{out}/README.md", "the dataset card"),
    ]
    print(f"\nEvery image with its masks and captions: {sheet}")
    print("What next (`source .venv/bin/activate` puts paracaption on the path):")
    for what, why in rows:
        print(f"  {what:<40} {why}")


@app.command()
def config(
    training: Annotated[bool, typer.Option("--training", help="Of `train` instead of `build`.")] = False,
    evaluation: Annotated[bool, typer.Option("--evaluation", help="Of `evaluate`.")] = False,
) -> None:
    """Print every key of the configuration with its default and the reason for it."""
    from ...pipeline.config_file import describe
    from ...schemas.config import BuildConfig
    from ...schemas.evaluation import EvaluateConfig
    from ...schemas.training import TrainConfig

    _one_kind("config", training, evaluation)
    kind = TrainConfig if training else EvaluateConfig if evaluation else BuildConfig
    print(describe(kind))


@app.command()
def deploy(
    name: Annotated[str, typer.Option(help="Name of the deployment.")] = "corpus",
) -> None:
    """Serve the flows to a Prefect server (PREFECT_API_URL): launched there, parameters checked."""
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError("PREFECT_API_URL is not set; start `prefect server start` and point it there")
    from prefect import serve

    from ..build import build_corpus
    from ..evaluate import evaluate_captioner
    from ..train import train_captioner

    all_flows = (build_corpus, train_captioner, evaluate_captioner)
    serve(*(flow.to_deployment(name) for flow in all_flows))


def _build(
    loaded: BuildConfig,
    local: bool = False,
    ray_address: str | None = None,
    limit_images: int | None = None,
    retry_failed: bool = False,
) -> None:
    """Build, starting nothing where there is nothing to do or only to merge; then the summary."""
    from ...pipeline.executor import driver, findings, preflight
    from ...pipeline.executor.local import LocalEngine
    from ...pipeline.executor.ray_data import RayEngine

    engine = LocalEngine() if local else RayEngine(ray_address)
    asked = {"limit_images": limit_images, "retry_failed": retry_failed}
    if driver.is_finished(loaded, **asked):
        print(f"nothing to do: every unit of {loaded.out} is committed and merged", file=sys.stderr)
        inspect(Path(loaded.out))
        return
    if not driver.is_built(loaded, **asked):
        findings.refuse(preflight.examine(loaded))
        engine.check(loaded)
        models = driver.prepare(loaded, **asked)
        if ray_address is None:
            findings.refuse(preflight.packages(loaded, models))
    if driver.is_built(loaded, **asked):  # perhaps from other places than it was planned with
        driver.build(loaded, engine, **asked)
    elif isinstance(engine, LocalEngine):
        with BuildView(live=False) as view:
            driver.build(loaded, engine, on_progress=view.show, **asked)
    else:
        from .. import launch

        with BuildView() as view:
            launch.build(loaded, engine, view.show, **asked)
    inspect(Path(loaded.out))


def main() -> None:
    """Entry point: errors of ours are one clear line and exit code 2, anything else is a traceback."""
    try:
        app()
    except ParaCaptionError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        from ...pipeline.executor import findings

        if error.name is None or error.name.partition(".")[0] not in findings.MODULES:
            raise
        name = error.name.partition(".")[0]
        print(f"error: {name} is not installed; {findings.how_to_install(name)}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
