"""kill -9 at random moments: the corpus is equal to the last byte, nothing committed is paid for twice.

The driver of a local build dies a few times in every run of the tests. Under Ray, drivers, actors and nodes
die in `make soak`; PARACAPTION_KILLS sets how often each of them does.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from paracaption.pipeline.corpus import log
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.io.store import TEMPORARY
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.pipeline.stages.recipes import recipe_of
from tests.building import build, calls, committed, config_of
from tests.machinery import alone
from tests.synthetic import write_coconut, write_sa1b

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("PARACAPTION_KILLS", "25"))
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    return {
        "coconut": write_coconut(root / "coconut", NUM_IMAGES),
        "sa1b": write_sa1b(root / "sa1b", NUM_IMAGES // 2),
    }


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A cluster that outlives the drivers: `ray start --head` in effect; nodes come and go."""
    from ray.cluster_utils import Cluster

    with alone():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """What the local engine commits when nobody kills it."""
    root = tmp_path_factory.mktemp("undisturbed")
    build(_slow(root, source))
    return committed(root / "out")


def _slow(root: Path, source: dict, apart: bool = False):
    """Backends that take their time, so that a kill finds them at work."""
    return config_of(
        root / "out",
        **source,
        apart=apart,
        images_per_shard=3,
        captioner={"delay_s": 0.03, "batch_images": 2},
        judge={"delay_s": 0.02},
        segmenter={"delay_s": 0.02},
    )


def _drive(config, *address: str) -> subprocess.Popen:
    """A driver in a process of its own; the local engine's without an address."""
    path = Path(config.out).parent / "config.json"
    path.write_text(config.model_dump_json())
    log = open(path.with_suffix(".log"), "ab")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.building", str(path), *address], stdout=log, stderr=log
    )


def _evidence_rows(config) -> set[tuple[str, str, int]]:
    """(stage, key, region) of everything committed to the evidence store."""
    rows = set()
    for subset in config.subsets:
        for stage in recipe_of(config, subset):
            if isinstance(stage, ModelStage):
                folder = Path(config.out) / subset / "evidence" / f"{stage.name}-{stage.evidence_digest}"
                store = EvidenceStore(folder, stage.evidence)
                for path in folder.glob(f"{subset}-*.parquet"):
                    rows |= {(f"{subset}/{stage.name}", *where) for where in store.load(path.stem)}
    return rows


def _captions_paid(root: Path) -> Counter[str]:
    return Counter(calls(root / "captioner.log"))


def _at_work(config, driver: subprocess.Popen) -> bool:
    """Wait until a new run has a worker that is ready; False if the driver ends before."""
    runs = Path(config.out) / "events"
    before = set(runs.glob("*")) if runs.exists() else set()
    while driver.poll() is None:
        for run in set(runs.glob("*")) - before:
            if any(event.what == "ready" for event in EventReader(run).new()):
                return True
        time.sleep(0.02)
    return False


def _kill_drivers(
    config, undisturbed, kills: int, longest_s: float, rng: random.Random, *address: str
) -> None:
    """Kill so many drivers at random moments of their work, then let one finish; nothing is paid twice."""
    root = Path(config.out).parent
    killed = 0
    while killed < kills:
        before, paid = _evidence_rows(config), _captions_paid(root)
        driver = _drive(config, *address)
        if _at_work(config, driver):
            try:
                driver.wait(rng.uniform(0.0, longest_s))
            except subprocess.TimeoutExpired:
                driver.send_signal(signal.SIGKILL)
                killed += driver.wait() == -signal.SIGKILL
        if driver.wait() == 0:
            assert committed(root / "out") == undisturbed
            _forget(config, rng)
        assert driver.returncode in (0, -signal.SIGKILL), (root / "config.log").read_text()[-3000:]
        known = {f"{key}/{region}" for stage, key, region in before if stage.endswith("/caption")}
        again = (_captions_paid(root) - paid).keys()
        assert not again & known, "a caption that was committed as evidence was paid for again"
    _finish(config, undisturbed, _drive(config, *address))


def _finish(config, undisturbed, driver: subprocess.Popen) -> None:
    """The last driver ends well: the corpus is whole, each unit was committed once since it was last undone,
    and neither a file nor a process is left over.
    """
    out = Path(config.out)
    assert driver.wait(300) == 0, (out.parent / "config.log").read_text()[-3000:]
    assert committed(out) == undisturbed
    assert [path for path in out.rglob(f"{TEMPORARY}*") if "events" not in path.parts] == []
    state = log.read_state(str(out))
    assert state.released and all(log.is_whole(str(out), each.unit) for each in state.units.values())
    left = [
        each for each in psutil.process_iter(["cmdline"]) if str(out.parent) in (each.info["cmdline"] or ())
    ]
    assert left == [], "a driver is left"


@pytest.mark.parametrize("kills", [2, pytest.param(KILLS, marks=pytest.mark.soak)])
def test_the_driver_of_a_local_build_killed_at_random_moments(tmp_path, source, undisturbed, kills):
    _kill_drivers(_slow(tmp_path, source), undisturbed, kills, 2.5, random.Random(5))


@pytest.mark.parametrize(
    ("batch_images", "name"),
    [
        pytest.param(2, "InstantCaptioner", id="batches", marks=pytest.mark.soak),
        pytest.param(32, "InstantCaptioner", id="a batch outlives a worker", marks=pytest.mark.soak),
        pytest.param(2, "OneByOneCaptioner", id="a captioner that batches by itself"),
    ],
)
@pytest.mark.soak
def test_a_unit_of_slow_calls_gets_ahead_though_its_worker_is_killed_every_second(
    tmp_path, source, batch_images, name
):
    """One unit of 24 images, 0.1 s each; a worker lives for 1 s from its first call. A kill costs what was
    answered since the last saving, and the batch in flight.
    """
    slow = {"delay_s": 0.1, "batch_images": batch_images}
    config = config_of(
        tmp_path / "out",
        coconut=source["coconut"],
        images_per_shard=NUM_IMAGES,
        captioner=slow,
        failures={"save_every_s": 0.2},
    )
    captioner = config.captioner.model_copy(update={"name": f"tests.backends:{name}"})
    config = config.model_copy(update={"captioner": captioner})
    kills, regions = 0, 4 * NUM_IMAGES
    for _ in range(30):
        began_s, driver = time.time(), _drive(config)
        if _asks(config, driver, began_s):
            try:
                driver.wait(1.0)
            except subprocess.TimeoutExpired:
                driver.send_signal(signal.SIGKILL)
                kills += driver.wait() == -signal.SIGKILL
        if driver.wait() == 0:
            break
    assert driver.returncode == 0, (tmp_path / "config.log").read_text()[-3000:]
    assert kills > 1
    paid = _captions_paid(tmp_path)
    assert len(paid) == regions
    assert paid.total() <= regions + kills * 4 * (0.2 / 0.1 + 2 * min(batch_images, 10))
    undisturbed = tmp_path / "undisturbed"
    build(config.model_copy(update={"out": str(undisturbed)}))
    assert committed(tmp_path / "out") == committed(undisturbed)
    (stored,) = (tmp_path / "out" / "coconut" / "evidence").glob("caption-*/*")
    assert stored.read_bytes() == next(undisturbed.glob("coconut/evidence/caption-*/*")).read_bytes()


def _asks(config, driver: subprocess.Popen, began_s: float) -> bool:
    """Wait until a new run asks its captioner; False if the driver ends before."""
    while driver.poll() is None:
        notes = list(Path(config.out).glob("coconut/journal/caption-*/*.json"))
        if any(note.stat().st_mtime > began_s for note in notes):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("at", ["flush", "name"])
@pytest.mark.soak
def test_a_worker_that_dies_while_it_saves_loses_that_batch_alone_and_leaves_nothing(tmp_path, source, at):
    mark = tmp_path / "died"
    config = config_of(
        tmp_path / "out",
        coconut=source["coconut"],
        captioner={"batch_images": 2},
        failures={"save_every_s": 0},
    )
    name = "tests.odd_backends:KilledWhileSaving"
    options = {**config.captioner.options, "mark": str(mark), "at": at}
    captioner = config.captioner.model_copy(update={"name": name, "options": options})
    config = config.model_copy(update={"captioner": captioner})
    assert _drive(config).wait(60) == -signal.SIGKILL and mark.exists()
    assert len(list((tmp_path / "out" / "coconut" / "evidence").glob(f"*/{TEMPORARY}*"))) == 1
    assert _drive(config).wait(60) == 0, (tmp_path / "config.log").read_text()[-3000:]
    paid = _captions_paid(tmp_path)
    assert len(paid) == 4 * NUM_IMAGES and paid.total() == len(paid) + 4 * 2
    assert [path for path in (tmp_path / "out").rglob(f"{TEMPORARY}*") if "events" not in path.parts] == []


@pytest.mark.soak
@pytest.mark.ray
def test_the_driver_killed_at_random_moments(tmp_path, source, head, undisturbed):
    _kill_drivers(_slow(tmp_path, source), undisturbed, KILLS, 6.0, random.Random(7), head.address)


def _forget(config, rng: random.Random) -> None:
    """The build finished before all kills were spent: undo some units, evidence and all."""
    for subset in config.subsets:
        manifests = sorted((Path(config.out) / subset / "manifests").glob("*.json"))
        for path in rng.sample(manifests, len(manifests) // 2):
            path.unlink()
            for evidence in (Path(config.out) / subset / "evidence").glob(f"*/{path.stem}.parquet"):
                evidence.unlink()


@pytest.mark.soak
@pytest.mark.ray
def test_stage_actors_killed_at_random_moments(tmp_path, source, head, undisturbed):
    config = _slow(tmp_path, source, apart=True)
    rng = random.Random(11)
    kills: Counter[str] = Counter()
    driver = _drive(config, head.address)
    while sum(kills.values()) < KILLS:
        if driver.poll() is not None:
            assert driver.returncode == 0, (tmp_path / "config.log").read_text()[-3000:]
            assert committed(tmp_path / "out") == undisturbed
            _forget(config, rng)
            driver = _drive(config, head.address)
        time.sleep(rng.uniform(0.2, 4.0))
        actors = _actors(config)
        if actors:
            pid, step = rng.choice(actors)
            os.kill(pid, signal.SIGKILL)
            kills[step] += 1
    _finish(config, undisturbed, driver)
    assert len(kills) > 1, "the kills fell on one kind of actor only"


def _actors(config) -> list[tuple[int, str]]:
    """(process id, step) of the stage actors that are at work: each has an event file of its own.

    The files of "driver" and "ray" are the driver's.
    """
    found = []
    for path in (Path(config.out) / "events").glob("*/*.jsonl"):
        step, _, pid = path.stem.rpartition("-")
        if not step.startswith(("driver-", "ray-")) and psutil.pid_exists(int(pid)):
            found.append((int(pid), step))
    return found


@pytest.mark.soak
@pytest.mark.ray
def test_raylets_killed_at_random_moments(tmp_path, source, head, undisturbed):
    """The second node dies with everything on it, and another one joins."""
    config = _slow(tmp_path, source)
    rng = random.Random(13)
    kills = 0
    driver = _drive(config, head.address)
    while kills < KILLS:
        if driver.poll() is not None:
            assert driver.returncode == 0, (tmp_path / "config.log").read_text()[-3000:]
            assert committed(tmp_path / "out") == undisturbed
            _forget(config, rng)
            driver = _drive(config, head.address)
        node = head.add_node(num_cpus=2)
        time.sleep(rng.uniform(0.5, 4.0))
        head.remove_node(node, allow_graceful=False)
        kills += 1
    _finish(config, undisturbed, driver)


def test_the_undisturbed_build_is_complete(tmp_path, source, undisturbed):
    names = [name for name in undisturbed if "/manifests/" in name]
    assert len(names) == NUM_IMAGES // 3 + NUM_IMAGES // 6
