"""What tells one captioner's answers from another's stays what it was in release 0.1."""

import pytest

from paracaption.model_training.decoding import sampler
from paracaption.model_training.evaluation import captioners
from paracaption.model_training.evaluation.annotations import read_benchmark
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import ConfigError
from tests.model_training.benchmark_files import write_bench
from tests.tiny.perceptiondlm_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner") / "model"
    write_model(folder)
    return folder


def identity(model, **decode):
    return captioners.identity(Backend(name="perceptiondlm", options={"model": str(model), "decode": decode}))


def test_the_decoders_options_are_identified_by_their_names_and_numbers_of_release_0_1(model):
    found = identity(model, max_new_tokens=12, temperature=1, top_p=1.0)
    assert {name: found[name] for name in ("length", "temperature", "top_p", "regions_per_call")} == {
        "length": "12",
        "temperature": "1",
        "top_p": "1.0",
        "regions_per_call": "None",
    }
    assert "max_new_tokens" not in found and "compare" not in found


def test_an_unknown_option_of_the_decoder_is_an_error_that_says_where(model):
    with pytest.raises(ConfigError, match=r"captioner.options.decode: beams: unknown key; the keys are"):
        identity(model, beams=3)


def test_regions_that_are_captioned_one_by_one_are_decoded_one_by_one(model, tmp_path, monkeypatch):
    batches = []
    real = sampler.decode_batch

    def decode(network, batch, options):
        batches.append(len(batch.prefix.ids_BL))
        return real(network, batch, options)

    monkeypatch.setattr(sampler, "decode_batch", decode)
    options = {"model": str(model), "regions_per_call": 1, "decode": {"max_new_tokens": 4, "steps": 2}}
    captioner = captioners.load_captioner(Backend(name="perceptiondlm", options=options))
    image = read_benchmark(write_bench(tmp_path / "bench"), "paradlc").images[0]
    assert len(captioner.caption(image).texts) == 2
    assert batches == [1, 1]
