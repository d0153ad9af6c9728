"""Changes single bytes of a corpus, and counts what `verify` finds.

    python -m benchmarks.damage [--changes 2000] [--seed 0]

A small corpus is built, and some of its units once more with another threshold. The changes are spread over
all of its files, and each byte of a file is as likely as another. A change is found if a problem names the
file; of a replaced file that is kept, a note. What is not found must be in a file that promises nothing
(docs/operations.md says which), or be a byte of evidence that changes no answer. If not, or after a crash,
the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from paracaption.pipeline.corpus import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.pipeline.stages.registry import STAGES
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import IntegrityError

PROMISES_NOTHING = {
    "beat": "a sign of life of a driver; read for one lease",
    "events": "what happened in a build, for `inspect` and `estimate`",
}
"""Folders that `verify` does not look at, and why."""

FOUND, SAME, MISSED = "found", "changes no answer", "missed"


class Change(NamedTuple):
    """What became of one changed byte.

    Attributes:
        path: of the file, below the corpus.
        offset: of the byte.
        outcome: FOUND, SAME, MISSED, or the name of an exception that `verify` raised.
    """

    path: str
    offset: int
    outcome: str

    @property
    def kind(self) -> str:
        """What sort of file it is: the folder below the corpus or the subset."""
        parts = self.path.split("/")
        if parts[0] in (*PROMISES_NOTHING, "log", "plots", ".replaced"):
            return parts[0]
        return parts[1] if len(parts) > 2 else self.path

    @property
    def is_fault(self) -> bool:
        """Whether `verify` should have done better."""
        return self.outcome not in (FOUND, SAME) and self.kind not in PROMISES_NOTHING


def build(config: BuildConfig) -> Path:
    """Build and merge a corpus, and then once more with a threshold at which some regions are dropped."""
    driver.build(config, LocalEngine())
    stricter = config.model_copy(update={"min_iou": 0.99})
    driver.build(stricter, LocalEngine())
    return Path(config.out)


def change_bytes(out: Path, changes: int, seed: int) -> Iterator[Change]:
    """Change a byte, verify, and restore it, again and again.

    Raises:
        AssertionError: the corpus has problems before anything is changed.
    """
    report = verify.verify(out)
    assert report.ok, report.text()
    rng = random.Random(seed)
    paths = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    paths = [path for path in paths if (out / path).stat().st_size]
    order: list[str] = []
    while len(order) < changes:
        order += rng.sample(paths, len(paths))
    for path in order[:changes]:
        whole = (out / path).read_bytes()
        offset = rng.randrange(len(whole))
        changed = bytearray(whole)
        changed[offset] ^= rng.randrange(1, 256)
        (out / path).write_bytes(changed)
        try:
            yield Change(path, offset, _outcome(out, path, whole))
        finally:
            (out / path).write_bytes(whole)


def _outcome(out: Path, path: str, whole: bytes) -> str:
    try:
        report = verify.verify(out)
    except Exception as error:  # noqa: BLE001 - what must not happen is what is counted
        return type(error).__name__
    if any(problem.file == path for problem in [*report.problems, *report.notes]):
        return FOUND
    return SAME if "/evidence/" in path and _says_the_same(out / path, whole) else MISSED


def _says_the_same(path: Path, whole: bytes) -> bool:
    """Whether an evidence file that was changed has the answers that it had."""
    stage = STAGES[path.parent.name.rpartition("-")[0]]
    with tempfile.TemporaryDirectory() as folder:
        before = EvidenceStore(Path(folder), getattr(stage, "evidence"))  # noqa: B009 - of model stages only
        before.path(path.stem).write_bytes(whole)
        try:
            return EvidenceStore(path.parent, before.kind).read(path.stem) == before.read(path.stem)
        except IntegrityError:
            return False


def table(changes: Sequence[Change]) -> str:
    """A row for each kind of file: changes, found, those that change no answer, missed, crashes."""
    counts: dict[str, Counter[str]] = {}
    for change in changes:
        outcome = change.outcome if change.outcome in (FOUND, SAME, MISSED) else "crashes"
        counts.setdefault(change.kind, Counter())[outcome] += 1
    names = (FOUND, SAME, MISSED, "crashes")
    lines = [f"| file | changes | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    total: Counter[str] = Counter()
    for kind, each in sorted(counts.items()):
        total += each
        note = " (promises nothing)" if kind in PROMISES_NOTHING else ""
        lines.append(f"| {kind}{note} | {each.total()} | {' | '.join(str(each[name]) for name in names)} |")
    lines.append(f"| all | {total.total()} | {' | '.join(str(total[name]) for name in names)} |")
    return "\n".join(lines)


def small(folder: Path) -> BuildConfig:
    """A configuration of a corpus of both kinds, three units of two images and one of two."""
    from tests.building import config_of
    from tests.synthetic import write_coconut, write_sa1b

    return config_of(
        folder / "out",
        coconut=write_coconut(folder / "coconut", 4, 2, (48, 64)),
        sa1b=write_sa1b(folder / "sa1b", 2, 2, (48, 64)),
        images_per_shard=2,
        min_iou=0.01,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--changes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = build(small(Path(folder)))
        changes = list(change_bytes(out, arguments.changes, arguments.seed))
    print(table(changes))
    faults = [change for change in changes if change.is_fault]
    for change in faults:
        print(f"{change.path} at byte {change.offset}: {change.outcome}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
