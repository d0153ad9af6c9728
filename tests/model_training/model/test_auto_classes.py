"""transformers' Auto classes open our folders, and say what to do with one in the published layout."""

import json

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

import paracaption
from paracaption.schemas.errors import ConfigError
from tests.model_training.tiny_models import lively, photo


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    for part in lively():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(ours, tmp_path_factory):
    """Of its layout what is looked at: the type, and code that is offered."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ours / name).read_bytes())
    autos = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "pdmllm", "auto_map": autos}))
    processor = {"auto_map": {"AutoProcessor": "evil.Processor"}, "image_processor_type": "evil"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    return folder


def test_the_auto_classes_open_a_folder_of_ours(ours):
    model = AutoModel.from_pretrained(ours, trust_remote_code=False).eval()
    assert isinstance(model, paracaption.PerceptionDLM)
    processor = AutoProcessor.from_pretrained(ours, trust_remote_code=False)
    assert isinstance(processor, paracaption.PerceptionDLMProcessor)
    captioner = paracaption.RegionCaptioner(model, processor)
    assert len(captioner.caption(*photo(1, 2), max_new_tokens=4, steps=2)) == 2
    again = paracaption.RegionCaptioner.from_pretrained(ours, device="cpu")
    assert again.caption(*photo(1, 2), max_new_tokens=4, steps=2)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoProcessor])
@pytest.mark.parametrize("trusted", [{}, {"trust_remote_code": False}])
def test_the_auto_classes_say_how_a_published_folder_is_converted(published, auto, trusted):
    assert paracaption.PerceptionDLM and paracaption.PerceptionDLMProcessor  # which registers them
    with pytest.raises(ConfigError, match=r"published layout; convert it with `paracaption models convert"):
        auto.from_pretrained(published, **trusted)
    assert AutoConfig.from_pretrained(published, trust_remote_code=False).model_type == "pdmllm"


def test_a_captioner_says_how_a_published_folder_is_converted_and_that_nothing_is_downloaded(published):
    with pytest.raises(ConfigError, match=r"'pdmllm', not 'perceptiondlm'; convert .*`paracaption models"):
        paracaption.RegionCaptioner.from_pretrained(published)
    with pytest.raises(ConfigError, match=r"MSALab-PKU/PerceptionDLM: no such folder; download it"):
        paracaption.RegionCaptioner.from_pretrained("MSALab-PKU/PerceptionDLM")
