"""GAR gives the original's numbers: every intermediate, the prompt, the greedy tokens and the text."""

import json
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.models.gar.image import box_of, cut_mask, cut_photo, tile_grid
from paracaption.schemas.records import Blob, ImageRecord, Region
from tests.machinery import alone
from tests.pipeline.models.gar_parts import load_parts
from tests.shared_data import recorded

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

CASES = [("square", 0), ("wide", 0), ("multi", 0), ("multi", 1), ("multi", 2), ("multi", 3)]
NEW_TOKENS = 12
BACKGROUND = 5


class Golden(NamedTuple):
    """One recorded region."""

    image: ImageRecord
    prompt: int
    mask: np.ndarray
    manifest: dict[str, Any]
    photo_numbers: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]


@lru_cache(None)
def golden(case: str, number: int) -> Golden:
    root = recorded("gar")
    manifest = json.loads((root / "manifest.json").read_text())
    assert [(c["name"], i) for c in manifest["cases"] for i in range(len(c["regions"]))] == CASES
    found = next(entry for entry in manifest["cases"] if entry["name"] == case)
    region = found["regions"][number]
    mask = np.array(Image.open(root / region["mask"]).convert("L")) > 0
    encoded = rle.from_mask(mask)
    image = ImageRecord(
        key=f"{case}_{number}",
        subset="golden",
        photo=Blob(str(root / found["image"])),
        width=found["width"],
        height=found["height"],
        regions=[Region(id=number, rle=encoded.rle, bbox=encoded.bbox, area=encoded.area)],
    )
    numbers = dict(np.load(root / region["npz"]))
    prompt = int(region["prompt_token"].strip("<>").removeprefix("Prompt"))
    return Golden(image, prompt, mask, region, dict(np.load(root / f"cases/{case}/image.npz")), numbers)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """The only engine here: the published layout's checkpoint, exported and in vLLM."""
    from paracaption.pipeline.models.gar.captioner import GarCaptioner

    model = recorded("gar/checkpoint")
    exported = tmp_path_factory.mktemp("gar") / "language"
    with alone():
        found = GarCaptioner(
            model=str(model),
            language_model=str(exported),
            max_tokens=NEW_TOKENS,
            device="cpu",
            max_in_flight=8,
        )
    yield found
    found.close()


@pytest.fixture(scope="module")
def parts():
    """Config, tokenizer, vision side and embedding of the recorded checkpoint, without an engine."""
    return load_parts(recorded("gar/checkpoint"))


def encode(parts, which: Golden, **options):
    """The region's prompt as our encoder makes it."""
    from paracaption.pipeline.models.gar.encoder import Encoder

    encoder = Encoder(*parts, prompt=which.prompt, **options)
    [(key, prompt)] = encoder.run(encoder.prepare([which.image]))
    assert key == (0, 0)
    return prompt


def tiles_of(config, which: Golden):
    from paracaption.pipeline.io.photos import read_pixels

    grid = tile_grid(which.image.width, which.image.height, config.tile_px, config.max_tiles)
    return grid, cut_photo(read_pixels(which.image), config.tile_px, grid)


@pytest.mark.parametrize("case", ["square", "wide", "multi"])
def test_photos_are_cut_into_the_same_tiles(parts, case):
    which = golden(case, 0)
    grid, tiles = tiles_of(parts[0], which)
    assert list(grid) == which.photo_numbers["aspect_ratio"].ravel().tolist()
    pixels = (tiles.float() - 127.5) / 127.5
    assert pixels.shape == which.photo_numbers["pixel_values"].shape
    np.testing.assert_allclose(pixels.numpy(), which.photo_numbers["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("case", "number"), CASES)
def test_masks_are_cut_into_the_same_tiles(parts, case, number):
    which = golden(case, number)
    grid, _ = tiles_of(parts[0], which)
    painted = np.rint((which.numbers["mask_values"] + 1) / 2 * 255).astype(int)
    assert set(np.unique(painted)) <= {which.prompt, BACKGROUND}
    cut = cut_mask(which.mask, parts[0].tile_px, grid).numpy()
    np.testing.assert_array_equal(np.repeat(cut[:, None], 3, axis=1), painted != BACKGROUND)
    bicubic = cut_mask(which.mask, parts[0].tile_px, grid, "bicubic", which.prompt, BACKGROUND)
    expected = which.manifest["alternatives"]["mask_resample_bicubic"]["mask_pixels_true"]
    assert 3 * int(bicubic.sum()) == expected, "the other way to resize masks"


@pytest.mark.parametrize(("case", "number"), CASES)
def test_boxes_and_prompt_tokens_are_the_same(parts, case, number):
    which = golden(case, number)
    assert box_of(which.mask) == tuple(which.manifest["bbox"]) == tuple(which.numbers["bbox"].ravel())
    num_tiles = len(which.photo_numbers["pixel_values"])
    layout = parts[1].write(num_tiles, which.prompt)
    assert layout.ids == which.numbers["input_ids"].ravel().tolist()
    places = {parts[0].image_token: layout.image, which.manifest["crop_token_id"]: layout.crop}
    for token, (start, end) in places.items():
        assert [at for at, found in enumerate(layout.ids) if found == token] == list(range(start, end))


@pytest.mark.parametrize(("case", "number"), CASES)
def test_features_of_tiles_are_the_same(parts, case, number):
    which = golden(case, number)
    config, _, vision, _ = parts
    grid, tiles = tiles_of(config, which)
    features = vision(tiles, cut_mask(which.mask, config.tile_px, grid)).numpy()
    np.testing.assert_allclose(features, which.numbers["image_features"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "number"), CASES)
def test_prompts_with_image_and_replay_are_the_same(parts, case, number):
    which = golden(case, number)
    prompt = encode(parts, which).numpy()
    np.testing.assert_allclose(prompt, which.numbers["inputs_embeds"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "number"), CASES)
def test_the_exported_language_model_has_the_same_logits(parts, captioner, case, number):
    import torch
    from transformers import LlamaForCausalLM

    which = golden(case, number)
    model = LlamaForCausalLM.from_pretrained(captioner.options.language_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(inputs_embeds=encode(parts, which)[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(logits, which.numbers["first_logits"].ravel(), rtol=0, atol=2e-4)


def answers(captioner, prompts):
    """Tokens that vLLM continues the prompts with, all at once."""
    from paracaption.pipeline.models.vllm_engine import Request

    params = captioner.sampling()
    requests = [Request(key, {"prompt_embeds": prompt}, params) for key, prompt in prompts.items()]
    return {key: list(answer.token_ids) for key, answer in captioner.engine.run(requests)}


def test_greedy_tokens_are_the_same_with_all_regions_decoding_together(parts, captioner):
    prompts = {case: encode(parts, golden(*case)) for case in CASES}
    found = answers(captioner, prompts)
    for case in CASES:
        which = golden(*case)
        assert found[case] == which.manifest["greedy_tokens"] == which.numbers["greedy_tokens"].tolist(), case
        assert captioner.prompts.read(found[case]) == which.manifest["greedy_text"].strip(), case


def test_greedy_tokens_are_the_same_one_region_at_a_time(parts, captioner):
    for case in CASES:
        which = golden(*case)
        assert answers(captioner, {case: encode(parts, which)})[case] == which.manifest["greedy_tokens"], case


def test_masks_resized_the_other_way_give_that_ways_tokens(parts, captioner):
    """The published processor is not public in full; `mask_resample: bicubic` is what it may do instead."""
    prompts = {case: encode(parts, golden(*case), mask_resample="bicubic") for case in CASES}
    found = answers(captioner, prompts)
    for case in CASES:
        other = golden(*case).manifest["alternatives"]["mask_resample_bicubic"]["greedy_tokens"]
        assert found[case] == other, case


def test_captions_of_whole_images_are_the_recorded_texts(captioner):
    cases = [case for case in CASES if golden(*case).prompt == 1]  # the captioner's own prompt token
    texts = captioner.caption([golden(*case).image for case in cases])
    assert texts == [[golden(*case).manifest["greedy_text"].strip()] for case in cases]
