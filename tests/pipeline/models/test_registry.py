"""Backends are found by their name."""

from paracaption.model_training.toy.world import TruthCaptioner
from paracaption.pipeline.models.registry import find_backend
from paracaption.schemas.config import Backend


def test_a_toy_captioner_of_an_old_configuration_is_found_under_its_old_name():
    old = Backend(name="model_training.toy:TruthCaptioner")
    assert find_backend("captioner", old) is TruthCaptioner
