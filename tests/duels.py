"""Rounds of drivers against each other that build one corpus in a bucket which fails.

In each round two or three real processes build the same corpus. A share of the requests of `object_server`
meets a fault; drivers are stopped for longer than their lease and woken, killed, and started again, until
one has built everything. Then the bucket is calm, one more build runs, and the corpus is judged: by its log,
and by comparison with a build into a folder. A round is decided by its seed, as far as processes can be.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from paracaption.pipeline.corpus import adopt, log, verify
from paracaption.pipeline.corpus.owner import Fenced, own
from paracaption.pipeline.corpus.records import Adopt, Claim, Commit, Done
from paracaption.pipeline.corpus.sweep import sweep
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import bucket_checks, files, scratch
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob
from tests.building import calls, config_of
from tests.machinery import alone
from tests.object_server import ObjectServer, serving
from tests.synthetic import write_coconut, write_sa1b

DONE, BUSY, FENCED, FAILED, KILLED = 0, 3, 5, 9, -signal.SIGKILL
NAMES = {DONE: "done", BUSY: "busy", FENCED: "fenced", FAILED: "failed", KILLED: "killed"}

MASKS = 3
IMAGES = {"coconut": 6, "sa1b": 4}

FAULTS = ("500", "503", "lost_answer", "done_500", "reset", "stuck", "repeated", "repeated_late")
BODIES = ("slow_body", "cut_body")
LATER_S = 0.7
"""When what a network held, or sent twice, arrives."""

_BUSY = re.compile(r"is writing here|has begun to write here")
_FIGHT_LEASES = 30
"""For so many leases after the corpus was planned drivers are disturbed."""

_LONGEST_S = 1800


class Process(Protocol):
    """A driver: of `multiprocessing` or of `subprocess`."""

    @property
    def pid(self) -> int: ...
    def exit_code(self) -> int | None:
        """None while it runs."""
        ...


class Forked:
    """A driver of the local engine, in a process that has imported everything already."""

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["tests.duels", "tests.backends", "pyarrow.parquet", "obstore.store"])

    def __init__(self, folder: Path, environment: dict[str, str], seed: int):
        self._process = self._context.Process(target=drive, args=(str(folder), environment, seed))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def exit_code(self) -> int | None:
        return self._process.exitcode


class OnRay:
    """A driver of the Ray engine, in a process of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], seed: int, address: str):
        command = [sys.executable, "-m", "tests.duels", str(folder), str(seed), address]
        with open(folder / "drivers.log", "ab") as told:
            self._process = subprocess.Popen(
                command, env=os.environ | environment, stdout=told, stderr=told, start_new_session=True
            )
        self.pid = self._process.pid

    def exit_code(self) -> int | None:
        return self._process.poll()


def drive(folder: str, environment: dict[str, str], seed: int, address: str = "") -> None:
    """Build the corpus of a round; ends with one of `NAMES`."""
    os.environ.update(environment)
    os.environ["PARACAPTION_SEED"] = str(seed)
    with open(f"{folder}/drivers.log", "ab", buffering=0) as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    from paracaption.pipeline.executor import driver
    from paracaption.pipeline.executor.ray_data import RayEngine

    _hurry(random.Random(seed))
    config = BuildConfig.model_validate_json(Path(folder, "config.json").read_text())
    try:
        driver.build(config, RayEngine(address) if address else LocalEngine())
    except Fenced as error:
        _end(folder, FENCED, error)
    except ConfigError as error:
        _end(folder, BUSY if _BUSY.search(str(error)) else FAILED, error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the round tells it
        importlib.import_module("traceback").print_exc()
        _end(folder, FAILED, error)
    _end(folder, DONE, None)


def _end(folder: str, code: int, error: BaseException | None) -> None:
    """End as a command does: threads of the background are not waited for."""
    if code == FAILED:
        with open(f"{folder}/errors", "a") as file:
            file.write(f"{type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(code)


def _hurry(chance: random.Random) -> None:
    """Wait less, so that a round takes seconds; every other driver stages files, and uploads parts."""
    import obstore

    from paracaption.pipeline.corpus import event_parts, plots
    from paracaption.pipeline.executor import committer
    from paracaption.pipeline.io import bucket_clients, failures

    seconds = {"init_backoff": 0.01, "max_backoff": 0.2}
    backoff = {name: importlib.import_module("datetime").timedelta(seconds=s) for name, s in seconds.items()}
    bucket_clients._RETRIES["backoff"] = {**backoff, "base": 2}
    failures._FIRST_WAIT_S = 0.02
    committer.COMMIT_EVERY_S = 0.05
    event_parts.EVERY_S = 0.5
    plots.draw_plots = lambda _: {name: b"plot" for name in plots.NAMES}
    if chance.random() < 0.5:
        plain = obstore.put
        scratch.IN_MEMORY_BYTES = 0

        def put(client: Any, key: str, data: Any, **options: Any) -> Any:
            parts = {"use_multipart": True} if isinstance(data, Path) else {}
            return plain(client, key, data, **parts, **options)

        obstore.put = put  # pyright: ignore[reportPrivateImportUsage]


class Sources:
    """The sources of every round, and what an undisturbed build into a folder makes of them."""

    def __init__(self, root: Path):
        size = (48, 64)
        self.given = {
            "coconut": write_coconut(root / "coconut", IMAGES["coconut"], MASKS, size),
            "sa1b": write_sa1b(root / "sa1b", IMAGES["sa1b"], MASKS, size),
        }
        folder = root / "undisturbed"
        folder.mkdir()
        write_config(folder, self.config(str(folder / "out"), folder))
        process = Forked(folder, {}, 0)
        while process.exit_code() is None:
            time.sleep(0.05)
        assert process.exit_code() == DONE, (folder / "drivers.log").read_text()
        out = folder / "out"
        self.files = {
            str(path.relative_to(out)): _digest(path.read_bytes())
            for path in sorted(out.rglob("*"))
            if path.is_file() and _IS_SAME.search(str(path.relative_to(out)))
        }
        self.questions = {name: sorted(calls(folder / f"{name}.log")) for name in ("captioner", "judge")}

    def config(self, out: str, beside: Path, lease_s: float = 0.6, delay_s: float = 0.05) -> BuildConfig:
        return config_of(
            out,
            **self.given,
            beside=beside,
            images_per_shard=1,
            captioner={"delay_s": delay_s},
            failures={"lease_s": lease_s, "min_free_gb": 0, "read_retry_s": 60, "save_every_s": 0},
        )


_IS_SAME = re.compile(r"^\w+/(shards|ledger|manifests)/|plan\.parquet$|^index\.parquet$|^stats\.json$")
"""Files that are the same to the byte in every build, by their places."""


def write_config(folder: Path, config: BuildConfig) -> None:
    (folder / "config.json").write_text(config.model_dump_json())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Round:
    """One bucket and its drivers.

    Args:
        folder: a new folder, for the drivers' scratch and what they say.
        sources: of the corpus.
        seed: of the faults, and of what happens to whom.
        server: holds the bucket.
        address: of a Ray that is running; "" is the local engine.
    """

    def __init__(self, folder: Path, sources: Sources, seed: int, server: ObjectServer, address: str = ""):
        folder.mkdir()
        self.folder, self.sources, self.seed, self.server, self.address = (
            folder,
            sources,
            seed,
            server,
            address,
        )
        self.random = random.Random(seed)
        self.lease_s = 3.0 if address else 0.6
        self.out = f"{server.url()}/round-{seed}"
        self.config = sources.config(self.out, folder, self.lease_s)
        self.environment = {**server.environment, scratch.VARIABLE: str(folder)}
        write_config(folder, self.config)
        self.ends: Counter[int] = Counter()
        self.did: Counter[str] = Counter()
        self._live: list[tuple[Process, float]] = []
        self._started_s: dict[int, float] = {}
        self._began_s = time.monotonic()

    def run(self, end: Callable[[], object] = lambda: None) -> None:
        """Set drivers against each other until one has finished; then one builds in peace.

        Args:
            end: ends what may still write to the bucket, before that is judged.

        Raises:
            AssertionError: something does not hold.
        """
        self.server.set_faults(**self._draw_faults())
        try:
            self._fight()
        finally:
            for process, _ in self._live:
                _send(process, signal.SIGKILL)
        self.server.set_faults(shares={}, late_listing_s=0.0)
        time.sleep(LATER_S + 0.2)
        self._check_ends()
        self.did["last"] += 1
        last = self._process()
        while last.exit_code() is None:
            time.sleep(0.05)
        assert last.exit_code() == DONE, f"the last build: {self._told()}"
        end()
        with mock.patch.dict(os.environ, self.environment):
            self._judge()

    def _draw_faults(self) -> dict[str, Any]:
        """5 to 20% of the requests, of all kinds in proportions of this round."""
        share = self.random.uniform(0.05, 0.2)
        weights = {name: self.random.random() ** 2 for name in (*FAULTS, *BODIES)}
        total = sum(weights.values())
        return {
            "shares": {name: share * weight / total for name, weight in weights.items()},
            "seed": self.seed,
            "slow_s": self.random.choice([0.1, 0.3, 0.8]),
            "later_s": LATER_S,
            "late_listing_s": self.random.choice([0.0, 0.5, 2.0]),
            "page_size": self.random.choice([1000, 1000, 3]),
            "forgets_uploads": self.random.random() < 0.3,
        }

    def _fight(self) -> None:
        self._start()
        planned_s = 0.0
        while self._live or not self.ends[DONE]:
            seconds = time.monotonic() - self._began_s
            assert seconds < _LONGEST_S, f"no driver has finished: {self.told()}; {self._told()}"
            time.sleep(self.random.random() * 0.25 * self.lease_s)
            self._look()
            builder = self._builder()
            if builder and not planned_s:
                planned_s = seconds
            calm = bool(self.ends[DONE]) or (
                planned_s > 0 and seconds - planned_s > _FIGHT_LEASES * self.lease_s
            )
            running = [each for each, until in self._live if not until]
            wanted = not running or (len(self._live) < 3 and self.random.random() < 0.05 and not calm)
            if wanted and not self.ends[DONE]:
                self._start()
            if calm or len(running) < len(self._live):  # one is stopped
                continue
            owner = [each for each in running if each.pid == builder]
            if self.random.random() < (0.25 if owner else 0.03):
                self._disturb(self.random.choice(owner or running))

    def _builder(self) -> int:
        """The process that owns the corpus once it is planned; what comes before is the same each time."""
        prefix = f"{self.out.removeprefix(f'{self.server.url()}/')}/{log.LOG}/"
        keys = list(self.server.objects(prefix=prefix))
        if len(keys) < len(IMAGES) + 3:
            return 0
        found = [json.loads(self.server.content(key))["record"] for key in keys]
        return next(record["pid"] for record in reversed(found) if record["kind"] == "claim")

    def _process(self) -> Process:
        seed = self.random.randrange(1 << 30)
        if self.address:
            return OnRay(self.folder, self.environment, seed, self.address)
        return Forked(self.folder, self.environment, seed)

    def _start(self) -> None:
        process = self._process()
        self._live.append((process, 0.0))
        self._started_s[process.pid] = time.monotonic()
        self.did["started"] += 1

    def _look(self) -> None:
        left = []
        for process, until in self._live:
            if until and time.monotonic() > until:
                self.did["woken"] += _send(process, signal.SIGCONT)
                until = 0.0
            code = process.exit_code()
            if code is None:
                left.append((process, until))
            else:
                self.ends[code] += 1
        self._live = left

    def _disturb(self, process: Process) -> None:
        is_new = time.monotonic() - self._started_s[process.pid] < 2 * self.lease_s
        if is_new or self.random.random() < 0.75:
            until = time.monotonic() + self.lease_s * self.random.uniform(0.5, 9)
            self._live = [(each, until if each is process else old) for each, old in self._live]
            self.did["stopped"] += _send(process, signal.SIGSTOP)
            if len(self._live) < 3 and self.random.random() < 0.8:
                self._start()
        else:
            self.did["killed"] += _send(process, signal.SIGKILL)

    # What has to hold.

    def _check_ends(self) -> None:
        assert self.ends.keys() <= {DONE, BUSY, FENCED, KILLED}, f"{self.told()}; {self._told()}"

    def _told(self) -> str:
        """The errors of the drivers, and the end of what they said."""
        errors = self.folder / "errors"
        text = (self.folder / "drivers.log").read_text()[-3000:]
        return f"{errors.read_text() if errors.exists() else ''}\n{text}"

    def _judge(self) -> None:
        records = log.read_records(self.out)
        self._check_commits(records)
        state = log.read_state(self.out)
        assert state.released, "the last build has not released the corpus"
        self._check_files(state)
        self._check_questions(records)
        report = verify.verify(self.out)
        notes = [note for note in report.notes if bucket_checks.PROBE not in str(note)]
        assert report.ok, report.text()
        with own(self.out, "merge", self.lease_s) as owner:
            self.did["swept"] += sweep(owner)
        self._check_rest(records)
        scratch.clean(self.out)  # as the next process on that machine would
        self._check_scratch()
        self.did["notes"] += len(notes)

    def _check_commits(self, records: list[Any]) -> None:
        times = Counter(
            name for record in records if isinstance(record, Commit | Adopt) for name in record.units
        )
        assert set(times.values()) == {1}, f"not committed once: {times.most_common(3)}"
        assert len(times) == sum(IMAGES.values()), f"{len(times)} units are committed"
        self.did["records"] += len(records)
        self.did["claims"] += sum(isinstance(record, Claim) for record in records)

    def _check_files(self, state: log.LogState) -> None:
        """Every file that the log names is there and whole, and the same as in a folder."""
        named = [file for found in state.units.values() for file in found.unit.files()]
        found = {}
        for file in [*named, *state.files.values()]:
            data = files.read(Blob(f"{self.out}/{file.place}"))
            assert _digest(data) == file.sha256, f"{file.place}: is not what was committed"
            if _IS_SAME.search(file.path):
                found[file.path] = file.sha256
        wanted = self.sources.files
        other = sorted(path for path in found.keys() | wanted if found.get(path) != wanted.get(path))
        assert not other, f"not as in a folder: {other}"

    def _check_questions(self, records: list[Any]) -> None:
        """A question is asked again only where a driver was killed or replaced before its answer was saved.

        A worker saves after each image, so each of them may be asking once more about one image, and about
        another before it finds out that it was replaced; Ray has more of them under way.
        """
        before, lost = None, 1
        for record in records:
            lost += isinstance(record, Claim) and before is not None and not isinstance(before, Done)
            before = record
        for name, wanted in self.sources.questions.items():
            asked = Counter(calls(self.folder / f"{name}.log"))
            assert set(asked) == set(wanted), f"{name}: other questions than in an undisturbed build"
            again = asked.total() - len(wanted)
            self.did["asked again"] += again
            most = (8 if self.address else 2) * MASKS * (lost + self.did["killed"] + self.did["stopped"])
            assert again <= most, f"{name}: {again} questions were asked again, {most} may be"

    def _check_rest(self, records: list[Any]) -> None:
        """Nothing lies in the bucket that no record names, besides evidence, events, beats and the log."""
        named = {file.place for record in records for file in log.files_of(record)}
        prefix = self.out.removeprefix(f"{self.server.url()}/")
        places = [key.removeprefix(f"{prefix}/") for key in self.server.objects(prefix=f"{prefix}/")]
        left = [place for place in places if place not in named and not _IS_OTHER.search(place)]
        probes = [place for place in left if place.startswith(bucket_checks.PROBE)]
        self.did["probes left"] += len(probes)
        assert sorted(left) == sorted(probes), f"left after the sweep: {left}"

    def _check_scratch(self) -> None:
        left = [
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_file() and "paracaption-scratch" in str(path.relative_to(self.folder))
        ]
        assert not left, f"left on scratch: {left}"

    def told(self) -> dict[str, Any]:
        """What happened, for the file of results."""
        return {
            "seed": self.seed,
            "engine": "ray" if self.address else "local",
            "seconds": round(time.monotonic() - self._began_s, 1),
            **self.did,
            "ends": {NAMES.get(code, str(code)): count for code, count in sorted(self.ends.items())},
            "requests": sum(self.server.counts()["requests"].values()),
            "faults": self.server.counts()["faults"],
        }


_IS_OTHER = re.compile(rf"^(log|beat|events)/|^\w+/evidence/|^{re.escape(adopt.MARKER)}$")


def _send(process: Process, number: signal.Signals) -> bool:
    """Send a signal; whether the process was still there."""
    if process.exit_code() is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
        return True
    return False


def play(folder: Path, sources: Sources, seed: int, told: str = "", on_ray: bool = False) -> str:
    """One round; what does not hold in it, or "". Appends a line to the file `told`."""
    with serving() as server, contextlib.ExitStack() as stack:
        address, end = "", lambda: None
        if on_ray:
            stack.enter_context(mock.patch.dict(os.environ, server.environment))
            os.environ[scratch.VARIABLE] = str(folder / f"round-{seed}")
            address, end = _start_ray()
            stack.callback(end)
        one = Round(folder / f"round-{seed}", sources, seed, server, address)
        problem = ""
        try:
            one.run(end)
        except Exception as error:  # noqa: BLE001 - also what should never have come through
            problem = f"{type(error).__name__}: {error}"
        line = {**one.told(), "outcome": problem or "whole"}
    if told:
        with open(told, "a") as file:
            file.write(json.dumps(line) + "\n")
    return problem and f"seed {seed}: {problem}\n{line}"


def _start_ray() -> tuple[str, Callable[[], object]]:
    """The address of a Ray of this machine, whose workers inherit the environment; and what ends it."""
    from ray.cluster_utils import Cluster

    with alone():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    return cluster.address, functools.cache(cluster.shutdown)


def rounds(default: int, variable: str) -> Iterator[int]:
    """Seeds: so many as the variable says, from PARACAPTION_FIRST_DUEL on."""
    first = int(os.environ.get("PARACAPTION_FIRST_DUEL", "100"))
    yield from range(first, first + int(os.environ.get(variable, default)))


if __name__ == "__main__":
    drive(sys.argv[1], {}, int(sys.argv[2]), sys.argv[3])
