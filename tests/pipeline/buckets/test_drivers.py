"""Two drivers at one bucket, each stopped at the request where it would do harm; and listings that lag.

What rounds of real drivers (`tests.duels`) and the simulation have found, each by itself.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from paracaption.pipeline.corpus import adopt, log, reader, records, removal, status, units
from paracaption.pipeline.corpus.owner import Fenced, own
from paracaption.pipeline.corpus.sweep import is_swept, sweep
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.job import Job
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.run_folders import BEGUN
from paracaption.pipeline.executor.workers import Workers
from paracaption.pipeline.io import bucket_checks, bucket_clients, bucket_files, failures, files, scratch
from paracaption.pipeline.io.location import locate
from paracaption.pipeline.io.process_identity import name_of, this_process
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import ConfigError, IntegrityError
from paracaption.schemas.records import Blob
from tests.building import config_of
from tests.synthetic import write_coconut, write_sa1b

OUT = "s3://corpus/out"
LEASE_S = 0.2


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return {"coconut": write_coconut(folder / "coconut", 5), "sa1b": write_sa1b(folder / "sa1b", 2)}


@pytest.fixture(autouse=True)
def _is_a_corpus(monkeypatch):
    """Of each test: nothing is known of the bucket of another one."""
    locate(OUT)
    monkeypatch.setattr(log, "_SEEN", {})
    monkeypatch.setattr(bucket_checks, "_tried", set())


class Aside:
    """A call in a thread, as another driver makes it."""

    def __init__(self, call: Callable[[], Any]):
        self._future: Future[Any] = Future()
        threading.Thread(target=self._run, args=[call], daemon=True).start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._future.set_result(call())
        except Exception as error:  # noqa: BLE001 - raised again in the test
            self._future.set_exception(error)

    def result(self) -> Any:
        """What it returns; raises what it raises."""
        return self._future.result(30)


def put(path: str, data: bytes = b"x") -> None:
    store_of(OUT).put(f"{OUT}/{path}", data)


def build(sources: dict, beside: Any, **changes: Any) -> Any:
    config = config_of(OUT, beside=beside, **sources, **changes)
    driver.build(config, LocalEngine())
    return config


# Who begins next to another one.


def test_a_bucket_that_another_driver_has_just_marked_is_no_strangers(faulty_s3):
    """The marker was not there yet, what the other one writes is there already."""
    gate = faulty_s3.gate("HEAD", "out/corpus.json", hold="after")
    other = Aside(lambda: adopt.refuse_foreign(OUT, ["coconut"]))
    faulty_s3.held(gate, wait_s=10)
    adopt.mark(OUT)
    put("coconut/shards/coconut-000000-0123456789ab.tar")
    faulty_s3.release(gate)
    other.result()


def test_a_marker_that_no_listing_shows_yet_marks_a_bucket(faulty_s3):
    put("coconut/shards/coconut-000000-0123456789ab.tar")
    faulty_s3.set_faults(late_listing_puts=1)
    adopt.mark(OUT)
    assert files.list_names(OUT) == ["coconut"]
    adopt.refuse_foreign(OUT, ["coconut"])


def test_files_without_a_marker_are_a_strangers(faulty_s3):
    put("coconut/shards/holiday.tar")
    with pytest.raises(ConfigError, match=r"holiday.tar: this folder has other files"):
        adopt.refuse_foreign(OUT, ["coconut"])


@pytest.mark.parametrize("read", [log.read_units, lambda out: units.list_units(f"{out}/coconut")])
def test_what_another_driver_writes_before_its_first_commit_is_no_unit(faulty_s3, read):
    """Whoever asks has found no log; then its listing has attempts, which have other names than manifests."""
    gate = faulty_s3.gate("ListObjectsV2", "out/log/", hold="after")
    other = Aside(lambda: read(OUT))
    faulty_s3.held(gate, wait_s=10)
    put("coconut/manifests/coconut-000000-0123456789ab.json", b"{}")
    faulty_s3.release(gate)
    assert not other.result()


def test_a_store_that_ignores_conditions_is_refused_by_a_build(faulty_s3, sources, tmp_path):
    faulty_s3.set_faults(ignores_conditions=True)
    with pytest.raises(ConfigError, match="If-None-Match"):
        build(sources, tmp_path)
    assert faulty_s3.objects() == {}


def test_a_sweep_leaves_the_trial_of_another_driver_alone(faulty_s3):
    with own(OUT, "build", LEASE_S) as owner:
        gate = faulty_s3.gate("GET", f"out/{bucket_checks.PROBE}*", hold="before")
        other = Aside(lambda: bucket_checks.check_store(OUT))
        faulty_s3.held(gate, wait_s=10)
        assert sweep(owner) == 0
        faulty_s3.release(gate)
        other.result()
    asked = faulty_s3.requests()
    assert not [
        each for each in asked if each["operation"] == "ListObjectsV2" and "check-" in each["keys"][0]
    ]
    created = [each for each in asked if each["method"] == "PUT" and bucket_checks.PROBE in each["keys"][0]]
    assert len({each["keys"][0] for each in created}) == 1, "the trial was made more than once"


def test_a_sweep_removes_the_trial_of_a_killed_driver(faulty_s3):
    dead = name_of(this_process()._replace(started="1"))
    put(f"{bucket_checks.PROBE}0123456789ab~{dead}")
    with own(OUT, "build", LEASE_S) as owner:
        sweep(owner)
    assert not [key for key in faulty_s3.objects() if bucket_checks.PROBE in key]


def test_a_trial_that_another_process_has_under_way_keeps_no_build_from_being_finished(faulty_s3):
    put(f"{bucket_checks.PROBE}0123456789ab~{name_of(this_process())}")
    assert is_swept(OUT)


@pytest.mark.soak
def test_a_work_list_that_a_store_does_not_give_is_not_made_again(faulty_s3, sources, tmp_path, monkeypatch):
    build(sources, tmp_path)
    before, ask = log.read_state(OUT).files, bucket_files.ask

    def away(question, url):
        if "/plan/plan-" in url and url.endswith(".parquet"):
            raise bucket_clients.BucketError("HTTP 503 Service Unavailable", 503)
        return ask(question, url)

    monkeypatch.setattr(bucket_files, "ask", away)
    with pytest.raises(IntegrityError, match="run the same command again when the store answers"):
        build(sources, tmp_path, masks={"min_area_px": 1500})
    assert log.read_state(OUT).files == before


# Who is stopped for longer than its lease.


def stop(server: Any, call: Callable[[Any], Any], kind: str, keys: str) -> tuple[Aside, int]:
    """A driver that owns the corpus, and is held at such a request of `call`; it does not beat."""
    began, gates = threading.Event(), list[int]()

    def drive() -> None:
        with own(OUT, "build", 3600.0) as owner:
            gates.append(server.gate(kind, keys, hold="before"))
            began.set()
            call(owner)

    aside = Aside(drive)
    assert began.wait(10)
    server.held(gates[0], wait_s=10)
    return aside, gates[0]


def written(owner: Any, unit: str = "coconut-000000", text: bytes = b"a") -> records.Commit:
    """A commit of a unit without a shard, whose files are there."""
    ledger = owner.write(f"coconut/ledger/{unit}.parquet", text)
    manifest = owner.write(f"coconut/manifests/{unit}.json", text)
    return records.Commit(units={f"coconut/{unit}": records.LogUnit("p", "r", 0, 0, manifest, ledger)})


def test_a_record_that_was_stuck_in_the_network_does_not_count(faulty_s3):
    late, gate = stop(faulty_s3, lambda owner: owner.append(written(owner)), "PUT", "out/log/*")
    with own(OUT, "build", LEASE_S) as owner:
        owner.append(written(owner, text=b"b"))
        faulty_s3.release(gate)
        with pytest.raises(Fenced, match="has taken over"):
            late.result()
    (unit,) = log.read_units(OUT).values()
    assert files.read(Blob(f"{OUT}/{unit.ledger.place}")) == b"b"


def test_a_sweeper_that_wakes_up_deletes_nothing_that_was_committed_meanwhile(faulty_s3):
    """It has listed what the next owner commits, which wrote it before as somebody's worker."""
    put("coconut/ledger/coconut-000000-0123456789ab.parquet", b"a")
    put("coconut/manifests/coconut-000000-0123456789ab.json", b"a")
    late, gate = stop(faulty_s3, sweep, "PUT", "out/log/*")
    digest = hashlib.sha256(b"a").hexdigest()

    def named(path: str) -> records.LogFile:
        stem, _, ending = path.rpartition(".")
        return records.LogFile(path, 1, digest, name=f"{stem}-0123456789ab.{ending}")

    entry = records.LogUnit(
        "p",
        "r",
        0,
        0,
        named("coconut/manifests/coconut-000000.json"),
        named("coconut/ledger/coconut-000000.parquet"),
    )
    with own(OUT, "build", LEASE_S) as owner:
        owner.append(records.Commit(units={"coconut/coconut-000000": entry}))
        faulty_s3.release(gate)
        with pytest.raises(Fenced):
            late.result()
    assert log.is_whole(OUT, log.read_units(OUT)["coconut/coconut-000000"])


def test_what_a_sweep_deletes_late_has_names_that_nobody_uses_again(faulty_s3):
    """It has written its record, and is stopped before it deletes; then others write the same unit."""
    put("coconut/ledger/coconut-000000-0123456789ab.parquet", b"a")
    late, gate = stop(faulty_s3, sweep, "DeleteObjects", "out/coconut/*")
    with own(OUT, "build", LEASE_S) as owner:
        sweep(owner)
        owner.append(written(owner))
        faulty_s3.release(gate)
        with pytest.raises(Fenced):
            late.result()
    assert log.is_whole(OUT, log.read_units(OUT)["coconut/coconut-000000"])


# Listings that lag.


@pytest.mark.soak
def test_a_subset_that_no_listing_shows_is_merged_and_read(faulty_s3, sources, tmp_path):
    faulty_s3.set_faults(late_listing_s=3600.0)
    build(sources, tmp_path)
    assert files.list_names(OUT) == []
    corpus = reader.open_corpus(OUT)
    assert corpus.subsets == ["coconut", "sa1b"] and corpus.index_is_current()
    assert len(list(corpus.samples())) == 7
    assert sorted(corpus.summary.subsets) == ["coconut", "sa1b"]
    assert verify(OUT).ok
    assert [each.subset for each in status.Watcher(OUT).read().subsets] == ["coconut", "sa1b"]


def test_what_a_late_listing_hides_from_a_sweep_is_swept_by_the_next_one(faulty_s3):
    adopt.mark(OUT)
    put("coconut/shards/coconut-000000-0123456789ab.tar")
    faulty_s3.set_faults(late_listing_puts=10)
    with own(OUT, "build", LEASE_S) as owner:
        assert sweep(owner) == 0
        faulty_s3.set_faults(late_listing_puts=0)
        assert sweep(owner) == 1


# What is left.


def test_a_build_leaves_nothing_on_scratch(faulty_s3, sources, tmp_path):
    build(sources, tmp_path)
    assert [path for path in scratch.folder_of(OUT).rglob("*") if path.is_file()] == []


@pytest.mark.soak
def test_an_image_is_removed_from_a_corpus_in_a_bucket(faulty_s3, sources, tmp_path):
    build(sources, tmp_path)
    corpus = reader.open_corpus(OUT)
    (photo,) = (photo for sample, photo in corpus.samples("coconut") if sample.key == "000000000001")
    assert removal.remove(OUT, ["000000000001"], delete_replaced=True) == {"images": 1, "units": 1}
    assert not [key for key in faulty_s3.objects() if photo in faulty_s3.content(key)]
    assert len(list(reader.open_corpus(OUT).samples("coconut"))) == 4
    assert verify(OUT).ok


def test_a_node_asks_a_bucket_again_that_does_not_answer_for_a_while(
    faulty_s3, sources, tmp_path, monkeypatch
):
    """A worker that gave up at once would refuse every unit that it is sent."""
    config, tried = config_of(OUT, beside=tmp_path, **sources, failures={"read_retry_s": 20}), []
    job = Job(config, "coconut", f"{OUT}/coconut", "plan", "recipe", f"{OUT}/events/run")
    store_of(OUT).create(f"{job.run}/{BEGUN}", b"")
    ask = bucket_clients.ask

    def silent_once(question, url):
        tried.append(url)
        if len(tried) == 1:
            raise bucket_clients.BucketError("HTTP 503", 503)
        return ask(question, url)

    failures.RETRYING.set_budget(0)
    monkeypatch.setattr(bucket_clients, "ask", silent_once)
    with Workers([(job, ())], lambda _: lambda event: None) as workers:
        assert not workers._refused
    assert tried.count(tried[0]) == 2
