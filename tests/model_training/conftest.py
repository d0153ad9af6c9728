"""What the tests of the model share: one thread, and corpora of the toy world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model_training.toy_corpus import write_corpus, write_merged


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """So that a tiny model does not wait for cores that others use."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A corpus of sixty scenes, committed."""
    return write_corpus(tmp_path_factory.mktemp("toy") / "world")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A corpus of twelve scenes, committed and merged."""
    return write_merged(tmp_path_factory.mktemp("toy") / "world", 12)
