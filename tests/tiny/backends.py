"""The three GPU models of a build as tiny random checkpoints, and the configuration that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ACCEPT_ALL = {
    "min_iou": 0.0,
    "min_verdict_margin": -1e9,
    "text": {
        "min_words": 0,
        "max_words": 10_000,
        "min_chars": 0,
        "max_chars": 100_000,
        "min_letter_share": 0.0,
        "min_content_words": 0,
        "max_repeat_share": 1.0,
        "max_phrase_loops": 10_000,
        "max_loop_words": 10_000,
        "max_copied_words": 10_000,
        "max_doubled": 10_000,
        "max_list_items": 10_000,
        "max_same_sentence": 10_000,
    },
}
"""Thresholds of a configuration under which whatever a model says is kept."""


def limit_to_words(checkpoint: Path) -> None:
    """Zero what the language model's head has for tokens that are not a space and letters.

    Greedily it then says words. Else nearly every caption holds a broken character, which the text rules drop
    whatever the thresholds.
    """
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for path in sorted(checkpoint.glob("*.safetensors")):
        weights = load_file(path)
        heads = [name for name in weights if name.endswith("lm_head.weight")]
        tied = [name for name in weights if name.endswith("language_model.embed_tokens.weight")]
        for name in heads or tied:
            for token in range(len(weights[name])):
                text = tokenizer.decode([token])
                if not (text.startswith(" ") and text.isascii() and text[1:].isalpha()):
                    weights[name][token] = 0
        save_file(weights, path, metadata={"format": "pt"})


def write_backends(folder: Path, *, own_process: bool = False, max_tokens: int = 24) -> dict[str, Any]:
    """Write the checkpoints of `gar`, of `vllm`'s judge and of `sam3`.

    Args:
        folder: checkpoints that are there already are used again.
        own_process: each vLLM engine in a process beside its actor's.
        max_tokens: of a caption.

    Returns:
        The sections `captioner`, `judge` and `segmenter` of a `BuildConfig`. Their actors ask for different
        shares of a CPU, so each model has its own, as on GPUs.
    """
    from tests.tiny.gar import write_gar
    from tests.tiny.qwen3 import write_qwen3
    from tests.tiny.sam import write_sam3

    paths = {}
    for name, write in (
        ("gar", lambda path: write_gar(path, tile_px=56)),
        ("qwen3", write_qwen3),
        ("sam3", write_sam3),
    ):
        paths[name] = folder / name
        if not paths[name].exists():
            write(paths[name])
            if name == "gar":
                limit_to_words(paths[name])
    on_cpu = {"enforce_eager": True, "dtype": "float32"}
    captioner = {
        "model": str(paths["gar"]),
        "max_tokens": max_tokens,
        "max_in_flight": 32,
        "engine": {"own_process": own_process},
    }
    judge = {
        "model": str(paths["qwen3"]),
        "max_in_flight": 64,
        "own_process": own_process,
        "engine": {**on_cpu, "max_num_seqs": 64},
    }
    segmenter = {"model": str(paths["sam3"]), "threshold": 0.0}
    return {
        "captioner": {"name": "gar", "num_cpus": 0.31, "options": captioner},
        "judge": {"name": "vllm", "num_cpus": 0.32, "options": judge},
        "segmenter": {"name": "sam3", "num_cpus": 0.33, "options": segmenter},
    }
