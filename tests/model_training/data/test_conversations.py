"""Conversations on whole images, and mixtures of them with a corpus."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from paracaption.schemas.errors import BadSample, ConfigError
from paracaption.schemas.training import ConversationSource, CorpusSource
from tests.model_training.corpora import loader, processor, visits, write

UNITS = [[3, 9, 1, 0, 4], [0, 0], [7, 12, 2]]


def conversations(folder: Path, count: int = 5) -> tuple[list[dict], list[bytes]]:
    """Records of photos 0.png, 1.png, ... in a folder, and their bytes."""
    (folder / "images").mkdir(parents=True)
    records, photos = [], []
    for number in range(count):
        path = folder / "images" / f"{number}.png"
        Image.new("RGB", (40, 70 + number), (number, 9, 9)).save(path)
        photos.append(path.read_bytes())
        said = [("human", "<image>\nwhat?"), ("gpt", f"a {number} cat"), ("human", "where?"), ("gpt", "left")]
        turns = [{"from": speaker, "value": text} for speaker, text in said[: 2 + 2 * (number % 2)]]
        records.append({"id": f"q{number}", "image": path.name, "conversations": turns})
    return records, photos


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "structs"])
def test_conversations_come_from_every_form_with_their_answers_labelled(tmp_path: Path, form: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records, photos = conversations(tmp_path)
    path = tmp_path / f"said.{'parquet' if form == 'structs' else form}"
    if form == "json":
        path.write_text(json.dumps(records))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        images = photos if form == "parquet" else [{"bytes": photo, "path": None} for photo in photos]
        rows = [{**record, "image": image} for record, image in zip(records, images, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows), path)
        shutil.rmtree(tmp_path / "images")
    made = processor()
    source = ConversationSource(path=str(path), images=str(tmp_path / "images"))
    batches = list(loader(tmp_path / "out", sources=[source], packed=False, max_examples=1))
    assert sorted(batch.keys[0] for batch in batches) == [f"{path}: q{number}" for number in range(5)]
    for batch in batches:
        number = int(batch.keys[0][-1])
        labelled = made.tokenizer.decode(batch.tokens.ids_BL[batch.label_BL])
        second = "left<|eot_id|>" if number % 2 else ""
        assert labelled == f"a {number} cat<|eot_id|>{second}"
        assert batch.images.boxes_R4.shape == (0, 4) and batch.images.image_R.dtype == torch.int64
        text = made.tokenizer.decode(batch.tokens.ids_BL[0])
        assert text.count("<IMG_CONTEXT>") == made.config.tokens_per_tile * len(batch.images.views_N3SS)
        assert "</img>\nwhat?<|eot_id|>" in text


def test_a_mixture_passes_over_each_source_as_often_as_its_weight_says(tmp_path: Path):
    corpus = tmp_path / "corpus" / "out"
    write(corpus, UNITS)
    records, _ = conversations(tmp_path, 8)
    (tmp_path / "said.json").write_text(json.dumps(records))
    said = ConversationSource(path=str(tmp_path / "said.json"), images=str(tmp_path / "images"), weight=0.5)
    ours = loader(corpus, sources=[CorpusSource(corpus=str(corpus), weight=2), said])
    halves = []
    for _ in range(2):
        keys = [key for batch in ours for key in batch.keys]
        halves.append({key for key in keys if "said.json" in key})
        found = Counter(key.partition("#")[0] for key in keys if "said.json" not in key)
        assert found == {key: 2 * count for key, count in visits(UNITS).items()}
        assert keys.index(min(halves[-1], key=keys.index)) < len(keys) / 2  # not one source after the other
    assert len(halves[0]) == len(halves[1]) == 4 and not halves[0] & halves[1]


def test_conversations_that_cannot_be_used_are_errors_or_counted(tmp_path: Path):
    records, _ = conversations(tmp_path, 6)
    records[0]["image"] = "absent.png"
    records[1]["image"] = "../images/1.png"
    records[2]["conversations"].reverse()
    del records[3]["image"]
    (tmp_path / "images" / "4.png").write_bytes(b"no photo")
    path = tmp_path / "said.json"
    path.write_text(json.dumps(records))
    source = ConversationSource(path=str(path), images=str(tmp_path / "images"))
    with pytest.raises(BadSample, match=r"said.json: q?\d"):
        list(loader(tmp_path / "out", sources=[source]))
    ours = loader(tmp_path / "out", sources=[source], on_bad_sample="skip")
    assert [key for batch in ours for key in batch.keys if "said" in key] == [f"{path}: q5"]
    reasons = ["photo_missing", "unsafe_name", "conversation_unusable", "conversation_without_image"]
    assert ours.skipped == dict.fromkeys([*reasons, "photo_unreadable"], 1)
    path.write_text(json.dumps([*records[:2], {"id": 7}]))
    with pytest.raises(ConfigError, match=r"said.json: record 3 \(id 7\): .*conversations"):
        loader(tmp_path / "out", sources=[source])
    with pytest.raises(ConfigError, match=r"absent\.json"):
        loader(tmp_path / "out", sources=[ConversationSource(path=str(tmp_path / "absent.json"))])
