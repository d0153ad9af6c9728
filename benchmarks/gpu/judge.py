"""Qwen3-8B as the judge `vllm` runs it: captions in, verdicts in the schema out of vLLM.

Captions of 20 to 60 words, eight to a category. Weights are random, drawn by vLLM on the device. The prefix
cache holds the instructions, so the floor counts the tokens that it did not have.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.gar_vllm import dummy_engine
from benchmarks.gpu.machine import Call, Machine, forget_peak, peak_gb, seconds_of
from benchmarks.gpu.rows import Measured, Rows
from benchmarks.words import captions
from tests.tiny.qwen3 import write_qwen3

IN_FLIGHT = 512


def run(rows: Rows, machine: Machine) -> None:
    """Start the engine once, then ask more and more."""
    with tempfile.TemporaryDirectory() as folder:
        start_s, judge = seconds_of(lambda: start(Path(folder), machine), machine.device)
        judge.ask(_questions(0, 4))  # warm
        for seed, number in enumerate((16,) if machine.tiny else (256, 2048), start=1):
            rows.measure(
                f"{number:,} verdicts",
                lambda seed=seed, number=number: _ask(judge, seed, number, machine, start_s),
                needs_s=number / 150,
            )
        judge.close()


def start(folder: Path, machine: Machine) -> Any:
    """The judge, with random weights."""
    from paracaption.pipeline.models.vllm_judge import VllmJudge

    model = write_qwen3(folder / "Qwen3-8B", published=not machine.tiny)
    dtype = str(machine.dtype).removeprefix("torch.")
    engine: dict[str, Any] = {"enforce_eager": True, "dtype": dtype, "max_num_seqs": IN_FLIGHT}
    if machine.device.type == "cpu":
        engine |= {"max_num_seqs": 64, "block_size": 32}
    with dummy_engine():
        return VllmJudge(model=str(model), max_in_flight=IN_FLIGHT, engine=engine)


def _questions(seed: int, number: int) -> list[Any]:
    from paracaption.pipeline.models.protocols import Question

    categories = itertools.cycle(["cat", "dog", "bench", "traffic light"])
    words = itertools.islice(captions(str(seed)), number)
    return [Question("verify", text, category) for text, category in zip(words, categories, strict=False)]


def _ask(judge: Any, seed: int, number: int, machine: Machine, start_s: float) -> Measured:
    from paracaption.pipeline.models.protocols import Answer

    questions = _questions(seed, number)
    prompt_tokens = sum(len(judge._prompt_tokens(question)) for question in questions)
    hits, queries = judge.engine.prefix_cache()
    forget_peak(machine.device)
    seconds, answers = seconds_of(lambda: judge.ask(questions), machine.device)
    after_hits, after_queries = judge.engine.prefix_cache()
    cached = (after_hits - hits) / max(1, after_queries - queries)
    config = judge.engine.engine.model_config.hf_config
    fresh = prompt_tokens * (1 - cached) + number
    numbers = {
        "verdicts": number,
        "verdicts_per_s": number / seconds,
        "verdicts_per_gpu_hour": 3600 * number / seconds,
        "inside_the_schema": sum(isinstance(answer, Answer) for answer in answers),
        "prompt_tokens": prompt_tokens,
        "prefix_cache_share": cached,
        "start_s": start_s,
        "peak_gb": peak_gb(machine.device),
    }
    weights = layer_weights(config)
    head = config.vocab_size * config.hidden_size
    flop = 2 * weights * fresh + 2 * head * number
    passes = number / IN_FLIGHT
    roofline = machine.roofline([Call(flop, 2 * passes * (weights + head))], seconds)
    return Measured(f"{number / seconds:,.0f} verdicts/s", numbers, roofline)


def layer_weights(config: Any) -> int:
    """Numbers in the matrices of all layers."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return (
        config.num_hidden_layers
        * config.hidden_size
        * (heads * config.head_dim + 3 * config.intermediate_size)
    )
