"""What a bucket costs: writing shards, reading photos, feeding a trainer; and what buckets cost a folder.

    python -m benchmarks.store writes               # ministack: our store against bare obstore and s3fs
    python -m benchmarks.store reads
    python -m benchmarks.store feed                 # the loader on a bucket that takes 20 ms, and on a folder
    python -m benchmarks.store folder --before cda0f34    # builds into a folder, by other code and by this

All sides of a comparison take turns in one run, so that a busy machine hits them alike; what is printed is
the median of the ratios of the turns. CPU seconds are those of the client alone, all its threads together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from paracaption.model_training.data.loader import Loader
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import files, scratch
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.records import Blob
from paracaption.schemas.training import CorpusSource, DataOptions
from tests.building import config_of
from tests.object_server import control, s3_environment
from tests.servers import running_ministack
from tests.synthetic import write_coconut

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 100 << 20
PIECE_BYTES = 256 << 10
PHOTO_BYTES = (80_000, 250_000)
LATENCY_S = 0.02
WHAT = ("stores", "writes", "reads", "feed", "folder")
"""What can be measured; `stores` is writes and reads."""


class Spent(NamedTuple):
    """Seconds of one side in one turn."""

    clock_s: float
    cpu_s: float


def spend(work: Callable[[], Any]) -> Spent:
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - clock, time.process_time() - cpu)


def compare(title: str, sides: dict[str, Callable[[int], Any]], turns: int) -> None:
    """Run all sides `turns` times in changing order, after one turn that does not count; print ratios.

    The first side is what the others are compared with.
    """
    found: dict[str, list[Spent]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        order = list(sides)
        random.Random(turn).shuffle(order)
        for name in order:
            spent = spend(lambda name=name, turn=turn: sides[name](turn))
            if turn:
                found[name].append(spent)
    first, *others = sides
    print(f"{title}, median of {turns} turns:")
    for name in sides:
        clock, cpu = (statistics.median(each[i] for each in found[name]) for i in (0, 1))
        print(f"  {name:<14} {clock:7.2f} s by the clock  {cpu:7.2f} CPU s")
    for name in others:
        pairs = list(zip(found[first], found[name], strict=True))
        clock = [ours.clock_s / theirs.clock_s for ours, theirs in pairs]
        cpu = [ours.cpu_s / theirs.cpu_s for ours, theirs in pairs]
        print(
            f"  {first} / {name}: {statistics.median(clock):.2f} by the clock "
            f"({min(clock):.2f} to {max(clock):.2f}), {statistics.median(cpu):.2f} by CPU "
            f"({min(cpu):.2f} to {max(cpu):.2f})",
            flush=True,
        )


# Shards and photos.


def stores(what: str, turns: int, reads: int, folder: Path) -> None:
    """Our store, bare obstore and s3fs on a ministack."""
    with running_ministack(_Below(folder)) as server:
        os.environ.update(server.environment)
        server.make_bucket("bench")
        write = writers(folder)
        if what != "reads":
            compare(f"a shard of {SHARD_BYTES >> 20} MiB is written", write, turns)
        if what != "writes":
            write["Store"](0)
            compare(f"{reads} ranges of a photo's size are read one by one", readers(reads), turns)


class _Below:
    """Makes folders in a folder, as pytest does for tests."""

    def __init__(self, folder: Path):
        self._folder = folder

    def mktemp(self, basename: str) -> Path:
        made = self._folder / basename
        made.mkdir()
        return made


def writers(folder: Path) -> dict[str, Callable[[int], Any]]:
    """Each writes the same pieces, as the writer of a tar does, and has an object at the end."""
    import obstore
    import s3fs
    from obstore.store import S3Store

    piece, num_pieces = random.Random(0).randbytes(PIECE_BYTES), SHARD_BYTES // PIECE_BYTES
    store = S3Store("bench", client_options={"allow_http": True})
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], skip_instance_cache=True)

    def write_pieces(file: Any) -> None:
        for _ in range(num_pieces):
            file.write(piece)

    def ours(turn: int) -> None:
        with store_of("s3://bench/corpus").write(f"s3://bench/corpus/ours-{turn}.tar") as file:
            write_pieces(file)

    def bare(turn: int) -> None:
        staged = folder / "staged.tar"
        with staged.open("wb") as file:
            write_pieces(file)
        obstore.put(store, f"corpus/bare-{turn}.tar", staged)
        staged.unlink()

    def theirs(turn: int) -> None:
        with fs.open(f"bench/corpus/s3fs-{turn}.tar", "wb") as file:
            write_pieces(file)

    return {"Store": ours, "obstore": bare, "s3fs": theirs}


def readers(reads: int) -> dict[str, Callable[[int], Any]]:
    """Each reads the same ranges of one shard; what is read is compared in the turn that does not count."""
    import obstore
    import s3fs
    from obstore.store import S3Store

    url, key = "s3://bench/corpus/ours-0.tar", "corpus/ours-0.tar"
    store = S3Store("bench", client_options={"allow_http": True})
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"], skip_instance_cache=True)

    def ranges(turn: int) -> Iterator[tuple[int, int]]:
        draw = random.Random(turn)
        for _ in range(reads):
            length = draw.randint(*PHOTO_BYTES)
            yield draw.randrange(SHARD_BYTES - length), length

    def ours(turn: int) -> None:
        for start, length in ranges(turn):
            assert len(files.read(Blob(url, start, length))) == length

    def bare(turn: int) -> None:
        for start, length in ranges(turn):
            assert len(obstore.get_range(store, key, start=start, length=length).to_bytes()) == length

    def theirs(turn: int) -> None:
        for start, length in ranges(turn):
            assert len(fs.cat_file(f"bench/{key}", start=start, end=start + length)) == length

    return {"files.read": ours, "obstore": bare, "s3fs": theirs}


# The trainer.


def feed(turns: int, images: int, folder: Path, workers: int) -> None:
    """Passes of the loader over a corpus in a folder, and over the same in a bucket far away."""
    source = write_coconut(folder / "source", images, 8, (480, 640))
    with object_server() as address:
        os.environ.update(s3_environment(address))
        places = {"bucket": "s3://corpus/out", "folder": str(folder / "out")}
        for out in places.values():
            driver.build(config_of(out, beside=folder, coconut=source, images_per_shard=50), LocalEngine())
        control(address, "set_faults", shares={"slow_body": 1.0}, slow_s=LATENCY_S)
        passes = {name: _passes(out, folder, workers) for name, out in places.items()}
        what = f"{images} photos of 640x480, {workers} workers; each answer of the bucket takes"
        compare(f"an epoch of {what} {LATENCY_S * 1e3:.0f} ms", passes, turns)
    print("  (the workers' CPU seconds are not counted)")


def _passes(corpus: str, folder: Path, workers: int) -> Callable[[int], Any]:
    from benchmarks.loader import processor

    options = DataOptions(workers=workers, cache=f"{folder}/cache", max_tokens=8192, on_too_long="skip")
    loader = Loader([CorpusSource(corpus=corpus)], processor(), options, start_method="spawn")

    def epoch(_: int) -> None:
        assert sum(len(batch.keys) for batch in loader)

    return epoch


@contextmanager
def object_server() -> Iterator[str]:
    """The address of a server in memory, in a process of its own."""
    command = [sys.executable, "-m", "tests.object_server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


# A folder, before and after.

_BUILD = """
import json, sys, time
from pathlib import Path
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from tests.building import config_of
out, source, size = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
config = config_of(out, coconut=source, images_per_shard=size)
clock, cpu = time.perf_counter(), time.process_time()
driver.build(config, LocalEngine())
print(json.dumps([time.perf_counter() - clock, time.process_time() - cpu]))
"""


def builds(before: str, turns: int, images: int, per_shard: int, folder: Path) -> None:
    """Builds into a folder by the code of another commit and by this one, each in a process of its own."""
    source = write_coconut(folder / "source", images, 6)
    worktree = folder / "before"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(worktree), before], check=True)
    found: dict[str, list[list[float]]] = {"before": [], "after": []}
    try:
        for turn in range(turns + 1):
            for name in ("before", "after") if turn % 2 else ("after", "before"):
                out = folder / f"{name}-{turn}" / "out"
                out.parent.mkdir()
                arguments = [str(out), json.dumps(source), str(per_shard)]
                home = worktree if name == "before" else ROOT
                done = subprocess.run(
                    [sys.executable, "-c", _BUILD, *arguments],
                    cwd=home,
                    check=True,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "PYTHONPATH": str(home)},
                )
                if turn:  # the first warms the disk's cache up
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        subprocess.run([*git, "remove", "--force", str(worktree)], check=True)
    print(f"builds of {images} images in units of {per_shard} into a folder, median of {turns} turns:")
    for name, spent in found.items():
        clock, cpu = (statistics.median(each[i] for each in spent) for i in (0, 1))
        print(f"  {name:<7} {clock:7.2f} s by the clock  {cpu:7.2f} CPU s")
    for i, what in enumerate(("by the clock", "by CPU")):
        ratios = [b[i] / a[i] for a, b in zip(found["before"], found["after"], strict=True)]
        print(
            f"  after / before {what}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to "
            f"{max(ratios):.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="?", choices=WHAT, default="stores")
    parser.add_argument("--before", default="cda0f34", metavar="COMMIT", help="what `folder` compares with")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--reads", type=int, default=200)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--per-shard", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ[scratch.VARIABLE] = str(folder)
        if given.what in ("stores", "writes", "reads"):
            stores(given.what, given.turns, given.reads, folder)
        elif given.what == "feed":
            feed(given.turns, given.images, folder, given.workers)
        else:
            builds(given.before, given.turns, given.images, given.per_shard, folder)


if __name__ == "__main__":
    main()
