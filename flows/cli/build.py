"""The commands that write a corpus: `build`, `merge`, `demo`, `deploy`."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...schemas.errors import ConfigError
from .. import stopping
from .arguments import Changes, Config, RayAddress, locate, suggest
from .corpus import print_funnel
from .progress import BuildView, counting

if TYPE_CHECKING:
    from ...pipeline.executor.local import LocalEngine
    from ...pipeline.executor.ray_data import RayEngine
    from ...schemas.config import BuildConfig


def build(
    config: Config,
    ray_address: RayAddress = None,
    limit_images: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Build only the first N images of each subset.", show_default="all"
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            help="Also rebuild units in which an error dropped regions (a missing photo, a failed model)."
        ),
    ] = False,
    check_files: Annotated[
        bool,
        typer.Option(
            "--check-files",
            help="First compare committed images with their files, all of which are read, and rebuild units "
            "with files that were changed in place.",
        ),
    ] = False,
    local: Annotated[
        bool,
        typer.Option("--local", help="Build in this process, without Ray and Prefect."),
    ] = False,
    changes: Changes = None,
) -> None:
    """Build the corpus, or resume a build that was interrupted.

    A unit is one shard of images (`images_per_shard`). Units that are committed with the same settings are
    not built again. After a change of settings, units are rebuilt from the stored answers of the models, and
    a model is asked only where an answer is missing.
    """
    from ...pipeline.config_file import load_config

    if local and ray_address is not None:
        raise ConfigError("build: choose --local or --ray-address; the local engine uses no cluster")
    loaded = load_config(config, changes or ())
    if check_files:
        _check_files(loaded)
    _build(loaded, local, ray_address, limit_images=limit_images, retry_failed=retry_failed)
    suggest(("explore", loaded.out), ("verify", loaded.out))


def _check_files(config: BuildConfig) -> None:
    from ...pipeline.executor.changed_files import note_changed_files

    unread = list[str]()
    with counting("images compared with their files") as progress:
        found = note_changed_files(config, progress, unread.append)
    for subset, each in found.items():
        print(f"{subset}: {each}", file=sys.stderr)
    if unread:
        some = ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else "")
        print(
            f"{len(unread):,} images were not compared, because they cannot be read: {some}", file=sys.stderr
        )
    elif not found:
        print("no file of a committed image has changed", file=sys.stderr)


def _build(loaded: BuildConfig, local: bool = False, ray_address: str | None = None, **asked: Any) -> None:
    """Build with progress on stderr, then print the summary."""
    from ...pipeline.corpus.reader import read_summary
    from ...pipeline.executor.build import build_checked
    from ...pipeline.executor.local import LocalEngine
    from ...pipeline.executor.ray_data import RayEngine

    stopping.say(lambda: _what_is_committed(loaded))
    engine = LocalEngine() if local else RayEngine(ray_address)
    if not build_checked(loaded, engine, _run_in_view, **asked):
        print(f"nothing to do: every unit of {loaded.out} is committed and merged", file=sys.stderr)
    for subset, found in read_summary(loaded.out).subsets.items():
        if found.counts.benchmark_photos:
            left = f"{found.counts.benchmark_photos:,} images are photos of benchmarks"
            print(f"{subset}: {left}, and are left out (`benchmark_photo` in the ledger)", file=sys.stderr)
    print_funnel(locate(loaded.out))


def _what_is_committed(config: BuildConfig) -> str:
    """What a stopped build says."""
    from ...pipeline.corpus import log
    from ...pipeline.corpus.work_list_summary import find_work_list

    lists = [find_work_list(locate(config.out) / subset) for subset in config.subsets]
    total = sum(each.num_units for each in lists if each is not None)
    if not total or not log.exists(config.out):
        return "nothing is committed yet; run the same command to begin again"
    units = log.read_units(config.out)
    return f"{len(units):,} of {total:,} units are committed; run the same command to continue"


def _run_in_view(config: BuildConfig, engine: LocalEngine | RayEngine, **asked: Any) -> None:
    from ...pipeline.executor import driver
    from ...pipeline.executor.local import LocalEngine

    if isinstance(engine, LocalEngine):
        with BuildView(live=False) as view:
            driver.build(config, engine, on_progress=view.show, **asked)
    else:
        from .. import launch

        with BuildView() as view:
            launch.build(config, engine, view.show, **asked)


def merge(config: Config, changes: Changes = None) -> None:
    """Write the index, statistics, plots and dataset card again.

    `build` does this when it ends. Run `merge` yourself after you change `held_out_share` or a license.
    """
    from ...pipeline.config_file import load_config
    from ...pipeline.corpus import log, reader
    from ...pipeline.corpus import merge as merging
    from ...pipeline.executor import driver

    loaded = load_config(config, changes or ())
    reader.open_corpus(loaded.out)  # before anything is written to what may be another folder
    with driver.owned(loaded, "merge") as owner:
        driver.write_config(loaded, owner)
        merging.merge(loaded.out, loaded, owner)
    print(log.place_of(loaded.out, reader.INDEX))
    suggest(("inspect", loaded.out), ("verify", loaded.out))


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write the corpus to.")] = Path("out/demo"),
) -> None:
    """Build both subsets of the bundled sample and draw a contact sheet."""
    from ...pipeline.config_file import load_config
    from ...pipeline.corpus.contact_sheet import draw_contact_sheet

    sample = Path(str(resources.files("paracaption") / "samples" / "build.yaml")).resolve()
    loaded = load_config(sample).model_copy(update={"out": str(out.resolve())})
    _build(loaded)
    sheet = out / "contact-sheet.png"
    draw_contact_sheet(out, sheet)
    print(f"every image with its masks and captions: {sheet}")
    print(f"the dataset card: {out / 'README.md'}")
    script = Path(sys.prefix) / "bin/activate"
    activate = [f"source {script}"] if script.is_file() and not shutil.which("paracaption") else []
    suggest(*activate, ("explore", out), ("verify", out), ("init", "my.yaml"))


def deploy(
    name: Annotated[str, typer.Option(help="Name of the deployment.")] = "corpus",
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Allow runs to use something that is not built in: a backend or source (`module:Class`, "
            "installed or in the current folder), the py_executable of a runtime_env, or the base_url of a "
            "server. Repeat the option for more.",
        ),
    ] = None,
) -> None:
    """Let a Prefect server launch builds, trainings and evaluations on this machine.

    Registers the flows of `build`, `train` and `evaluate` with the server in PREFECT_API_URL, and waits for
    runs until it is interrupted. The parameters of a run are checked before it starts.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "PREFECT_API_URL is not set; start a server with `prefect server start`, and set it to the "
            "address of that server, as in http://127.0.0.1:4200/api"
        )
    import asyncio

    from prefect.runner import Runner

    from .. import served
    from ..build import build_corpus
    from ..evaluate import evaluate_captioner
    from ..train import train_captioner

    served.allow(allow or [])
    runner = Runner(name=name)
    for flow in (build_corpus, train_captioner, evaluate_captioner):
        # Not by `prefect.serve`: that runs whatever code the deployment names, which the API can change.
        runner.add_flow(flow, name=name)
        print(f"serving {flow.name}/{name}", file=sys.stderr)
    with suppress(KeyboardInterrupt):
        asyncio.run(runner.start())
