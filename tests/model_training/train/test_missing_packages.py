"""A package of training that is not installed is one line that says how to install it."""

import sys

import pytest

from paracaption.model_training.train import build, metrics
from paracaption.pipeline.io.packages import how_to_install
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.training import Lora
from tests.model_training import toy_corpus


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = toy_corpus.config_of(tmp_path, tmp_path / "corpus")
    with pytest.raises(ConfigError) as caught:
        metrics.MetricsLogger(tmp_path / "run", config, 0)
    assert str(caught.value) == f"tensorboard is not installed; {how_to_install('tensorboard')}"


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError) as caught:
        build.add_lora(None, Lora(), 0)
    assert str(caught.value) == f"lora: peft is not installed; {how_to_install('peft')}, or remove `lora`"
