"""A model, a configuration and a checkpoint of release 0.1.0 (tests/formats) are taken by this one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from paracaption.model_training.decoding import caption_photo, read_regions
from paracaption.model_training.train import metrics
from paracaption.model_training.train.trainer import fit
from paracaption.pipeline.config_file import load_training
from paracaption.schemas.decoding import DecodeOptions

HERE = Path(__file__).resolve().parents[1] / "formats" / "v0_1"


@pytest.fixture
def home(tmp_path) -> Path:
    return shutil.copytree(HERE, tmp_path / "v0_1")


def test_a_run_goes_on_from_its_checkpoint(home):
    config = load_training(home / "train.yaml")
    cache = config.data.model_copy(update={"cache": str(home / "cache")})
    outcome = fit(config.model_copy(update={"steps": 6, "data": cache}))
    assert outcome.steps == 6
    records = metrics.read(home / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("model", ["model", "run/model"])
def test_a_saved_model_captions_the_corpus(home, model):
    loaded = caption_photo.load(home / model, "cpu", "float32")
    photo = read_regions.read(None, [str(home / "corpus")], "coconut/000000000000")
    answer = caption_photo.describe(loaded, photo, DecodeOptions(max_new_tokens=4, steps=2))
    assert len(answer.captioned.captions) == 4
