"""Evidence is of a photo: another one is asked about again, and none is written with captions of another."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import verify, work_list
from paracaption.pipeline.io import photos
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.errors import StageFailed
from tests import backends
from tests.building import build, calls, committed, config_of
from tests.synthetic import jpeg, write_coconut, write_sa1b

FIRST = "000000000000"


class ReadingCaptioner(backends.InstantCaptioner):
    """Looks at the photos, as a real captioner does."""

    def caption(self, images):
        for image in images:
            photos.read_pixels(image)
        return super().caption(images)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def source(root):
    return write_coconut(root, 6)


@pytest.fixture(params=["InstantCaptioner", "OneByOneCaptioner", "ReadingCaptioner"])
def config(request, tmp_path, source):
    """Of one unit, with a captioner that reads the photos and with one that does not."""
    made = config_of(tmp_path / "out", coconut=source, images_per_shard=6, captioner={"batch_images": 2})
    name = f"{(__name__ if request.param.startswith('Reading') else backends.__name__)}:{request.param}"
    return made.model_copy(update={"captioner": made.captioner.model_copy(update={"name": name})})


def another_photo(root: Path, key: str = FIRST) -> bytes:
    """Replace a photo by one of the same size."""
    data = jpeg(np.full((96, 128, 3), 77, np.uint8))
    (root / "photos" / f"{key}.jpg").write_bytes(data)
    return data


def rows(out: Path, stage: str, subset: str = "coconut") -> list[dict]:
    (path,) = out.glob(f"{subset}/evidence/{stage}-*/*.parquet")
    return pq.read_table(path).to_pylist()


def test_evidence_names_the_photo_that_was_seen_and_a_judge_sees_none(config, tmp_path, root):
    build(config)
    for row in rows(tmp_path / "out", "caption"):
        assert row["photo"] == photos.digest_of((root / "photos" / f"{row['key']}.jpg").read_bytes())
    assert {row["photo"] for row in rows(tmp_path / "out", "verify_category")} == {None}


def test_a_segmenter_and_a_captioner_saw_the_same_photo(tmp_path):
    source = write_sa1b(tmp_path / "tars", 3)
    build(config_of(tmp_path / "out", sa1b=source))
    both = [
        {(row["key"], row["photo"]) for row in rows(tmp_path / "out", stage, "sa1b")}
        for stage in ("caption", "agree_with_segmenter")
    ]
    assert both[0] == both[1] and len(both[0]) == 3


@pytest.mark.soak(keep=1)
def test_only_another_photo_is_asked_about_again(config, tmp_path, root):
    build(config)
    asked = len(calls(tmp_path / "captioner.log"))
    data = another_photo(root)
    build(config.model_copy(update={"text": config.text.model_copy(update={"min_words": 4})}))
    assert calls(tmp_path / "captioner.log")[asked:] == [f"{FIRST}/{i}" for i in range(4)]
    with tarfile.open(tmp_path / "out/coconut/shards/coconut-000000.tar") as shard:
        assert shard.extractfile(f"{FIRST}.jpg").read() == data
    assert photos.digest_of(data) in {row["photo"] for row in rows(tmp_path / "out", "caption")}
    assert verify.verify(tmp_path / "out").ok


@pytest.mark.soak(keep=2)
def test_a_photo_that_is_replaced_by_an_equal_one_is_not_asked_about_again(config, tmp_path, root):
    build(config)
    before, asked = committed(tmp_path / "out"), len(calls(tmp_path / "captioner.log"))
    path = root / "photos" / f"{FIRST}.jpg"
    shutil.copy(path, tmp_path / "copy.jpg")
    path.unlink()
    shutil.copy(tmp_path / "copy.jpg", path)
    for manifest in (tmp_path / "out/coconut/manifests").iterdir():
        manifest.unlink()
    build(config)
    assert committed(tmp_path / "out") == before and len(calls(tmp_path / "captioner.log")) == asked


@pytest.mark.soak(keep=1)
def test_a_resumed_build_and_one_from_evidence_alone_are_the_fresh_one_to_the_last_byte(tmp_path, config):
    build(config)
    fresh = committed(tmp_path / "out")
    (path,) = (tmp_path / "out").glob("coconut/evidence/caption-*/*.parquet")
    for lost in (False, True):
        for manifest in (tmp_path / "out/coconut/manifests").iterdir():
            manifest.unlink()
        if lost:
            path.unlink()
        build(config)
        assert committed(tmp_path / "out") == fresh


def test_evidence_that_names_no_photo_counts_whatever_the_photo_is(tmp_path, source, root):
    config = config_of(tmp_path / "out", coconut=source, images_per_shard=6)
    build(config)
    (path,) = (tmp_path / "out").glob("coconut/evidence/caption-*/*.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["photo"]).replace_schema_metadata(None), path)
    asked = len(calls(tmp_path / "captioner.log"))
    another_photo(root)
    for manifest in (tmp_path / "out/coconut/manifests").iterdir():
        manifest.unlink()
    build(config)
    assert len(calls(tmp_path / "captioner.log")) == asked
    ledger = tmp_path / "out/coconut/ledger/coconut-000000.parquet"
    assert "photo_digest" not in pq.read_schema(ledger).names


@pytest.mark.parametrize("cut", [False, True], ids=["another photo", "cut short"])
@pytest.mark.soak(keep=1)
def test_a_photo_that_changes_after_it_was_captioned_is_not_committed_and_asked_about_next_time(
    config, tmp_path, root, monkeypatch, cut
):
    path = root / "photos" / f"{FIRST}.jpg"
    good = path.read_bytes()
    ask = backends.InstantJudge.ask

    def change(self, questions):
        path.write_bytes(good[:900] if cut else jpeg(np.full((96, 128, 3), 77, np.uint8)))
        return ask(self, questions)

    monkeypatch.setattr(backends.InstantJudge, "ask", change)
    with pytest.raises(StageFailed, match=rf"{FIRST}\.jpg: the photo changed while the build was running"):
        build(config)
    assert committed(tmp_path / "out") == {}
    assert not [each for each in (tmp_path / "out").rglob("*") if each.name.startswith(".tmp-")]
    monkeypatch.undo()
    if cut:
        path.write_bytes(good)
    asked = len(calls(tmp_path / "captioner.log"))
    build(config)
    assert len(calls(tmp_path / "captioner.log")) == asked + (0 if cut else 4)
    assert len(committed(tmp_path / "out")) == 3


def test_a_photo_that_changes_between_two_models_holds_its_unit_back(tmp_path, monkeypatch):
    source = write_sa1b(tmp_path / "tars", 3)
    tar = Path(source["paths"][0])
    config = config_of(tmp_path / "out", sa1b=source)
    planned = work_list.make_work_list(open_source(config, "sa1b"), config, tmp_path / "elsewhere")
    photo = planned.read_unit(0)[0].photo
    ask = backends.InstantJudge.ask

    def change(self, questions):
        data = bytearray(tar.read_bytes())
        data[photo.offset + 300] ^= 1
        tar.write_bytes(data)
        return ask(self, questions)

    monkeypatch.setattr(backends.InstantJudge, "ask", change)
    with pytest.raises(StageFailed, match="the photo changed while the build was running"):
        build(config)
    assert committed(tmp_path / "out") == {}
    asked = len(calls(tmp_path / "segmenter.log"))
    monkeypatch.undo()
    build(config)
    assert len(calls(tmp_path / "captioner.log")) == 12 + 4  # one image has changed
    assert len(calls(tmp_path / "segmenter.log")) == asked  # and was seen by the segmenter as it is now


@pytest.mark.soak(keep=2)
def test_a_photo_that_cannot_be_hashed_decides_nothing(tmp_path, config, monkeypatch):
    build(config)
    fresh, asked = committed(tmp_path / "out"), len(calls(tmp_path / "captioner.log"))
    for manifest in (tmp_path / "out/coconut/manifests").iterdir():
        manifest.unlink()
    fetch, failed = photos._fetch, []

    def fail_once(photo, start, length):
        if length is None and start == 0 and photo.url not in failed:
            failed.append(photo.url)
            raise photos.BadRecord(photos.Reason.PHOTO_UNREADABLE, f"{photo}: Input/output error")
        return fetch(photo, start, length)

    monkeypatch.setattr(photos, "_fetch", fail_once)
    build(config)
    assert len(failed) == 6
    assert committed(tmp_path / "out") == fresh and len(calls(tmp_path / "captioner.log")) == asked
