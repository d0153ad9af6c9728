from __future__ import annotations

from pathlib import Path

import pytest
from tests.model_training.golden import golden

from model_training.convert import from_published
from model_training.model import PerceptionDLM
from model_training.processing import PerceptionDLMProcessor


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """The original's tiny checkpoint in our layout."""
    return from_published(golden("checkpoint"), tmp_path_factory.mktemp("golden") / "ours").folder


@pytest.fixture(scope="session")
def golden_model(published) -> PerceptionDLM:
    return PerceptionDLM.from_pretrained(published).eval()


@pytest.fixture(scope="session")
def golden_processor(published) -> PerceptionDLMProcessor:
    return PerceptionDLMProcessor.from_pretrained(published)
