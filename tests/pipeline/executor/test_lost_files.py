"""A file of a committed unit that is gone or cut is no silence: the next build makes that unit again."""

from __future__ import annotations

from pathlib import Path

import pytest

from paracaption.pipeline.corpus import log, verify
from paracaption.pipeline.corpus.records import Commit
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.config import BuildConfig
from tests.building import build, calls, committed, config_of
from tests.synthetic import write_coconut

UNIT = "coconut-000001"
FILES = {
    "shard": f"shards/{UNIT}.tar",
    "ledger": f"ledger/{UNIT}.parquet",
    "manifest": f"manifests/{UNIT}.json",
}


@pytest.fixture
def built(tmp_path) -> BuildConfig:
    config = config_of(
        tmp_path / "out", coconut=write_coconut(tmp_path / "source", 6, 2, (48, 64)), images_per_shard=2
    )
    build(config)
    return config


def lose(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def commits(out: Path) -> list[list[str]]:
    return [sorted(record.units) for record in log.read_records(str(out)) if isinstance(record, Commit)]


@pytest.mark.parametrize("harm", [lose, empty, cut])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.soak(keep=1)
def test_the_unit_whose_file_is_gone_or_cut_is_built_again_to_the_last_byte_and_no_model_is_asked(
    built, tmp_path, name, harm
):
    out = Path(built.out)
    before, asked, done = committed(out), calls(tmp_path / "captioner.log"), commits(out)
    harm(out / "coconut" / FILES[name])
    assert not verify.verify(out).ok
    progress = build(built)
    assert progress["coconut"].pending == 1
    assert commits(out) == [*done, [f"coconut/{UNIT}"]]
    assert committed(out) == before
    assert calls(tmp_path / "captioner.log") == asked
    assert verify.verify(out).ok


def test_a_changed_byte_is_healed_as_verify_says(built):
    out = Path(built.out)
    before = committed(out)
    path = out / "coconut" / FILES["shard"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (problem,) = verify.verify(out).problems
    assert problem.file == f"coconut/{FILES['shard']}" and "delete this file" in problem.what
    path.unlink()
    build(built)
    assert committed(out) == before and verify.verify(out).ok


def test_a_configuration_with_a_changed_byte_is_written_again(built):
    out = Path(built.out)
    path = out / "config.yaml"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"min_words: 5", b"min_words: 6"))
    (problem,) = verify.verify(out).problems
    assert problem.file == "config.yaml" and "run `paracaption build CONFIG` again" in problem.what
    build(built)
    assert path.read_bytes() == whole and verify.verify(out).ok


@pytest.mark.parametrize("name", ["manifest", "shard"])
@pytest.mark.soak(keep=1)
def test_nobody_is_asked_to_delete_the_manifest_where_a_file_is_missing(built, name):
    out = Path(built.out)
    (out / "coconut" / FILES[name]).unlink()
    (problem,) = verify.verify(out).problems
    assert problem.file == f"coconut/{FILES[name]}"
    assert problem.what == "missing; run `paracaption build CONFIG` again, which rebuilds its unit"
    build(built)
    assert verify.verify(out).ok


def test_a_missing_configuration_is_one_problem_with_a_remedy_that_helps(built):
    out = Path(built.out)
    (out / "config.yaml").unlink()
    report = verify.verify(out)
    assert [str(each) for each in report.problems] == [
        "config.yaml: missing; run `paracaption build CONFIG` again, which writes it"
    ]
    assert report.text().endswith(": 1 problem")
    build(built)
    assert verify.verify(out).ok


@pytest.mark.parametrize("name", FILES)
def test_in_a_bucket_a_changed_byte_is_healed_as_verify_says(memory_out, tmp_path, name):
    source = write_coconut(tmp_path / "source", 4, 2, (48, 64))
    config = config_of(memory_out, beside=tmp_path, coconut=source, images_per_shard=2)
    build(config)
    store, file = store_of(memory_out), log.read_units(memory_out)[f"coconut/{UNIT}"]
    place = f"{memory_out}/{getattr(file, name).place}"
    store.put(place, store.read(place)[:-1] + b"x")
    (problem,) = verify.verify(memory_out).problems
    assert f"{memory_out}/{problem.file}" == place and "delete this file" in problem.what
    store.delete(f"{memory_out}/{problem.file}")
    build(config)
    assert verify.verify(memory_out).ok
