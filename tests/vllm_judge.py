"""The engine that the tests of the judge share: one for the whole session, started when first asked for."""

import gc
from pathlib import Path

import pytest

from paracaption.model_training.evaluation.judges import COMPACT_JSON
from tests.machinery import alone
from tests.tiny.qwen3 import write_qwen3

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 32,
    "block_size": 32,
    "max_model_len": 3072,
    **COMPACT_JSON,
}


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> Path:
    """Its tokenizer has "yes" as one token, spells "no" in two, and begins "agree" and "against" with one."""
    return write_qwen3(tmp_path_factory.mktemp("qwen3"), [("y", "e"), ("ye", "s"), ("a", "g")])


@pytest.fixture(scope="session")
def vllm_judge(qwen3):
    """The judge on that checkpoint, in a real engine in this process."""
    from paracaption.pipeline.models.vllm_judge import VllmJudge

    with alone():
        judge = VllmJudge(model=str(qwen3), engine=ENGINE)
    yield judge
    with pytest.MonkeyPatch.context() as patch:
        # vLLM collects garbage twice for each engine: ten seconds in a process full of modules, at its end
        patch.setattr(gc, "collect", lambda *_: 0)
        judge.close()
