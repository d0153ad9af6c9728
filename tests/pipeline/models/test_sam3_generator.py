"""SAM 3's tracker at the points of a grid: transformers' own answers, from the published layout."""

import shutil

import numpy as np
import pytest

from paracaption.filters import rle
from paracaption.pipeline.models.sam3_generator import Sam3MaskGenerator
from paracaption.schemas.errors import ConfigError, StageFailed
from tests.synthetic import scene
from tests.tiny.sam import SAM3_IMAGE_PX, write_sam3, write_sam3_tracker

SOME = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
"""Random weights are sure of nothing."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_sam3_tracker(tmp_path_factory.mktemp("sam3"))


@pytest.fixture(scope="module")
def generator(checkpoint):
    return made(checkpoint)


def made(checkpoint, **options):
    return Sam3MaskGenerator(model=str(checkpoint), device="cpu", **SOME | options)


def photo(height=60, width=90):
    return np.ascontiguousarray(scene(0, 4, (max(height, 24), max(width, 24)))[0][:height, :width])


def counts_of(found):
    return sorted(each.rle.counts for each in found)


@pytest.mark.soak
def test_transformers_reads_the_tiny_checkpoint_whole_by_its_rules_for_the_published_one(
    checkpoint, generator
):
    import torch
    from transformers import Sam3TrackerModel

    theirs, info = Sam3TrackerModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = generator._grid.generator.predictor.model.state_dict()
    assert theirs.state_dict().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.soak
def test_masks_are_those_of_the_tracker_asked_one_point_at_a_time(checkpoint, generator):
    import torch
    from transformers import Sam3Processor, Sam3TrackerModel

    model = Sam3TrackerModel.from_pretrained(checkpoint).eval()
    picture = photo()
    height, width = picture.shape[:2]
    processor = Sam3Processor.from_pretrained(checkpoint).image_processor
    pixels = processor(images=torch.tensor(picture).permute(2, 0, 1), return_tensors="pt")["pixel_values"]
    expected, scores = [], []
    for x, y in [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]:
        point = torch.tensor([[[[x * SAM3_IMAGE_PX, y * SAM3_IMAGE_PX]]]])
        with torch.no_grad():
            output = model(pixel_values=pixels, input_points=point, multimask_output=True)
        large = torch.nn.functional.interpolate(output.pred_masks[0], size=(height, width), mode="bilinear")
        expected += [rle.from_mask(mask.numpy()).rle.counts for mask in large[0] > 0]
        scores += output.iou_scores[0, 0].clamp(0, 1).tolist()
    found = generator.generate(picture)
    assert len(found) == 12 and counts_of(found) == sorted(expected)
    assert sorted(each.score for each in found) == pytest.approx(sorted(scores), abs=1e-5)
    assert counts_of(made(checkpoint, points_at_once=3).generate(picture)) == sorted(expected)


@pytest.mark.soak
def test_narrow_photos_and_crops_are_answered(checkpoint, generator):
    cropped = made(checkpoint, points_per_side=1, crop_n_layers=1)
    for size in [(1, 1), (1, 300), (40, 3), (33, 47)]:
        for each in (generator, cropped):
            assert all(found.rle.size == size for found in each.generate(photo(*size)))


@pytest.mark.soak
def test_a_checkpoint_without_the_tracker_and_one_that_lacks_a_tensor_are_told(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ConfigError, match=r"mask_decoder|no_memory"):
        Sam3MaskGenerator.check(model=str(write_sam3(tmp_path / "detector")))
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint, cut)
    tensors = load_file(cut / "model.safetensors")
    del tensors["tracker_model.mask_decoder.iou_token.weight"]
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"iou_token"):
        Sam3MaskGenerator(model=str(cut), device="cpu")
    with pytest.raises(ConfigError, match=r"mask_generator\.options\.model"):
        Sam3MaskGenerator.check(model=str(tmp_path / "gone"))


@pytest.mark.soak
def test_the_positional_embedding_may_be_stored_once(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    once = tmp_path / "once"
    shutil.copytree(checkpoint, once)
    tensors = load_file(once / "model.safetensors")
    del tensors["tracker_model.prompt_encoder.shared_embedding.positional_embedding"]
    save_file(tensors, once / "model.safetensors", metadata={"format": "pt"})
    assert len(made(once).generate(photo())) == 12


@pytest.mark.soak
def test_numbers_that_are_none_stop_the_build(checkpoint):
    broken = made(checkpoint)
    broken._grid.generator.predictor.model.mask_decoder.iou_token.weight.data.fill_(float("nan"))
    with pytest.raises(StageFailed, match=r"NaN or infinite.*mask_generator\.options\.dtype"):
        broken.generate(photo())


@pytest.mark.soak
def test_the_identity_has_what_decides_and_the_check_reads_no_weights(checkpoint):
    def identity(**options):
        return str(sorted(Sam3MaskGenerator.identity(model=str(checkpoint), **options).items()))

    assert identity() == identity(points_at_once=3, device="cpu")
    changed = [{"points_per_side": 9}, {"pred_iou_thresh": 0.5}, {"dtype": "bfloat16"}, {"crop_n_layers": 1}]
    assert len({identity(**each) for each in ({}, *changed)}) == 5
    checked = Sam3MaskGenerator.check(model=str(checkpoint))
    assert checked.what == "SAM 3's tracker: vision 2 x 32 at 112 px" and checked.weight_bytes > 0
