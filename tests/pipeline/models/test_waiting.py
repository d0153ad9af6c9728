"""How often the models of a build wait for their device, and that it changes no answer.

Libraries' own code stays as it is: what it waits is counted here, too, with its reason.
"""

import numpy as np
import pytest

from paracaption.pipeline.models import masks
from paracaption.pipeline.models.sam import SamSegmenter
from paracaption.pipeline.models.sam3 import Sam3Segmenter
from paracaption.pipeline.models.sam3_generator import Sam3MaskGenerator
from paracaption.pipeline.models.sam_generator import SamMaskGenerator
from tests.device import pretend
from tests.pipeline.models.gar_parts import TILE_PX, load_parts, photo, with_boxes
from tests.synthetic import scene
from tests.tiny.gar import write_gar
from tests.tiny.sam import write_sam, write_sam3, write_sam3_tracker

GAR_BOXES = [(5, 5, 60, 60), (400, 200, 40, 20), (0, 0, 448, 224), (100, 90, 40, 40), (330, 20, 3, 3)]
BOXES = np.array([[0, 0, 90, 60], [10, 12, 31, 40], [5, 5, 6, 6], [60.5, 3, 90, 59]], np.float32)
PHRASES = ["cat", "a red car", "person", "cat"]
GRID = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
PHOTO = np.ascontiguousarray(scene(0, 4, (60, 90))[0])

SCORES, RUNS = 1, 2
"""Waits of a segmenter: for the scores of a batch, which decide what is encoded, together with the check that
nothing is NaN; then, for the masks that are enlarged at once, for the number of their runs, without which
there is no tensor for them, and for the runs."""


# GAR.


def test_a_batch_of_gars_encoder_waits_at_its_end_alone(tmp_path):
    from paracaption.pipeline.models.gar.encoder import Encoder

    config, prompts, vision, embed = load_parts(write_gar(tmp_path / "m", "1b", tile_px=TILE_PX, max_tiles=8))
    images = [
        with_boxes(photo(tmp_path, "a"), *GAR_BOXES),
        with_boxes(photo(tmp_path, "b", (448, 112), 1), *GAR_BOXES[:1]),
    ]
    alone = Encoder(config, prompts, vision, embed, 9)
    expected = dict(alone.run(alone.prepare(images)))
    with pretend() as device:
        vision.to(device.name)
        vision.cos_pk, vision.sin_pk = (table.to(device.name) for table in (vision.cos_pk, vision.sin_pk))
        encoder = Encoder(config, prompts, vision, embed.to(device.name), 9)
        packs = list(encoder._packs(encoder.prepare(images)))
        inside, waited, found = [], [], {}
        for pack in packs:
            with device.counting() as counts:
                made = encoder._prompts(pack)
            inside.append((counts.syncs, counts.uploads, counts.waits()))
            with device.counting() as counts:
                found |= dict(encoder._fetch(made))
            waited.append((counts.syncs, bool(made)))
        assert len(packs) > 2
        with device.counting() as counts:
            again = dict(encoder.run(encoder.prepare(images)))
    for syncs, uploads, where in inside:
        assert syncs == uploads == 0, where
    assert [syncs for syncs, _ in waited] == [int(has_prompts) for _, has_prompts in waited]
    assert (counts.syncs, counts.uploads) == (sum(syncs for syncs, _ in waited), 0), counts.waits()
    assert list(found) == list(again) == list(expected)
    for key, prompt in expected.items():
        np.testing.assert_allclose(found[key].numpy(), prompt.numpy(), rtol=0, atol=1e-5)
        assert (found[key] == again[key]).all()


# Segmenters.


def segmented(segmenter):
    return segmenter.segment(PHOTO, PHRASES, BOXES)


def waits_of(backend, checkpoint, answer, **options):
    """What one photo makes a device wait; the answers on it are those of the CPU."""
    given = {"model": str(checkpoint), "dtype": "float32", **options}
    expected = answer(backend(**given, device="cpu"))
    assert expected
    with pretend() as device:
        model = backend(**given, device=device.name)
        answer(model)  # texts are encoded once
        with device.counting() as counts:
            found = answer(model)
    assert rles_of(found) == rles_of(expected)
    return counts


def rles_of(found):
    return [rles_of(each) if isinstance(each, list) else each.rle for each in found]


def of_library(counts, kind):
    """Events within a library that a backend calls: its own lines copy nothing and read nothing."""
    return sum("/pipeline/models/sam" in event.line for event in counts.of(kind))


@pytest.mark.soak
def test_sam_waits_for_scores_and_for_runs(tmp_path, monkeypatch):
    checkpoint = write_sam(tmp_path)
    for boxes_at_once in (len(BOXES), 2):
        counts = waits_of(SamSegmenter, checkpoint, segmented, multimask=True, boxes_at_once=boxes_at_once)
        batches = len(BOXES) // boxes_at_once
        assert counts.syncs == batches * (SCORES + RUNS), counts.waits()
        assert counts.uploads == 0, counts.waits()
    monkeypatch.setattr(masks, "CHUNK_PX", 1)
    counts = waits_of(SamSegmenter, checkpoint, segmented)
    assert counts.syncs == SCORES + len(BOXES) * RUNS, counts.waits()


def test_sam3_waits_for_scores_and_for_runs_and_in_transformers(tmp_path):
    """transformers asks whether 3 masks are full, and has the sides of 2 maps on the device (4 waits)."""
    counts = waits_of(Sam3Segmenter, write_sam3(tmp_path), segmented, threshold=0.35)
    assert counts.syncs - of_library(counts, "sync") == SCORES + RUNS, counts.waits()
    assert counts.uploads - of_library(counts, "upload") == 0, counts.waits()
    assert of_library(counts, "sync") <= 7, counts.waits()
    assert of_library(counts, "upload") <= 1, counts.waits()


@pytest.mark.parametrize(
    ("backend", "write"),
    [(SamMaskGenerator, write_sam), (Sam3MaskGenerator, write_sam3_tracker)],
    ids=["sam", "sam3"],
)
@pytest.mark.soak
def test_a_mask_generator_waits_for_the_check_of_each_batch_of_points_and_in_segment_anything(
    tmp_path, backend, write
):
    """segment-anything waits 4 times for each mask that it keeps: its runs, their start, and its number."""
    batches = 3
    counts = waits_of(backend, write(tmp_path), lambda model: model.generate(PHOTO), points_at_once=3, **GRID)
    assert counts.syncs - of_library(counts, "sync") == batches * SCORES, counts.waits()
    assert counts.uploads == of_library(counts, "upload"), counts.waits()
    num_masks = 3 * GRID["points_per_side"] ** 2
    assert of_library(counts, "sync") <= 4 * num_masks + batches * 10 + 4, counts.waits()
