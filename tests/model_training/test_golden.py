"""The reference layout against the original's numbers, step by step: a difference shows where it begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.model_training.golden import close, golden, masks, meta, photo, tensors

from model_training import attention
from model_training.model import feature_map, normalise, replay_regions, unshuffle
from model_training.tiles import box_of, choose_grid, cut_tiles, paint

pytestmark = pytest.mark.usefixtures("no_grad")
CASES = ("case_a", "case_b", "case_c")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def batch(case, golden_processor):
    return golden_processor([photo(case)], [masks(case)], length=8)


@pytest.fixture
def theirs(case):
    return tensors(case)


def test_every_grid_of_the_table_is_chosen():
    table = meta("grid_table.json")
    for width, height, columns, rows in table["rows_w_h_gridw_gridh"]:
        grid = choose_grid(width, height, table["image_size"], table["max_tiles"])
        assert grid == (columns, rows), (width, height)


def test_tiles_and_thumbnail_have_the_same_pixels(case, batch, theirs):
    assert batch.grids == (tuple(theirs["aspect_ratio_wh"][0].tolist()),)
    close(normalise(batch.pixels_TCSS, torch.float32), theirs["pixel_values"], 1e-6)


def test_regions_are_ranked_largest_first(case, batch, theirs):
    assert [mask for _, mask in batch.origins] == theirs["mask_sort_order"].tolist()
    ranked = np.stack([masks(case)[i] > 0 for i in theirs["mask_sort_order"]])
    assert torch.equal(torch.from_numpy(ranked).to(torch.uint8), theirs["sorted_masks"])


def test_boxes_have_inclusive_edges(batch, theirs):
    boxes = torch.tensor([box_of(mask.numpy() > 0, "inclusive") for mask in theirs["sorted_masks"]])
    assert torch.equal(boxes, theirs["bboxes_xyxy"])
    close(batch.boxes_N4, theirs["bboxes_xyxy"], 1e-6)


def test_painted_masks_are_the_same_to_the_last_bit(batch, theirs):
    painted = [
        paint(mask.numpy() > 0, i, batch.grids[0], 128) for i, mask in enumerate(theirs["sorted_masks"])
    ]
    assert torch.equal(torch.from_numpy(np.stack(painted)), theirs["global_mask_values_u8"])


def test_the_same_patches_are_marked(batch, theirs):
    active_NTGG = theirs["active_patches"]
    ours_NTGG = batch.prompts_TPK[..., : len(active_NTGG)].permute(2, 0, 1).view(active_NTGG.shape)
    assert torch.equal(ours_NTGG, active_NTGG)
    assert not batch.prompts_TPK[..., len(active_NTGG) :].any()


def test_vision_agrees_after_every_part(golden_model, batch, theirs):
    pixels, marks = normalise(batch.pixels_TCSS, torch.float32), golden_model.marks(batch.prompts_TPK)
    close(golden_model.vision.embeddings(pixels) + marks, theirs["vit_layer0_input"], 1e-5)
    hidden = golden_model.vision(pixels, marks)
    close(hidden, theirs["vit_selected_hidden"], 1e-5)
    close(golden_model.projector(unshuffle(hidden)), theirs["vision_embeds"], 1e-5)
    close(golden_model.image_features(batch.pixels_TCSS, batch.prompts_TPK), theirs["vision_embeds"], 1e-5)


def test_token_ids_are_the_same_before_and_after_the_replay_splice(golden_processor, batch, theirs):
    assert torch.equal(batch.input_ids_BL, theirs["input_ids_after"])
    assert torch.equal(batch.positions_BL, theirs["position_ids"])
    keep = torch.ones(batch.input_ids_BL.shape[1], dtype=torch.bool)
    for _, start, end in theirs["reserved_spans"].tolist():
        keep[start + 1 : end] = False
    assert torch.equal(batch.input_ids_BL[:, keep], theirs["input_ids_before"])


def test_replay_spans_and_slots_are_in_the_same_places(batch, theirs):
    spans = [torch.arange(start, end) for _, start, end in theirs["reserved_spans"].tolist()]
    assert torch.equal(batch.replay_at_R, torch.cat(spans))
    assert torch.equal(batch.slots_BS[0], theirs["slot_positions"])


def test_replayed_features_agree(golden_model, batch, theirs):
    whole = feature_map(theirs["vision_embeds"], batch.grids[0], golden_model.config.roi_tiles)
    assert torch.equal(whole[None], theirs["roi_feature_map"])
    tokens, cells = replay_regions(whole, batch.boxes_N4, (4, 4), golden_model.config.roi_divisor)
    close(cells, theirs["roi_boxes"][:, 1:], 1e-5)
    close(tokens, theirs["roi_features"].flatten(2).mT, 1e-5)


def test_input_embeddings_agree(golden_model, batch, theirs):
    close(golden_model.embed(batch), theirs["inputs_embeds"], 1e-5)


def test_the_same_positions_may_attend(golden_model, batch, theirs):
    allowed = attention.dense_mask(batch.structure, batch.structure, golden_model.config.isolate_prefix)
    assert torch.equal(allowed[0], theirs["attn_allowed"])


def test_logits_agree(golden_model, batch, theirs):
    close(golden_model(batch), theirs["logits_all_masked"], 2e-4)
    slots = golden_model(batch, batch.slots_BS)
    close(slots, theirs["logits_all_masked"][:, batch.slots_BS[0]], 2e-4)


@pytest.mark.parametrize("steps", [8, 4])
def test_confidences_agree_at_every_recorded_step(golden_model, batch, theirs, steps):
    embedded = golden_model.embed(batch)
    mask, out_mask = golden_model.mask(batch), golden_model.mask(batch, batch.slots_BS)
    for state, x0, confidence in zip(
        *(theirs[f"dec{steps}_{name}"] for name in ("state_before_step", "x0", "confidence")), strict=True
    ):
        embedded[0, batch.slots_BS[0]] = golden_model.embed_tokens(state)
        hidden = golden_model.language(
            embedded, batch.positions_BL, mask, out_BO=batch.slots_BS, out_mask=out_mask
        )
        best = golden_model.head(hidden)[0].double().softmax(-1).max(-1)
        assert torch.equal(best.indices, x0)
        close(best.values, confidence, 2e-5)


@pytest.mark.parametrize("grid", ["1x1", "6x1", "1x6", "3x2", "2x2", "2x1"])
@pytest.mark.parametrize(("use", "divisor"), [("infer", 32.0), ("train", 28.0)])
def test_replay_agrees_at_the_published_map_size(grid, use, divisor):
    recorded = tensors("roi")
    columns, rows = map(int, grid.split("x"))
    of_grid = {name.removeprefix(f"{grid}."): value for name, value in recorded.items() if grid in name}
    features = of_grid["features_i8"].float() / 64
    whole = feature_map(features, (columns, rows), "all_but_first")
    tokens, cells = replay_regions(whole, of_grid["bboxes_xyxy"], (4, 4), divisor)
    close(cells, of_grid[f"box_{use}"][:, 1:], 1e-5)
    close(tokens, of_grid[f"tokens_{use}"], 1e-5)


def test_no_pickle_lies_in_the_golden_checkpoint():
    assert not [file for file in golden("checkpoint").iterdir() if file.suffix in {".bin", ".pt"}]


def test_training_sequence_and_labels_are_the_same(training_batch):
    recorded = tensors("train")
    assert torch.equal(training_batch.input_ids_BL, recorded["input_ids_after"])
    assert torch.equal(training_batch.labels_BL, recorded["labels_after"])
    close(training_batch.boxes_N4, recorded["bboxes_xyxy"], 1e-6)
    allowed = attention.dense_mask(training_batch.structure, training_batch.structure, False)
    assert torch.equal(allowed[0], recorded["attn_allowed"])
    prompts = [int(name[7:-1]) for name in meta("train/meta.json")["prompt_tokens"]]
    for rank, prompt in enumerate(prompts):
        marked = training_batch.prompts_TPK[..., prompt].view(7, 8, 8)
        assert torch.equal(marked, recorded["active_patches"][rank])


def test_training_replay_uses_the_training_divisor(golden_model, training_batch):
    recorded = tensors("train")
    features = golden_model.image_features(training_batch.pixels_TCSS, training_batch.prompts_TPK)
    tokens = golden_model.train().replay(features, training_batch)
    golden_model.eval()
    close(tokens, recorded["roi_features_train"].flatten(2).mT.flatten(0, 1), 1e-5)
    assert not torch.allclose(golden_model.replay(features, training_batch), tokens, atol=1e-3)


@pytest.mark.parametrize("run", ["s0", "s1"])
def test_training_logits_and_cross_entropy_agree_under_recorded_noise(golden_model, training_batch, run):
    recorded = tensors("train")
    golden_model.train()
    clean = golden_model.embed(training_batch)
    close(clean, recorded["clean_embeds"], 1e-5)
    masked = recorded[f"{run}_masked"]
    noisy = clean.clone()
    noisy[masked] = golden_model.embed_tokens(torch.tensor(golden_model.config.mask_token_id))
    close(noisy, recorded[f"{run}_noisy_embeds"], 1e-5)
    labelled = (training_batch.labels_BL[0] != -100).nonzero().T
    mask, out_mask = golden_model.mask(training_batch), golden_model.mask(training_batch, labelled)
    hidden = golden_model.language(
        noisy, training_batch.positions_BL, mask, out_BO=labelled, out_mask=out_mask
    )
    logits = golden_model.head(hidden)[0]
    golden_model.eval()
    close(logits, recorded[f"{run}_logits_at_labels"], 2e-4)
    labels = training_batch.labels_BL[0, labelled[0]]
    chosen = masked[0, labelled[0]]
    entropy = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen], reduction="none")
    close(entropy, recorded[f"{run}_token_ce"], 2e-4)
    loss = (entropy / recorded[f"{run}_p_mask"].item()).sum() / len(labels)
    close(loss[None], recorded[f"{run}_loss"], 1e-5)


@pytest.fixture
def training_batch(golden_processor):
    recorded = meta("train/meta.json")
    prompts = [int(name[7:-1]) for name in recorded["prompt_tokens"]]
    [item] = golden_processor.items(
        photo("case_b"), masks("case_b"), recorded["captions_in"], prompts=prompts
    )
    return golden_processor.collate([[item]])
