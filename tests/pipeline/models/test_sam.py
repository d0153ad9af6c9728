"""SAM by box: the publisher's own masks, however the boxes are batched, and no code from the checkpoint."""

import os
import pickle

import numpy as np
import pytest

from paracaption.filters import rle
from paracaption.pipeline.models import masks as segmenting
from paracaption.pipeline.models import sam
from paracaption.pipeline.models.sam import SamSegmenter
from paracaption.schemas.errors import ConfigError, OutOfMemory, StageFailed
from tests.synthetic import scene
from tests.tiny.sam import plain_sam, write_sam

BOXES = np.array(
    [[0, 0, 90, 60], [10, 12, 31, 40], [5, 5, 6, 6], [10, 12, 31, 40], [60.5, 3, 90, 59], [0, 50, 44, 60]],
    np.float32,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_sam(tmp_path_factory.mktemp("sam"))


def photo(height=60, width=90):
    return np.ascontiguousarray(scene(0, 4, (max(height, 24), max(width, 24)))[0][:height, :width])


def segment(checkpoint, picture=None, boxes=BOXES, **options):
    segmenter = SamSegmenter(model=str(checkpoint), device="cpu", **options)
    picture = photo() if picture is None else picture
    return segmenter.segment(picture, ["thing"] * len(boxes), boxes)


def masks_of(found):
    return [[candidate.rle for candidate in candidates] for candidates in found]


def scores_of(found):
    return [candidate.score for candidates in found for candidate in candidates]


def counted(module, counts, name):
    module.register_forward_hook(lambda *_: counts.__setitem__(name, counts.get(name, 0) + 1))


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (200, 131), (64, 64)])
@pytest.mark.soak(keep=3)
def test_masks_are_those_of_the_publishers_predict_one_box_at_a_time(checkpoint, size, multimask):
    import torch
    from segment_anything import SamPredictor

    model = plain_sam()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    predictor = SamPredictor(model.eval())
    picture = photo(*size)
    predictor.set_image(picture)
    boxes = np.minimum(BOXES, [size[1], size[0], size[1], size[0]])
    boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    found = segment(checkpoint, picture, boxes, multimask=multimask)
    assert sum(map(len, found)) >= len(boxes)
    for box, candidates in zip(boxes, found, strict=True):
        last = np.maximum(box[:2], box[2:] - 1)  # SAM's boxes end on the last pixel
        masks, quality, _ = predictor.predict(box=np.concatenate([box[:2], last]), multimask_output=multimask)
        order = np.argsort(-quality.clip(0, 1), kind="stable")
        assert masks_of([candidates]) == [[rle.from_mask(masks[i]).rle for i in order if masks[i].any()]]
        expected = [quality[i] for i in order if masks[i].any()]
        assert scores_of([candidates]) == pytest.approx(np.clip(expected, 0, 1), abs=1e-5)


@pytest.mark.parametrize("options", [{"boxes_at_once": 1}, {"boxes_at_once": 4}, {}])
@pytest.mark.soak
def test_batches_of_boxes_change_nothing(checkpoint, options):
    whole = segment(checkpoint, multimask=True, **options)
    for box, candidates in zip(BOXES, whole, strict=True):
        [alone] = segment(checkpoint, boxes=box[None], multimask=True)
        assert masks_of([candidates]) == masks_of([alone])
        assert scores_of([candidates]) == pytest.approx(scores_of([alone]), abs=1e-5)
    assert whole[1] == whole[3], "the same box twice"


def test_masks_enlarged_one_at_a_time_are_the_same(checkpoint, monkeypatch):
    whole = segment(checkpoint, multimask=True)
    monkeypatch.setattr(segmenting, "CHUNK_PX", 1)
    assert segment(checkpoint, multimask=True) == whole


def test_the_image_is_encoded_once_whatever_is_asked(checkpoint):
    segmenter = SamSegmenter(model=str(checkpoint), device="cpu", boxes_at_once=2)
    counts = {}
    counted(segmenter.model.image_encoder, counts, "image")
    counted(segmenter.model.mask_decoder, counts, "boxes")
    segmenter.segment(photo(), ["thing"] * 6, BOXES)
    assert counts == {"image": 1, "boxes": 3}
    segmenter.segment(photo(), [], np.zeros((0, 4), np.float32))
    assert counts == {"image": 1, "boxes": 3}, "nothing asked, nothing computed"


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (1, 2000), (3, 50), (50, 3)])
def test_masks_of_narrow_photos_have_the_photos_size(checkpoint, size):
    boxes = np.array([[0, 0, size[1], size[0]]], np.float32)
    found = segment(checkpoint, photo(*size), boxes, multimask=True)
    assert [candidate.rle.size for candidate in found[0]] in ([size], [size] * 2, [size] * 3)


def test_a_photo_that_is_all_but_a_line_fails_in_the_publishers_resizing_alone(checkpoint):
    from segment_anything import SamPredictor

    line = photo(1, 2000)
    with pytest.raises(ValueError):
        SamPredictor(plain_sam()).set_image(line)
    assert segment(checkpoint, line, np.array([[0, 0, 2000, 1]], np.float32), multimask=True)[0]


def test_a_box_with_nothing_in_it_finds_nothing_and_the_others_are_not_shifted(checkpoint):
    empty = [[20, 20, 20, 30], [95, 5, 99, 9], [30, 30, 20, 20], [np.nan, 0, 5, 5], [-9, -9, 0, 0]]
    boxes = np.array([BOXES[0], *empty, BOXES[1]], np.float32)
    found = segment(checkpoint, boxes=boxes)
    assert [len(candidates) for candidates in found[1:-1]] == [0] * 5
    assert masks_of([found[0], found[-1]]) == masks_of(segment(checkpoint, boxes=BOXES[:2]))


def test_the_far_edge_beyond_the_photo_is_the_photos(checkpoint):
    beyond = np.array([[10, 5, 500, 500]], np.float32)
    inside = np.array([[10, 5, 90, 60]], np.float32)
    assert segment(checkpoint, boxes=beyond) == segment(checkpoint, boxes=inside)


def test_the_centre_point_is_an_option_that_is_heard_and_named(checkpoint):
    assert masks_of(segment(checkpoint, centre_point=True)) != masks_of(segment(checkpoint))
    names = [
        SamSegmenter.identity(model=str(checkpoint), **options)
        for options in ({}, {"centre_point": True}, {"multimask": True}, {"dtype": "bfloat16"})
    ]
    assert len({tuple(sorted(name.items())) for name in names}) == 4


def test_options_that_change_no_answer_stay_out_of_the_identity(checkpoint):
    assert SamSegmenter.identity(model=str(checkpoint)) == SamSegmenter.identity(
        model=str(checkpoint), boxes_at_once=3, device="cpu"
    )


def test_scores_are_between_0_and_1_and_the_best_is_first(checkpoint):
    found = segment(checkpoint, multimask=True)
    assert all(0 <= score <= 1 for score in scores_of(found))
    assert all(scores_of([one]) == sorted(scores_of([one]), reverse=True) for one in found)
    assert max(map(len, found)) == 3


def test_memory_that_runs_out_halves_the_boxes_and_changes_nothing(checkpoint):
    import torch

    def at_most(limit):
        def hook(module, args, kwargs):
            if kwargs["sparse_prompt_embeddings"].shape[0] > limit:
                raise torch.OutOfMemoryError("too many boxes")

        return hook

    segmenter = SamSegmenter(model=str(checkpoint), device="cpu")
    hook = segmenter.model.mask_decoder.register_forward_pre_hook(at_most(2), with_kwargs=True)
    assert masks_of(segmenter.segment(photo(), [""] * 6, BOXES)) == masks_of(segment(checkpoint))
    hook.remove()
    segmenter.model.mask_decoder.register_forward_pre_hook(at_most(0), with_kwargs=True)
    with pytest.raises(OutOfMemory, match="boxes of one photo: out of memory with a batch of one"):
        segmenter.segment(photo(), [""], BOXES[:1])


def test_bfloat16_is_close(checkpoint):
    exact, close = segment(checkpoint), segment(checkpoint, dtype="bfloat16")
    for one, other in zip(exact, close, strict=True):
        assert rle.iou([one[0].rle], [other[0].rle])[0, 0] > 0.8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "told"), [("quality", "scores"), ("masks", "masks")])
def test_a_model_that_says_nan_is_an_error_and_not_nothing_found(checkpoint, part, told, value):
    segmenter = SamSegmenter(model=str(checkpoint), device="cpu")

    def spoil(module, given, output):
        masks, quality = (each.clone() for each in output)
        (quality if part == "quality" else masks)[1] = value
        return masks, quality

    segmenter.model.mask_decoder.register_forward_hook(spoil)
    with pytest.raises(StageFailed, match=rf"values of {told} are NaN or infinite"):
        segmenter.segment(photo(), ["thing"] * len(BOXES), BOXES)


# The checkpoint.


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes_are_told_from_the_shapes(size, tmp_path):
    import torch
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        published = sam_model_registry[size]()
    shape = sam.measure(published.state_dict(), tmp_path)
    assert (shape.name, shape.window, shape.grid, shape.num_masks) == (size, 14, 64, 3)
    built = sam.build(published.state_dict(), tmp_path)
    assert repr(built) == repr(published), "every layer is the publisher's"
    for ours, theirs in zip(built.image_encoder.blocks, published.image_encoder.blocks, strict=True):
        assert ours.window_size == theirs.window_size
    assert torch.equal(built.pixel_mean, torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1))


def test_the_size_does_not_come_from_the_name(tmp_path):
    path = write_sam(tmp_path, embed_dim=48, depth=3, grid=6)
    assert path.name.startswith("sam_vit_b")
    checked = SamSegmenter.check(model=str(path))
    assert checked.what == "SAM 3 x 48: image encoder 3 x 48 at 96 px"
    segmenter = SamSegmenter(model=str(path), device="cpu")
    assert checked.weight_bytes == 4 * sum(p.numel() for p in segmenter.model.state_dict().values())
    assert [block.window_size for block in segmenter.model.image_encoder.blocks] == [3, 3, 0]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path, checkpoint, zipped):
    import torch

    trace = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(str(trace)))).close()
    assert trace.exists(), "the bomb works"
    trace.unlink()
    state = torch.load(checkpoint, weights_only=True)
    path = tmp_path / "sam.pth"
    torch.save({**state, "bomb": Bomb(str(trace))}, path, _use_new_zipfile_serialization=zipped)
    for attempt in (SamSegmenter, SamSegmenter.check):
        with pytest.raises(ConfigError, match=r"sam\.pth: a pickle with more than tensors .* state_dict\(\)"):
            attempt(model=str(path))
    assert not trace.exists()


def test_a_whole_model_is_refused_with_the_mend(tmp_path):
    import torch

    torch.save(plain_sam(), tmp_path / "whole.pth")
    with pytest.raises(ConfigError, match=r"save only its state_dict\(\)"):
        SamSegmenter(model=str(tmp_path / "whole.pth"))


def test_a_training_checkpoint_is_refused_with_its_keys(tmp_path, checkpoint):
    import torch

    state = torch.load(checkpoint, weights_only=True)
    torch.save({"model": state, "epoch": 3}, tmp_path / "train.pth")
    with pytest.raises(ConfigError, match="a dict with epoch, model, not a state dict"):
        SamSegmenter(model=str(tmp_path / "train.pth"))


def test_an_old_style_pth_is_read_too(tmp_path, checkpoint):
    import torch

    torch.save(
        torch.load(checkpoint, weights_only=True), tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    assert segment(tmp_path / "old.pth") == segment(checkpoint)
    assert SamSegmenter.check(model=str(tmp_path / "old.pth")).weight_bytes


def test_broken_files_are_named_with_the_mend(tmp_path, checkpoint):
    import torch

    state = torch.load(checkpoint, weights_only=True)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(checkpoint.read_bytes()[: os.path.getsize(checkpoint) // 2])
    torch.save({name: t for name, t in state.items() if "iou_token" not in name}, tmp_path / "less.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name, told in [
        ("cut.pth", "cut.pth: .*download it again"),
        ("less.pth", "less.pth: .* missing: .*iou_token"),
        ("other.pth", "not SAM's tensors"),
        ("none.pth", "no file .*none.pth; download sam_vit_h"),
    ]:
        for attempt in (SamSegmenter, SamSegmenter.check):
            with pytest.raises(ConfigError, match=told):
                attempt(model=str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"modle": "x"}, "unknown field `modle`; the options are model, multimask"),
        ({}, "missing required field `model`"),
        ({"model": "x", "boxes_at_once": 0}, r"boxes_at_once"),
        ({"model": "x", "multimask": "yes"}, r"multimask"),
        ({"model": "x", "dtype": "float8"}, r"dtype"),
    ],
)
def test_wrong_options_are_named(options, told):
    for attempt in (SamSegmenter, SamSegmenter.check, SamSegmenter.identity):
        with pytest.raises(ConfigError, match=told):
            attempt(**options)


def test_a_device_that_is_not_here_is_named(checkpoint):
    import torch

    with pytest.raises(ConfigError, match="'abacus': name auto, cpu or cuda"):
        SamSegmenter(model=str(checkpoint), device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"sees no GPU; set segmenter\.num_gpus to 1"):
            SamSegmenter(model=str(checkpoint), device="cuda")
