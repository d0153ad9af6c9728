"""SAM at the points of a grid: the masks that segment-anything's own generator gives."""

import numpy as np
import pytest

from paracaption.pipeline.models import answers, sam_generator
from paracaption.pipeline.models.sam_generator import SamMaskGenerator
from paracaption.schemas.errors import ConfigError, OutOfMemory, StageFailed
from tests.synthetic import scene
from tests.tiny.sam import plain_sam, write_sam

SOME = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
"""Random weights are sure of nothing."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_sam(tmp_path_factory.mktemp("sam"))


def photo(height=60, width=90):
    return np.ascontiguousarray(scene(0, 4, (max(height, 24), max(width, 24)))[0][:height, :width])


def made(checkpoint, **options):
    return SamMaskGenerator(model=str(checkpoint), device="cpu", **SOME | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pred_iou_thresh": 0.3},
        {"stability_score_thresh": 0.15},
        {"box_nms_thresh": 0.95},
        {"min_mask_region_area": 30},
        {"crop_n_layers": 1},
        {"points_at_once": 2},
    ],
)
@pytest.mark.soak(keep=2)
def test_masks_and_scores_are_those_of_the_publishers_generator(checkpoint, options):
    import torch
    from segment_anything import SamAutomaticMaskGenerator

    model = plain_sam()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    given = SOME | {name: value for name, value in options.items() if name != "points_at_once"}
    expected = SamAutomaticMaskGenerator(model.eval(), output_mode="coco_rle", **given).generate(photo())
    found = made(checkpoint, **options).generate(photo())
    assert expected, "the options leave something to compare"
    assert [each.rle.counts for each in found] == [each["segmentation"]["counts"] for each in expected]
    scores = [min(1, max(0, each["predicted_iou"])) for each in expected]
    assert [each.score for each in found] == pytest.approx(scores, abs=1e-5)
    assert len(answers.generated(found, (60, 90))) == len({each.rle.counts for each in found})


def test_nothing_that_is_good_enough_is_an_answer_without_masks(checkpoint):
    assert made(checkpoint, stability_score_thresh=1.0, pred_iou_thresh=1.0).generate(photo()) == []


@pytest.mark.parametrize("layers", [0, 2])
def test_narrow_photos_are_answered(checkpoint, layers):
    generator = made(checkpoint, points_per_side=1, crop_n_layers=layers)
    for size in [(1, 1), (40, 1), (1, 2000), (3, 50), (5, 5)]:
        assert all(each.rle.size == size for each in generator.generate(photo(*size)))


def test_memory_that_runs_out_halves_the_points_and_one_point_too_many_is_told(checkpoint, monkeypatch):
    import torch

    whole, generator = made(checkpoint).generate(photo()), made(checkpoint, points_at_once=8)
    run, asked = generator._grid.generator._process_batch, []

    def limited(points, *rest):
        asked.append(len(points))
        if len(points) > limit:
            raise torch.OutOfMemoryError("no room")
        return run(points, *rest)

    monkeypatch.setattr(generator._grid.generator, "_process_batch", limited)
    limit = 2
    assert {each.rle.counts for each in generator.generate(photo())} == {each.rle.counts for each in whole}
    assert asked[:3] == [8, 4, 2]
    limit = 0
    with pytest.raises(OutOfMemory, match="larger GPU"):
        generator.generate(photo())


def test_numbers_that_are_none_stop_the_build(checkpoint):
    generator = made(checkpoint)
    generator._grid.generator.predictor.model.mask_decoder.iou_token.weight.data.fill_(float("nan"))
    with pytest.raises(StageFailed, match=r"NaN or infinite.*mask_generator\.options\.dtype"):
        generator.generate(photo())


def test_the_identity_has_what_decides_and_not_how_it_is_computed(checkpoint):
    def identity(**options):
        return SamMaskGenerator.identity(model=str(checkpoint), **options)

    assert identity() == identity(points_at_once=3, device="cpu")
    changed = [
        {"points_per_side": 9},
        {"pred_iou_thresh": 0.5},
        {"stability_score_thresh": 0.5},
        {"dtype": "bfloat16"},
    ]
    changed += [{"crop_n_layers": 1}, {"min_mask_region_area": 9}, {"box_nms_thresh": 0.5}]
    assert len({str(identity(**each)) for each in ({}, *changed)}) == 1 + len(changed)


def test_errors_name_the_option_of_this_backend_and_the_check_reads_no_weights(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"mask_generator\.options\.model: no file"):
        SamMaskGenerator(model=str(tmp_path / "gone.pth"))
    with pytest.raises(ConfigError, match=r"mask_generator\.options\.device"):
        SamMaskGenerator(model=str(checkpoint), device="abacus")
    assert SamMaskGenerator.check(model=str(checkpoint)).what.startswith("SAM 2 x 32")


def test_bfloat16_gives_masks_too(checkpoint):
    assert made(checkpoint, dtype="bfloat16").generate(photo())
    assert sam_generator._predictor_type() is sam_generator._predictor_type()
