import io
import json
import pickle
from pathlib import Path

import fsspec
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask

from paracaption.pipeline.corpus import shard
from paracaption.pipeline.corpus.reader import open_corpus
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests import committed


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return committed.merged(tmp_path_factory.mktemp("reader") / "out")


@pytest.fixture(scope="module")
def stored(out) -> str:
    """The same corpus in a store."""
    fsspec.filesystem("memory").put(str(out), "/reader/out", recursive=True)
    return "memory://reader/out"


def test_the_example_of_open_corpus_works(out):
    corpus = open_corpus(out)
    assert corpus.subsets == ["coconut", "sa1b"]
    assert (corpus.summary.kept, corpus.config.min_iou) == (25, 0.5)
    for sample, photo in corpus.samples("coconut"):
        image = Image.open(io.BytesIO(photo))
        for region in sample.regions:
            pixels = mask.decode({"size": region.rle.size, "counts": region.rle.counts})
            assert pixels.shape == (image.height, image.width) and pixels.sum() == region.area
    short = 0
    for table in corpus.ledgers("coconut", ["key", "region", "drop_stage", "drop_reason", "drop_detail"]):
        short += table.filter(pc.field("drop_reason") == "text_too_short").num_rows
    assert short == 3
    found = corpus.find_image("coconut/000000000005")
    sample, photo = corpus.read_sample(next(row for row in found.rows if row["kept"]))
    assert sample.key == "000000000005" and photo.startswith(b"\xff\xd8")


def test_a_corpus_in_a_store_is_read_as_one_in_a_folder(out, stored):
    here, there = open_corpus(out), open_corpus(stored)
    assert there.subsets == here.subsets
    assert [unit.name for unit in there.units()] == [unit.name for unit in here.units()]
    assert (there.config, there.summary) == (here.config, here.summary)
    assert list(there.samples()) == list(here.samples())
    assert [table.to_pylist() for table in there.ledgers()] == [table.to_pylist() for table in here.ledgers()]
    assert there.find_image("000000000005") == here.find_image("000000000005")
    row = pq.read_table(out / "index.parquet").to_pylist()[0]
    assert there.read_sample(row) == here.read_sample(row)
    assert there.index_is_current() and there.digest("coconut") == here.digest("coconut")
    assert there.num_planned_units("coconut") == here.num_planned_units("coconut") == 3


def test_units_are_listed_in_order_and_without_temporary_files(tmp_path):
    out = committed.merged(tmp_path / "out")
    (out / "coconut" / "manifests" / ".tmp-coconut-000009.json-1").write_text("{")
    names = [unit.name for unit in open_corpus(out).units()]
    assert names == ["coconut-000000", "coconut-000001", "coconut-000002", "sa1b-000000"]
    committed.uncommitted(out, "coconut-000001")
    names = [unit.name for unit in open_corpus(out).units()]
    assert names == ["coconut-000000", "coconut-000002", "sa1b-000000"]


def test_a_committed_manifest_that_is_gone_is_an_error_and_no_smaller_corpus(out, tmp_path):
    out = committed.merged(tmp_path / "out")
    (out / "coconut" / "manifests" / "coconut-000001.json").unlink()
    corpus = open_corpus(out)
    for ask in (list, lambda _: corpus.digest("coconut"), lambda _: corpus.find_unit("coconut", "none")):
        with pytest.raises(IntegrityError, match=r"coconut-000001\.json: gone.*build CONFIG` again"):
            ask(corpus.samples())


def test_a_folder_whose_name_is_a_pattern_is_read(tmp_path):
    out = committed.merged(tmp_path / "out [1]*")
    assert len(list(open_corpus(out).samples())) == 9
    assert open_corpus(out).find_image("000000000005").subset == "coconut"


def test_units_that_are_committed_later_are_seen_by_an_open_corpus(tmp_path):
    out = committed.merged(tmp_path / "out")
    path = out / "coconut" / "manifests" / "coconut-000001.json"
    whole = path.read_bytes()
    committed.uncommitted(out, "coconut-000001")
    corpus = pickle.loads(pickle.dumps(open_corpus(out)))
    assert len(corpus.units("coconut")) == 2 and not corpus.index_is_current()
    path.write_bytes(whole)
    assert len(corpus.units("coconut")) == 3 and corpus.index_is_current()


def test_one_sample_is_held_at_a_time(out, monkeypatch):
    taken = []
    real = shard.decode_sample
    monkeypatch.setattr(shard, "decode_sample", lambda *a: taken.append(1) or real(*a))
    samples = open_corpus(out).samples()
    next(samples)
    assert len(taken) == 1


def test_an_unknown_subset_column_or_folder_is_an_error_that_names_what_there_is(out, tmp_path):
    with pytest.raises(ConfigError, match="no subset coco; it has coconut, sa1b"):
        list(open_corpus(out).samples("coco"))
    with pytest.raises(ConfigError, match="captions: no such column; a ledger has unit, subset"):
        list(open_corpus(out).ledgers("coconut", ["captions"]))
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "x", out / "stats.json"):
        with pytest.raises(ConfigError, match="no corpus here"):
            open_corpus(path)
    with pytest.raises(ConfigError, match="no corpus here"):
        open_corpus("memory://reader/none")


def test_an_index_of_other_manifests_is_not_current(tmp_path):
    out = committed.merged(tmp_path / "out")
    corpus = open_corpus(out)
    digests = {name: corpus.digest(name) for name in corpus.subsets}
    assert corpus.index_is_current(digests) and corpus.index_is_current({"sa1b": digests["sa1b"]})
    assert not corpus.index_is_current({"sa1b": digests["coconut"]})
    (out / "stats.json").unlink()
    assert not corpus.index_is_current(digests)
    with pytest.raises(ConfigError, match="paracaption merge"):
        _ = corpus.summary
    (out / "index.parquet").unlink()
    with pytest.raises(ConfigError, match="paracaption merge"):
        next(corpus.index())


def test_damaged_files_are_errors_that_say_what_to_do(tmp_path):
    out = committed.merged(tmp_path / "out")
    corpus = open_corpus(out)
    (out / "config.yaml").write_text("outt: x")
    with pytest.raises(IntegrityError, match=r"config\.yaml.*run `paracaption build CONFIG` again"):
        _ = corpus.config
    (out / "coconut" / "plan" / "plan.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"plan\.json: not a work list"):
        corpus.num_planned_units("coconut")
    (out / "sa1b" / "manifests" / "sa1b-000000.json").write_text(json.dumps({}))
    with pytest.raises(IntegrityError, match=r"sa1b-000000\.json: not a manifest"):
        list(corpus.manifests())


def test_an_image_is_found_without_the_index_if_that_is_damaged(tmp_path):
    out = committed.merged(tmp_path / "out")
    key = open_corpus(out).find_image("coconut/000000000001").rows[0]["key"]
    (out / "index.parquet").write_bytes(b"damaged")
    assert open_corpus(out).find_image(f"coconut/{key}").rows[0]["key"] == key
