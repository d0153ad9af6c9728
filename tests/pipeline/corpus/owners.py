"""Owners that neither beat nor release, and units of theirs: for tests of owners and of moves."""

from __future__ import annotations

from pathlib import Path

import msgspec

from paracaption.pipeline.corpus import adopt, log, processes
from paracaption.pipeline.corpus.owner import Owner
from paracaption.pipeline.corpus.records import Claim, LogUnit

LEASE_S = 0.3
NAME = "coconut/coconut-000000"


def claim_of(**changes) -> Claim:
    return msgspec.structs.replace(processes.claim_of_this_process("build"), **changes)


def begin(out: Path, claim: Claim) -> Owner:
    """An owner that neither beats nor releases the corpus."""
    begun = Owner(str(out), log.read_state(str(out)))
    begun.append(claim)
    begun.beat()
    return begun


def draft(begun: Owner, content: bytes, shard: bool = True) -> LogUnit:
    """Write the files of a unit under temporary names."""
    return LogUnit(
        plan="p",
        recipe="r",
        regions=1,
        kept=int(shard),
        manifest=begun.write(f"coconut/manifests/{NAME[8:]}.json", content),
        ledger=begun.write(f"coconut/ledger/{NAME[8:]}.parquet", content),
        shard=begun.write(f"coconut/shards/{NAME[8:]}.tar", content) if shard else None,
    )


def places(unit: LogUnit) -> list[str]:
    return [file.path for file in unit.files()]


def contents(out: Path) -> dict[str, bytes]:
    """The files of a corpus but for its log, by path."""
    found = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    skipped = (f"{log.LOG}/", f"{log.BEAT}/", adopt.MARKER)
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(skipped)}
