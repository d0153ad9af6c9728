"""Drivers against each other on one folder: stopped past their lease, woken, killed, their clocks moved.

Whatever happens, no unit is committed twice, no file that the log names is missing, nobody waits for ever,
and the corpus is the one that an undisturbed driver builds.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import log, verify
from paracaption.pipeline.corpus.owner import Fenced
from paracaption.pipeline.corpus.records import Adopt, Commit
from paracaption.schemas.config import BuildConfig
from tests.building import build, committed, config_of
from tests.synthetic import write_coconut, write_sa1b

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(3600)]

LEASE_S = 0.6
DONE, BUSY, FENCED = 0, 3, 5

ROUNDS = int(os.environ.get("PARACAPTION_DUELS", "50"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    return {"coconut": write_coconut(root / "coconut", 8), "sa1b": write_sa1b(root / "sa1b", 4)}


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    build(config(out, source))
    return committed(out)


def config(out: Path, source: dict) -> BuildConfig:
    return config_of(
        out,
        **source,
        images_per_shard=1,
        captioner={"delay_s": 0.02},
        failures={"lease_s": LEASE_S, "min_free_gb": 0},
    )


def drive(text: str, shift_s: float, errors: str) -> None:
    """One driver, in a process of its own whose clock is off by `shift_s`."""
    from paracaption.pipeline.executor import committer
    from paracaption.schemas.errors import ConfigError

    plain = time.time
    time.time = lambda: plain() + shift_s
    committer.COMMIT_EVERY_S = 0.05
    try:
        build(BuildConfig.model_validate_json(text))
    except Fenced:
        sys.exit(FENCED)
    except ConfigError as error:
        if "writ" in str(error):
            sys.exit(BUSY)
        Path(errors).write_text(repr(error))
        raise
    except BaseException as error:
        Path(errors).write_text(repr(error))
        raise


class Duel:
    """One folder and its drivers."""

    def __init__(self, folder: Path, source: dict, seed: int):
        self.folder = folder
        self.random = random.Random(seed)
        self.config = config(folder / "out", source)
        self.ends: Counter[int] = Counter()
        self.did: Counter[str] = Counter()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.building", "tests.backends", "pyarrow.parquet"])
        self._live: list[tuple[multiprocessing.Process, float]] = []

    def run(self) -> None:
        """Start, stop, wake and kill drivers until one has finished."""
        self._start()
        began = time.monotonic()
        while self._live or not self.ends[DONE]:
            assert time.monotonic() - began < 120, f"no driver has finished: {self.ends}, {self.did}"
            time.sleep(self.random.random() * 0.15)
            self._look()
            calm = self.ends[DONE] or time.monotonic() - began > 20
            if not self.ends[DONE] and (
                not self._live or (len(self._live) < 3 and self.random.random() < 0.3)
            ):
                self._start()
            running = [each for each, until in self._live if not until]
            if running and not calm and self.random.random() < 0.25:
                self._disturb(self.random.choice(running))

    def _start(self) -> None:
        shift_s = self.random.choice([0.0, 0.0, -30 * 86_400.0, 30 * 86_400.0])
        arguments = (self.config.model_dump_json(), shift_s, str(self.folder / "error"))
        process = self._context.Process(target=drive, args=arguments)
        process.start()
        self._live.append((process, 0.0))

    def _look(self) -> None:
        left = []
        for process, until in self._live:
            if until and time.monotonic() > until:
                self.did["woken"] += _send(process, signal.SIGCONT)
                until = 0.0
            if process.exitcode is None:
                left.append((process, until))
            else:
                self.ends[process.exitcode] += 1
        self._live = left

    def _disturb(self, process: multiprocessing.Process) -> None:
        if self.random.random() < 0.7:
            until = time.monotonic() + LEASE_S * self.random.uniform(0.5, 4)
            self._live = [(each, until if each is process else old) for each, old in self._live]
            self.did["stopped"] += _send(process, signal.SIGSTOP)
        else:
            self.did["killed"] += _send(process, signal.SIGKILL)

    def check(self, undisturbed: dict[str, str]) -> None:
        """Judge what is left by the log alone, and by comparison."""
        out = self.config.out
        error = self.folder / "error"
        assert self.ends.keys() <= {DONE, BUSY, FENCED, -signal.SIGKILL}, (
            self.ends,
            error.exists() and error.read_text(),
        )
        times = Counter(
            name
            for record in log.read_records(out)
            if isinstance(record, Commit | Adopt)
            for name in record.units
        )
        assert set(times.values()) == {1}, f"committed twice: {times.most_common(3)}"
        state = log.read_state(out)
        assert all(log.is_whole(out, each.unit) for each in state.units.values())
        if any("/.tmp-" in name for name in committed(Path(out))):
            build(self.config)  # a driver that was killed, or was woken when all was done, was writing these
        assert committed(Path(out)) == undisturbed
        report = verify.verify(out)
        assert report.ok, report.text()


def _send(process: multiprocessing.Process, number: signal.Signals) -> bool:
    """Send a signal; whether the process was still there."""
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def duels(folder: Path, source: dict, undisturbed: dict[str, str], seeds: range) -> Counter[str]:
    did: Counter[str] = Counter()
    for seed in seeds:
        duel = Duel(folder / f"duel-{seed}", source, seed)
        duel.folder.mkdir()
        duel.run()
        duel.check(undisturbed)
        did += duel.did
        did.update({f"ended with {code}": count for code, count in duel.ends.items()})
    return did


def test_drivers_against_each_other_commit_each_unit_once(tmp_path, source, undisturbed):
    duels(tmp_path, source, undisturbed, range(1))


@pytest.mark.soak
def test_many_rounds_of_drivers_against_each_other(tmp_path, source, undisturbed, capsys):
    did = duels(tmp_path, source, undisturbed, range(100, 100 + ROUNDS))
    with capsys.disabled():
        sys.stdout.write(f"\n{ROUNDS} rounds: {dict(did)}\n")
    assert did["stopped"] >= ROUNDS and did["killed"] and did[f"ended with {FENCED}"]
