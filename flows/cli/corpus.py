"""The commands that read a corpus: `verify`, `inspect`, `show`, `explore`, `report`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Corpus, Json, print_json

Outside = Annotated[
    bool,
    typer.Option(
        "--photos-outside",
        help="Show photos of dropped images from where the work list has them on this machine, outside of "
        "CORPUS. For corpora whose builder you trust.",
    ),
]
Urls = Annotated[
    bool, typer.Option("--photo-urls", help="Fetch photos of dropped images that the work list has at URLs.")
]


def verify(corpus: Corpus, json: Json = False) -> None:
    """Check that a corpus is complete and undamaged; exit code 1 if it is not."""
    from ...pipeline.corpus import verify as verifying

    report = verifying.verify(corpus)
    if json:
        print_json({"ok": report.ok, **report._asdict()})
    else:
        print(report.text())
    raise typer.Exit(0 if report.ok else 1)


def inspect(corpus: Corpus, json: Json = False) -> None:
    """Print the funnel, with samples of what was kept and of what was dropped for each reason."""
    from rich.console import Console

    from ...pipeline.corpus import inspect as inspecting

    if json:
        print_json(inspecting.inspect_values(corpus))
    else:
        Console().print(inspecting.inspect(corpus))


def show(
    corpus: Corpus, key: str, picture: Annotated[Path, typer.Option("--out", help="PNG to write.")]
) -> None:
    """Draw one image with its masks and captions."""
    from ...pipeline.corpus.contact_sheet import draw_corpus_image

    draw_corpus_image(corpus, key, picture)
    print(picture)


def explore(
    corpus: Corpus,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes any that is free.")] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to bind to. Requests from other machines need a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(help="Token that requests need.", show_default="a random one for other machines"),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The `out` of a training run to show as well.")] = None,
    shards: Annotated[
        str | None, typer.Option(help="Folder or URL of the shards, if they are not in CORPUS.")
    ] = None,
    photos_outside: Outside = False,
    photo_urls: Urls = False,
) -> None:
    """Open a corpus in the browser: the funnel, images with masks, other thresholds, reviews."""
    from ...pipeline.explorer.serve import serve

    def tell(url: str) -> None:
        print(f"{url} (Ctrl-C ends it)", flush=True)

    serve(corpus, host, port, token, run, shards, photos_outside, photo_urls, tell)


def report(
    corpus: Corpus,
    to: Annotated[
        Path | None, typer.Option(help="HTML file to write.", show_default="CORPUS/report.html")
    ] = None,
    photos_outside: Outside = False,
    photo_urls: Urls = False,
) -> None:
    """Write the overview and samples of each drop reason as one HTML file."""
    from ...pipeline.explorer.report import write_report

    print(write_report(corpus, to, photos_outside, photo_urls))


def export(
    corpus: Corpus,
    format: Annotated[str, typer.Option(help="Format: perceptiondlm-json, coco or parquet.")],
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    prefix: Annotated[
        str, typer.Option(help="What names of photos and JSONs begin with, such as the folder's path.")
    ] = "",
    split: Annotated[
        str | None,
        typer.Option(
            help="Images to export: train, held_out or all.",
            show_default="train if the corpus holds images out, else all",
        ),
    ] = None,
) -> None:
    """Export the corpus in another format. Photos become files if the format names them by path."""
    from ...pipeline.corpus import export as exporting

    chosen = exporting.select(corpus, split)
    written = exporting.export(corpus, format, to, prefix, chosen.split)
    if chosen.share:
        found, images = chosen.images
        print(f"split {chosen.split}: {found:,} of {images:,} images; held_out_share is {chosen.share:g}")
    for path in written:
        print(path)
