"""Images are taken out on request: their bytes, rows and answers are gone, and all else is untouched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import log, reader, removal, undo, verify, versions, work_list_summary
from paracaption.pipeline.executor import driver
from paracaption.pipeline.sources.registry import complete
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests.building import calls, committed, config_of
from tests.pipeline.corpus.test_growth import SIZE, finish, records, samples
from tests.synthetic import write_coconut, write_sa1b

GONE = "000000000001"


@pytest.fixture
def built(tmp_path) -> BuildConfig:
    config = config_of(
        tmp_path / "out",
        coconut=write_coconut(tmp_path / "source", 6, 2, SIZE),
        sa1b=write_sa1b(tmp_path / "tars", 2, 2, SIZE),
    )
    finish(config)
    return config


def whole_tree(out: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file())


@pytest.mark.soak
def test_photo_captions_and_answers_are_gone_and_everything_else_stays(built, tmp_path):
    out = tmp_path / "out"
    photo = (tmp_path / "source/photos" / f"{GONE}.jpg").read_bytes()
    rows, kept, asked = records(out), samples(out), calls(tmp_path / "captioner.log")
    captions = {row["caption"] for (_, key, _), row in rows.items() if key == GONE}
    before = committed(out)
    assert photo in whole_tree(out)
    assert removal.remove(str(out), [GONE], delete_replaced=True) == {"images": 1, "units": 1}
    assert photo not in whole_tree(out)
    now = records(out)
    assert now.pop(("coconut", GONE, None))["drop_reason"] == "removed"
    assert now == {place: row for place, row in rows.items() if place[1] != GONE}
    assert samples(out) == {name: each for name, each in kept.items() if name != f"coconut/{GONE}"}
    for path in out.glob("*/evidence/*/*.parquet"):
        assert GONE.encode() not in path.read_bytes()
    assert len(captions) == 2 and not captions & {row["caption"] for row in now.values()}
    changed = {path for path, digest in committed(out).items() if before[path] != digest}
    assert {Path(path).stem for path in changed} == {"coconut-000000"}
    assert verify.verify(out).ok, verify.verify(out).text()
    assert driver.is_finished(complete(built))
    assert calls(tmp_path / "captioner.log") == asked


@pytest.mark.soak
def test_the_index_of_a_corpus_without_a_log_does_not_keep_the_image_either(built, tmp_path):
    out = tmp_path / "out"
    shutil.rmtree(out / "log")
    removal.remove(str(out), [GONE])
    assert GONE not in pq.read_table(out / "index.parquet")["key"].to_pylist()
    assert verify.verify(out).ok, verify.verify(out).text()


@pytest.mark.soak
def test_what_a_removal_writes_is_what_a_build_would_write(built, tmp_path):
    out = tmp_path / "out"
    removal.remove(str(out), [f"coconut/{GONE}", "sa1b/sa_0"])
    after = committed(out)
    for name in ("coconut/manifests/coconut-000000.json", "sa1b/manifests/sa1b-000000.json"):
        (out / name).unlink()
    finish(built)
    assert committed(out) == after


@pytest.mark.soak
def test_no_later_build_brings_an_image_back(built, tmp_path):
    out = tmp_path / "out"
    removal.remove(str(out), [GONE])
    write_coconut(tmp_path / "source", 9, 2, SIZE)
    finish(built)
    stricter = built.model_copy(update={"text": built.text.model_copy(update={"min_words": 1})})
    finish(stricter)
    assert {row["drop_reason"] for (_, key, _), row in records(out).items() if key == GONE} == {"removed"}
    assert verify.verify(out).ok, verify.verify(out).text()


@pytest.mark.soak
def test_a_removal_that_died_is_finished_by_the_next_build_or_by_itself(built, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(removal.writer, "commit", die)
        removal.remove(str(out), [GONE])
    assert any(key == GONE and row["kept"] for (_, key, _), row in records(out).items())
    other = tmp_path / "other"
    shutil.copytree(out, other)
    finish(built)
    assert removal.remove(str(other), [GONE]) == {"images": 0, "units": 1}
    assert records(out) == records(other)
    assert verify.verify(other).ok and verify.verify(out).ok
    assert removal.remove(str(other), [GONE]) == {"images": 0, "units": 0}


@pytest.mark.soak
def test_an_undo_never_brings_a_removed_image_back(built, tmp_path):
    out = tmp_path / "out"
    stricter = built.model_copy(update={"text": built.text.model_copy(update={"min_words": 30})})
    finish(stricter)
    removal.remove(str(out), [GONE])
    rebuild = undo.find_rebuild(str(out))
    assert rebuild.units == ["coconut/coconut-000001", "sa1b/sa1b-000000"]
    undo.undo(str(out), rebuild)
    assert not any(key == GONE and row["kept"] for (_, key, _), row in records(out).items())


@pytest.mark.soak
def test_a_removal_alone_cannot_be_undone(built, tmp_path):
    removal.remove(str(tmp_path / "out"), [GONE])
    with pytest.raises(ConfigError, match="nothing to undo"):
        undo.find_rebuild(str(tmp_path / "out"))


@pytest.mark.soak
def test_the_log_says_what_was_removed(built, tmp_path):
    removal.remove(str(tmp_path / "out"), [GONE, "000000000005"])
    texts = [entry.text for entry in versions.list_versions(str(tmp_path / "out"))]
    assert "coconut: 6 images in 2 units; of these images 2 removed on request" in texts


def test_keys_that_are_of_no_image_are_named_and_nothing_is_removed(built, tmp_path):
    out = tmp_path / "out"
    number = log.last_number(str(out))
    with pytest.raises(ConfigError, match=r"1 of 2 keys are of no image of this corpus \(sa1b/nobody\)"):
        removal.remove(str(out), [GONE, "sa1b/nobody"])
    assert log.last_number(str(out)) == number


def test_a_file_of_keys_may_have_empty_lines_and_notes(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# asked for on Monday\n\n a \nsa1b/b\n")
    assert removal.read_keys(path) == ["a", "sa1b/b"]
    path.write_bytes(b"\xef\xbb\xbfa\r\nsa1b/b\r\n")  # as editors on Windows save it
    assert removal.read_keys(path) == ["a", "sa1b/b"]
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="no key in it"):
        removal.read_keys(path)


def test_a_damaged_work_list_stops_a_removal(built, tmp_path):
    path = work_list_summary.table_path(tmp_path / "out/coconut")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"plan\.parquet"):
        removal.remove(str(tmp_path / "out"), [GONE])


@pytest.mark.soak
def test_every_image_of_a_unit_may_be_removed(built, tmp_path):
    out = tmp_path / "out"
    removal.remove(str(out), ["sa_0", "sa_1"])
    (unit,) = reader.list_units(f"{out}/sa1b")
    assert reader.read_manifest(unit.manifest).shard is None
    assert verify.verify(out).ok, verify.verify(out).text()
