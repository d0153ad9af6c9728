"""The commands about benchmarks: `make`, `coco`, `requests`, `table` and `photos`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import Json, changes_of, print_json, suggest
from .examples import example
from .help import Command, Group
from .progress import counting_parts

if TYPE_CHECKING:
    from ...model_training.evaluation.annotations import Benchmark
    from ...schemas.evaluation import EvaluateConfig

benchmarks = typer.Typer(
    cls=Group,
    help="Make benchmarks for region captions, hand them to other models, and compare results.",
    no_args_is_help=True,
)


@benchmarks.command(cls=Command, epilog=example("benchmark make"))
def make(
    corpus: Annotated[
        str, typer.Argument(help="The corpus: the `out` of its configuration.", show_default=False)
    ],
    to: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    judge: Annotated[
        Path,
        typer.Option(
            help="YAML file with the `name` (vllm or openai) and the `options` of the model that drafts the "
            "questions.",
            show_default=False,
        ),
    ],
    images: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of images, at most. Those whose regions are most easily confused are taken first.",
        ),
    ] = 100,
) -> None:
    """Make a benchmark from a corpus.

    Picks images whose regions are easily confused, lets a model draft questions about them, and writes a page
    on which people review the questions.
    """
    from ...model_training.evaluation import make_benchmark as making
    from ...pipeline.config_file import load_judge

    with counting_parts() as show:
        made = making.make_benchmark(corpus, to, load_judge(judge), images, show)
    print(
        f"{made.questions:,} questions about {made.regions:,} regions of {made.images:,} images, unverified"
    )
    if made.without:
        print(f"{made.without:,} regions have no question: run the command again, or choose another model")
    print(to / making.REVIEW)


@benchmarks.command(cls=Command, epilog=example("benchmark photos"))
def photos(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="TITLE=FOLDER",
            help="Title of a benchmark, and the folder of its annotations.json. More of them may follow.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path,
        typer.Option(help="JSON file to write.", show_default=False),
    ],
) -> None:
    """Write a list of the photos of benchmarks, by name and size.

    This command is for developers of ParaCaption. `build` and `train` leave out the photos of ParaDLC-Bench
    and DLC-Bench by a list that is part of the package. This command writes a file in the form of that list.
    No command reads the file.
    """
    from ...model_training.evaluation.list_photos import list_photos
    from ...pipeline.io import files
    from ...schemas.errors import ConfigError

    named = [each.partition("=") for each in folders]
    if wrong := [title for title, equals, folder in named if not (title and equals and folder)]:
        raise ConfigError(
            f"benchmark photos: {wrong[0]}: give TITLE=FOLDER, as in ParaDLC-Bench=data/paradlc"
        )
    found = list_photos({title: Path(folder) for title, _, folder in named})
    with files.write_atomic(to) as file:
        file.write(found)
    print(to)


Config = Annotated[
    Path,
    typer.Argument(help="YAML file of `paracaption evaluate` that names the benchmarks.", show_default=False),
]


@benchmarks.command(cls=Command, epilog=example("benchmark coco"))
def coco(
    config: Config,
    to: Annotated[
        Path,
        typer.Option(help="Folder to write, with a folder for each benchmark.", show_default=False),
    ],
) -> None:
    """Write benchmarks as COCO instances, for captioners that have scripts of their own.

    The scripts of GAR, DAM and PixelRefer for DLC-Bench read these files. Give `keys.json`, which is written
    next to them, to the captioner `predictions`, together with the captions that the script wrote.
    """
    from ...model_training.evaluation.exchange import KEYS, write_coco

    for name, benchmark in _benchmarks(_loaded(config)):
        regions = write_coco(benchmark, to / name)
        print(f"{name}: {regions:,} regions of {len(benchmark.images):,} photos")
        print(to / name)
    suggest(f"keys: {to / '{benchmark}' / KEYS} among the options of the captioner `predictions`")


@benchmarks.command(cls=Command, epilog=example("benchmark requests"))
def requests(
    config: Config,
    to: Annotated[
        Path,
        typer.Option(help="Folder to write, with a file NAME.jsonl for each benchmark.", show_default=False),
    ],
    changes: Annotated[list[str] | None, changes_of("captioner.options.model=other")] = None,
) -> None:
    """Write the requests of the captioner `openai`, for a model that no server has.

    The lines are those of a batch, as OpenAI and `vllm run-batch` take them: each has the pictures and the
    prompt of one region. The captioner `predictions` reads the answers of a batch.
    """
    from ...model_training.evaluation.exchange import write_requests

    loaded = _loaded(config, changes or ())
    for name, benchmark in _benchmarks(loaded):
        path = to / f"{name}.jsonl"
        to.mkdir(parents=True, exist_ok=True)
        print(f"{name}: {write_requests(benchmark, loaded.backend(), path):,} requests")
        print(path)


def _loaded(config: Path, changes: Any = ()) -> EvaluateConfig:
    from ...pipeline.config_file import load_evaluation

    return load_evaluation(config, changes)


def _benchmarks(config: EvaluateConfig) -> Iterator[tuple[str, Benchmark]]:
    from ...model_training.evaluation.run_benchmark import open_benchmark
    from ...schemas.errors import ConfigError

    if not config.benchmarks:
        raise ConfigError("benchmarks: the configuration has none; name at least one")
    for bench in config.benchmarks:
        yield bench.name, open_benchmark(bench)


@benchmarks.command(cls=Command, epilog=example("benchmark table"))
def table(
    out: Annotated[
        Path,
        typer.Argument(help="Folder of results: the `out` of evaluations.", show_default=False),
    ],
    json: Json = False,
) -> None:
    """Compare all captioners of a folder of results, next to the numbers that papers report.

    Numbers in brackets are the paper's.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from ...model_training.evaluation.results_table import HEADINGS, cells, read_rows

    rows = read_rows(out)
    if json:
        print_json([row._asdict() | {"difference": row.difference} for row in rows])
        return
    shown = Table(*HEADINGS, box=SIMPLE, padding=(0, 1, 0, 0))
    for row in cells(rows):
        shown.add_row(*row)
    Console().print(shown)
