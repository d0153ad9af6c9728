"""Models whose weights are elsewhere: offloaded ones caption as whole ones do, absent ones are refused."""

import pytest
import torch

from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.placement import check_placement, fetched
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.schemas.errors import ConfigError
from tests.model_training.tiny_models import photo
from tests.tiny.perceptiondlm_model import tiny_model, write_model

PARTS = ["vision_tower", "projector", "region_prompts", "language_model", "lm_head"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model")


def captions(saved, **options):
    model = PerceptionDLM.from_pretrained(saved, **options)
    captioner = RegionCaptioner(model, PerceptionDLMProcessor.from_pretrained(saved))
    return captioner.caption(*photo(1, 2), max_new_tokens=6, steps=6)


@pytest.mark.parametrize("away", [["lm_head"], ["region_prompts"], ["vision_tower"], PARTS[1:]])
@pytest.mark.soak(keep=2)
def test_captions_are_the_same_with_parts_offloaded_to_disk(saved, tmp_path, away):
    pytest.importorskip("accelerate")
    places = {part: "disk" if part in away else "cpu" for part in PARTS}
    assert captions(saved, device_map=places, offload_folder=str(tmp_path)) == captions(saved)


def test_a_model_whose_weights_were_never_loaded_is_refused():
    model, _ = tiny_model()
    model.lm_head.to("meta")
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not loaded"):
        check_placement(model)
    with pytest.raises(ConfigError, match="not loaded"), fetched(model.lm_head):
        pass


def test_a_model_in_one_place_is_where_it_computes():
    model, _ = tiny_model()
    check_placement(model)
    assert model.device == torch.device("cpu")
    model.region_prompts.to("meta")
    assert model.device == torch.device("cpu")
