"""Photos of benchmarks are not trained on, and everybody says so; runs on other data go on as they were."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.filters.held_out import is_held_out
from paracaption.model_training.data import left_out
from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.train import trainer
from paracaption.model_training.train.distributed import DistributedGroup
from paracaption.pipeline.corpus import writer
from paracaption.pipeline.corpus.merge import merge
from paracaption.schemas.config import BuildConfig, dump_config
from paracaption.schemas.errors import ConfigError, IntegrityError
from paracaption.schemas.records import Blob, ImageRecord, Region
from paracaption.schemas.training import ConversationSource, CorpusSource, TrainConfig
from tests.model_training.corpora import loader, masks_of, processor, regions_of
from tests.model_training.data.test_conversations import conversations

LISTED = "000000571598"
SIZE = (60, 30)


def write_named(out: Path, number: int, names: dict[str, str]) -> None:
    """Commit a unit of images with two kept regions each, by key and name of the photo's file."""
    writer.prepare(out / "coconut")
    path = out.parent / "photo.jpg"
    Image.new("RGB", SIZE, (9, 99, 9)).save(path)
    images = []
    for key, name in names.items():
        found = [rle.from_mask(mask) for mask in masks_of(number, 2, SIZE)]
        regions = [
            Region(region, mask.rle, mask.bbox, mask.area, caption=f"{key} {region}")
            for region, mask in enumerate(found)
        ]
        images.append(ImageRecord(key, "coconut", Blob(str(path)), *SIZE, "jpeg", name, regions))
    draft = writer.write_unit(out / "coconut", f"coconut-{number:06d}", images, "plan", "recipe")
    writer.commit(out / "coconut", draft)


UNITS = (
    {"plain": "a.jpg", "first": f"COCO_train2014_{LISTED}.jpg"},
    {f"{LISTED}-dup2": f"other/{LISTED}.jpg"},
    {"objects": "objects365_v2_00912042.jpg", "near": "objects365_v2_00912043.jpg"},
)
KEPT = {f"coconut/{key}#{region}" for key in ("plain", "near") for region in (0, 1)}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three units: one has a benchmark's photo, one nothing else, one a photo whose number is one higher."""
    for number, names in enumerate(UNITS):
        write_named(tmp_path / "corpus", number, names)
    return tmp_path / "corpus"


@pytest.fixture
def merged(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("paracaption.pipeline.corpus.plots.draw_plots", lambda *_: {})
    monkeypatch.setattr("paracaption.pipeline.corpus.card.render_card", lambda *_: "")
    merge(corpus, BuildConfig.model_construct(subsets={}))
    return corpus


def test_photos_of_benchmarks_are_not_trained_on_by_index_and_by_ledgers(merged: Path):
    by_index = loader(merged)
    assert regions_of(by_index) == Counter(KEPT)
    assert by_index.left_out == [{"benchmark_photos": 3}]
    shutil.rmtree(merged.parent / "cache")
    (merged / "index.parquet").unlink()
    by_ledgers = loader(merged)
    assert regions_of(by_ledgers) == Counter(KEPT)
    assert by_ledgers.fingerprint == by_index.fingerprint


def test_an_index_without_file_names_goes_by_the_keys(merged: Path):
    import pyarrow.parquet as pq

    path = merged / "index.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["file_name"]), path)
    stats = json.loads((merged / "stats.json").read_text())
    stats["index"]["bytes"] = path.stat().st_size
    (merged / "stats.json").write_text(json.dumps(stats))
    found = loader(merged)
    keys = {name.split("/")[1].split("#")[0] for name in regions_of(found)}
    assert keys == {"plain", "near", "first", "objects"}
    assert found.left_out == [{"benchmark_photos": 1}]


def test_keeping_them_is_the_data_that_it_was_and_their_refusal_says_how(merged: Path, monkeypatch):
    monkeypatch.setattr(left_out, "rules_of", lambda *_: left_out.Rules())  # as before there were rules
    early = loader(merged)
    state = early.state_dict()
    monkeypatch.undo()
    kept = loader(merged, benchmark_photos="keep")
    kept.load_state_dict(state)
    assert sum(regions_of(kept).values()) == 10 and kept.left_out == [{}]
    with pytest.raises(IntegrityError, match=r"set data\.benchmark_photos: keep$"):
        loader(merged).load_state_dict(state)


def test_data_without_such_photos_have_the_fingerprint_that_they_had(tmp_path: Path):
    write_named(tmp_path / "corpus", 0, {"plain": "a.jpg", "number": "000000000139.jpg"})
    usual, kept = loader(tmp_path / "corpus"), loader(tmp_path / "corpus", benchmark_photos="keep")
    assert usual.fingerprint == kept.fingerprint and usual.left_out == [{}]
    kept.load_state_dict(usual.state_dict())
    with pytest.raises(IntegrityError, match="train in another `out`"):
        loader(tmp_path / "corpus", seed=1).load_state_dict(usual.state_dict())


def test_a_corpus_of_nothing_else_is_an_error_that_says_so(tmp_path: Path):
    write_named(tmp_path / "corpus", 0, {"one": f"{LISTED}.jpg", "two": f"{LISTED}.png"})
    with pytest.raises(
        ConfigError, match=r"nothing is left to train on after leaving out 2 photos of ParaDLC-Bench"
    ):
        loader(tmp_path / "corpus")


def configure(corpus: Path, share: float) -> BuildConfig:
    """Give a corpus the configuration of a build with a share of held-out images."""
    source = {"source": "coconut", "annotations": ["a.json"], "photos": ["p"], "labels": "l"}
    values = {"out": "x", "subsets": {"coconut": {"sources": [source]}}, "held_out_share": share}
    config = BuildConfig.model_validate(values)
    (corpus / "config.yaml").write_text(dump_config(config))
    return config


@pytest.mark.parametrize("known", ["index", "ledgers", "no configuration"])
@pytest.mark.soak(keep=1)
def test_held_out_images_are_never_read(tmp_path: Path, monkeypatch, known: str):
    monkeypatch.setattr("paracaption.pipeline.corpus.plots.draw_plots", lambda *_: {})
    names = {f"photo_{n}": f"photo_{n}.jpg" for n in range(20)} | {"listed": f"{LISTED}.jpg"}
    write_named(tmp_path / "corpus", 0, names)
    config = configure(tmp_path / "corpus", 0.4)
    if known != "ledgers":
        merge(tmp_path / "corpus", config)
    if known == "no configuration":
        (tmp_path / "corpus" / "config.yaml").unlink()
    held = {key for key in names if is_held_out(key, 0.4)} - {"listed"}
    found = loader(tmp_path / "corpus")
    read = {name.split("/")[1].split("#")[0] for name in regions_of(found)}
    assert held and read == names.keys() - held - {"listed"}
    assert found.left_out == [{"benchmark_photos": 1, "held_out": len(held)}]
    both = loader(tmp_path / "corpus", benchmark_photos="keep")
    assert sum(both.left_out[0].values()) + len(regions_of(both)) // 2 == 21


def test_a_run_from_before_the_split_is_refused_with_what_has_changed(corpus: Path):
    early = loader(corpus, benchmark_photos="keep")
    configure(corpus, 0.0)
    assert loader(corpus, benchmark_photos="keep").fingerprint == early.fingerprint
    configure(corpus, 0.5)
    with pytest.raises(
        IntegrityError, match=r"when a corpus had another held_out_share, set that share again"
    ):
        loader(corpus, benchmark_photos="keep").load_state_dict(early.state_dict())


@pytest.mark.soak
def test_what_one_corpus_holds_out_or_is_evaluated_on_no_other_corpus_trains(tmp_path: Path):
    names = {f"photo_{n}": f"photo_{n}.jpg" for n in range(20)}
    for name, share in (("one", 0.0), ("two", 0.2), ("three", 0.4)):
        write_named(tmp_path / name / "corpus", 0, names)
        configure(tmp_path / name / "corpus", share)
    held = {
        share: {f"photo_{n}" for n in range(20) if is_held_out(f"photo_{n}", share)} for share in (0.2, 0.4)
    }
    assert set() < held[0.2] < held[0.4]

    def read(*corpora: str, **options) -> set[str]:
        sources = [CorpusSource(corpus=str(tmp_path / name / "corpus")) for name in corpora]
        found = loader(tmp_path / "any", sources=sources, **options)
        return {name.split("/")[1].split("#")[0] for name in regions_of(found)}

    assert read("one") == names.keys()
    assert read("two") == read("one", "two") == names.keys() - held[0.2]
    assert read("one", "two", "three") == names.keys() - held[0.4]
    evaluation = {"corpus": str(tmp_path / "three" / "corpus")}
    run = TrainConfig.model_validate(
        {
            "out": str(tmp_path / "run"),
            "model": {"path": "m"},
            "corpora": [{"corpus": str(tmp_path / "one" / "corpus")}],
            "evaluation": evaluation,
            "steps": 1,
            "device": "cpu",
            "data": {"max_tokens": 600, "workers": 0, "cache": str(tmp_path / "cache")},
        }
    )
    for config, share in ((run, 0.4), (run.model_copy(update={"evaluation": None}), 0.0)):
        found = trainer.open_loader(config, processor(), DistributedGroup(config, 0, 1))
        wanted = {"held_out": len(held[share])} if share else {}
        assert found.left_out == [wanted]
    scenes = iter_photo_regions(evaluation["corpus"], held_out=True)
    assert {scene.name.rpartition("#")[2] for scene in scenes} == held[0.4]


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_conversations_on_photos_of_benchmarks_are_left_out_by_name_and_id(tmp_path: Path, form: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records, photos = conversations(tmp_path)
    (tmp_path / "images" / "coco").mkdir()
    name = f"coco/{LISTED}.jpg"
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / name)
    records[1]["image"] = name
    records[3]["id"] = LISTED
    path = tmp_path / f"said.{form}"
    if form == "json":
        path.write_text(json.dumps(records))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pairs = zip(records, photos, strict=True)
        rows = [{**each, "image": {"bytes": photo, "path": each["image"]}} for each, photo in pairs]
        pq.write_table(pa.Table.from_pylist(rows), path)
    source = ConversationSource(path=str(path), images=str(tmp_path / "images"))
    found = loader(tmp_path / "out", sources=[source])
    assert sorted(key for batch in found for key in batch.keys) == [f"{path}: q{n}" for n in (0, 2, 4)]
    assert found.left_out == [{"benchmark_photos": 2}]
    kept = loader(tmp_path / "out", sources=[source], benchmark_photos="keep")
    assert kept.num_items(0) == 5 and kept.left_out == [{}]


def test_a_conversation_without_a_photo_is_never_one_of_a_benchmark(tmp_path: Path):
    records, _ = conversations(tmp_path)
    records[0] |= {"id": LISTED, "image": None}
    path = tmp_path / "said.json"
    path.write_text(json.dumps(records))
    source = ConversationSource(path=str(path), images=str(tmp_path / "images"))
    assert loader(tmp_path / "out", sources=[source]).left_out == [{}]


def test_conversations_on_nothing_else_are_an_error_that_says_so(tmp_path: Path):
    records, _ = conversations(tmp_path, 1)
    (tmp_path / "said.json").write_text(json.dumps([records[0] | {"id": LISTED}]))
    source = ConversationSource(path=str(tmp_path / "said.json"), images=str(tmp_path / "images"))
    with pytest.raises(ConfigError, match=r"nothing is left to train on after leaving out 1 photo of"):
        loader(tmp_path / "out", sources=[source])


def test_counts_of_sources_add_up(merged: Path, tmp_path: Path):
    records, _ = conversations(tmp_path)
    records[2]["id"] = LISTED
    (tmp_path / "said.json").write_text(json.dumps(records))
    talk = ConversationSource(path=str(tmp_path / "said.json"), images=str(tmp_path / "images"))
    found = loader(merged, sources=[CorpusSource(corpus=str(merged)), talk])
    assert left_out.total(found.left_out) == {"benchmark_photos": 4}
