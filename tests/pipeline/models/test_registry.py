"""Backends are found by their name."""

import pytest

from paracaption.model_training.toy.world import TruthCaptioner
from paracaption.pipeline.models.registry import find_backend, options_of
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import ConfigError


def test_a_toy_captioner_of_an_old_configuration_is_found_under_its_old_name():
    old = Backend(name="model_training.toy:TruthCaptioner")
    assert find_backend("captioner", old) is TruthCaptioner


@pytest.mark.parametrize("url", ["https://example.org/gar", "s3://bucket/gar"])
def test_a_model_at_a_url_is_refused_with_the_url_as_it_was_given(url):
    with pytest.raises(ConfigError, match=f"gar: options.model: {url} is a URL; download the model"):
        options_of(Backend(name="gar", options={"model": url}))
    assert options_of(Backend(name="openai", options={"model": url})) == {"model": url}
