"""The commands that read a corpus: `verify`, `inspect`, `show`, `explore`, `report`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...schemas.errors import ConfigError
from . import publishing
from .arguments import Corpus, Json, Place, print_json, suggest, to_location

if TYPE_CHECKING:
    from ...pipeline.io.location import Location

Outside = Annotated[
    bool,
    typer.Option(
        "--photos-outside",
        help="Also show photos of images without a kept region. They are not in the corpus, so they are read "
        "from the source paths that the corpus names. Use this only for a corpus whose builder you trust.",
    ),
]
Urls = Annotated[
    bool,
    typer.Option(
        "--photo-urls",
        help="Also show photos of images without a kept region whose source is a URL. They are fetched from "
        "the URLs that the corpus names. Use this only for a corpus whose builder you trust.",
    ),
]


def verify(
    corpus: Corpus,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes that check units.")] = 1,
    json: Json = False,
) -> None:
    """Check that a corpus is complete and undamaged. Exit code 1 if it is not."""
    from ...pipeline.corpus import verify as verifying

    report = verifying.verify(corpus, workers=workers)
    if json:
        print_json({"ok": report.ok, **report._asdict()})
    else:
        print(report.text())
    if not report.ok:
        raise typer.Exit(1)
    if not json:
        suggest(("explore", corpus), ("export", corpus, "--format", "coco", "--to", "FOLDER"))


def inspect(
    corpus: Corpus,
    json: Json = False,
    shards: Annotated[
        bool,
        typer.Option(
            "--shards",
            help="Print the path or URL of each committed shard, one in a line, and nothing else. No pattern "
            "names those of a bucket.",
        ),
    ] = False,
    pipe: Annotated[
        bool,
        typer.Option(
            "--pipe", help="With --shards: print a URL as a `pipe:` command, as webdataset reads it."
        ),
    ] = False,
) -> None:
    """Print how many regions each step left (the funnel), with samples of kept and of dropped regions."""
    if pipe and not shards:
        raise ConfigError("inspect: --pipe says how shards are listed; give --shards, too")
    if shards:
        from ...pipeline.corpus.shard_pipes import pipe_of
        from ...pipeline.corpus.shard_urls import list_shards

        for shard in list_shards(corpus):
            print(pipe_of(shard) if pipe else shard)
    elif json:
        from ...pipeline.corpus.inspect import inspect_values

        print_json(inspect_values(corpus))
    else:
        print_funnel(corpus)
        suggest(("explore", corpus), ("verify", corpus))


def print_funnel(corpus: Location) -> None:
    """Print the funnel of each subset, and samples of regions."""
    from rich.console import Console

    from ...pipeline.corpus.inspect import inspect as render

    Console().print(render(corpus))


def show(
    corpus: Corpus,
    key: Annotated[
        str,
        typer.Argument(help="Key of the image, as `inspect`, `explore` and index.parquet have it."),
    ],
    picture: Annotated[Path, typer.Option("--out", help="PNG file to write.")],
) -> None:
    """Draw one image with its masks and captions."""
    from ...pipeline.corpus.contact_sheet import draw_corpus_image

    draw_corpus_image(corpus, key, picture)
    print(picture)
    suggest(("explore", corpus))


def explore(
    corpus: Corpus,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 picks a free one.")
    ] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to listen on. One that other machines reach needs a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            help="Token that every request has to carry, with 8 characters or more.",
            show_default="none if --host is this machine only, else a random one",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a training run, the `out` of its configuration, to show too.", show_default="none"
        ),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL that has <subset>/shards/ in it, if the shards were moved.",
            show_default="CORPUS",
        ),
    ] = None,
    photos_outside: Outside = False,
    photo_urls: Urls = False,
) -> None:
    """Show a corpus in the browser: the funnel, images with masks, the effect of other thresholds, reviews.

    Prints the address to open, and serves the pages until it is interrupted.
    """
    from ...pipeline.explorer.serve import serve

    def tell(url: str) -> None:
        print(f"{url} (Ctrl-C ends it)", flush=True)

    serve(corpus, host, port, token, run, shards, photos_outside, photo_urls, tell)


def report(
    corpus: Corpus,
    to: Annotated[
        Place | None,
        typer.Option(
            parser=to_location, metavar="PATH", help="HTML file to write.", show_default="CORPUS/report.html"
        ),
    ] = None,
    photos_outside: Outside = False,
    photo_urls: Urls = False,
) -> None:
    """Write the overview, with samples of kept regions and of each drop reason, as one HTML file."""
    from ...pipeline.explorer.report import write_report

    print(write_report(corpus, to, photos_outside, photo_urls))


def export(
    corpus: Corpus,
    format: Annotated[
        str,
        typer.Option(help="Format: perceptiondlm-json, coco, parquet, hub (a dataset repository) or mds."),
    ],
    to: Annotated[
        Place, typer.Option(parser=to_location, metavar="PATH", help="Folder to write, or URL in a bucket.")
    ],
    prefix: Annotated[
        str,
        typer.Option(
            help="Text to put before the photo and JSON paths in the written files, such as the path of the "
            "folder.",
            show_default="none: paths are relative to the folder",
        ),
    ] = "",
    split: Annotated[
        str | None,
        typer.Option(
            help="Images to export: train, held_out or all.",
            show_default="train if the corpus has held-out images, else all; hub and mds: all",
        ),
    ] = None,
    shard_mb: Annotated[
        float | None,
        typer.Option(
            "--shard-mb",
            help="Largest size of a shard in MB, for hub and mds.",
            show_default="1000 for hub, 64 for mds",
        ),
    ] = None,
    energon: Annotated[
        bool,
        typer.Option(
            "--energon",
            help="With hub, also write the metadata that Megatron-Energon needs to read the shards.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="With hub, print the files, their sizes and the head of the card, and write nothing.",
        ),
    ] = False,
) -> None:
    """Export the corpus in another format.

    perceptiondlm-json and coco name photos by path, so the photos are written as files too. parquet has the
    photos inside. hub is a dataset repository to upload to a hub (docs/publishing.md); if it is interrupted,
    the same command goes on with it. mds is read by mosaicml-streaming, which has to be installed.
    """
    from ...pipeline.corpus import export as exporting

    publishing.refuse_options(format, prefix, shard_mb, energon, dry_run)
    if format == "hub":
        folder = publishing.local_folder(to, format)
        publishing.publish_corpus(corpus, folder, split, shard_mb, energon, dry_run)
        return
    if format == "mds":
        publishing.export_mds(corpus, publishing.local_folder(to, format), split, shard_mb)
        return
    chosen = exporting.select(corpus, split)
    written = exporting.export(corpus, format, to, prefix, chosen.split)
    if chosen.share:
        found, images = chosen.images
        print(f"split {chosen.split}: {found:,} of {images:,} images; held_out_share is {chosen.share:g}")
    for path in written:
        print(path)
    suggest(("config", "--training") if format == "perceptiondlm-json" else ("explore", corpus))
