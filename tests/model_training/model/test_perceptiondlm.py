"""The model as a whole: saving and loading, and logits that depend on nothing but their own sample."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paracaption.model_training.model.attention import PADDING
from paracaption.model_training.model.batch import Images, collate, pack
from paracaption.model_training.model.config import PerceptionDLMConfig
from paracaption.model_training.model.perceptiondlm import PerceptionDLM, pixel_unshuffle
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from tests.model_training.tiny_models import examples, lively, photo
from tests.tiny.perceptiondlm_model import SMALLEST, byte_tokenizer, tiny_config, tiny_model

LAYOUTS = ["corrected", "reference"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its processor."""
    model, processor = lively(dtype=torch.float32, layout="reference", layout_options={"cut": "block"})
    where = tmp_path_factory.mktemp("saved")
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return where


@pytest.fixture(scope="module", params=LAYOUTS)
def ready(request):
    """A float64 model and its processor in each layout."""
    return lively(layout=request.param)


def forward(model, examples, packed=False):
    """Each sample's logits, without padding."""
    images, tokens = pack(examples) if packed else (collate(examples).images, collate(examples).tokens())
    with torch.inference_mode():
        logits = model(tokens, images)
    samples = tokens.roles.sample_BL
    return [logits[samples == sample] for sample in range(len(examples))]


def same(found, expected, tolerance=1e-9):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < tolerance


def test_saving_and_loading_gives_the_same_model_to_the_last_bit(folder, tmp_path):
    model, _ = lively(dtype=torch.float32, layout="reference", layout_options={"cut": "block"})
    found = PerceptionDLM.from_pretrained(folder)
    assert not found.training
    assert found.layout == model.layout
    assert found.config.to_diff_dict().keys() >= {"layout", "layout_options", "caption_token_ids"}
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    found.save_pretrained(tmp_path)
    weights = "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (folder / weights).read_bytes()
    again, once = (PerceptionDLM.from_pretrained(where).config for where in (tmp_path, folder))
    assert {**again.to_dict(), "_name_or_path": ""} == {**once.to_dict(), "_name_or_path": ""}


def test_a_model_saved_in_bf16_is_loaded_in_bf16(tmp_path):
    model, _ = lively(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    lively()[1].save_pretrained(tmp_path)  # a processor with a config of its own, which knows no type
    found = PerceptionDLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_auto_classes_load_it_without_code_from_the_folder(folder):
    from transformers import AutoConfig, AutoModel, AutoProcessor

    assert "auto_map" not in (folder / "config.json").read_text()
    assert isinstance(AutoConfig.from_pretrained(folder), PerceptionDLMConfig)
    assert isinstance(AutoModel.from_pretrained(folder), PerceptionDLM)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, PerceptionDLMProcessor)
    assert processor.layout.cut == "block"
    one, other = (
        processor.make_example(*photo(0, 2), 4),
        lively(layout="reference")[1].make_example(*photo(0, 2), 4),
    )
    np.testing.assert_array_equal(one.prefix, other.prefix)


def test_a_folder_to_upload_has_config_weights_and_tokenizer_and_no_code(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt"))]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_loading_as_another_type_or_with_flex_attention_is_by_the_usual_arguments(folder, monkeypatch):
    found = PerceptionDLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="flex_attention")
    assert found.config._attn_implementation == "flex_attention"
    assert found.lm_head.weight.dtype == torch.float64
    assert found.vision_tower.layers[0].self_attn.config._attn_implementation == "sdpa"
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # eager at once
    plain = PerceptionDLM.from_pretrained(folder, dtype=torch.float64)
    samples = examples(lively(layout="reference")[1], [2, 0, 3])
    for packed in (True, False):
        same(forward(found, samples, packed), forward(plain, samples, packed))


def test_a_new_model_starts_as_the_original_does():
    model, _ = tiny_model(
        vision_config=SMALLEST["vision_config"] | {"hidden_size": 400, "num_attention_heads": 2}
    )
    assert model.region_prompts.weight.std().item() == pytest.approx(1.0, abs=0.05)
    assert model.language_model.embed_tokens.weight.std().item() == pytest.approx(0.02, abs=0.002)
    assert (model.language_model.norm.weight == 1).all()
    assert (model.projector[0].bias == 0).all()


def test_padded_packed_and_reordered_samples_have_the_logits_of_single_ones(ready):
    model, processor = ready
    found = examples(processor, [3, 0, 1, 6, 2], slots=3)
    single = [forward(model, [example])[0] for example in found]
    same(forward(model, found), single)
    same(forward(model, found, packed=True), single)
    order = [4, 2, 0, 3, 1]
    same(forward(model, [found[i] for i in order]), [single[i] for i in order])
    same(forward(model, [found[i] for i in order], packed=True), [single[i] for i in order])


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    regions=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 99), packed=st.booleans()
)
def test_any_number_of_samples_tiles_and_regions_changes_no_samples_logits(ready, regions, seed, packed):
    model, processor = ready
    found = examples(processor, regions, slots=2, seed=seed)
    same(forward(model, found, packed), [forward(model, [example])[0] for example in found])


def test_what_padding_holds_does_not_matter(ready):
    model, processor = ready
    batch = collate(examples(processor, [1, 4]))
    tokens = batch.tokens()
    padding = tokens.roles.sample_BL == PADDING
    assert padding.any()
    other = tokens._replace(
        ids_BL=tokens.ids_BL.masked_fill(padding, 65),
        position_BL=tokens.position_BL.masked_fill(padding, 999),
    )
    with torch.inference_mode():
        moved = (model(other, batch.images) - model(tokens, batch.images)).abs()
    assert moved[~padding].max() < 1e-9
    assert moved[padding].max() > 0.1


def test_samples_without_any_region_have_logits_too(ready):
    model, processor = ready
    [logits] = forward(model, examples(processor, [0]))
    assert logits.isfinite().all()
    same(
        forward(model, examples(processor, [0, 0])),
        [logits, forward(model, examples(processor, [0], seed=1))[0]],
    )


def test_every_tile_and_every_region_matters_to_every_logit(ready):
    model, processor = ready
    [example] = examples(processor, [2], slots=2, seed=1)
    [logits] = forward(model, [example])
    for view in range(len(example.views)):
        views = example.views.copy()
        views[view] = 255 - views[view]
        [other] = forward(model, [example._replace(views=views)])
        assert (other - logits).abs().amax(-1).min() > 1e-6, view
    for prompt in range(2):
        prompts = example.prompts.copy()
        prompts[0, prompt] = ~prompts[0, prompt]
        [other] = forward(model, [example._replace(prompts=prompts)])
        assert (other - logits).abs().amax(-1).min() > 1e-6, prompt


def test_replay_of_several_grids_in_one_batch_equals_one_by_one(ready):
    model, processor = ready
    found = examples(processor, [2, 3, 0, 1, 6, 2, 4, 2, 1])
    assert len({example.grid for example in found}) > 4
    together = collate(found).images
    generator = torch.Generator().manual_seed(0)
    views = len(together.views_N3SS)
    features = torch.randn(views, 4, 32, generator=generator, dtype=torch.float64)
    alone, start = [], 0
    for example in found:
        end = start + len(example.views)
        alone.append(model.replay_regions(features[start:end], collate([example]).images))
        start = end
    assert torch.equal(model.replay_regions(features, together), torch.cat(alone))


def test_too_few_or_too_many_features_are_an_error(ready):
    model, processor = ready
    batch = collate(examples(processor, [2], seed=1))
    features, replay = model.encode_images(batch.images)
    with pytest.raises(ValueError, match=r"places for \d+ image tokens"):
        model.embed(batch.tokens(), features[1:], replay)
    with pytest.raises(ValueError, match=r"places for \d+ replay tokens"):
        model.embed(batch.tokens(), features, replay[:1])


@pytest.mark.parametrize("ablation", ["region_prompting", "feature_replay"])
def test_ablations_run_and_leave_out_what_they_say(ablation):
    model, processor = lively(**{ablation: False})
    found = examples(processor, [2, 1])
    assert forward(model, found)[0].isfinite().all()
    shown, boxed = [], []
    for example in found:
        other = ~example.prompts
        shown.append(example._replace(prompts=other))
        boxed.append(example._replace(boxes=[(0.0, 0.0, 0.1, 0.1)] * len(example.boxes)))
    moved_by_prompts = (forward(model, shown)[0] - forward(model, found)[0]).abs().max()
    moved_by_boxes = (forward(model, boxed)[0] - forward(model, found)[0]).abs().max()
    assert (moved_by_prompts == 0) == (ablation == "region_prompting")
    assert (moved_by_boxes == 0) == (ablation == "feature_replay")


def gradients(model, images, tokens):
    model.zero_grad()
    logits = model(tokens, images)
    logits[tokens.roles.caption_BL].log_softmax(-1)[:, 65].sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(ready):
    model, processor = copy.deepcopy(ready[0]).train(), ready[1]
    images, tokens = pack(examples(processor, [2, 1]))
    plain = gradients(model, images, tokens)
    calls = []
    for layer in (model.language_model.layers[0], model.vision_tower.layers[0]):
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    found = gradients(model, images, tokens)
    assert len(calls) == 4, "both run once more on the way back"
    assert plain.keys() == found.keys()
    for name, gradient in plain.items():
        assert (found[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name


def test_every_parameter_gets_a_gradient(ready):
    model, processor = ready
    images, tokens = pack(examples(processor, [6, 1]))
    for name, gradient in gradients(model, images, tokens).items():
        if "k_proj.bias" in name:  # adds the same to every score of a query
            continue
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0, name
    model.zero_grad()


def test_fewer_heads_of_keys_than_of_queries_are_as_if_each_were_there_twice():
    text = SMALLEST["text_config"]
    model, processor = lively(text_config=text | {"num_attention_heads": 4, "num_key_value_heads": 2})
    full, _ = lively(text_config=text | {"num_attention_heads": 4, "num_key_value_heads": 4})
    weights = model.state_dict()
    for name in weights:
        if "language_model" in name and ("k_proj" in name or "v_proj" in name):
            weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(weights)
    found = examples(processor, [2, 1])
    same(forward(model, found), forward(full, found))


def test_bf16_gives_about_the_logits_of_float32():
    narrow, processor = lively(dtype=torch.bfloat16)
    wide, _ = lively(dtype=torch.float32)
    found = examples(processor, [2, 0, 3])
    for one, other in zip(forward(narrow, found), forward(wide, found), strict=True):
        assert one.dtype == torch.bfloat16
        assert one.isfinite().all()
        assert torch.corrcoef(torch.stack([one.float().flatten(), other.flatten()]))[0, 1] > 0.95


def test_the_last_layer_of_the_vision_tower_comes_with_its_norm():
    last, _ = lively(vision_select_layer=-1)
    assert len(last.vision_tower.layers) == 3
    before, processor = lively(vision_select_layer=-2)
    assert len(before.vision_tower.layers) == 2
    assert before.vision_tower.norm is None
    images = collate(examples(processor, [2])).images
    out = last.vision_tower(images.views_N3SS.double(), None)
    assert out.mean(-1).abs().max() < 1e-6, "normalised"
    assert forward(last, examples(processor, [2]))[0].isfinite().all()


@pytest.mark.parametrize("layer", [0, 1, 3, -4])
def test_a_layer_of_the_vision_tower_that_is_not_there_is_an_error(layer):
    with pytest.raises(ValueError, match=f"vision_select_layer: {layer}; the tower has 3 layers: -3 to -1"):
        lively(vision_select_layer=layer)


def test_pixels_are_scaled_to_minus_one_to_one():
    model, _ = lively()
    seen = []
    model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    views = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    model.encode_views(views, torch.zeros(1, 6, 16, dtype=torch.bool))
    assert torch.allclose(seen[0][0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0], dtype=torch.float64))


def test_two_by_two_patches_become_a_token_the_lower_right_last():
    patches = torch.arange(16).reshape(1, 16, 1)
    tokens = pixel_unshuffle(patches, 4)
    assert tokens[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_prompts_of_overlapping_regions_add_up_in_every_view():
    model, _ = lively()
    seen = []
    model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    prompts = torch.zeros(2, 6, 16, dtype=torch.bool)
    prompts[0, 1, 3] = prompts[0, 4, 3] = prompts[1, 4, 0] = True
    model.encode_views(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), prompts)
    weight = model.region_prompts.weight
    assert torch.allclose(seen[0][0, 3], weight[1] + weight[4])
    assert torch.allclose(seen[0][1, 0], weight[4])
    assert seen[0].abs().sum(-1).count_nonzero() == 2


def test_moving_a_batch_leaves_what_decides_about_shapes_on_the_cpu():
    _, processor = lively()
    batch = collate(examples(processor, [2])).to("meta")
    images = batch.images
    assert {images.grids_I2.device.type, images.image_R.device.type} == {"cpu"}
    others = [images.views_N3SS, images.prompts_NPQ, images.boxes_R4, *batch.tokens()[:2]]
    assert {part.device.type for part in [*others, *batch.tokens().roles]} == {"meta"}
    assert isinstance(batch.images, Images)


def test_an_untrained_model_starts_at_the_scales_of_its_config():
    config = tiny_config(byte_tokenizer(), region_prompt_std=0.05, position_std=0.7)
    model = PerceptionDLM(config)
    positions = model.vision_tower.embeddings.position_embedding.weight
    assert 0.03 < float(model.region_prompts.weight.std()) < 0.07
    assert 0.6 < float(positions.std()) < 0.8
    default = PerceptionDLM(tiny_config(byte_tokenizer()))
    assert 0.7 < float(default.region_prompts.weight.std()) < 1.3
    width = config.vision_config.hidden_size
    assert float(default.vision_tower.embeddings.position_embedding.weight.std()) == pytest.approx(
        width**-0.5, rel=0.2
    )


def test_pixels_are_scaled_in_float32_and_rounded_once():
    model, _ = tiny_model(dtype=torch.bfloat16)
    side, seen = model.config.tile_px, []
    model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    views = torch.arange(256, dtype=torch.uint8).repeat(side * side * 3 // 256).view(1, 3, side, side)
    with torch.no_grad():
        model.encode_views(views, torch.zeros(1, 6, (side // 16) ** 2, dtype=torch.bool))
    assert torch.equal(seen[0], ((views.float() / 255 - 0.5) / 0.5).bfloat16())
