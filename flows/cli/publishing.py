"""What `export --format hub`, `export --format mds` and `models publish` print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...schemas.errors import ConfigError
from .arguments import suggest

if TYPE_CHECKING:
    from ...pipeline.corpus import hub
    from ...pipeline.io.location import Location


def refuse_options(format: str, prefix: str, shard_mb: float | None, energon: bool, dry_run: bool) -> None:
    """Raise ConfigError for a format that does not exist, and for an option that the format does not have."""
    from ...pipeline.corpus.export import FORMATS

    if format not in (*FORMATS, "hub", "mds"):
        raise ConfigError(f"format {format!r}: no such format; there are {', '.join(FORMATS)}, hub, mds")
    for option, given, formats in (
        ("--prefix", prefix, tuple(FORMATS)),
        ("--shard-mb", shard_mb is not None, ("hub", "mds")),
        ("--energon", energon, ("hub",)),
        ("--dry-run", dry_run, ("hub",)),
    ):
        if given and format not in formats:
            raise ConfigError(f"{option}: not for the format {format}, only for {', '.join(formats)}")


def local_folder(to: Location, format: str) -> Path:
    """The folder that a format is written to; ConfigError for a place in a bucket."""
    if isinstance(to, Path):
        return to
    raise ConfigError(
        f"{to}: {format} is written to a folder of this machine; give one, and upload it from there "
        "(docs/publishing.md)"
    )


def publish_corpus(
    corpus: Location, to: Path, split: str | None, shard_mb: float | None, energon: bool, dry_run: bool
) -> None:
    """Write a dataset repository, or print what it would have."""
    from rich.console import Console
    from rich.progress import Progress

    from ...pipeline.corpus import hub

    repository = hub.plan_repository(corpus, split, hub.SHARD_MB if shard_mb is None else shard_mb, energon)
    plan = repository.plan
    if dry_run:
        _print_dry_run(repository)
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing shards", total=plan.bytes)
        written = hub.write_repository(repository, to, lambda size: progress.advance(task, size))
    for name in plan.splits:
        shards = plan.of(split=name)
        images, regions = sum(each.images for each in shards), sum(each.regions for each in shards)
        print(f"split {name}: {images:,} images, {regions:,} regions in {len(shards):,} shards")
    print(f"{len(written):,} files, {plan.bytes / 1e6:,.1f} MB of shards: {to}")
    suggest(
        f"hf upload NAMESPACE/NAME {shlex.quote(str(to))} . --repo-type dataset    # see docs/publishing.md"
    )


def _print_dry_run(repository: hub.Repository) -> None:
    plan = repository.plan
    for name, text in sorted(repository.texts.items()):
        print(f"{len(text.encode()):>16,}  {name}")
    for shard in plan.shards:
        counted = f"{shard.images:,} images, {shard.regions:,} regions"
        print(f"{shard.bytes:>16,}  {shard.path}  {counted}")
        if repository.energon:
            print(f"{8 * (shard.images + 1):>16,}  {shard.path}.idx")
    for split in plan.splits:
        rows = sum(each.regions for each in plan.of(split=split))
        print(f"{'?':>16}  index/{split}.parquet  {rows:,} rows")
    if repository.energon:
        for subset in plan.subsets:
            print(f"{'?':>16}  data/{subset}/.nv-meta/index.sqlite")
            print(f"{36:>16}  data/{subset}/.nv-meta/index.uuid")
    print(f"\n---\n{repository.front_matter}---")


def export_mds(corpus: Location, to: Path, split: str | None, shard_mb: float | None) -> None:
    """Write a corpus as MDS."""
    from ...pipeline.corpus import mds

    for folder in mds.export_mds(corpus, to, split, mds.SHARD_MB if shard_mb is None else shard_mb):
        print(folder)


def publish_model(path: Path, to: Path, title: str, stated: dict[str, Any], dry_run: bool) -> None:
    """Write a model repository, or print what it would have.

    Args:
        path: of a run or of a saved model.
        to: the folder to write.
        title: of the card.
        stated: what else is said of the model: the other arguments of `plan_repository`.
        dry_run: print only.
    """
    from ...model_training.train import publish

    repository = publish.plan_repository(path, title, **stated)
    for name in repository.left_out:
        print(f"not published: {repository.folder / name}", file=sys.stderr)
    if dry_run:
        print(f"{len(repository.card.encode()):>16,}  {publish.CARD}")
        for name, size in repository.files.items():
            print(f"{size:>16,}  {name}")
        print(f"\n{repository.card}", end="")
        return
    for file in publish.write_repository(repository, to):
        print(file)
    suggest(f"hf upload NAMESPACE/NAME {shlex.quote(str(to))} .    # see docs/publishing.md")
