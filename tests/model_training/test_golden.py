"""PerceptionDLM in the reference layout gives the released code's numbers at every step."""

import json
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from paracaption.model_training.convert.published import convert
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.decoding.sampler import decode_steps
from paracaption.model_training.model import tiling
from paracaption.model_training.model.attention import dense_mask
from paracaption.model_training.model.batch import Images, collate
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.schemas.decoding import DecodeOptions
from tests.model_training.recorded_perceptiondlm import Ours, RoiAlign, forward, golden
from tests.shared_data import recorded

CASES = ["a", "b", "c"]
TILE_PX, PATCH_PX = 128, 16


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Ours:
    folder = tmp_path_factory.mktemp("perceptiondlm") / "model"
    convert(recorded("perceptiondlm/checkpoint"), folder)
    model = PerceptionDLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.layout == "reference"
    return Ours(model, PerceptionDLMProcessor.from_pretrained(folder))


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=tolerance)


def views_of(painted, grid):
    """Cut a painted canvas into tiles, told apart from `tiling` by plain slicing."""
    across, down = grid
    return [
        painted[row * TILE_PX : (row + 1) * TILE_PX, column * TILE_PX : (column + 1) * TILE_PX]
        for row in range(down)
        for column in range(across)
    ]


def test_tilings_are_the_recorded_ones():
    table = json.loads((recorded("perceptiondlm") / "grid_table.json").read_text())
    rows = table["rows_w_h_gridw_gridh"]
    found = [[*tiling.tile_grid(w, h, table["image_size"], table["max_tiles"])] for w, h, _, _ in rows]
    assert len(rows) > 200
    assert found == [row[2:] for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_images_are_cut_into_the_same_views(ours, case):
    which = golden(case)
    example = ours.example(which)
    assert [list(example.grid)] == which.numbers["aspect_ratio_wh"].tolist()
    pixels = (torch.from_numpy(example.views).float() / 255 - 0.5) / 0.5
    close(pixels, which.numbers["pixel_values"], 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_regions_are_in_the_same_order_with_the_same_boxes(ours, case):
    which = golden(case)
    example = ours.example(which)
    assert example.order == which.numbers["mask_sort_order"].tolist()
    in_order = np.stack([which.masks[number] for number in example.order])
    np.testing.assert_array_equal(in_order, which.numbers["sorted_masks"].numpy())
    np.testing.assert_array_equal(example.boxes, which.numbers["bboxes_xyxy"].numpy())


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_painted_alike(ours, case):
    which = golden(case)
    across, down = grid = ours.example(which).grid
    for rank, number in enumerate(which.numbers["mask_sort_order"].tolist()):
        mask = which.masks[number]
        views = views_of(tiling.paint_prompt(mask, rank, (across * TILE_PX, down * TILE_PX)), grid)
        if across * down > 1:
            views.append(tiling.paint_prompt(mask, rank, (TILE_PX, TILE_PX)))
        np.testing.assert_array_equal(views, which.numbers["global_mask_values_u8"][rank].numpy())


@pytest.mark.parametrize("case", CASES)
def test_the_same_patches_show_the_regions(ours, case):
    which = golden(case)
    found = ours.example(which).prompts[:, : len(which.masks)].swapaxes(0, 1)
    expected = which.numbers["active_patches"].flatten(2).numpy().astype(bool)
    np.testing.assert_array_equal(found, expected)
    assert found.sum((1, 2)).tolist() == which.meta["active_patch_counts"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["vit_layer0_input", "vit_selected_hidden", "vision_embeds"])
def test_the_vision_side_gives_the_same_numbers(ours, case, name):
    close(forward(ours, case)[name], golden(case).numbers[name], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_sequences_are_the_same_before_and_after_the_replay(ours, case):
    numbers, found = golden(case).numbers, forward(ours, case)
    tokens = found["tokens"]
    assert torch.equal(tokens.ids_BL, numbers["input_ids_after"])
    assert torch.equal(tokens.position_BL, numbers["position_ids"])
    replay = tokens.roles.replay_BL()[0]
    starts = replay & ~(tokens.roles.region_BL[0] == tokens.roles.region_BL[0].roll(1))
    assert torch.equal(tokens.ids_BL[:, starts | ~replay], numbers["input_ids_before"])
    for region, start, end in numbers["reserved_spans"].tolist():
        here = replay & (tokens.roles.region_BL[0] == 1 + region)
        assert here.nonzero().flatten().tolist() == list(range(start, end))
    slots = (tokens.ids_BL[0] == ours.model.config.mask_token_id).nonzero().flatten()
    assert torch.equal(slots, numbers["slot_positions"])


@pytest.mark.parametrize("case", CASES)
def test_the_replay_samples_the_same_boxes_of_the_same_map(ours, case):
    numbers, found = golden(case).numbers, forward(ours, case)
    roi = found["roi"]
    assert set(roi.scales) == {golden(case).meta["roi_spatial_scale"]}
    close(roi.boxes[0], numbers["roi_boxes"], 1e-5)
    close(roi.maps[0], numbers["roi_feature_map"], 1e-5)
    close(found["replay"], numbers["roi_features"].flatten(2).transpose(1, 2), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_embeddings_attention_and_logits_are_the_same(ours, case):
    numbers, found = golden(case).numbers, forward(ours, case)
    close(found["inputs_embeds"], numbers["inputs_embeds"], 1e-5)
    roles = found["tokens"].roles
    assert torch.equal(dense_mask(roles, roles, False)[0], numbers["attn_allowed"])
    close(found["logits"], numbers["logits_all_masked"], 2e-4)


@lru_cache(None)
def trajectory(ours, case, num_steps):
    batch = collate([ours.example(golden(case))])
    options = DecodeOptions(max_new_tokens=8, steps=num_steps, cache="none")
    return list(decode_steps(ours.model, batch, options))


@pytest.mark.parametrize("num_steps", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_step_of_a_decode_is_the_same(ours, case, num_steps):
    which = golden(case)
    expected = {
        name.removeprefix(f"dec{num_steps}_"): value
        for name, value in which.numbers.items()
        if name.startswith(f"dec{num_steps}_")
    }
    states = trajectory(ours, case, num_steps)
    forwards = which.meta["decode"][str(num_steps)]["forwards"]
    assert [int(state.forwards_B[0]) for state in states] == list(range(forwards + 1))
    before = torch.stack([state.tokens_BNS.flatten() for state in states[:-1]])
    assert torch.equal(before, expected["state_before_step"])
    guesses = torch.stack([state.predicted_BNS.flatten() for state in states[1:]])
    assert torch.equal(guesses, expected["x0"])
    confidences = torch.stack([state.confidence_BNS.flatten() for state in states[1:]])
    close(confidences.double(), expected["confidence"], 2e-5)


@pytest.mark.parametrize("num_steps", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_final_tokens_and_the_steps_that_wrote_them_are_the_same(ours, case, num_steps):
    which = golden(case)
    states = trajectory(ours, case, num_steps)
    opens = torch.stack([state.open_BNS.flatten() for state in states])
    written = torch.stack([was & ~now for was, now in pairwise(opens)])
    last = written.shape[0] - written.flip(0).int().argmax(0)
    assert torch.equal(last, which.numbers[f"dec{num_steps}_committed_at_step"])
    again = (~opens[:-1] & opens[1:]).sum()
    assert int(again) == which.meta["decode"][str(num_steps)]["committed_tokens_remasked_later"]
    ids = forward(ours, case)["tokens"].ids_BL.clone()
    ids[0, which.numbers["slot_positions"]] = states[-1].tokens_BNS.flatten()
    assert torch.equal(ids, which.numbers[f"dec{num_steps}_final_ids"])
    start = forward(ours, case)["batch"].prefix.ids_BL.shape[1]
    text = ours.processor.tokenizer.decode(ids[0, start:])
    assert text == which.meta["decode"][str(num_steps)]["text"]


@pytest.mark.parametrize("num_steps", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_captions_are_the_recorded_texts_cut_at_the_answers_first_end(ours, case, num_steps):
    which, tokenizer = golden(case), ours.processor.tokenizer
    ids = which.numbers[f"dec{num_steps}_final_ids"][0].tolist()
    answer = ids[which.meta["reserved_spans"][-1][2] :]
    answer = answer[answer.index(ours.model.config.caption_token_ids[0]) :]
    answer = answer[: answer.index(ours.model.config.eot_token_id)]
    expected = [""] * len(which.masks)
    for rank, number in enumerate(which.numbers["mask_sort_order"].tolist()):
        opening = ours.model.config.caption_token_ids[rank]
        if opening in answer:
            block = answer[answer.index(opening) + 1 :]
            ends = [block.index(end) for end in ours.model.config.caption_token_ids if end in block]
            text = tokenizer.decode(block[: min(ends, default=None)], skip_special_tokens=True)
            expected[number] = text.strip()
    captioner = RegionCaptioner(ours.model, ours.processor)
    captions = captioner.caption(which.pixels, which.masks, max_new_tokens=8, steps=num_steps)
    assert captions == expected
    if case == "c":  # all that comes after the first end of text is lost
        assert captions.count("") > 1


def test_the_schedule_is_the_recorded_one():
    from paracaption.model_training.decoding.selection import left_open

    table = json.loads((recorded("perceptiondlm") / "schedule_table.json").read_text())
    assert len(table) == 13
    for row in table:
        slots, num_steps = row["slots"], row["steps"]
        masked = [left_open(slots, num_steps, step) for step in range(-1, num_steps)]
        forwards = masked.index(0)
        assert forwards == row["forwards"]
        assert masked[:forwards] == row["masked_before_each_forward_by_formula"]
        assert set(masked[forwards:]) == {0}


@pytest.mark.parametrize(("when", "scale"), [("infer", 1 / 32), ("train", 1 / 28)])
@pytest.mark.parametrize("grid", ["1x1", "6x1", "1x6", "3x2", "2x2", "2x1"])
def test_replay_from_maps_of_the_real_size_is_the_same(ours, grid, when, scale):
    numbers = load_file(recorded("perceptiondlm") / "roi/tensors.safetensors")
    features = numbers[f"{grid}_features_i8"].float() / 64
    boxes = numbers[f"{grid}_bboxes_xyxy"]
    model = ours.with_layout(replay_scale=scale).model
    model.config.vision_config.image_size = 512  # 16 x 16 tokens a tile, as the published model has
    images = Images(
        views_N3SS=torch.empty(0),
        prompts_NPQ=torch.empty(0),
        grids_I2=torch.tensor([[int(side) for side in grid.split("x")]]),
        boxes_R4=boxes.float(),
        image_R=torch.zeros(len(boxes), dtype=torch.int64),
    )
    with torch.inference_mode(), RoiAlign() as roi:
        found = model.replay_regions(features, images)
    close(roi.boxes[0], numbers[f"{grid}_box_{when}"], 1e-5)
    close(found, numbers[f"{grid}_tokens_{when}"], 1e-5)


@pytest.fixture(scope="module")
def trained(ours):
    return ours.with_layout(replay_scale=1 / 28)


@pytest.fixture(scope="module")
def example(trained):
    which = golden("train")
    prompts = [int(token.removeprefix("<Prompt").rstrip(">")) for token in which.meta["prompt_tokens"]]
    captions = [trained.processor.tokenize(text) for text in which.meta["captions_in"]]
    return trained.processor.make_example(which.pixels, which.masks, captions, prompts)


@pytest.fixture(scope="module")
def batch(example):
    return collate([example])


def test_training_sequences_and_what_is_to_be_learnt_are_the_same(batch):
    numbers, tokens = golden("train").numbers, batch.tokens()
    assert torch.equal(tokens.ids_BL, numbers["input_ids_after"])
    labels = tokens.ids_BL.masked_fill(~tokens.roles.caption_BL, -100)
    assert torch.equal(labels, numbers["labels_after"])
    roles = tokens.roles
    assert torch.equal(dense_mask(roles, roles, False)[0], numbers["attn_allowed"])
    replay, region = roles.replay_BL()[0], roles.region_BL[0]
    keep = ~replay | ~(region == region.roll(1))
    assert torch.equal(tokens.ids_BL[:, keep], numbers["input_ids_before"])
    assert torch.equal(labels[:, keep], numbers["labels_before"])
    for place, start, end in numbers["reserved_spans"].tolist():
        span = (replay & (region == 1 + place)).nonzero().flatten()
        assert span.tolist() == list(range(start, end))


def test_prompts_are_those_drawn_and_patches_and_boxes_the_same(example):
    numbers, meta = golden("train").numbers, golden("train").meta
    prompts = [int(token[len("<Prompt") : -1]) for token in meta["prompt_tokens"]]
    found = example.prompts[:, prompts].swapaxes(0, 1)
    np.testing.assert_array_equal(found, numbers["active_patches"].flatten(2).numpy().astype(bool))
    assert example.prompts.sum() == found.sum(), "no other prompt is used"
    np.testing.assert_array_equal(example.boxes, numbers["bboxes_xyxy"].numpy())
    assert [list(example.grid)] == numbers["aspect_ratio_wh"].tolist()


def test_the_clean_embeddings_are_the_same(trained, batch):
    numbers = golden("train").numbers
    with torch.inference_mode(), RoiAlign() as roi:
        features, replay = trained.model.encode_images(batch.images)
        embeds = trained.model.embed(batch.tokens(), features, replay)
    close(roi.boxes[0], numbers["roi_boxes_train"], 1e-5)
    close(replay, numbers["roi_features_train"].flatten(2).transpose(1, 2), 1e-5)
    close(embeds, numbers["clean_embeds"], 1e-5)


@pytest.mark.parametrize("run", ["s0", "s1"])
def test_logits_and_loss_of_recorded_noise_are_the_same(trained, batch, run):
    numbers, tokens = golden("train").numbers, batch.tokens()
    numbers = numbers | {
        name.removeprefix(f"{run}_"): numbers[name] for name in numbers if name.startswith(run)
    }
    caption = tokens.roles.caption_BL
    masked = (numbers["uniform"] < numbers["p_mask"]) & caption
    assert torch.equal(masked, numbers["masked"])
    mask_embed = trained.model.get_input_embeddings().weight[trained.model.config.mask_token_id]
    noisy = torch.where(masked[..., None], mask_embed, numbers["clean_embeds"])
    close(noisy.detach(), numbers["noisy_embeds"], 1e-6)
    with torch.inference_mode():
        logits = trained.model(tokens, inputs_embeds=numbers["noisy_embeds"])
    close(logits[caption], numbers["logits_at_labels"], 2e-4)
    token_ce = functional.cross_entropy(logits[masked], tokens.ids_BL[masked], reduction="none")
    close(token_ce, numbers["token_ce"], 2e-4)
    loss = (token_ce / numbers["p_mask"][0, 0]).sum() / caption.sum()
    close(loss[None], numbers["loss"], 1e-5)


OPTIONS = {
    "drop last tile (thumbnail) instead of first from the RoI map": {"replay_map": "tiles"},
    "spatial scale applied once": {"replay_scale": 1.0},
    "28 instead of 32": {"replay_scale": 1 / 28},
    "prompt rows not allowed to see captions": {"isolate_prefix": True},
    "newlines between RoI spans visible to captions": {"hidden_newlines": False},
    "bbox max exclusive (+1 px)": {"inclusive_boxes": False},
}


def moved(model, processor, images=None):
    """How far the slots' logits of each case are from the recorded ones; `images` changes what is shown."""
    far = []
    for case in CASES:
        which = golden(case)
        example = processor.make_example(which.pixels, which.masks, 8)
        if images is not None:
            example = images(which, example)
        batch = collate([example])
        with torch.inference_mode():
            logits = model(batch.tokens(), batch.images)[0, which.numbers["slot_positions"]]
        right = which.numbers["logits_all_masked"][0, which.numbers["slot_positions"]]
        far.append(float((logits - right).abs().max()))
    return far


def as_recorded(mistake):
    table = json.loads((recorded("perceptiondlm") / "sensitivity.json").read_text())
    return pytest.approx(table[mistake], abs=1e-3)


def test_each_option_of_the_layout_moves_the_logits_as_that_mistake_did(ours):
    assert moved(*ours) == pytest.approx([0, 0, 0], abs=2e-4)
    for mistake, options in OPTIONS.items():
        assert moved(*ours.with_layout(**options)) == as_recorded(mistake), mistake


@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
def test_masks_resized_another_way_move_the_logits_as_that_mistake_did(ours, resample):
    def images(which, example):
        across, down = example.grid
        sizes = [(across, down)] + [(1, 1)] * (across * down > 1)
        prompts = example.prompts.copy()
        for rank, number in enumerate(example.order):
            painted = Image.fromarray(np.where(which.masks[number], rank, 255).astype(np.uint8))
            views = []
            for size in sizes:
                stretched = painted.resize(
                    (size[0] * TILE_PX, size[1] * TILE_PX), Image.Resampling[resample.upper()]
                )
                views += views_of(np.asarray(stretched), size)
            corners = np.stack(views)[:, ::PATCH_PX, ::PATCH_PX] != 255
            prompts[:, rank] = corners.reshape(len(views), -1)
        return example._replace(prompts=prompts)

    assert moved(*ours, images) == as_recorded(f"{resample} instead of bicubic mask resize")


def test_no_region_prompts_move_the_logits_as_that_mistake_did(ours):
    other = ours.with_layout()
    other.model.config.region_prompting = False
    assert moved(*other) == as_recorded("no mask id embedding")


@pytest.mark.parametrize("mistake", ["last ViT layer instead of -2", "post_layernorm applied"])
def test_another_end_of_the_vision_tower_moves_the_logits_as_that_mistake_did(ours, mistake):
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

    weights = load_file(recorded("perceptiondlm") / "checkpoint/model.safetensors")
    at = "vision_model.vision_model."
    other = ours.with_layout()
    tower = other.model.vision_tower
    if mistake == "post_layernorm applied":
        tower.norm = torch.nn.LayerNorm(weights[f"{at}post_layernorm.weight"].shape, eps=1e-6)
        added, prefix = tower.norm, f"{at}post_layernorm."
    else:
        added, prefix = SiglipEncoderLayer(other.model.config.vision_config), f"{at}encoder.layers.2."
        tower.layers.append(added)
    named = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    added.load_state_dict(named)
    assert moved(*other) == as_recorded(mistake)
