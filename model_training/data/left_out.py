"""Which images of a corpus are not trained on: photos of benchmarks, by file name, and its held-out split."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...filters.held_out import is_held_out, without_repeat
from ...pipeline.corpus import reader
from ...pipeline.io import benchmark_photos
from .table import cached_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from ...schemas.training import DataOptions

BENCHMARK_PHOTOS = "benchmark_photos"
"""Why images are left out: they are photos of ParaDLC-Bench or DLC-Bench."""

HELD_OUT = "held_out"
"""Why images are left out: a corpus of the run holds them out of training."""

COLUMNS = ["unit", "key", "image_width", "image_height"]
FILE_NAME = "file_name"

_WORDS = {
    BENCHMARK_PHOTOS: "of ParaDLC-Bench or DLC-Bench (to train on them, set data.benchmark_photos: keep)",
    HELD_OUT: "of the held-out split (`held_out_share` of the build)",
}
_FOUND = "found.json"


class Rules(NamedTuple):
    """What decides which images are left out.

    Attributes:
        benchmarks: digest of those that are photos of benchmarks; "" if none is, or if they are kept.
        held_out_share: share of the images that are held out.
    """

    benchmarks: str = ""
    held_out_share: float = 0.0

    def facts(self) -> list[Any]:
        """What a table's name has to cover besides its manifests; nothing if no image is left out."""
        found: list[Any] = [BENCHMARK_PHOTOS, self.benchmarks] if self.benchmarks else []
        return found + ([HELD_OUT, self.held_out_share] if self.held_out_share else [])

    def reasons(self, table: pa.Table, firsts: np.ndarray) -> list[str]:
        """Why each image of a table with a row per region is left out; "" for those to train on.

        Args:
            table: with `COLUMNS`, and with `FILE_NAME` if it is known.
            firsts: (N,) the row in which each image starts.
        """
        if not self.facts():
            return [""] * len(firsts)
        images, share = _images(table, firsts), self.held_out_share
        reasons = [HELD_OUT if share and is_held_out(row["key"], share) else "" for row in images]
        if not self.benchmarks:
            return reasons
        listed = _are_benchmarks(images)
        return [BENCHMARK_PHOTOS if found else other for found, other in zip(listed, reasons, strict=True)]


def _images(table: pa.Table, firsts: np.ndarray) -> list[dict[str, Any]]:
    known = [name for name in (*COLUMNS, FILE_NAME) if name in table.column_names]
    return table.select(known).take(firsts).to_pylist()


def _are_benchmarks(images: list[dict[str, Any]]) -> list[bool]:
    return [is_benchmark(_name_of(row), (row["image_width"], row["image_height"])) for row in images]


def is_benchmark(name: str, size: tuple[int | None, int | None], number: int | str | None = None) -> bool:
    """Whether a photo is one of a benchmark.

    Args:
        name: of its file, with or without folders; "" if it is not known.
        size: width and height in pixels, if they are known.
        number: the id that its publisher may have given it.
    """
    return bool(benchmark_photos.load_names().find(name, number, size))


def _name_of(row: dict[str, Any]) -> str:
    """The photo's name; the key has it too, but for what tells images of one name apart."""
    return row.get(FILE_NAME) or without_repeat(row["key"])


@functools.cache
def list_digest() -> str:
    """Identifies the list of the benchmarks' photos."""
    names = benchmark_photos.load_names().photos
    return hashlib.sha256(repr(sorted(names.items())).encode()).hexdigest()[:16]


def first_rows(table: pa.Table) -> np.ndarray:
    """In which rows the images start, of a table with a row per region: (N,)."""
    units, keys = table["unit"].to_numpy(), table["key"].to_numpy()
    if not len(keys):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.append(True, (units[1:] != units[:-1]) | (keys[1:] != keys[:-1])))


def apply(rules: Rules, table: pa.Table) -> tuple[pa.Table, list[str]]:
    """The rows of the images that are trained on, and why each of the others is not."""
    import pyarrow as pa

    firsts = first_rows(table)
    reasons = rules.reasons(table, firsts)
    if not any(reasons):
        return table, []
    rows = np.repeat([not reason for reason in reasons], np.diff(np.append(firsts, table.num_rows)))
    return table.filter(pa.array(rows)).combine_chunks(), [reason for reason in reasons if reason]


def total(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The counts of several sources together."""
    return dict(sorted(sum(map(Counter, counts), Counter()).items()))


def said(counts: Mapping[str, int]) -> str:
    """How many images are left out and why, for a message."""
    return ", ".join(
        f"{number:,} photo{'s' * (number != 1)} {_WORDS[reason]}" for reason, number in sorted(counts.items())
    )


def advice(counts: Sequence[Mapping[str, int]]) -> str:
    """What else may have changed the data of a run that cannot go on; "" if nothing is left out."""
    found, text = total(counts), ""
    if HELD_OUT in found:
        text += (
            ", or, if the run began when a corpus had another held_out_share, set that share again in the "
            "configuration of the corpus and run `paracaption merge CONFIG`"
        )
    if BENCHMARK_PHOTOS in found:
        text += ", or, if the run trained on photos of the benchmarks before, set data.benchmark_photos: keep"
    return text


def rules_of(
    held_out_share: float,
    options: DataOptions,
    digests: dict[str, str],
    tables: Iterable[pa.Table],
    cache: Path,
) -> Rules:
    """The rules for a corpus. Those that leave no image out are not among them.

    So a run that began before there were rules goes on, unless it has to leave something out.

    Args:
        held_out_share: share of the images that are held out.
        options: of the run.
        digests: of the manifests of each subset, under which the answer is kept.
        tables: the corpus's kept regions, with `COLUMNS`, and `FILE_NAME` if it is known. They are read only
            if the cache has no answer.
        cache: local folder of the tables.
    """
    if options.benchmark_photos == "keep":
        return Rules("", held_out_share)

    def write(folder: Path) -> None:
        digest, found = hashlib.sha256(), False
        for table in tables:
            images = _images(table, first_rows(table))
            for row in itertools.compress(images, _are_benchmarks(images)):
                found = True
                digest.update(f"{row['unit']}/{row['key']}\n".encode())
        (folder / _FOUND).write_text(digest.hexdigest()[:16] if found else "")

    facts = repr((sorted(digests.items()), list_digest()))
    name = hashlib.sha256(facts.encode()).hexdigest()[:16]
    found = (cached_folder(cache, f"benchmarks-{name}", write) / _FOUND).read_text()
    return Rules(found, held_out_share)


def has_file_names(corpus: reader.Corpus) -> bool:
    """Whether the index says what each photo's file is called. Who reads a damaged one says so."""
    import pyarrow as pa

    try:
        return FILE_NAME in corpus.index_columns()
    except (OSError, pa.ArrowException):
        return True
