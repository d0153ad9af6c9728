"""The commands that measure a captioner: `evaluate` and `profile`."""

from __future__ import annotations

from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import stopping
from .arguments import Device, Dtype, Json, changes_of, print_json, suggest
from .harness_table import check_rows, show_rows
from .progress import counting_parts, show_row

if TYPE_CHECKING:
    from rich.table import Table


def evaluate(
    config: Annotated[
        Path,
        typer.Argument(
            help="The YAML file; `paracaption config --evaluation` prints every key.", show_default=False
        ),
    ],
    changes: Annotated[list[str] | None, changes_of("label=run2", "captioner.options.dtype=float32")] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the PerceptionDLM to measure, instead of the YAML's.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure a captioner on benchmarks, on a corpus of synthetic scenes, and by its cost.

    A judge model scores the captions of a benchmark. With `harness`, lmms-eval asks a PerceptionDLM the
    questions of benchmarks of whole images. The same command continues an evaluation that was interrupted.
    """
    from rich.console import Console

    from ...pipeline.config_file import load_evaluation
    from ...pipeline.executor.findings import refuse_failures
    from .. import launch, preflight

    named = [] if model is None else [f"captioner.options.model={dumps(str(model.resolve()))}"]
    loaded = load_evaluation(config, [*(changes or ()), *named])
    refuse_failures(preflight.check_evaluation(loaded))
    stopping.say(lambda: "what was captioned and judged is kept; run the same command to continue")
    with counting_parts() as show:
        found = launch.evaluate(loaded, show)
    if json:
        print_json(found)
        check_rows(found)
        return
    if found["benchmarks"] or "toy" in found:
        Console().print(_table(found))
    show_rows(found)
    pages = []
    for result in found["benchmarks"]:
        for line in notes(result):
            print(line)
        pages.append(Path(loaded.out) / loaded.label / result["benchmark"] / "page.html")
        print(pages[-1])
    print(Path(loaded.out) / "history.jsonl")
    if pages:
        suggest(*(f"open {page} in a browser" for page in pages))
    check_rows(found)


def profile(
    model: Annotated[Path, typer.Option(help="Folder of a saved PerceptionDLM.", show_default=False)],
    corpus: Annotated[str, typer.Option(help="Corpus with the photos to caption.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder for a table, a plot and all measurements.",
            show_default=False,
        ),
    ],
    images: Annotated[int, typer.Option(min=1, help="Number of photos to caption.")] = 4,
    regions: Annotated[int, typer.Option(min=1, help="Measure 1 to N regions per image.")] = 8,
    max_new_tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Caption length to measure, in tokens. Repeat the option for each length.",
            show_default="32 and 64",
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Number of decoding steps to measure. Repeat the option for each number.",
            show_default="8, 16, 32 and 64",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="How often each measurement is taken; the fastest counts.")
    ] = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure what captioning costs, by number of regions, caption length, decoding steps and cache.

    Confidence thresholds of the strategy `threshold` and batch sizes are measured too. Their values have no
    option here; the section `profile` in a configuration of `evaluate` sets them.
    """
    from ...model_training.evaluation import profile as measuring
    from ...schemas.evaluation import ProfileConfig

    given: dict[str, Any] = {"corpus": corpus, "images": images, "repeats": repeats}
    given |= {"regions": tuple(range(1, regions + 1))}
    lists = {"max_new_tokens": max_new_tokens, "steps": steps}
    given |= {name: tuple(values) for name, values in lists.items() if values}
    rows = measuring.measure_costs(model, ProfileConfig(**given), out, device, dtype, show_row)
    print(measuring.markdown_table(rows), end="")
    for name in (measuring.TABLE, measuring.ROWS, measuring.PLOT):
        print(out / name)


def notes(result: dict[str, Any]) -> Iterator[str]:
    """What a benchmark's numbers cannot be compared without: how the model was asked, what it left empty."""
    name, quality = result["benchmark"], result.get("quality") or {}
    if result.get("prompt"):
        yield f"{name}: asked {result['prompt']!r}, grouping {result['grouping']}"
    if quality.get("empty"):
        yield f"{name}: {quality['empty']:.1%} of the captions are empty"
    if not result["questions"]:
        yield f"{name}: no scores: no judge is configured; add `judge` to the configuration"


def _table(found: dict[str, Any]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    names = ("benchmark", "average", "positive", "negative", "recognized", "regions", "tok/fwd", "s")
    table = Table(*names, box=SIMPLE, padding=(0, 1, 0, 0))
    for each in found["benchmarks"]:
        shares = (each[name] for name in ("average", "positive", "negative", "recognised"))
        cells = ["" if share is None else f"{share:.1%}" for share in shares]
        regions = f"{each['regions']:,}" + (
            f" ({each['without_caption']:,} without)" if each["without_caption"] else ""
        )
        per_forward = f"{each['tokens_per_forward']:.1f}" if each["forwards"] else ""
        table.add_row(each["benchmark"], *cells, regions, per_forward, f"{each['seconds']:.1f}")
    for name, toy in found.get("toy", {}).items():
        shares = f"{toy['exact']:.1%} exact, {toy['leaked']:.1%} leaked"
        table.add_row(f"toy, {name}", shares, "", "", "", f"{toy['regions']:,}", "", f"{toy['seconds']:.3f}")
    return table
