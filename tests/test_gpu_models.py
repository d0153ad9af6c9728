"""Both recipes with `gar`, `vllm` and `sam3`: real engines, loading code and photographs, tiny random models.

What such models say is nonsense; where it goes is what is tested. The local engine holds the three of them in
one process. Under Ray each has its own, and engines and actors are killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import yaml

from paracaption.pipeline.corpus import verify
from paracaption.pipeline.corpus.events import Event, EventReader
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.in_flight import Note
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.models import registry
from paracaption.schemas.config import BuildConfig
from tests.building import committed
from tests.machinery import alone
from tests.shared_data import shared_data
from tests.tiny.backends import ACCEPT_ALL, write_backends

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.vllm, pytest.mark.timeout(900)]
MODEL_STAGES = {
    "coconut": ["caption", "verify_category"],
    "sa1b": ["caption", "extract_category", "agree_with_segmenter"],
}


def paracaption(home: Path, *args: object) -> subprocess.Popen:
    env = {**os.environ, "PREFECT_HOME": str(home / "prefect"), "OMP_NUM_THREADS": "1"}
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "paracaption.flows.cli", *map(str, args)]
    with open(home / "log.txt", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def assert_verified(out: Path) -> None:
    report = verify.verify(out)
    assert report.ok, report.text()


def said(home: Path) -> str:
    return (home / "log.txt").read_text(errors="replace")[-4000:]


def rows_of(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of a folder of Parquet files by image key and region."""
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    found = {(row["key"], row["region"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def events(out: Path) -> list[Event]:
    return [event for run in sorted((out / "events").iterdir()) for event in EventReader(run).new()]


def actors(out: Path) -> dict[str, int]:
    """Process ids of the model stages' actors that are up, from the names of their event files."""
    found = {}
    for path in (out / "events").glob("*/*.jsonl"):
        name, _, pid = path.stem.rpartition("-")
        stage = name.partition("-")[0]
        if pid.isdecimal() and psutil.pid_exists(int(pid)):
            found[stage] = int(pid)
    return {stage: pid for stage, pid in found.items() if any(stage in s for s in MODEL_STAGES.values())}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def values(home):
    panoptic, tar = shared_data("coco_panopticapi"), shared_data("sa1b_style_open/sa_900000.tar")
    coconut = {
        "annotations": [str(panoptic / "panoptic.json")],
        "labels": str(panoptic / "panoptic"),
        "photos": [str(panoptic / "images")],
    }
    return {
        "coconut": [coconut],
        "sa1b": [{"paths": [str(tar)]}],
        "images_per_shard": 1,
        "io": {"num_cpus": 0.3, "concurrency": [1, 1]},
        "failures": {"min_free_gb": 0},
    }


def start(home: Path, name: str, values: dict[str, Any]) -> tuple[Path, subprocess.Popen]:
    out, path = home / name, home / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, "out": str(out)}))
    return out, paracaption(home, "build", path)


@pytest.fixture(scope="module")
def accepting(values, home):
    """A corpus under thresholds that accept all, by the local engine."""
    load = registry.load_backend

    def load_alone(*given: Any) -> Any:
        with alone():
            return load(*given)

    out = home / "accepting"
    given = {**values, **ACCEPT_ALL, **write_backends(home), "out": str(out)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load_backend", load_alone)
        driver.build(BuildConfig.model_validate(given), LocalEngine())
    return out


def test_a_configuration_that_accepts_all_keeps_every_region_that_was_captioned(accepting):
    out = accepting
    for subset, stages in MODEL_STAGES.items():
        rows = rows_of(out / subset / "ledger").values()
        lost = Counter((row["drop_stage"], row["drop_reason"]) for row in rows if row["drop_reason"])
        assert not {stage for stage, _ in lost} & {*stages, "clean_text"}, lost
        kept = {(row["key"], row["region"]): row["caption"] for row in rows if not row["drop_reason"]}
        shards = sorted(map(str, (out / subset / "shards").glob("*.tar")))
        found = {}
        for sample in wds.WebDataset(shards, shardshuffle=False):
            for region in msgspec.json.decode(sample["json"])["regions"]:
                found[sample["__key__"], region["id"]] = region["caption"]
        assert found == kept
        assert len(kept) >= 40


def test_its_corpus_passes_verification(accepting):
    assert_verified(accepting)


def test_the_engines_report_what_they_did(accepting):
    units = [event for event in events(accepting) if event.what == "unit" and event.asked]
    assert {event.stage for event in units} >= {stage for stages in MODEL_STAGES.values() for stage in stages}
    told = {event.stage: event.report for event in units if event.report}
    assert told["verify_category"]["prefix_cache_hit_share"] > 0.3


@pytest.fixture(scope="module")
def as_configured(values, home, accepting):
    """The same corpus built again under the default thresholds, and the events of that."""
    out = home / "as-configured"
    shutil.copytree(accepting, out)
    before = len(events(out))
    given = {**values, **write_backends(home), "out": str(out)}
    driver.build(BuildConfig.model_validate(given), LocalEngine())
    return out, events(out)[before:]


def test_as_configured_more_is_dropped_each_with_its_reason(as_configured, accepting):
    """Of SA-1B everything: no mask that the random SAM 3 draws is like the one it was asked for."""
    out, _ = as_configured
    assert all(row["drop_reason"] for row in rows_of(out / "sa1b" / "ledger").values())
    for subset in MODEL_STAGES:
        rows, before = rows_of(out / subset / "ledger"), rows_of(accepting / subset / "ledger")
        assert rows.keys() == before.keys()
        dropped = [row for row in rows.values() if row["drop_reason"]]
        assert len(dropped) > sum(row["drop_reason"] is not None for row in before.values())
        assert all(row["drop_stage"] and row["drop_reason"] and row["drop_detail"] for row in dropped)
        assert not {"worker_crashed", "model_error"} & {row["drop_reason"] for row in dropped}
    assert_verified(out)


def test_other_thresholds_start_no_engine(as_configured):
    _, happened = as_configured
    assert {event.what for event in happened} >= {"ready", "unit", "committed"}
    assert not [event for event in happened if event.what == "started" or event.asked]


# Under Ray, each model in its own actors.


@pytest.fixture(scope="module")
def under_ray(values, home):
    """The same corpus as `accepting`; the sets of stages that had actors at the same moment."""
    out, build = start(home, "under-ray", {**values, **ACCEPT_ALL, **write_backends(home)})
    together = set()
    while build.poll() is None:
        together.add(tuple(sorted(actors(out))))
        time.sleep(0.5)
    assert build.returncode == 0, said(home)
    return out, together


def test_three_models_hold_their_actors_at_once(under_ray):
    _, together = under_ray
    for wanted in ({"agree_with_segmenter", "caption", "extract_category"}, {"caption", "verify_category"}):
        assert any(wanted <= set(names) for names in together), together


def test_under_ray_the_engines_give_the_same_corpus_to_the_last_byte(under_ray, accepting):
    assert committed(under_ray[0]) == committed(accepting)
    assert_verified(under_ray[0])


class Kills:
    """kill -9 for the engine of the captioner in a unit of SA-1B, then for its actor in another one."""

    def __init__(self, out: Path):
        self.out = out
        self.killed: dict[str, str] = {}
        self.engines: list[psutil.Process] = []
        self.before: dict[Path, int] = {}

    def look(self) -> None:
        unit, pid = self.unit(), actors(self.out).get("caption")
        if unit is None or pid is None or unit in self.killed.values() or len(self.killed) == 2:
            return
        committed = self.committed()
        if self.killed and not any(path.parent.name.startswith("caption") for path in committed):
            return  # the actor dies when there is something to lose
        engines = [
            child
            for child in psutil.Process(pid).children(recursive=True)
            if "EngineCore" in " ".join([child.name(), *child.cmdline()])
        ]
        assert len(engines) == 1
        self.engines += engines
        self.before |= committed
        if not self.killed:
            engines[0].suspend()  # so that the captioner waits for its answers when the engine dies
            time.sleep(2)
            engines[0].kill()
            self.killed["engine"] = unit
        else:
            os.kill(pid, signal.SIGKILL)
            self.killed["actor"] = unit

    def unit(self) -> str | None:
        """The unit whose regions are in the captioner's engine now."""
        for path in (self.out / "sa1b" / "journal").glob("caption-*/*.json"):
            try:
                if msgspec.json.decode(path.read_bytes(), type=Note).working:
                    return path.stem
            except (OSError, msgspec.DecodeError):
                continue  # it was just removed, or is being written
        return None

    def committed(self) -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for path in (self.out / "sa1b" / "evidence").glob("*/*.parquet")
        }


@pytest.fixture(scope="module")
def disturbed(values, home, accepting):
    """SA-1B once more, engines in processes of their own, and the kills."""
    values = {name: value for name, value in values.items() if name != "coconut"}
    out, build = start(home, "disturbed", {**values, **write_backends(home, own_process=True)})
    kills = Kills(out)
    while build.poll() is None:
        kills.look()
        time.sleep(0.02)
    assert build.returncode == 0, said(home)
    return out, kills


def test_after_the_kill_of_engine_and_actor_no_answer_is_missing_and_none_differs(disturbed, accepting):
    out, kills = disturbed
    assert kills.killed.keys() == {"engine", "actor"}
    assert kills.killed["engine"] != kills.killed["actor"]
    (folder,) = (out / "sa1b" / "evidence").glob("caption-*")  # the digest is that of the undisturbed build
    assert rows_of(folder) == rows_of(accepting / "sa1b" / "evidence" / folder.name)


def test_evidence_that_was_committed_before_a_kill_is_not_written_again(disturbed):
    _, kills = disturbed
    assert any(path.parent.name.startswith("caption") for path in kills.before)
    after = kills.committed()
    assert {path: after[path] for path in kills.before} == kills.before


def test_no_engine_outlives_its_actor(disturbed):
    _, kills = disturbed
    assert len(kills.engines) == 2
    _, alive = psutil.wait_procs(kills.engines, timeout=30)
    assert not alive
