"""SAM 3 by phrase: transformers' own masks, however the phrases are batched, from one look at the photo."""

import json
import shutil

import numpy as np
import pytest

from paracaption.filters import rle
from paracaption.pipeline.models import masks
from paracaption.pipeline.models.sam3 import Sam3Segmenter
from paracaption.schemas.errors import ConfigError, OutOfMemory, StageFailed
from tests.synthetic import scene
from tests.tiny.sam import write_sam3

PHRASES = ["cat", "a red car", "person", "tree", "x", "old wooden rowing boat"]
THRESHOLD = 0.35
"""Which some of the tiny model's queries pass and some do not."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_sam3(tmp_path_factory.mktemp("sam3"))


def make(checkpoint, **options):
    return Sam3Segmenter(**{"model": str(checkpoint), "device": "cpu", "threshold": THRESHOLD, **options})


@pytest.fixture(scope="module")
def segmenter(checkpoint):
    return make(checkpoint)


def photo(height=60, width=90, seed=0):
    return np.ascontiguousarray(scene(seed, 4, (max(height, 24), max(width, 24)))[0][:height, :width])


def segment(segmenter, phrases, picture=None):
    picture = photo() if picture is None else picture
    return segmenter.segment(picture, phrases, np.zeros((len(phrases), 4), np.float32))


def masks_of(found):
    return [[candidate.rle for candidate in candidates] for candidates in found]


def scores_of(found):
    return [candidate.score for candidates in found for candidate in candidates]


def assert_equal(found, expected, abs=1e-5):
    assert masks_of(found) == masks_of(expected)
    assert scores_of(found) == pytest.approx(scores_of(expected), abs=abs)


def batches_of(module, sizes):
    """Note the batch size of every call of a module."""
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(next(v for v in [*args, *kwargs.values()] if len(v)))),
        with_kwargs=True,
    )


@pytest.mark.parametrize("detector_only", [False, True])
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (200, 131), (3, 40)])
@pytest.mark.soak
def test_masks_are_those_of_transformers_one_phrase_at_a_time(tmp_path, size, detector_only):
    import torch
    from PIL import Image
    from transformers import Sam3Model, Sam3Processor

    folder = write_sam3(tmp_path, detector_only=detector_only)
    model = Sam3Model.from_pretrained(folder).eval()
    processor = Sam3Processor.from_pretrained(folder)
    picture = photo(*size)
    found = segment(make(folder), PHRASES, picture)
    counts = [len(candidates) for candidates in found]
    assert min(counts) < max(counts), "a threshold that some queries pass and some do not"
    for phrase, candidates in zip(PHRASES, found, strict=True):
        inputs = processor(images=Image.fromarray(picture), text=phrase, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        [expected] = processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[size]
        )
        surer, looser = (  # a pixel at the threshold may round either way, no other may
            processor.post_process_instance_segmentation(
                outputs, threshold=THRESHOLD, mask_threshold=0.5 + margin, target_sizes=[size]
            )[0]["masks"]
            for margin in (1e-4, -1e-4)
        )
        order = expected["scores"].argsort(descending=True, stable=True).tolist()
        order = [i for i in order if expected["masks"][i].any()]
        scores = [float(expected["scores"][i]) for i in order]
        found_masks = [rle.decode(candidate.rle) for candidate in candidates]
        for mask, i in zip(found_masks, order, strict=True):
            assert (surer[i].numpy() <= mask).all() and (mask <= looser[i].numpy()).all()
        assert scores_of([candidates]) == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("phrases_at_once", [1, 2, 4, 16])
@pytest.mark.soak
def test_batches_of_phrases_change_nothing(checkpoint, segmenter, phrases_at_once):
    alone = [segment(segmenter, [phrase])[0] for phrase in PHRASES]
    assert sum(map(len, alone)) > len(PHRASES)
    assert_equal(segment(make(checkpoint, phrases_at_once=phrases_at_once), PHRASES), alone)


def test_masks_enlarged_one_at_a_time_are_the_same(segmenter, monkeypatch):
    whole = segment(segmenter, PHRASES)
    monkeypatch.setattr(masks, "CHUNK_PX", 1)
    assert segment(segmenter, PHRASES) == whole


@pytest.mark.parametrize(
    ("part", "told"), [("pred_logits", "scores"), ("presence_logits", "scores"), ("pred_masks", "masks")]
)
@pytest.mark.soak(keep=1)
def test_a_model_that_says_nan_is_an_error_and_not_nothing_found(checkpoint, part, told):
    segmenter = make(checkpoint)

    def spoil(module, given, output):
        getattr(output, part).view(-1)[0] = float("nan")
        return output

    segmenter.model.register_forward_hook(spoil)
    with pytest.raises(StageFailed, match=rf"values of {told} are NaN or infinite"):
        segment(segmenter, PHRASES[:2])


def test_the_image_is_seen_once_and_a_repeated_phrase_is_asked_once(checkpoint):
    segmenter = make(checkpoint, phrases_at_once=2)
    images, phrases = [], []
    batches_of(segmenter.model.vision_encoder, images)
    batches_of(segmenter.model.detr_encoder, phrases)
    asked = ["cat", "tree", "cat", " cat ", "tree", "person"]
    found = segment(segmenter, asked)
    assert images == [1]
    assert len(phrases) == 2, "three phrases, two at once"
    assert found[0] == found[2] == found[3]
    assert found[1] == found[4] != found[0]
    found[0].clear()
    assert found[2], "each region has a list of its own"


@pytest.mark.soak
def test_a_phrase_is_read_once_for_all_images_and_its_answers_stay_the_same(checkpoint):
    segmenter = make(checkpoint)
    texts = []
    batches_of(segmenter.model.text_encoder, texts)
    first = segment(segmenter, PHRASES)
    segment(segmenter, ["person", "cat"], photo(seed=1))
    assert len(texts) == 1
    assert segment(segmenter, PHRASES) == first
    assert_equal(segment(make(checkpoint), PHRASES[::-1])[::-1], first)


@pytest.mark.soak
def test_the_phrases_kept_are_the_last_used_ones(checkpoint):
    segmenter = make(checkpoint, phrase_cache=2)
    expected = segment(segmenter, PHRASES)
    assert list(segmenter._texts) == PHRASES[-2:]
    segment(segmenter, [PHRASES[-2]])
    segment(segmenter, ["cat"])
    assert list(segmenter._texts) == [PHRASES[-2], "cat"]
    forgetful = make(checkpoint, phrase_cache=0)
    assert_equal(segment(forgetful, PHRASES), expected)
    assert not forgetful._texts


def test_an_empty_phrase_is_not_asked_and_finds_nothing(checkpoint, segmenter):
    found = segment(segmenter, ["", "cat", "  ", "tree"])
    assert found[0] == found[2] == []
    assert_equal([found[1], found[3]], segment(segmenter, ["cat", "tree"]))
    untouched = make(checkpoint)
    images = []
    batches_of(untouched.model.vision_encoder, images)
    assert segment(untouched, ["", " "]) == [[], []]
    assert segment(untouched, []) == []
    assert images == []


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (1, 2000), (3, 3)])
def test_masks_of_narrow_photos_have_the_photos_size(segmenter, size):
    found = segment(segmenter, PHRASES, photo(*size))
    sizes = {candidate.rle.size for candidates in found for candidate in candidates}
    assert sizes == {size}


def test_scores_pass_the_threshold_and_the_best_is_first(checkpoint):
    low, high = (segment(make(checkpoint, threshold=t), PHRASES) for t in (0.3, 0.45))
    for candidates, fewer in zip(low, high, strict=True):
        scores = scores_of([candidates])
        assert scores == sorted(scores, reverse=True)
        assert all(0.3 < score <= 1 for score in scores)
        assert [score for score in scores if score > 0.45] == pytest.approx(scores_of([fewer]), abs=1e-6)
    assert sum(map(len, high)) < sum(map(len, low))


def test_a_phrase_longer_than_the_text_encoder_is_cut(segmenter):
    long = "a very long phrase that says far too much " * 3
    assert masks_of(segment(segmenter, [long])) == masks_of(segment(segmenter, [long + " and more"]))


def test_memory_that_runs_out_halves_the_phrases_and_changes_nothing(checkpoint, segmenter):
    import torch

    def at_most(limit):
        def hook(module, args, kwargs):
            if kwargs["text_features"].shape[0] > limit:
                raise torch.OutOfMemoryError("too many phrases")

        return hook

    short = make(checkpoint)
    hook = short.model.detr_encoder.register_forward_pre_hook(at_most(2), with_kwargs=True)
    assert_equal(segment(short, PHRASES), segment(segmenter, PHRASES))
    hook.remove()
    short.model.detr_encoder.register_forward_pre_hook(at_most(0), with_kwargs=True)
    with pytest.raises(OutOfMemory, match="phrases of one photo: out of memory with a batch of one"):
        segment(short, ["cat"])


@pytest.mark.soak
def test_bfloat16_is_close(checkpoint, segmenter):
    exact = segment(segmenter, ["cat"])[0]
    close = segment(make(checkpoint, dtype="bfloat16"), ["cat"])[0]
    overlaps = rle.iou([c.rle for c in exact], [c.rle for c in close]).max(axis=1)
    assert overlaps.min() > 0.8
    assert close[0].score == pytest.approx(exact[0].score, abs=0.02)


def test_the_identity_names_what_answers_depend_on_and_nothing_else(checkpoint, tmp_path):
    def name(**options):
        return Sam3Segmenter.identity(**{"model": str(checkpoint), **options})

    assert name() == name(phrases_at_once=3, device="cpu", phrase_cache=9)
    assert name(model=str(write_sam3(tmp_path / "same"))) == name(), "wherever it lies"
    others = [
        name(threshold=0.3),
        name(mask_threshold=0.4),
        name(dtype="bfloat16"),
        name(model=str(write_sam3(tmp_path / "other", seed=1))),
    ]
    assert len({tuple(sorted(other.items())) for other in [name(), *others]}) == 5


# The checkpoint.


def test_check_reads_shapes_and_counts_the_detector_alone(checkpoint, segmenter):
    checked = Sam3Segmenter.check(model=str(checkpoint))
    assert checked.what == "SAM 3: vision 2 x 32 at 112 px, 12 queries a phrase"
    assert checked.weight_bytes == 4 * sum(p.numel() for p in segmenter.model.parameters())


def test_the_weights_are_the_files_own(checkpoint, segmenter):
    import torch
    from safetensors.torch import load_file

    stored = load_file(checkpoint / "model.safetensors")
    for name, weight in segmenter.model.named_parameters():
        assert torch.equal(weight, stored["detector_model." + name]), name


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def refused(folder, told):
    for attempt in (Sam3Segmenter, Sam3Segmenter.check):
        with pytest.raises(ConfigError, match=told):
            attempt(model=str(folder))


@pytest.mark.parametrize("name", ["sam3.pt", "pytorch_model.bin"])
def test_a_pickle_in_the_folder_is_refused_unread(copy, name):
    (copy / name).write_bytes(b"whatever it is")
    refused(copy, f"{name}: this is a pickle, which can run code .*safetensors")


def test_a_missing_or_misshapen_tensor_is_named(copy):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = "detector_model.detr_decoder.query_embed.weight"
    save_file({**tensors, name: torch.zeros(3, 32)}, copy / "model.safetensors")
    refused(copy, r"wrong: detr_decoder.query_embed.weight is 3x32, not 12x32 \(model.safetensors\)")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors")
    refused(copy, "missing: detr_decoder.query_embed.weight")


def test_a_cut_file_is_named(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(copy, "model.safetensors: not a sound safetensors file")


def test_another_models_folder_is_named(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    refused(copy, "model_type is 'qwen3', not sam3")


@pytest.mark.parametrize("names", [["processor_config.json"], ["tokenizer.json", "vocab.json", "merges.txt"]])
@pytest.mark.soak(keep=1)
def test_a_folder_without_processor_or_tokenizer_is_named(copy, names):
    for name in names:
        (copy / name).unlink()
    refused(copy, "processor or tokenizer do not load .*download it again")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "x", "treshold": 0.4}, "unknown field `treshold`; the options are model, threshold"),
        ({}, "missing required field `model`"),
        ({"model": "x", "threshold": 1.5}, r"threshold"),
        ({"model": "x", "phrases_at_once": 0}, r"phrases_at_once"),
        (
            {"model": "x", "dtype": "half"},
            r"options\.dtype: choose from auto, float32, bfloat16; the options",
        ),
        ({"model": "no/such/folder"}, "segmenter.options.model: no/such/folder is not a checkpoint folder"),
    ],
)
def test_wrong_options_are_named(options, told):
    for attempt in (Sam3Segmenter, Sam3Segmenter.check, Sam3Segmenter.identity):
        with pytest.raises(ConfigError, match=told):
            attempt(**options)


# In a build.


@pytest.mark.slow
@pytest.mark.soak
def test_both_segmenters_evidence_and_scores_arrive_in_the_ledger(checkpoint, tmp_path):
    import pyarrow.parquet as pq

    from paracaption.pipeline.stages.agreement import Resegmented
    from paracaption.pipeline.stages.evidence import EvidenceStore
    from paracaption.schemas.config import Backend
    from tests.building import build, config_of, drops
    from tests.synthetic import write_sa1b
    from tests.tiny.sam import write_sam

    source = write_sa1b(tmp_path / "source", num_images=6)
    chosen = {
        "sam": {"model": str(write_sam(tmp_path)), "multimask": True},
        "sam3": {"model": str(checkpoint), "threshold": 0.2},
    }
    for name, options in chosen.items():
        out = tmp_path / name
        config = config_of(out, sa1b=source, min_iou=0)
        backend = Backend(name=name, options={**options, "device": "cpu"}, num_cpus=0.1)
        progress = build(config.model_copy(update={"segmenter": backend}))["sa1b"]
        none_found = drops(out, "sa1b")
        assert {reason for _, reason, _ in none_found.values()} <= {"segmenter_none"}
        assert progress.regions == 24 == progress.kept + len(none_found)
        assert progress.kept > 12
        [folder] = (out / "sa1b" / "evidence").glob("agree_with_segmenter-*")
        answers = {}
        for path in sorted(folder.glob("*.parquet")):
            answers |= EvidenceStore(folder, Resegmented).load(path.stem)
        rows = [
            row
            for path in sorted((out / "sa1b" / "ledger").glob("sa1b-*.parquet"))
            for row in pq.read_table(path).to_pylist()
        ]
        assert len(answers) == len(rows) == 24
        for row in rows:
            answer = answers[row["key"], row["region"]].answer
            if (row["key"], row["region"]) in none_found:
                assert answer == Resegmented(0.0, 0.0, None, 0)
                continue
            assert (row["iou"], row["segmenter_score"]) == (answer.iou, answer.score)
            found = answer.rle((row["image_height"], row["image_width"]))
            assert found is not None and rle.decode(found).any()
            assert answer.num_candidates >= 1
        assert len({row["segmenter_score"] for row in rows}) > 1
        assert any(row["iou"] > 0 for row in rows)
