"""The captioner `perceptiondlm` of a build: a trained model describes the regions of the next corpus."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from paracaption.filters import rle
from paracaption.model_training.decoding.corpus_captioner import PerceptionDLMCaptioner
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import reader, work_list
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io.photos import read_pixels
from paracaption.pipeline.models import registry
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages.recipes import recipe_digest, recipe_of
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import BadRecord, ConfigError, OutOfMemory
from paracaption.schemas.records import Blob
from tests.building import config_of
from tests.synthetic import write_coconut, write_sa1b
from tests.tiny.perceptiondlm_model import SMALLEST, write_model

DECODE = {"max_new_tokens": 8, "steps": 8, "strategy": "threshold"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", **SMALLEST)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Records of four photos with eight masks each: more than the model has prompts."""
    folder = tmp_path_factory.mktemp("source")
    config = config_of(folder / "out", sa1b=write_sa1b(folder, num_images=4, num_masks=8))
    source = open_source(config, "sa1b")
    planned = work_list.make_work_list(source, config, folder / "out")
    return [source.read(entry, config.limits) for entry in planned.read_unit(0)]


def captioner_of(model, **options) -> PerceptionDLMCaptioner:
    return PerceptionDLMCaptioner(**{"model": str(model), "device": "cpu", "decode": DECODE, **options})


def texts(answers) -> list[list[str]]:
    return [[caption.text for caption in image] for image in answers]


@pytest.fixture(scope="module")
def alone(model, images):
    """What the region captioner says of each photo by itself."""
    captioner = RegionCaptioner.load(model, "cpu")
    return [
        captioner.caption(
            read_pixels(image), [rle.decode(region.rle).astype(bool) for region in image.live()], **DECODE
        )
        for image in images
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.soak
def test_all_regions_of_a_unit_are_captioned_as_each_photo_is_by_itself(model, images, alone, batch_size):
    found = captioner_of(model, batch_size=batch_size).caption(images)
    assert texts(found) == alone
    assert all(0 < caption.confidence <= 1 for image in found for caption in image)
    assert all(image.photo_digest for image in images)


def test_regions_one_by_one_are_what_the_region_captioner_says_one_by_one(model, images):
    found = captioner_of(model, regions_per_call=1).caption(images[:1])
    masks = [rle.decode(region.rle).astype(bool) for region in images[0].live()]
    single = RegionCaptioner.load(model, "cpu").caption(
        read_pixels(images[0]), masks, regions_per_call=1, **DECODE
    )
    assert texts(found) == [single]


def test_a_photo_that_cannot_be_read_costs_its_own_regions_only(model, images, alone, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no photo at all")
    bad = [*images]
    bad[1] = type(images[1])(**{**_fields(images[1]), "photo": Blob(str(tmp_path / "bad.jpg"))})
    found = captioner_of(model).caption(bad)
    assert all(isinstance(caption, BadRecord) for caption in found[1]) and len(found[1]) == len(alone[1])
    assert texts([found[0], *found[2:]]) == [alone[0], *alone[2:]]


def _fields(record) -> dict:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def test_memory_that_runs_out_halves_the_batch_and_changes_no_caption(model, images, alone, monkeypatch):
    captioner = captioner_of(model, batch_size=8)
    whole, sizes = captioner.captioner.iter_captions, []

    def short_of_memory(pairs, *args, batch_size, **options):
        sizes.append(batch_size)
        for number, found in enumerate(whole(pairs, *args, batch_size=batch_size, **options)):
            if batch_size > 2 and number == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield found

    monkeypatch.setattr(captioner.captioner, "iter_captions", short_of_memory)
    assert texts(captioner.caption(images)) == alone
    assert sizes == [8, 4, 2]


def test_a_sequence_that_does_not_fit_alone_is_an_error_that_a_larger_gpu_turns(model, images, monkeypatch):
    captioner = captioner_of(model)

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captioner.captioner, "iter_captions", no_memory)
    with pytest.raises(OutOfMemory, match="a batch of one"):
        captioner.caption(images)


def identity(folder, **options) -> dict[str, str]:
    backend = Backend(name="perceptiondlm", options={"model": str(folder), "decode": DECODE, **options})
    return registry.backend_identity("captioner", backend)


def test_the_identity_covers_weights_and_what_changes_answers_and_nothing_else(model, tmp_path):
    plain = identity(model)
    for same in (
        {"batch_size": 2},
        {"device": "cpu"},
        {"max_pixels": 9},
        {"decode": {**DECODE, "compare": True}},
    ):
        assert identity(model, **same) == plain
    others = [
        identity(write_model(tmp_path / "other", seed=1, **SMALLEST)),
        identity(model, prompt="What is it?"),
        identity(model, regions_per_call=1),
        identity(model, dtype="float16"),
        *(
            identity(model, decode=DECODE | change)
            for change in (
                {"steps": 4},
                {"threshold": 0.5},
                {"strategy": "remask"},
                {"seed": 1},
                {"cache": "approximate"},
                {"cache": "approximate", "refresh_every": 2},
            )
        ),
    ]
    assert len({str(each) for each in [plain, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": {"lenght": 8}}, r"captioner\.options\.decode.*lenght"),
        ({"decode": {"threshold": 2}}, r"captioner\.options\.decode.*threshold"),
        ({"regions_per_call": 0}, r"captioner\.options\.regions_per_call"),
        ({"dtype": "int8"}, r"captioner\.options\.dtype: choose from auto, float32, bfloat16, float16"),
        ({"model": "no/such/folder"}, "no such folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(model, options, message):
    with pytest.raises(ConfigError, match=message):
        identity(model, **options)


def test_a_blank_prompt_is_refused(model):
    with pytest.raises(ConfigError, match="prompt: a blank text"):
        captioner_of(model, prompt=" ")


def test_doctor_learns_what_the_model_is_without_its_weights(model):
    checked = PerceptionDLMCaptioner.check(model=str(model))
    assert checked.what == ("PerceptionDLM: vision 3 x 16, language model 2 x 32, up to 6 regions at once")
    assert checked.weight_bytes == sum(
        each.numel() * each.element_size() for each in RegionCaptioner.load(model, "cpu").model.parameters()
    )


# In a build.


@pytest.fixture
def config(model, tmp_path):
    source = write_coconut(tmp_path / "source", num_images=3)
    values = config_of(tmp_path / "out", coconut=source).model_dump()
    options = {"model": str(model), "device": "cpu", "decode": DECODE}
    values["captioner"] = {"name": "perceptiondlm", "options": options}
    values["text"] = {"min_words": 1, "min_content_words": 0, "min_chars": 1, "max_doubled": 99}
    return load_config(values)


@pytest.mark.soak
def test_the_confidence_is_in_evidence_ledger_and_index_and_decides(config):
    driver.build(config, LocalEngine())
    corpus = reader.open_corpus(config.out)
    rows = [row for table in corpus.ledgers("coconut") for row in table.to_pylist()]
    sure = [row["confidence"] for row in rows if row["caption"]]
    assert sure and all(0 < each <= 1 for each in sure)
    kept = [row["confidence"] for row in rows if row["kept"]]
    assert kept and pq.read_table(f"{config.out}/index.parquet")["confidence"].to_pylist() == kept
    least = float(np.median(kept))
    text = config.text.model_copy(update={"min_confidence": least})
    driver.build(config.model_copy(update={"text": text}), LocalEngine())
    rows = [row for table in reader.open_corpus(config.out).ledgers("coconut") for row in table.to_pylist()]
    assert [row["confidence"] for row in rows if row["kept"]] == [each for each in kept if each >= least]
    assert sum(row["drop_reason"] == "text_unsure" for row in rows) == sum(each < least for each in kept)


def test_another_threshold_of_confidence_is_another_recipe_on_the_same_evidence(config):
    text = config.text.model_copy(update={"min_confidence": 0.5})
    one, other = (recipe_of(each, "coconut") for each in (config, config.model_copy(update={"text": text})))
    assert recipe_digest(one, config) != recipe_digest(other, config)
    assert one[1].evidence_digest == other[1].evidence_digest


def test_a_relative_model_is_seen_from_the_configuration_in_a_build(model, tmp_path):
    (tmp_path / "build.yaml").write_text(
        "out: out\nsubsets: {a: {sources: {source: sa1b, paths: [a.tar]}}}\n"
        "captioner: {name: perceptiondlm, options: {model: some/model}}\n"
    )
    assert load_config(tmp_path / "build.yaml").captioner.options["model"] == str(tmp_path / "some/model")
