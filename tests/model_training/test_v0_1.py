"""A model, a configuration and a checkpoint of release 0.1.0 (tests/formats) are taken by this one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from paracaption.model_training.decoding.caption_photo import caption_regions
from paracaption.model_training.decoding.read_regions import read_photo_regions
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.train import metrics
from paracaption.model_training.train.trainer import fit
from paracaption.pipeline.config_file import load_training
from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.renames import RenamedWarning
from paracaption.schemas.training import TrainConfig

HERE = Path(__file__).resolve().parents[1] / "formats" / "v0_1"


@pytest.fixture
def home(tmp_path) -> Path:
    return shutil.copytree(HERE, tmp_path / "v0_1")


@pytest.mark.filterwarnings("default::paracaption.schemas.renames.RenamedWarning")
@pytest.mark.soak
def test_a_run_goes_on_from_its_checkpoint(home, caplog):
    with pytest.warns(RenamedWarning) as warned:
        config = load_training(home / "train.yaml")
    new = {re.search(r"is now `(\w+)", str(each.message))[1] for each in warned}
    assert new == {
        *("corpus", "gradient_accumulation_steps", "warmup_ratio", "min_lr_ratio", "max_grad_norm"),
        *("ema_decay", "activation_checkpointing", "eps", "loss_weighting"),
    }
    cache = config.data.model_copy(update={"cache": str(home / "cache")})
    outcome = fit(config.model_copy(update={"steps": 6, "data": cache}))
    assert outcome.steps == 6
    records = metrics.read_metrics(home / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert (
        "have changed since the checkpoint: model, corpora, data, steps" in caplog.text
    )  # paths, and no mere name


def test_the_configuration_that_a_run_has_stored_is_read_without_a_warning(home):
    stored = yaml.safe_load((home / "run/config.yaml").read_text())
    config = TrainConfig.from_stored(stored)
    assert (config.gradient_accumulation_steps, config.warmup_ratio, config.min_lr_ratio) == (1, 0.25, 0.1)
    assert (config.max_grad_norm, config.ema_decay, config.activation_checkpointing) == (1.0, 0.9, False)
    assert (config.noise.eps, config.noise.loss_weighting) == (0.01, "1/t")
    assert (config.corpora[0].corpus, config.data.max_new_tokens) == ("/data/v0.1/corpus", 32)


@pytest.mark.parametrize("model", ["model", "run/model"])
def test_a_saved_model_captions_the_corpus(home, model):
    captioner = RegionCaptioner.load(home / model, "cpu", "float32")
    photo = read_photo_regions(None, [str(home / "corpus")], "coconut/000000000000")
    captioned = caption_regions(captioner, photo, DecodeOptions(max_new_tokens=4, steps=2))
    assert len(captioned.found.captions) == 4
