"""Text alone and several images in the model; region data of the released code, each mask once, as it is."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paracaption.model_training.model.tiling import MaskRuns
from paracaption.model_training.train import build, metrics
from paracaption.model_training.train.trainer import fit
from paracaption.pipeline.corpus.export import export
from tests.model_training.corpora import processor, write
from tests.model_training.released_data import (
    ASKED,
    decoded,
    drawn_masks,
    opened,
    rles,
    said_in,
    texts,
    turns,
    write_json,
    write_parquet,
    write_photos,
)
from tests.model_training.tiny_models import lively
from tests.model_training.toy_corpus import config_of

# Text alone.


def test_text_alone_is_read_packed_and_padded_beside_photos(tmp_path: Path):
    images = write_photos(tmp_path / "images", "a.png")
    records = [
        {"id": "text", "conversations": turns(("human", "hi"), ("gpt", "ho"))},
        {"id": "photo", "image": "a.png", "conversations": turns(*ASKED)},
    ]
    path = write_json(tmp_path / "said.json", records)
    assert {name: said_in(text) for name, text in texts(opened(path, images)).items()} == {
        "text": ["hi", "ho"],
        "photo": ["<img>###</img>\nwhat?", "a cat"],
    }
    (batch,) = opened(path, images, packed=True, max_examples=None)
    assert batch.images.views_N3SS.shape[0] == 3 and batch.images.grids_I2.tolist() == [[1, 2]]
    assert batch.tokens.ids_BL.shape[0] == 1 and len(batch.keys) == 2
    path = write_json(tmp_path / "said.json", [records[0], {**records[0], "id": "more"}])
    for packed, rows in ((True, 1), (False, 2)):
        (batch,) = opened(path, packed=packed, max_examples=None)
        assert batch.images.views_N3SS.shape[0] == 0 and batch.images.grids_I2.shape == (0, 2)
        assert batch.tokens.ids_BL.shape[0] == rows and batch.label_BL.sum() == 6  # "ho" and its end, twice


@pytest.mark.parametrize("packed", [True, False])
def test_text_alone_goes_forward_and_backward_through_every_part_of_the_model(tmp_path: Path, packed: bool):
    model, made = lively(dtype=torch.float32)
    hello = {"conversations": turns(("human", "a cat"), ("gpt", "a dog"))}
    path = write_json(tmp_path / "said.json", [hello])
    (batch,) = opened(path, packed=packed, processor=made)
    logits = model(batch.tokens, batch.images)
    assert logits.shape[:2] == batch.tokens.ids_BL.shape and logits.isfinite().all()
    assert torch.equal(logits, model(batch.tokens, None))  # the gray view has no part in it
    wanted = batch.label_BL
    torch.nn.functional.cross_entropy(logits[wanted], batch.tokens.ids_BL[wanted]).backward()
    grads = {name: each.grad.abs() for name, each in model.named_parameters() if each.grad is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["projector.0.weight"].sum() == 0 < grads["lm_head.weight"].sum()


def test_a_photo_answers_the_same_beside_text_alone_and_beside_several_images(tmp_path: Path):
    model, made = lively()
    images = write_photos(tmp_path / "images", "a.png", "b.png")
    several = {
        "images": ["a.png", "b.png"],
        "conversations": turns(("human", "<image><image>"), ("gpt", "a")),
    }
    records = [
        {"id": "one", "image": "a.png", "conversations": turns(*ASKED)},
        {"id": "two", **several},
        {"id": "none", "conversations": turns(("human", "hi"), ("gpt", "ho"))},
    ]
    path = write_json(tmp_path / "said.json", records)
    alone = {}
    with torch.inference_mode():
        for batch in opened(path, images, processor=made):
            alone[batch.keys[0]] = model(batch.tokens, batch.images)[0]
        (together,) = opened(path, images, processor=made, packed=True, max_examples=None)
        logits = model(together.tokens, together.images)
    for number, key in enumerate(together.keys):
        found = logits[together.tokens.roles.sample_BL == number]
        assert (found - alone[key]).abs().max() < 1e-9


# Region data.


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, str]]:
    """Every mask that goes to the model, decoded run by run, with its caption."""
    made, found = processor(), []
    real = type(made).make_example

    def make_example(self, pixels, masks, captions, *rest):
        for mask, caption in zip(masks, captions, strict=True):
            if isinstance(mask, MaskRuns):
                flat = np.repeat(np.arange(len(mask.counts)) % 2 == 1, mask.counts)
                text = self.tokenizer.decode(caption)
                found.append((flat.reshape(mask.shape[::-1]).T, text))
        return real(self, pixels, masks, captions, *rest)

    monkeypatch.setattr(type(made), "make_example", make_example)
    return found


def region_forms() -> dict[str, Any]:
    return {
        "mask_rles": lambda coded, said: {"mask_rles": coded, "captions": said},
        "uncompressed": lambda coded, said: {
            "mask_rles": [{"size": each["size"], "counts": run_lengths(each)} for each in coded],
            "captions": said,
        },
        "annotations": lambda coded, said: {
            "annotations": [
                {"segmentation": each, "caption": text} for each, text in zip(coded, said, strict=True)
            ]
        },
        "beside turns": lambda coded, said: {
            "mask_rles": coded,
            "captions": said,
            "conversations": turns(*ASKED),
        },
    }


def run_lengths(coded: dict[str, Any]) -> list[int]:
    flat = decoded(coded).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return [0, *counts] if flat[0] else counts


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("form", region_forms())
def test_region_data_give_each_mask_as_pycocotools_reads_it_with_its_caption_once(
    tmp_path: Path, shown: list[tuple[np.ndarray, str]], form: str, kind: str
):
    images = write_photos(tmp_path / "images", "a.png")
    masks = drawn_masks(9, 40, 70)
    said = [f"thing {number}" for number in range(9)]
    record = {"image": "a.png"} | region_forms()[form](rles(masks), said)
    if kind == "json":
        path = write_json(tmp_path / "sam_dataset.json", [record])
    else:
        data = (images / "a.png").read_bytes()
        path = write_parquet(tmp_path / "data/0.parquet", [record | {"image": data}]).parent
    found = opened(path, images if kind == "json" else "")
    sizes = []
    for batch in found:
        sizes.append(len(batch.images.boxes_R4))
        assert set(batch.keys[0].partition("#")[2].split(",")) <= {str(number) for number in range(9)}
    assert sizes == [3, 3, 3]  # ceil(9 / 3.5) groups
    got = {text: mask for mask, text in shown}
    assert len(shown) == len(got) == 9
    for text, coded in zip(said, rles(masks), strict=True):
        assert np.array_equal(got[text], decoded(coded))


def test_a_region_without_a_mask_is_the_whole_image_and_one_mask_may_stand_alone(
    tmp_path: Path, shown: list[tuple[np.ndarray, str]]
):
    images = write_photos(tmp_path / "images", "a.png")
    (mask,) = drawn_masks(1, 40, 70)
    records = [
        {"image_file": "a.png", "annotations": [{"caption": "all", "segmentation": None}]},
        {"image_path": "a.png", "mask_rles": rles([mask])[0], "captions": "one"},
    ]
    found = texts(opened(write_json(tmp_path / "coconut_dataset.json", records), images))
    assert len(found) == 2
    got = {text: mask for mask, text in shown}
    assert got["all"].all() and got["all"].shape == (70, 40)
    assert np.array_equal(got["one"], mask)


def test_what_export_writes_is_read_with_every_kept_region(
    tmp_path: Path, shown: list[tuple[np.ndarray, str]]
):
    corpus = tmp_path / "corpus" / "out"
    kept = write(corpus, [[3, 9, 1, 0, 4], [7, 2]])
    export(str(corpus), "perceptiondlm-json", tmp_path / "exported")
    path = tmp_path / "exported/annotations.json"
    found = list(opened(path, path.parent))
    assert sum(len(batch.images.boxes_R4) for batch in found) == len(kept) == len(shown)
    expected = [
        (text, decoded(rle))
        for record in json.loads(path.read_text())
        for rle, text in zip(record["mask_rles"], record["captions"], strict=True)
    ]
    got = {text: mask for mask, text in shown}
    assert all(np.array_equal(got[text], mask) for text, mask in expected) and len(expected) == len(kept)


def test_regions_that_cannot_be_used_are_named_and_the_others_of_their_image_are_kept(tmp_path: Path, caplog):
    images = write_photos(tmp_path / "images", "a.png", "b.png")
    good = rles(drawn_masks(2, 40, 70))
    empty = {"size": [70, 40], "counts": [2800]}
    other = rles(drawn_masks(1, 30, 70))
    torn = {"size": [70, 40], "counts": [1, 2]}
    records = [
        {"image": "a.png", "mask_rles": [*good, empty, torn, None], "captions": ["a", "b", "c", "d", "e"]},
        {"id": "said", "image": "a.png", "mask_rles": good, "captions": ["a", " "]},
        {"id": "short", "image": "a.png", "mask_rles": good, "captions": ["a"]},
        {"id": "size", "image": "a.png", "mask_rles": other, "captions": ["a"]},
        {"id": "none", "mask_rles": good, "captions": ["a", "b"]},
        {"id": "two", "images": ["a.png", "b.png"], "mask_rles": good, "captions": ["a", "b"]},
        {"id": "bare", "image": "a.png", "annotations": []},
    ]
    path = write_json(tmp_path / "dam_dataset.json", records)
    with caplog.at_level(logging.WARNING):
        found = opened(path, images, on_bad_sample="skip")
    assert (
        "dam_dataset.json: 1 of 7 records have no regions and are left out; the first is record 7"
        in caplog.text
    )
    kept = sorted(key.rpartition(": ")[2] for batch in found for key in batch.keys if batch.weight_E.sum())
    assert kept in (["0#0,1", "said#0"], ["0#1,0", "said#0"])
    assert found.skipped == {
        "mask_empty": 1,
        "mask_undecodable": 1,
        "size_mismatch": 1,
        "conversation_without_image": 1,
        "regions_unusable": 4,  # no mask, no caption, a caption too few, two images
    }


@pytest.mark.parametrize(
    "regions", [pytest.param(False, id="text", marks=pytest.mark.soak), pytest.param(True, id="mixed")]
)
@pytest.mark.soak
def test_a_run_trains_on_text_alone_and_on_all_kinds_together(tmp_path: Path, regions: bool):
    images = write_photos(tmp_path / "images", "a.png", "b.png")
    hello = turns(("human", "a cat"), ("gpt", "a dog"))
    records: list[dict[str, Any]] = [{"conversations": hello}] * 6
    if regions:
        records += [{"images": ["a.png", "b.png"], "conversations": hello}] * 3
        masks = rles(drawn_masks(6, 40, 70))
        records += [{"image": "a.png", "mask_rles": masks, "captions": ["a cat"] * 6}] * 3
    config = config_of(
        tmp_path / "run",
        tmp_path / "cache",
        corpora=[],
        conversations=[
            {"path": str(write_json(tmp_path / "said.json", records)), "images": str(images)},
        ],
        steps=None,
        epochs=2,
    )
    before = build.open_model(config)[0].state_dict()
    fit(config)
    lines = metrics.read_metrics(tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert sum(len(line["samples"]) for line in lines) == 2 * (6 + regions * (3 + 3 * 2))
    after = load_file(tmp_path / "run/model/model.safetensors")
    moved = {build.part_of(name) for name, each in before.items() if not torch.equal(each, after[name])}
    assert moved >= ({"vision", "projector", "language", "prompts"} if regions else {"language"})
