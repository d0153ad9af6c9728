"""The recorded cases of `../shared/cases/model` that end in a wrong result without a word, and what shows each.

| case | what holds | tests, besides those here |
| --- | --- | --- |
| 02 | offloaded weights change no caption; absent ones are refused | model_training/model/test_placement.py |
| 03 | a sure model keeps the released code's tokens | model_training/decoding/test_sampler.py: `..._a_sure_model_...` |
| 04 | probabilities and logits are the region, NaN is refused | model_training/decoding/test_mask_arrays.py, test_read_regions.py |
| 06 | GAR's patch size and MLP ratio are its config's | pipeline/models/test_gar.py: `..._other_patches_...`, `..._arguments_of_the_tower_...` |
| 07 | the released code's data are read | model_training/data/test_conversation_records.py, test_region_records.py |
| 08 | a run that trains on nothing fails | model_training/train/test_dropped.py |
| 10 | benchmarks are asked as published | model_training/evaluation/test_captioners.py: `test_seven_regions_...` |
| 13 | pixels are rounded once | model_training/model/test_perceptiondlm.py: `test_pixels_are_scaled_in_float32_...` |
| 14 | a model that says NaN is an error | model_training/decoding/test_sampler.py: `..._exclamation_marks`; pipeline/models/test_gar.py, test_gar_encoder.py, test_sam.py, test_sam3.py |

The tests here run the same cases from the outside, or show neighbors of them that no other test does.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.decoding.sampler import decode_batch
from paracaption.model_training.evaluation import run_benchmark
from paracaption.model_training.model.batch import collate
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.model_training.train.trainer import fit
from paracaption.pipeline.config_file import load_evaluation
from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.errors import StageFailed
from paracaption.schemas.evaluation import Bench, EvaluateConfig
from tests.model_training.benchmark_files import write_bench
from tests.model_training.plain_decoder import decode_plainly
from tests.model_training.tiny_models import examples, lively, photo
from tests.model_training.toy_corpus import config_of, write_corpus
from tests.pipeline.models.gar_parts import load_parts, with_boxes
from tests.pipeline.models.gar_parts import photo as photo_file
from tests.tiny.gar import write_gar
from tests.tiny.perceptiondlm_model import write_model

ROOT = Path(__file__).resolve().parents[2]
QUICK: dict[str, Any] = {"max_new_tokens": 6, "steps": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("saved") / "model")


def captions_of(model: PerceptionDLM, saved: Path) -> list[str]:
    captioner = RegionCaptioner(model, PerceptionDLMProcessor.from_pretrained(saved))
    return captioner.caption(*photo(1, 2), **QUICK)


# 02: weights that are elsewhere.


@pytest.mark.parametrize("places", ["auto", "each part"])
def test_captions_are_the_same_whatever_is_offloaded(saved: Path, tmp_path: Path, places: str):
    pytest.importorskip("accelerate")
    whole = PerceptionDLM.from_pretrained(saved)
    given: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": "200KB"}}
    if places == "each part":
        parts = [name for name, part in whole.named_modules() if list(part.parameters(recurse=False))]
        given = {"device_map": dict.fromkeys(parts, "disk")}
    model = PerceptionDLM.from_pretrained(saved, offload_folder=str(tmp_path), **given)
    assert model.lm_head.weight.is_meta
    assert captions_of(model, saved) == captions_of(whole, saved)


# 03: a model that is sure.


def test_a_sure_models_images_keep_their_tokens_in_a_batch_with_what_is_cached():
    model, processor = lively(seed=3, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    found = examples(processor, [4, 1, 3], slots=8)
    options = DecodeOptions(
        strategy="remask", max_new_tokens=8, steps=8, cache="exact", suppress_special=False, early_exit=False
    )
    together = decode_batch(model, collate(found), options).tokens_BNS
    for row, example in enumerate(found):
        expected, _ = decode_plainly(model, example, options, [])
        assert together[row, : len(expected)].tolist() == expected


# 04: masks as SAM's models give them on a GPU.


def test_logits_in_half_precision_are_captioned_as_the_region(saved: Path):
    captioner = RegionCaptioner.load(saved, device="cpu")
    pixels, masks = photo(1, 2)
    expected = captioner.caption(pixels, masks, **QUICK)
    logits = [torch.from_numpy(np.where(mask, 20.0, -20.0)).half() for mask in masks]
    assert captioner.caption(pixels, logits, **QUICK) == expected


# 06: a checkpoint with other patches, from its file to a prompt.


def test_a_checkpoint_with_patches_of_4_makes_prompts_that_tell_its_regions_apart(tmp_path: Path):
    from paracaption.pipeline.models.gar.encoder import Encoder

    parts = load_parts(write_gar(tmp_path / "GAR", tile_px=32, patch_px=4))
    image = with_boxes(photo_file(tmp_path, "a", (64, 96)), (0, 0, 8, 8), (80, 50, 12, 12), (0, 0, 8, 8))
    encoder = Encoder(*parts)
    first, second, third = dict(encoder.run(encoder.prepare([image]))).values()
    assert torch.equal(first, third)
    assert first.shape == second.shape and not torch.equal(first, second)


# 08: nothing to train on.


def test_a_run_on_a_corpus_of_which_all_is_too_long_fails_and_writes_no_model(tmp_path: Path):
    corpus = write_corpus(tmp_path / "world", 6)
    data = {"max_tokens": 256, "workers": 0, "cache": str(tmp_path / "cache")}
    data |= {"max_caption_tokens": 1, "on_too_long": "skip"}
    with pytest.raises(StageFailed, match=r"items were left out.*on_too_long"):
        fit(config_of(tmp_path / "run", corpus, data=data, steps=3))
    assert not (tmp_path / "run/model").exists()


# 10: what a benchmark's result says of how it was asked.


@pytest.mark.parametrize("kind", ["paradlc", "dlc"])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, ("Describe the masked region in detail.", "published")),
        ({"prompt": "What is it?", "grouping": "even"}, ("What is it?", "even")),
    ],
)
@pytest.mark.soak(keep=1)
def test_a_result_says_with_which_prompt_and_grouping_it_was_made(
    saved: Path, tmp_path: Path, kind: str, asked: dict[str, str], told: tuple[str, str]
):
    bench = Bench(name="b", kind=kind, folder=str(write_bench(tmp_path / "bench", kind)), **asked)  # pyright: ignore[reportArgumentType]
    run_benchmark.caption_images(bench, config_for(bench, saved).backend(), tmp_path / "out")
    result = run_benchmark.score_answers(bench, None, tmp_path / "out")
    assert (result.prompt, result.grouping, result.regions) == (*told, 4)
    written = json.loads((tmp_path / "out/summary.json").read_text())
    assert (written["prompt"], written["grouping"]) == told


def test_the_committed_configuration_asks_as_published():
    for path in sorted((ROOT / "configs/evaluate/regions").glob("*.yaml")):
        for bench in load_evaluation(path).benchmarks:
            assert (bench.prompt, bench.grouping) == ("Describe the masked region in detail.", "published")


def config_for(bench: Bench, model: Path) -> EvaluateConfig:
    options = {"model": str(model), "device": "cpu", "decode": QUICK}
    captioner = {"name": "perceptiondlm", "options": options}
    return EvaluateConfig.model_validate(
        {"out": "unused", "label": "it", "captioner": captioner, "benchmarks": [bench.model_dump()]}
    )


# 13: pixels in bfloat16.


def test_gar_scales_pixels_in_float32_and_rounds_once(tmp_path: Path):
    from paracaption.pipeline.models.gar.vision import load_vision

    config, *_ = load_parts(write_gar(tmp_path / "GAR", tile_px=112))
    vision, seen = load_vision(config, torch.bfloat16, "cpu"), []
    vision.tower.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tiles = torch.arange(256, dtype=torch.uint8).repeat(3 * 112 * 112 // 256).view(1, 3, 112, 112)
    vision(tiles)
    assert torch.equal(seen[0], ((tiles.double() / 255 - 0.5) / 0.5).bfloat16())


# 14: a model that says NaN.


def spoil(part: str, value: float) -> Callable[[PerceptionDLM], None]:
    def change(model: PerceptionDLM) -> None:
        weight = model.get_submodule(part).weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            weight.view(-1)[3] = value

    return change


PARTS = ["vision_tower.embeddings.patch_embedding", "language_model.layers.0.mlp.down_proj", "lm_head"]


@pytest.fixture(params=[*((part, float("nan")) for part in PARTS), (PARTS[1], 1e38)])
def damaged(request, tmp_path: Path) -> Path:
    """A saved model of which one weight is NaN, or so large that what is computed with it is."""
    folder = write_model(tmp_path / "model")
    model = PerceptionDLM.from_pretrained(folder)
    spoil(*request.param)(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.soak(keep=2)
def test_a_damaged_model_is_an_error_of_one_line_and_captions_nothing(damaged: Path, tmp_path: Path):
    pixels, (mask, _) = photo(1, 2)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = ["--model", damaged, "--image", tmp_path / "photo.png", "--masks", tmp_path / "mask.png"]
    given += ["--device", "cpu", "--max-new-tokens", "6", "--steps", "3", "--json", tmp_path / "said.json"]
    result = CliRunner().invoke(app, ["caption", *map(str, given)])
    assert result.exit_code and isinstance(result.exception, StageFailed)
    assert f"{damaged}: the probabilities in" in str(result.exception)
    assert "\n" not in str(result.exception) and not (tmp_path / "said.json").exists()

    bench = Bench(name="b", kind="paradlc", folder=str(write_bench(tmp_path / "bench")))
    with pytest.raises(StageFailed, match="are NaN, or equal"):
        run_benchmark.caption_images(bench, config_for(bench, damaged).backend(), tmp_path / "out")
    assert len((tmp_path / "out/captions.jsonl").read_text().splitlines()) == 1, "the header"
