"""Scores of decoding in few steps count what they say; thresholds of positions are calibrated as stated."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paracaption.model_training.decoding import sampler
from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.parallelism import (
    lay_out,
    lowest_threshold,
    position_thresholds,
    score_decoding,
)
from paracaption.model_training.train import build
from paracaption.schemas.decoding import DecodeOptions
from tests.model_training.toy_corpus import config_of, write_corpus

SLOTS = 32


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> SimpleNamespace:
    """An untrained model, and eight scenes of the hard world."""
    folder = tmp_path_factory.mktemp("hard")
    corpus = write_corpus(folder / "toy", 8, toy.HARD)
    model, processor = build.open_model(config_of(folder / "run", corpus))
    laid_out = lay_out(processor, iter_photo_regions(corpus), SLOTS, batch_size=3)
    return SimpleNamespace(model=model.eval(), processor=processor, laid_out=laid_out)


def test_one_token_a_forward_is_counted_as_one(hard):
    options = DecodeOptions(strategy="left-to-right", max_new_tokens=SLOTS, steps=SLOTS)
    scores = score_decoding(hard.model, hard.processor, hard.laid_out, options)
    assert scores.regions == sum(len(row) for each in hard.laid_out for row in each.truths)
    assert scores.tokens_per_forward == 1
    assert scores.forwards <= SLOTS
    assert scores.malformed == 1, "an untrained model writes nothing of the world"


def test_all_tokens_at_once_take_one_forward(hard):
    options = DecodeOptions(strategy="threshold", threshold=0, max_new_tokens=SLOTS, steps=SLOTS)
    scores = score_decoding(hard.model, hard.processor, hard.laid_out, options)
    assert scores.forwards == 1
    assert 1 <= scores.tokens_per_forward <= SLOTS


def test_a_decoder_that_writes_the_truth_is_right(hard, monkeypatch):
    def tell_the_truth(model, batch, options):
        (each,) = (each for each in hard.laid_out if each.batch is batch)
        most = max(map(len, each.truths))
        shape = (len(each.truths), most, SLOTS)
        tokens = torch.full(shape, model.config.eot_token_id)
        for row, truths in enumerate(each.truths):
            for region, truth in enumerate(truths):
                ids = hard.processor.tokenize(truth)
                tokens[row, region, : len(ids)] = torch.tensor(ids)
        opens = torch.zeros(shape, dtype=torch.bool)
        yield SimpleNamespace(tokens_BNS=tokens, open_BNS=~opens)
        yield SimpleNamespace(tokens_BNS=tokens, open_BNS=opens)

    monkeypatch.setattr(sampler, "decode_steps", tell_the_truth)
    scores = score_decoding(hard.model, hard.processor, hard.laid_out, DecodeOptions())
    assert scores.right == scores.right_tangled == 1
    assert 26 <= scores.tokens_per_forward <= 31


def test_regions_are_tangled_if_one_box_has_the_other(hard):
    scenes = list(toy.draw_scenes(8, 0, toy.HARD))
    tangled = [row for each in hard.laid_out for row in each.tangled]
    for scene, row in zip(scenes, tangled, strict=True):
        assert sum(row) >= 2 if scene.tangled else sum(row) != 1
    assert any(scene.tangled for scene in scenes)
    assert not all(map(all, tangled))


def test_thresholds_of_positions_fall_with_the_agreement(hard):
    strict, loose = position_thresholds(hard.model, hard.laid_out[:1], SLOTS, (1.0, 0.1))
    assert len(strict) == len(loose) == SLOTS
    assert all(0 < low <= high <= 1 for low, high in zip(loose, strict, strict=True))
    DecodeOptions(strategy="threshold", max_new_tokens=SLOTS, position_thresholds=strict)


def test_calibration_decodes_one_token_a_step_where_auto_would_not(hard, monkeypatch):
    used, real = [], sampler.decode_steps
    monkeypatch.setattr(hard.model, "layout", dataclasses.replace(hard.model.layout, isolate_prefix=False))
    monkeypatch.setattr(sampler, "decode_steps", lambda *given: used.append(given[2]) or real(*given))
    position_thresholds(hard.model, hard.laid_out[:1], SLOTS, (0.5,))
    assert [(each.cache, each.settled, each.steps) for each in used] == [("none", None, SLOTS)]


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), st.booleans()), min_size=1),
    st.sampled_from([0.5, 0.8, 1.0]),
)
def test_the_lowest_threshold_is_the_lowest_that_keeps_the_agreement(pairs, agreement):
    confidence, kept = (np.array(each) for each in zip(*pairs, strict=True))
    good = [t for t in sorted(set(confidence)) if kept[confidence >= t].mean() >= agreement]
    assert lowest_threshold(confidence, kept, agreement) == (good[0] if good else 1.0)
