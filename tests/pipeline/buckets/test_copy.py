"""Copies of corpora between folders and buckets: the same bytes, whole or invisible, and up to date."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import copy as copying
from paracaption.pipeline.corpus import history, log, reader, undo
from paracaption.pipeline.corpus.owner import own
from paracaption.pipeline.corpus.records import Adopt, Checkpoint, Sweep
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import files, scratch
from paracaption.pipeline.io.buckets import BucketStore
from paracaption.pipeline.io.listing import list_files
from paracaption.pipeline.io.location import locate
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import ConfigError, IntegrityError
from paracaption.schemas.records import Blob
from tests.building import build, calls, config_of
from tests.synthetic import write_coconut, write_sa1b


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return {"coconut": write_coconut(folder / "coconut", 10), "sa1b": write_sa1b(folder / "sa1b", 3)}


@pytest.fixture(scope="module")
def versions(sources, tmp_path_factory):
    """A corpus in a folder after each of three builds: one subset; other thresholds; two subsets."""
    folder = tmp_path_factory.mktemp("corpus")
    out, found = folder / "now", list[str]()
    coconut = {"coconut": sources["coconut"]}
    for changes in (coconut, {**coconut, "text": {"min_words": 3}}, {**sources, "text": {"min_words": 4}}):
        driver.build(config_of(out, **changes), LocalEngine())
        found.append(str(folder / f"{len(found)}"))
        shutil.copytree(out, found[-1])
    return found


@pytest.fixture(scope="module")
def folder_corpus(versions):
    """The newest of them."""
    return versions[-1]


@pytest.fixture
def places(tmp_path, monkeypatch, memory_out, faulty_s3):
    """Names of new places, by kind."""
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch"))
    return {"folder": str(tmp_path / "copy"), "memory": memory_out, "s3": "s3://corpus/copies/one"}


def content(out: str) -> dict[str, str]:
    """SHA-256 of every file of the newest version by its place, as it lies there."""
    state = log.read_state(out)
    named = [file for found in state.units.values() for file in found.unit.files()]
    found = {}
    for file in [*named, *state.files.values()]:
        found[file.path] = hashlib.sha256(files.read(Blob(f"{out}/{file.place}"))).hexdigest()
        assert found[file.path] == file.sha256
    return found


def assert_copied(corpus: str, to: str) -> None:
    assert content(to) == content(corpus)
    report = verify(to)
    former = [note for note in report.notes if "belongs to no committed unit" in note.what]
    assert not report.problems and report.notes == former, report.text()
    assert log.is_bucket(to) or not former
    nonces = [[record.nonce for record in log.read_records(out)] for out in (corpus, to)]
    assert nonces[0] == nonces[1]
    assert copying.COPYING not in files.list_names(to)
    beside = [
        {path: listed.bytes for path, listed in list_files(locate(out)).items() if "/evidence/" in path}
        for out in (corpus, to)
    ]
    assert beside[0] == beside[1] != {}


@pytest.mark.parametrize("kind", ["folder", "memory", "s3"])
@pytest.mark.soak(keep=1)
def test_a_folder_is_copied_and_back_again(kind, folder_corpus, places, tmp_path):
    to = places[kind]
    report = copying.copy(folder_corpus, to)
    assert report.files and not report.present and not report.lost
    assert_copied(folder_corpus, to)
    assert list(reader.open_corpus(to).samples()) == list(reader.open_corpus(folder_corpus).samples())
    back = str(tmp_path / "back")
    copying.copy(to, back)
    assert_copied(folder_corpus, back)


def test_a_bucket_is_copied_to_a_bucket_with_its_names(folder_corpus, places):
    copying.copy(folder_corpus, places["memory"])
    copying.copy(places["memory"], places["s3"])
    assert_copied(folder_corpus, places["s3"])
    assert set(list_files(locate(places["s3"]))) == set(list_files(locate(places["memory"])))


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.soak(keep=1)
def test_a_copy_goes_back_to_earlier_versions(kind, folder_corpus, places):
    to = places[kind]
    copying.copy(folder_corpus, to)
    version = undo.find_rebuild(to)
    then = history.unit_files_at(to, version.before.number)
    assert all(place is not None for _, _, found in then for place in found)
    undo.undo(to, version)
    assert not verify(to).problems
    now = log.read_state(to).units
    for name, found in version.before.units.items():
        assert now[name].unit.manifest.sha256 == found.unit.manifest.sha256


def test_a_copy_is_built_on_without_asking_a_model_again(sources, folder_corpus, places, tmp_path):
    copying.copy(folder_corpus, places["memory"])
    config = config_of(places["memory"], beside=tmp_path, **sources, text={"min_words": 2})
    driver.build(config, LocalEngine())
    assert not verify(places["memory"]).problems
    assert not calls(tmp_path / "captioner.log")


@pytest.mark.parametrize("kind", ["folder", "memory", "s3"])
@pytest.mark.parametrize("from_bucket", [False, True])
@pytest.mark.soak(keep=1)
def test_a_copy_is_brought_up_to_date(kind, from_bucket, versions, places, tmp_path):
    to = places[kind]
    corpus = f"{places['memory']}-source" if from_bucket else str(tmp_path / "corpus")
    before = 0
    for number, version in enumerate(versions):
        if from_bucket:
            copying.copy(version, corpus)
        else:
            shutil.rmtree(corpus, ignore_errors=True)
            shutil.copytree(version, corpus)
        dry = copying.copy(corpus, to, dry_run=True)
        report = copying.copy(corpus, to)
        assert report == dry
        assert report.before == before and report.files
        assert report.present or not number
        before = report.number
        again = copying.copy(corpus, to)
        assert again.before == again.number == before
        assert not again.files or kind == "s3"  # evidence of the same second, by the store's clock
        assert content(to) == content(corpus)
    assert_copied(versions[-1], to)
    for _, _, found in history.unit_files_at(to, log.last_number(versions[1])):
        assert None not in found


class _Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
@pytest.mark.soak(keep=2)
def test_a_copy_that_was_stopped_is_invisible_and_goes_on(kind, share, folder_corpus, places):
    to = places[kind]

    def stop(_: str, done: int, total: int) -> None:
        if done > share * total:
            raise _Stop

    with pytest.raises(_Stop):
        copying.copy(folder_corpus, to, progress=stop, threads=2)
    assert not log.exists(to)
    with pytest.raises(ConfigError):
        reader.open_corpus(to)
    report = copying.copy(folder_corpus, to)
    assert report.present or share < 0.5
    assert_copied(folder_corpus, to)


def test_a_copy_whose_log_is_not_whole_is_invisible_and_goes_on(folder_corpus, faulty_s3, places):
    to = places["s3"]
    number = log.last_number(folder_corpus)
    gate = faulty_s3.fail("403", "PUT", f"*/log/{number // 2:012}.json", count=None)
    with pytest.raises(ConfigError):
        copying.copy(folder_corpus, to)
    faulty_s3.release(gate)
    assert log.last_number(to) > 0
    assert not log.exists(to)
    with pytest.raises(ConfigError):
        reader.open_corpus(to)
    report = copying.copy(folder_corpus, to)
    assert report.present > 0
    assert_copied(folder_corpus, to)


def test_no_build_begins_where_a_copy_is_under_way(sources, folder_corpus, places, tmp_path):
    for kind in ("folder", "memory"):
        to = places[kind]

        def stop(*_: object) -> None:
            raise _Stop

        with pytest.raises(_Stop):
            copying.copy(folder_corpus, to, progress=stop)
        if kind == "memory":
            with pytest.raises(ConfigError, match=r"a copy of a corpus has begun here"):
                build(config_of(to, beside=tmp_path, **sources))
            assert not log.exists(to)
        else:
            build(config_of(to, beside=tmp_path, coconut=sources["coconut"]))
            with pytest.raises(ConfigError, match="another corpus is here"):
                copying.copy(folder_corpus, to)


@pytest.mark.soak
def test_a_copy_over_a_failing_network_has_the_same_bytes(folder_corpus, faulty_s3, places):
    shares = {"503": 0.05, "500": 0.03, "lost_answer": 0.03, "reset": 0.03, "cut_body": 0.03}
    faulty_s3.set_faults(shares=shares, seed=7)
    copying.copy(folder_corpus, places["s3"])
    copying.copy(places["s3"], places["folder"])
    faulty_s3.set_faults(shares={})
    assert_copied(folder_corpus, places["s3"])
    assert_copied(folder_corpus, places["folder"])


def test_a_copy_that_is_stopped_deletes_nothing_of_another_one(folder_corpus, faulty_s3, places, monkeypatch):
    """Two at the same place give the same names; who stops in the middle leaves the other's."""
    to, write = places["s3"], BucketStore.write

    def copied_meanwhile(self, path):
        monkeypatch.setattr(BucketStore, "write", write)
        copying.copy(folder_corpus, to)
        file = write(self, path)
        monkeypatch.setattr(file, "write", stop)
        return file

    def stop(data):
        raise KeyboardInterrupt

    monkeypatch.setattr(BucketStore, "write", copied_meanwhile)
    with pytest.raises(KeyboardInterrupt):
        copying.copy(folder_corpus, to, threads=1)
    assert_copied(folder_corpus, to)


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_file_of_the_corpus_is_an_error_that_names_it(how, folder_corpus, places, tmp_path):
    corpus = tmp_path / "damaged"
    shutil.copytree(folder_corpus, corpus)
    shard = sorted((corpus / "coconut" / "shards").iterdir())[0]
    data = shard.read_bytes()
    shard.unlink()
    if how != "gone":
        shard.write_bytes(data[:-512] if how == "cut" else data[:512] + b"?" + data[513:])
    with pytest.raises(IntegrityError, match=f"{shard.name}: (damaged|missing)"):
        copying.copy(str(corpus), places["memory"])
    assert not log.exists(places["memory"])
    shard.write_bytes(data)
    copying.copy(str(corpus), places["memory"])
    assert_copied(folder_corpus, places["memory"])


def test_a_file_in_the_copy_that_is_another_one_is_copied_again(folder_corpus, places):
    def stop(_: str, done: int, total: int) -> None:
        if done > 0.8 * total:
            raise _Stop

    to = places["folder"]
    with pytest.raises(_Stop):
        copying.copy(folder_corpus, to, progress=stop, threads=1)
    shard = sorted(Path(to).parent.glob(".copy.copying/*/shards/*.tar"))[0]
    shard.write_bytes(b"?" + shard.read_bytes()[1:])
    copying.copy(folder_corpus, to)
    assert_copied(folder_corpus, to)


def test_other_places_are_refused(sources, folder_corpus, places, tmp_path):
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis.tex: this place is not empty"):
        copying.copy(folder_corpus, str(tmp_path / "stranger"))
    other = str(tmp_path / "other")
    build(config_of(other, coconut=sources["coconut"]))
    with pytest.raises(ConfigError, match="another corpus is here"):
        copying.copy(folder_corpus, other)
    with pytest.raises(ConfigError, match="another place"):
        copying.copy(other, f"{other}/copy")
    with pytest.raises(ConfigError, match="no commit log"):
        copying.copy(str(tmp_path / "stranger"), places["memory"])
    with pytest.raises(ConfigError, match="no such folder"):
        copying.copy(str(tmp_path / "nothing"), places["memory"])
    copying.copy(folder_corpus, places["memory"])
    build(config_of(places["memory"], beside=tmp_path, **sources, text={"min_words": 1}))
    with pytest.raises(ConfigError, match="something was built"):
        copying.copy(folder_corpus, places["memory"])


def test_reviews_are_copied_and_events_are_not(folder_corpus, places, tmp_path):
    corpus = tmp_path / "reviewed"
    shutil.copytree(folder_corpus, corpus)
    store_of(str(corpus)).put(f"{corpus}/review/marks.parquet", b"reviews")
    copying.copy(str(corpus), places["memory"])
    names = files.list_names(places["memory"])
    assert "review" in names and "events" not in names
    store_of(str(corpus)).put(f"{corpus}/review/marks.parquet", b"reviewe?")
    assert copying.copy(str(corpus), places["memory"]).files == 1
    assert files.read(Blob(f"{places['memory']}/review/marks.parquet")) == b"reviewe?"


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_reviews_that_were_made_in_a_copy_stay_there(kind, folder_corpus, places, tmp_path):
    corpus, to = tmp_path / "reviewed", places[kind]
    shutil.copytree(folder_corpus, corpus)
    store_of(str(corpus)).put(f"{corpus}/review/marks.parquet", b"reviews")
    copying.copy(str(corpus), to)
    store_of(to).put(f"{to}/review/marks.parquet", b"reviews and others")
    assert not copying.copy(str(corpus), to).files
    assert files.read(Blob(f"{to}/review/marks.parquet")) == b"reviews and others"


@pytest.mark.parametrize("kind", ["folder", "s3"])
@pytest.mark.soak(keep=1)
def test_a_copy_that_was_killed_goes_on(kind, folder_corpus, places):
    to = places[kind]
    program = (
        "import os, sys\n"
        "from paracaption.pipeline.corpus.copy import copy\n"
        "end = lambda _, done, total: done > total / 2 and os._exit(9)\n"
        "copy(*sys.argv[1:], progress=end)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, folder_corpus, to], check=False)
    assert killed.returncode == 9
    assert not log.exists(to)
    copying.copy(folder_corpus, to)
    assert_copied(folder_corpus, to)
    if kind == "folder":
        assert [path.name for path in Path(to).parent.iterdir() if "copying" in path.name] == []


def test_a_corpus_of_a_release_without_a_log_is_copied_once_it_has_one(versions, places, tmp_path):
    corpus = tmp_path / "early"
    shutil.copytree(versions[0], corpus)
    shutil.rmtree(corpus / log.LOG)
    with pytest.raises(ConfigError, match="no commit log here"):
        copying.copy(str(corpus), places["memory"])
    with own(str(corpus), "merge", 60):
        pass
    assert isinstance(log.read_record(str(corpus), 2), Adopt)
    copying.copy(str(corpus), places["memory"])
    assert content(places["memory"]) == content(str(corpus)) == content(versions[0])
    copying.copy(places["memory"], places["folder"])
    assert content(places["folder"]) == content(versions[0])


@pytest.mark.soak
def test_a_long_log_is_copied_with_its_checkpoints(versions, places):
    corpus, to = places["memory"], f"{places['memory']}-copy"
    copying.copy(versions[0], corpus)

    def write(last: int) -> None:
        with own(corpus, "build", 60) as owner:
            while owner.state.number < last:
                owner.append(Sweep())

    write(150)
    for place in (to, places["folder"]):
        assert copying.copy(corpus, place).number == 151
        assert content(place) == content(versions[0])
    write(230)
    for place in (to, places["folder"]):
        assert copying.copy(corpus, place).before == 151
        log._SEEN.clear()
        log._RECENT.clear()
        assert content(place) == content(versions[0])  # from the checkpoint at 200
        assert isinstance(log.read_record(place, 200), Checkpoint)
        assert history.state_at(place, 120).units.keys() == log.read_state(place).units.keys()


def _swapping(corpus: Path, version: str) -> Callable[[str, int, int], None]:
    """A view of a copy's progress in which a build replaces files of the corpus when the first has begun."""
    swapped = list[bool]()

    def swap(*_: object) -> None:
        if not swapped:
            swapped.append(True)
            shutil.rmtree(corpus)
            shutil.copytree(version, corpus)

    return swap


def test_units_that_a_build_replaces_meanwhile_are_copied_as_they_were(sources, places, tmp_path):
    corpus, later = tmp_path / "corpus", tmp_path / "later"
    for changes in ({}, {"text": {"min_words": 3}}):
        build(config_of(corpus, coconut=sources["coconut"], **changes))
        shutil.copytree(corpus, later if changes else tmp_path / "first")
    shutil.rmtree(corpus)
    shutil.copytree(tmp_path / "first", corpus)
    number = log.last_number(str(corpus))
    shutil.copy(tmp_path / "first/config.yaml", later)  # it has no former version
    report = copying.copy(str(corpus), places["memory"], progress=_swapping(corpus, str(later)), threads=1)
    assert report.number == number < log.last_number(str(corpus))
    assert content(places["memory"]) == content(str(tmp_path / "first"))


def test_an_index_that_a_merge_replaces_meanwhile_is_no_damage(versions, places, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(versions[0], corpus)
    with pytest.raises(ConfigError, match="was replaced while the corpus was copied; run the same command"):
        copying.copy(str(corpus), places["memory"], progress=_swapping(corpus, versions[2]), threads=1)
    assert not log.exists(places["memory"])
    copying.copy(str(corpus), places["memory"])
    assert_copied(versions[2], places["memory"])


def test_a_copy_that_goes_back_brings_only_what_is_new(sources, places, memory_out, tmp_path):
    coconut = {"coconut": sources["coconut"]}
    driver.build(config_of(memory_out, beside=tmp_path, **coconut), LocalEngine())
    copying.copy(memory_out, places["folder"])
    before = set(list_files(locate(memory_out)))
    copying.copy(places["folder"], memory_out)  # where files have other names than a copy gives them
    assert set(list_files(locate(memory_out))) == before
    driver.build(config_of(places["folder"], **coconut, text={"min_words": 3}), LocalEngine())
    copying.copy(places["folder"], memory_out)
    assert_copied(places["folder"], memory_out)
    new = {file.place for record in log.read_records(memory_out) for file in log.files_of(record)} - before
    came = set(list_files(locate(memory_out))) - before
    assert new and {path for path in came if not path.startswith("log/")} <= new
