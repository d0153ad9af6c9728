"""Training steps at the published 8B shapes on one GPU: MFU and memory, against what was planned.

Random weights, drawn at start, which takes a minute; scenes of the toy world on large canvases, so that
images have tiles and thumbnails. Through the trainer itself: FSDP2, bfloat16, FlexAttention, compiled and
recomputed layers. A GPU of 80 GB holds the 8.4B weights in float32 (34 GB), not their gradients and moments:
so LoRA is trained, or all but the language model.

    python -m benchmarks.train_gpu               # both, each in a process of its own; a GPU with 80 GB
    python -m benchmarks.train_gpu --small       # small shapes on whatever there is: shows that it runs
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from model_training import journal, toy
from model_training.trainer import fit
from pipeline.config_file import load_config
from schemas.training import TrainConfig

STEPS, WARM = 12, 4
WHAT: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 16}, "learning_rate": {"vision": 0.0, "projector": 4e-5, "prompts": 4e-5}},
    "vision": {"learning_rate": {"language": 0.0}},
}
SMALL = {
    "vision_config": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "image_size": 128, "patch_size": 16},
    "text_config": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 4},
}
BIG = {"text_config": {"vocab_size": 126464}}


def corpus(folder: Path, small: bool) -> Path:
    """Scenes of the toy world, built by `paracaption build`. Returns `out`."""
    side = 256 if small else 1024
    options = toy.Options(canvas=((side, side), (2 * side, side)), unit_px=side / 8)
    config = toy.write_world(folder, 60, 0, options)
    subprocess.run([sys.executable, "-m", "flows.cli", "build", str(config)], check=True, capture_output=True)
    return Path(load_config(config).out)


def run(what: str, small: bool, source: Path, out: Path) -> None:
    """Train some steps and print what the journal says of them."""
    config = TrainConfig.model_validate(
        {
            "out": str(out),
            "model": {"tokenizer": "toy", "config": SMALL if small else BIG},
            "corpora": [{"out": str(source)}],
            "data": {"max_tokens": 1024 if small else 4096, "workers": 2},
            "accumulation": 1,
            "steps": STEPS,
            "checkpoint": {"every": 10_000},
            **WHAT[what],
        }
    )
    fit(config)
    records = journal.read(out)[WARM:]
    middle = {
        name: statistics.median(record[name] for record in records)
        for name in ("seconds", "tokens", "tokens_per_s", "regions_per_s", "mfu", "data_wait", "memory_gb")
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"| {what} | {device} | " + " | ".join(f"{value:.4g}" for value in middle.values()) + " |", flush=True
    )


def main() -> None:
    """Both ways to train, in a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, source, out = args.one
        run(what, args.small, Path(source), Path(out))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = corpus(Path(folder) / "world", args.small)
        print("| trained | device | s a step | tokens | tokens/s | regions/s | MFU | data wait | GB |")
        print("| --- | --- |" + " ---: |" * 7, flush=True)
        for what in WHAT:
            command = [sys.executable, "-m", "benchmarks.train_gpu", *(["--small"] if args.small else [])]
            subprocess.run([*command, "--one", what, source, Path(folder) / what], check=True)


if __name__ == "__main__":
    main()
