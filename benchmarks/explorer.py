"""The explorer on one million synthetic regions: time of its pages, and memory of its server.

    python -m benchmarks.explorer [--regions 1000000] [--corpus DIR]

100,000 images with 10 regions each in 196 units, COCONut's and SA-1B's columns; captions of 6 to 34 words of
a vocabulary with Zipf's frequencies, so that there are rare words and common ones. Each time is that of the
whole answer over HTTP, with nothing remembered of the question; "page turn" is the median of ten. Beside it
stand the CPU seconds that the server took, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import html
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import pyarrow as pa

from paracaption.filters import rle
from paracaption.pipeline.corpus import ledger
from paracaption.schemas import manifest as manifests
from paracaption.schemas.config import BuildConfig, dump_config
from paracaption.schemas.manifest import FileEntry, Manifest

PER_IMAGE, PER_UNIT = 10, 512
SIZE = (480, 640)
CATEGORIES = [f"category {i}" for i in range(133)]
DROPS = (("source", "crowd"), ("verify_category", "category_wrong"), ("clean_text", "text_too_short"))
RARE = "zanzibar"


def write_corpus(out: Path, num_regions: int) -> None:
    """Ledgers, manifests and shards of the kind that a build writes; every image has the same photo."""
    rng = np.random.default_rng(0)
    config = BuildConfig.model_validate({"out": str(out), "sa1b": [{"paths": ["none"]}]})
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(config))
    words = np.array([f"word{i}" for i in range(5_000)])
    chances = 1 / np.arange(1, len(words) + 1)
    photo = _photo(rng)
    masks = [_mask(rng) for _ in range(200)]
    num_images = num_regions // PER_IMAGE
    for folder in ("manifests", "ledger", "shards"):
        (out / "sa1b" / folder).mkdir(parents=True)
    for number, first in enumerate(range(0, num_images, PER_UNIT)):
        unit = f"sa1b-{number:06d}"
        keys = [f"sa_{i}" for i in range(first, min(num_images, first + PER_UNIT))]
        place = _write_shard(out / "sa1b" / "shards" / f"{unit}.tar", photo)
        table = _table(rng, unit, keys, words, chances / chances.sum(), masks, place, len(photo))
        (out / "sa1b" / "ledger" / f"{unit}.parquet").write_bytes(ledger.table_bytes(table))
        kept = table["kept"].to_numpy()
        names = [f"{stage}/{reason}" for stage, reason in DROPS]
        reasons = np.array(table["drop_reason"].to_pylist(), object)
        dropped = {name: int((reasons == name.partition("/")[2]).sum()) for name in names}
        record = Manifest(
            unit, "sa1b", "plan", "recipe", FileEntry(f"shards/{unit}.tar", 1, ""),
            FileEntry(f"ledger/{unit}.parquet", 1, ""),
            dict(zip(keys, kept.reshape(-1, PER_IMAGE).sum(1).tolist(), strict=True)),
            len(kept), int(kept.sum()), dropped, {},
        )  # fmt: skip
        (out / "sa1b" / "manifests" / f"{unit}.json").write_bytes(manifests.encode(record))


def _table(
    rng: Any, unit: str, keys: list[str], words: Any, chances: Any, masks: Any, place: int, length: int
) -> pa.Table:
    n = len(keys) * PER_IMAGE
    lengths = rng.integers(6, 35, n)
    stream = words[rng.choice(len(words), lengths.sum(), p=chances)]
    captions = [" ".join(part) + "." for part in np.split(stream, np.cumsum(lengths)[:-1])]
    for i in np.flatnonzero(rng.random(n) < 2e-5):
        captions[i] = f"A view of {RARE.title()} with {captions[i]}"
    drop = rng.integers(0, 12, n)
    kept = drop >= len(DROPS)
    iou = np.clip(rng.normal(0.7, 0.2, n), 0, 1)
    chosen = rng.integers(0, len(masks), n)
    category = [CATEGORIES[i] for i in rng.integers(0, len(CATEGORIES), n)]

    def where(values: Any, kind: Any = None) -> pa.Array:
        return pa.array(
            [value if there else None for value, there in zip(values, kept.tolist(), strict=True)], kind
        )

    columns: dict[str, Any] = {
        "unit": pa.repeat(unit, n),
        "subset": pa.repeat("sa1b", n),
        "key": np.repeat(keys, PER_IMAGE),
        "region": np.tile(np.arange(PER_IMAGE), len(keys)),
        "kept": kept,
        "drop_stage": [None if d >= len(DROPS) else DROPS[d][0] for d in drop],
        "drop_reason": [None if d >= len(DROPS) else DROPS[d][1] for d in drop],
        "category": category,
        "caption": captions,
        "file_name": np.repeat([f"{key}.jpg" for key in keys], PER_IMAGE),
        "photo_format": pa.repeat("jpeg", n),
        "image_width": np.full(n, SIZE[1]),
        "image_height": np.full(n, SIZE[0]),
        "area": np.array([mask.area for mask in masks])[chosen],
        "rle_counts": [masks[i].rle.counts for i in chosen],
        "iou": iou,
        "verdict_margin": rng.normal(2, 3, n),
        "num_words": lengths.astype(float),
        "repeat_share": rng.beta(1, 20, n),
        "shard": where([f"shards/{unit}.tar"] * n),
        "photo_offset": where([place] * n, pa.int64()),
        "photo_length": where([length] * n, pa.int64()),
    }
    arrays = [
        pa.nulls(n, field.type) if field.name not in columns
        else columns[field.name].cast(field.type) if isinstance(columns[field.name], pa.Array)
        else pa.array(columns[field.name], field.type)
        for field in ledger.ledger_schema()
    ]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=ledger.ledger_schema())


def _photo(rng: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    small.resize(SIZE[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _mask(rng: Any) -> rle.Mask:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    at, radii = rng.uniform(0.1, 0.9, 2) * SIZE, rng.uniform(20, 120, 2)
    return rle.from_mask(((y - at[0]) / radii[0]) ** 2 + ((x - at[1]) / radii[1]) ** 2 < 1)


def _write_shard(path: Path, photo: bytes) -> int:
    """A tar with the photo; returns its offset."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("photo.jpg")
        info.size = len(photo)
        tar.addfile(info, io.BytesIO(photo))
    return 512


class Took(NamedTuple):
    """Seconds by the clock, and of the server's CPU time."""

    wall: float
    cpu: float


class Server:
    """The command in a process of its own."""

    def __init__(self, out: Path):
        start = time.perf_counter()
        command = [sys.executable, "-m", "paracaption.flows.cli", "explore", str(out), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.client = httpx.Client(base_url=self.process.stdout.readline().split()[0], timeout=600)
        self.start_s = time.perf_counter() - start
        self.page = ""

    def cpu_s(self) -> float:
        """That the server took so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def get(self, url: str) -> Took:
        """Fetch a page, and keep its text."""
        before, start = self.cpu_s(), time.perf_counter()
        answer = self.client.get(url)
        took = Took(time.perf_counter() - start, self.cpu_s() - before)
        answer.raise_for_status()
        self.page = answer.text if "text" in answer.headers["content-type"] else ""
        return took

    def turn(self, url: str, times: int = 10) -> Took:
        """Medians of following the link to the next page."""
        found = []
        self.get(url)
        for _ in range(times):
            link = re.search(r'rel="next" href="([^"]+)"', self.page)
            if link is None:
                break
            found.append(self.get(html.unescape(link[1])))
        return Took(*(statistics.median(each) for each in zip(*found, strict=True)))

    def memory_mb(self) -> float:
        """Most that was resident so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


def measure(out: Path) -> None:
    """Print what each page takes, and what is wanted."""

    def add(what: str, took: Took, wanted: str = "") -> None:
        print(f"{what:<56} {took.wall:7.3f} s  {took.cpu:7.3f} s CPU  {wanted}", flush=True)

    for what, url in (("first page: overview", "/"), ("first page: browse", "/browse")):
        server = Server(out)
        if what.endswith("overview"):
            add("start of the server, until it accepts connections", Took(server.start_s, server.cpu_s()))
        add(f"{what}, of a server just started", server.get(url), "< 1 s")
        if what.endswith("overview"):
            add("  its distributions, which follow", server.get("/distributions/sa1b"))
        server.close()
    server = Server(out)
    server.get("/browse")
    for what, text in (
        ("a rare word", RARE),
        ("a word in most captions", "word1"),
        ("two words", "word40 word70"),
    ):
        add(f"text search: {what}", server.get(f"/browse?text={text}"), "< 2 s")
        add("  how many there are, counted after it", server.get(f"/total?text={text}"))
    add("text search: no such word", server.get("/browse?text=nowhere"), "< 2 s")
    add("page turn, in the corpus's order", server.turn("/browse"), "< 300 ms")
    add("page turn, of a search", server.turn("/browse?text=word40"), "< 300 ms")
    add(
        "page turn, of a search for a word of some 500 regions",
        server.turn("/browse?text=word4900"),
        "< 300 ms",
    )
    add("page turn, of drops for a reason", server.turn("/browse?reason=category_wrong"), "< 300 ms")
    add("first page by a score", server.get("/browse?sort=iou&outcome=kept"), "< 2 s")
    add("page turn, by a score", server.turn("/browse?sort=iou&outcome=kept"), "< 300 ms")
    add("image page", server.get("/image/sa1b/sa_51234"))
    add("image page, again", server.get("/image/sa1b/sa_51234"))
    add("thumbnail with 10 masks", server.get("/thumb/sa1b/sa_777?r=0,1,2,3,4,5,6,7,8,9"))
    add("what if: higher IoU", server.get("/whatif/result?min_iou=0.7"))
    add("what if: more words", server.get("/whatif/result?text.min_words=10"))
    add("review: a region at random", server.get("/review?decision=kept"))
    print(f"{'memory of the server, the most that was resident':<56} {server.memory_mb():7.0f} MB  < 1 GB")
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--regions", type=int, default=1_000_000)
    parser.add_argument("--corpus", type=Path, help="kept, and used again if it is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="paracaption-explorer-") as folder:
        out = args.corpus or Path(folder) / "out"
        if not (out / "config.yaml").exists():
            start = time.perf_counter()
            write_corpus(out, args.regions)
            print(f"wrote {args.regions:,} regions in {time.perf_counter() - start:.0f} s", flush=True)
        measure(out)


if __name__ == "__main__":
    main()
