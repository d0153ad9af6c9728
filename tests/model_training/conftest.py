"""What the tests of the model share: one thread, and corpora of the toy world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paracaption.model_training.decoding import loop
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


@pytest.fixture
def end_memory(monkeypatch) -> Callable[[], list[int]]:
    """A function from whose call on memory runs out: after two steps, of more than one row at once.

    It returns the list that gets the number of open rows of each step.
    """

    def begin() -> list[int]:
        launch, sizes = loop.Loop.launch, []

        def short_of_memory(decoding):
            sizes.append(int(decoding.open_RN.any(1).sum()))
            if sizes[-1] > 1 and len(sizes) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            launch(decoding)

        monkeypatch.setattr(loop.Loop, "launch", short_of_memory)
        return sizes

    return begin
