"""The commands to use before a run: `config`, `audit`, `doctor`, `estimate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...schemas.errors import ConfigError
from .arguments import (
    Changes,
    Config,
    Json,
    Place,
    RayAddress,
    locate,
    print_json,
    suggest,
    to_location,
    written,
)
from .evaluation_costs import estimate_evaluation, load_kind
from .progress import counting


def config(
    training: Annotated[
        bool, typer.Option("--training", help="Print the keys of a configuration of `train`.")
    ] = False,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Print the keys of a configuration of `evaluate`.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema, for editors that complete and check YAML.")
    ] = False,
    recipes: Annotated[
        bool,
        typer.Option("--recipes", help="Print the recipes `verify` and `identify` as lists to copy."),
    ] = False,
) -> None:
    """Print every key of a configuration of `build`, with its default and what it does."""
    from ...pipeline.config_file import describe, describe_recipes
    from ...schemas.config import BuildConfig
    from ...schemas.evaluation import EvaluateConfig
    from ...schemas.training import TrainConfig

    _one_kind("config", training, evaluation)
    kind = TrainConfig if training else EvaluateConfig if evaluation else BuildConfig
    if recipes:
        if training or evaluation or schema:
            raise ConfigError("config: --recipes stands alone; leave out the other options")
        print(describe_recipes())
    elif schema:
        from .schema import json_schema

        print_json(json_schema(kind))
    else:
        print(describe(kind))


def _one_kind(command: str, training: bool, evaluation: bool) -> None:
    if training and evaluation:
        raise ConfigError(f"{command}: choose --training or --evaluation, not both")


def audit(
    config: Config,
    parquet: Annotated[
        Place | None,
        typer.Option(
            parser=to_location,
            metavar="PATH",
            help="Parquet file for the full list of problems.",
            show_default="audit.parquet in the configuration's `out`",
        ),
    ] = None,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Read the sources without a model, and report every problem. Exit code 1 if no region is usable."""
    from ...pipeline.config_file import load_config
    from ...pipeline.corpus.growth import Growth
    from ...pipeline.corpus.work_list import leave_out
    from ...pipeline.corpus.work_list_summary import find_work_list
    from ...pipeline.executor.audit import AuditReport, AuditResult, SharedPhotos, audit_subset
    from ...pipeline.models.registry import refuse_unknown
    from ...pipeline.sources.registry import open_source
    from ...pipeline.stages.recipes import used_backends

    loaded = load_config(config, changes or ())
    for place, (protocol, backend) in used_backends(loaded).items():
        refuse_unknown(protocol, backend, place)
    total, reports, shared = AuditResult(), {}, SharedPhotos()
    usable = 0
    for subset in loaded.subsets:
        source = open_source(loaded, subset)
        planned = find_work_list(locate(loaded.out) / subset)
        source.leave_out = leave_out(loaded, planned)
        with counting(f"{subset}: images read") as progress:
            report = audit_subset(source, loaded.limits, progress=progress, shared=shared)
        total.add(report.result)
        usable += report.usable()
        reports[subset] = report.summary()
        if not json:
            print(report.text())
            if planned is not None and planned.gone:
                gone = Growth(gone=planned.gone, examples={"gone": planned.gone_examples})
                print(f"{subset}: as of the last build, {gone}")
    target = parquet or locate(loaded.out) / "audit.parquet"
    AuditReport("all", total).write(target)
    if json:
        print_json({"subsets": reports, "full_list": str(target)})
    else:
        print(f"full list: {target}")
    if not usable:
        print("no region is usable: a build would be empty", file=sys.stderr)
        raise typer.Exit(1)
    if not json:
        suggest(*((each, config, *written(changes)) for each in ("doctor", "build")))


def doctor(
    config: Config,
    ray_address: RayAddress = None,
    training: Annotated[
        bool, typer.Option("--training", help="CONFIG is a configuration of `train`.")
    ] = False,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="CONFIG is a configuration of `evaluate`.")
    ] = False,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Check packages, GPUs, models, inputs and output before a run. Exit code 1 if a check fails (FAIL)."""
    from rich.console import Console

    from ...pipeline import config_file
    from ...pipeline.executor import findings

    _one_kind("doctor", training, evaluation)
    if training:
        from .. import preflight

        loaded = config_file.load_training(config, changes or ())
        found = list(preflight.check_training(loaded, on_cluster=ray_address is not None))
    elif evaluation:
        from .. import preflight

        found = list(preflight.check_evaluation(config_file.load_evaluation(config, changes or ())))
    else:
        from ...pipeline.executor.doctor import examine_build

        found = examine_build(config_file.load_config(config, changes or ()), ray_address)
    if json:
        print_json(found)
    else:
        Console().print(findings.render_findings(found))
    if any(each.state == findings.FAIL for each in found):
        raise typer.Exit(1)
    if not json:
        command = "train" if training else "evaluate" if evaluation else "build"
        address = ("--ray-address", ray_address) if ray_address and not evaluation else ()
        suggest((command, config, *address, *written(changes)))


def estimate(
    config: Config,
    run: Annotated[
        Place | None,
        typer.Option(
            parser=to_location,
            metavar="PATH",
            help="Corpus of the pilot, a small build whose speed is measured (`build --limit-images 500`). "
            "With --evaluation: folder of the trial, `OUT/LABEL`.",
            show_default="the configuration's `out`; with --evaluation, `trial` in it",
        ),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of rates, as --write-rates prints it, to use instead of the rates of a pilot."
        ),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Number of GPUs in the cluster.",
            show_default="as many as the configured actors use at most; with --evaluation, 1",
        ),
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option(
            min=1, help="Number of CPU cores in the cluster.", show_default="as many as the actors need"
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SUBSET=IMAGES",
            help="Size of a subset: coconut=334000, or coconut=334000/3400000 to give the number of regions "
            "too. Repeat the option for more subsets; a subset that is not named is left out.",
            show_default="COCONut and SA-1B as in the PerceptionDLM paper; others as in their sources",
        ),
    ] = None,
    sources: Annotated[
        bool,
        typer.Option(
            help="Count the images of the configured sources instead of taking the sizes in the "
            "PerceptionDLM paper. Has no effect with --images."
        ),
    ] = False,
    write_rates: Annotated[
        bool, typer.Option(help="Print the rates of the pilot as YAML instead of an estimate.")
    ] = False,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="CONFIG is a configuration of `evaluate`.")
    ] = False,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Estimate a large build from a small one: GPU-hours, time, bottleneck, GPUs per stage, disk space.

    With --evaluation, estimate the hours of an evaluation from a trial of it.
    """
    from rich.console import Console

    from ...pipeline.config_file import load_config, load_evaluation
    from ...pipeline.corpus import log
    from ...pipeline.corpus.reader import CONFIG, read_config
    from ...pipeline.executor.estimate.rates import format_rates, measure_rates, read_rates
    from ...pipeline.executor.estimate.report import make_estimates, render_estimate
    from ...pipeline.executor.estimate.sizes import choose_sizes
    from ...pipeline.io import files

    if evaluation:
        if rates or write_rates or cpus or images or sources:
            raise ConfigError("estimate: with --evaluation, give only --run, --gpus, --set and --json")
        estimate_evaluation(config, run, gpus, changes, json)
        return
    loaded = load_kind(config, changes, load_config, load_evaluation, "`evaluate`; add --evaluation")
    pilot = run or locate(loaded.out)
    known = read_rates(rates) if rates else measure_rates(pilot)
    if write_rates:
        print(format_rates(known), end="")
        return
    sizes = choose_sizes(loaded, known, images or [], count_sources=sources)
    has_config = not rates and files.exists(log.place_of(pilot, CONFIG))
    pilot_config = read_config(pilot) if has_config else None
    shown = make_estimates(loaded, known, sizes, gpus, cpus, pilot_config)
    if json:
        print_json(shown._asdict())
    else:
        Console().print(render_estimate(shown))
