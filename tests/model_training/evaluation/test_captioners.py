"""What tells one captioner's answers from another's stays what it was in release 0.1."""

import numpy as np
import pytest

from paracaption.model_training.decoding import loop
from paracaption.model_training.evaluation import captioners
from paracaption.model_training.evaluation.annotations import read_benchmark
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.schemas.config import Backend
from paracaption.schemas.decoding import AUTO_CACHE
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.evaluation import Bench
from tests.model_training.benchmark_files import write_bench
from tests.tiny.perceptiondlm_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner") / "model"
    write_model(folder)
    return folder


def identity(model, dtype="auto", **decode):
    options = {"model": str(model), "dtype": dtype, "decode": decode}
    return captioners.identity(Backend(name="perceptiondlm", options=options))


def test_the_decoders_options_are_identified_by_their_names_and_numbers_of_release_0_1(model):
    found = identity(model, max_new_tokens=12, temperature=1, top_p=1.0)
    assert {name: found[name] for name in ("length", "temperature", "top_p", "regions_per_call")} == {
        "length": "12",
        "temperature": "1",
        "top_p": "1.0",
        "regions_per_call": "None",
    }
    assert "max_new_tokens" not in found and "compare" not in found


def test_the_identity_tells_apart_what_auto_means_and_is_as_before_where_it_means_the_same(model, tmp_path):
    write_model(tmp_path / "published", layout="reference")
    default = identity(tmp_path / "published")
    assert default["refresh_every"] == "4" and default["auto"] == repr(AUTO_CACHE)
    assert identity(tmp_path / "published", refresh_every=None) == default
    assert identity(tmp_path / "published", refresh_every=8)["auto"] == repr(AUTO_CACHE)
    assert identity(tmp_path / "published", refresh_every=4) != default
    assert identity(tmp_path / "published", refresh_every=4, cache="approximate")["refresh_every"] == "4"
    assert identity(model)["refresh_every"] == "4" and "auto" not in identity(model)


def test_captions_of_two_data_types_have_two_identities_and_auto_is_as_before(model):
    default, *others = (identity(model, dtype) for dtype in ("auto", "float32", "bfloat16"))
    assert "dtype" not in default
    assert [each["dtype"] for each in others] == ["float32", "bfloat16"]
    assert all({**each, "dtype": ""} == {**default, "dtype": ""} for each in others)


def test_an_unknown_option_of_the_decoder_is_an_error_that_says_where(model):
    with pytest.raises(ConfigError, match=r"captioner.options.decode: beams: unknown key; the keys are"):
        identity(model, beams=3)


def test_regions_that_are_captioned_one_by_one_are_decoded_one_by_one(model, tmp_path, monkeypatch):
    batches = []
    real = loop.Loop.admit

    def admit(loop, places, x_APD, prefix, captions, options):
        batches.extend(captions.regions)
        return real(loop, places, x_APD, prefix, captions, options)

    monkeypatch.setattr(loop.Loop, "admit", admit)
    options = {"model": str(model), "regions_per_call": 1, "decode": {"max_new_tokens": 4, "steps": 2}}
    bench = write_bench(tmp_path / "bench")
    asked = Bench(name="b", kind="paradlc", folder=str(bench))
    captioner = captioners.load_captioner(Backend(name="perceptiondlm", options=options), asked)
    image = read_benchmark(bench, "paradlc").images[0]
    assert [len(each.texts) for each in captioner.caption([image])] == [2]
    assert batches == [1, 1]


@pytest.mark.parametrize(
    ("asked", "groups"),
    [
        ({}, [[0, 1, 2, 3, 4, 5], [6]]),
        ({"grouping": "even"}, [[0, 1, 2, 3], [4, 5, 6]]),
        ({"kind": "dlc"}, [[0], [1], [2], [3], [4], [5], [6]]),
    ],
)
def test_seven_regions_are_asked_about_in_the_published_groups_with_the_published_prompt(
    model, monkeypatch, asked, groups
):
    made = []
    real = PerceptionDLMProcessor.make_example

    def make(processor, pixels, masks, *rest, **named):
        made.append(
            ([int(np.flatnonzero(mask.any(0))[0]) // 8 for mask in masks], processor.layout.instruction)
        )
        return real(processor, pixels, masks, *rest, **named)

    monkeypatch.setattr(PerceptionDLMProcessor, "make_example", make)
    bench = Bench(**{"name": "b", "kind": "paradlc", "folder": "unused"} | asked)
    backend = Backend(
        name="perceptiondlm", options={"model": str(model), "decode": {"max_new_tokens": 2, "steps": 1}}
    )
    captioner = captioners.load_captioner(backend, bench)
    list(captioner.caption([_Strips()]))  # pyright: ignore[reportArgumentType]
    assert [regions for regions, _ in made] == groups
    assert {instruction for _, instruction in made} == {"Describe the masked region in detail."}
    assert captioners.how_asked(backend, bench)["grouping"] == bench.grouping


def test_memory_that_runs_out_halves_the_batch_instead_of_ending_the_evaluation(model, tmp_path, end_memory):
    images = read_benchmark(write_bench(tmp_path / "bench", images=6), "paradlc").images
    options = {"model": str(model), "batch_size": 4, "decode": {"max_new_tokens": 4, "steps": 2}}
    asked = Bench(name="b", kind="paradlc", folder="unused")
    captioner = captioners.load_captioner(Backend(name="perceptiondlm", options=options), asked)
    expected = [each.texts for each in captioner.caption(images)]
    sizes = end_memory()
    assert [each.texts for each in captioner.caption(iter(images))] == expected
    assert max(sizes) > 1 and sizes[-1] == 1 and captioner.batches.size == 1


class _Strip:
    def __init__(self, number: int):
        self.number = number

    def dense(self) -> np.ndarray:
        mask = np.zeros((16, 56), bool)
        mask[:, 8 * self.number : 8 * self.number + 8] = True
        return mask


class _Strips:
    """A photo with seven regions side by side."""

    regions = [_Strip(number) for number in range(7)]

    def pixels(self) -> np.ndarray:
        return np.zeros((16, 56, 3), np.uint8)
