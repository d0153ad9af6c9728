"""The loss equals that of PerceptionDLM's released code, and is the same however examples share a batch."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from paracaption.model_training.convert.published import convert
from paracaption.model_training.data.samples import TrainBatch
from paracaption.model_training.model.batch import collate, pack
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.model_training.train.loss import Noise, diffusion_loss, draw_noise
from paracaption.schemas.training import NoiseOptions
from tests.model_training.recorded_perceptiondlm import Ours, golden
from tests.shared_data import recorded
from tests.tiny.perceptiondlm_model import SMALLEST, tiny_model

RUNS = ["s0", "s1", "s2_nothing_masked"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Ours:
    folder = tmp_path_factory.mktemp("perceptiondlm") / "model"
    convert(recorded("perceptiondlm/checkpoint"), folder)
    model = PerceptionDLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Ours(model, PerceptionDLMProcessor.from_pretrained(folder)).with_layout(replay_scale=1 / 28)


@pytest.fixture(scope="module")
def batch(ours) -> TrainBatch:
    which = golden("train")
    prompts = [int(token.removeprefix("<Prompt").rstrip(">")) for token in which.meta["prompt_tokens"]]
    captions = [ours.processor.tokenize(text) for text in which.meta["captions_in"]]
    return train_batch(ours.processor.make_example(which.pixels, which.masks, captions, prompts))


def train_batch(*examples, packed=False) -> TrainBatch:
    if packed:
        images, tokens = pack(examples)
    else:
        together = collate(examples)
        images, tokens = together.images, together.tokens()
    weight = torch.ones(len(examples))
    return TrainBatch(images, tokens, tokens.roles.caption_BL, weight, ["?"] * len(examples), [])


@pytest.mark.parametrize("run", RUNS)
def test_the_recorded_draws_mask_the_same_tokens_and_give_the_recorded_loss(ours, batch, run):
    meta = golden("train").meta["runs"][run]
    noise = draw_noise(batch, NoiseOptions(), torch.Generator().manual_seed(meta["seed"]))
    assert noise.masked_BL.sum() == meta["n_masked"]
    assert float(noise.probability_BL[0, 0]) == pytest.approx(meta["p_mask"], abs=1e-6)
    found = diffusion_loss(ours.model, batch, noise)
    assert float(found.mean.detach()) == pytest.approx(meta["loss"], abs=1e-5)
    if meta["n_masked"]:
        numbers = golden("train").numbers
        assert torch.equal(noise.masked_BL, numbers[f"{run}_masked"].bool())
        np.testing.assert_allclose(found.ce_K, numbers[f"{run}_token_ce"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("run", RUNS)
def test_gradients_have_the_recorded_norms(ours, batch, run):
    meta = golden("train").meta["runs"][run]
    noise = draw_noise(batch, NoiseOptions(), torch.Generator().manual_seed(meta["seed"]))
    ours.model.zero_grad()
    diffusion_loss(ours.model, batch, noise).mean.backward()
    norms = meta["grad_norms"]
    pairs = {
        "language_model.lm_head.weight": ours.model.lm_head.weight,
        "mask_id_embedding.weight": ours.model.region_prompts.weight,
        "vision_abstractor.projection.0.weight": ours.model.projector[0].weight,
        "language_model.model.embed_tokens.weight": ours.model.language_model.embed_tokens.weight,
        "language_model.model.layers.0.self_attn.q_proj.weight": (
            ours.model.language_model.layers[0].self_attn.q_proj.weight
        ),
    }
    for name, parameter in pairs.items():
        assert float(parameter.grad.norm()) == pytest.approx(norms[name] or 0.0, rel=1e-3, abs=1e-6), name


@pytest.fixture(scope="module")
def tiny():
    model, processor = tiny_model(0, **SMALLEST)
    return model.double().eval(), processor


def scenes(processor, counts):
    random = np.random.default_rng(0)
    examples = []
    for count in counts:
        masks = [np.zeros((40, 60), bool) for _ in range(count)]
        for number, mask in enumerate(masks):
            mask[5 * number : 5 * number + 9, 7 * number : 7 * number + 9] = True
        captions = [random.integers(30, 60, random.integers(1, 9)).tolist() for _ in masks]
        pixels = random.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        examples.append(processor.make_example(pixels, masks, captions))
    return examples


def test_packed_padded_and_single_examples_have_the_same_loss(tiny):
    model, processor = tiny
    examples = scenes(processor, [3, 1, 5])
    packed, padded = train_batch(*examples, packed=True), train_batch(*examples)
    noise = draw_noise(packed, NoiseOptions(), torch.Generator().manual_seed(1))
    masked = torch.zeros_like(padded.label_BL)
    probability = torch.ones(padded.label_BL.shape)
    singles = 0.0
    for row in range(3):
        here, there = packed.tokens.roles.sample_BL == row, padded.tokens.roles.sample_BL == row
        masked[there], probability[there] = noise.masked_BL[here], noise.probability_BL[here]
        alone = train_batch(examples[row])
        own = Noise(noise.masked_BL[here][None], noise.probability_BL[here][None])
        singles += float(diffusion_loss(model, alone, own).mean.detach()) / 3
    together = float(diffusion_loss(model, packed, noise).mean.detach())
    assert together == pytest.approx(
        float(diffusion_loss(model, padded, Noise(masked, probability)).mean.detach()), 1e-9
    )
    assert together == pytest.approx(singles, 1e-9)


def test_only_labelled_tokens_are_masked_each_with_its_levels_probability(tiny):
    _, processor = tiny
    batch = train_batch(*scenes(processor, [2] * 40))
    rates = []
    for seed in range(200):
        masked, probability = draw_noise(batch, NoiseOptions(), torch.Generator().manual_seed(seed))
        assert not (masked & ~batch.label_BL).any()
        rates.append((masked[batch.label_BL].double() - probability[batch.label_BL]).mean())
    assert abs(float(torch.stack(rates).mean())) < 5e-3


def test_regions_can_have_levels_of_their_own(tiny):
    _, processor = tiny
    batch = train_batch(*scenes(processor, [4, 2]))
    _, probability = draw_noise(batch, NoiseOptions(level="region"), torch.Generator().manual_seed(0))
    region, caption = batch.tokens.roles.region_BL, batch.tokens.roles.caption_BL
    levels = [probability[0][caption[0] & (region[0] == code)].unique() for code in range(1, 5)]
    assert [len(level) for level in levels] == [1] * 4
    assert len({float(level) for level in levels}) == 4


def test_stratified_levels_are_spread_evenly(tiny):
    _, processor = tiny
    batch = train_batch(*scenes(processor, [1] * 10))
    _, probability = draw_noise(batch, NoiseOptions(stratified=True), torch.Generator().manual_seed(3))
    levels = probability[:, 0].sort().values
    np.testing.assert_allclose(np.diff(levels), 0.0999, atol=1e-4)


def test_a_filler_counts_nothing(tiny):
    model, processor = tiny
    examples = scenes(processor, [2, 3])
    both = train_batch(*examples)._replace(weight_E=torch.tensor([1.0, 0.0]))
    noise = draw_noise(both, NoiseOptions(), torch.Generator().manual_seed(4))
    first = train_batch(examples[0])
    width = first.label_BL.shape[1]
    here = both.tokens.roles.sample_BL[0] == 0
    own = Noise(noise.masked_BL[:1, here], noise.probability_BL[:1, here])
    assert own.masked_BL.shape[1] == width
    assert float(diffusion_loss(model, both, noise).mean.detach()) == pytest.approx(
        float(diffusion_loss(model, first, own).mean.detach()), 1e-9
    )


def test_an_unknown_option_is_an_error():
    with pytest.raises(ValidationError, match="level"):
        NoiseOptions(level="image")
    with pytest.raises(ValidationError, match="eps"):
        NoiseOptions(eps=0.0)
