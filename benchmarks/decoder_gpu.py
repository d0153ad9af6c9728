"""The published 8B shapes on a GPU: seconds an image by regions, images a second by batch, against the floor.

Random weights in bfloat16, corrected layout, cache `exact`, FlexAttention; plain and compiled. The floor is
the larger of two: the arithmetic over the rate of a plain product, the weights' bytes over that of a copy.

    python -m benchmarks.decoder_gpu              # needs a GPU with 40 GB
    python -m benchmarks.decoder_gpu --mid-size   # the mid size, on whatever there is: shows that it runs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.decoder import LENGTH, SPECIAL, TEXT, VISION, measure, scene
from model_training.config import PerceptionDLMConfig
from model_training.decode import DecodeOptions
from model_training.model import PerceptionDLM


def build(mid_size: bool, device: torch.device) -> PerceptionDLM:
    """Random weights on the device."""
    sizes = {"vision_config": VISION, "text_config": TEXT | {"vocab_size": 8192}} if mid_size else {}
    config = PerceptionDLMConfig(**sizes, **SPECIAL)
    config._attn_implementation = "flex_attention" if device.type == "cuda" else "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return PerceptionDLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def best_s(function: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Seconds of the best of some runs, after one to warm up."""
    function()
    found = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a plain product, bytes a second of a plain copy."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_s = best_s(lambda: left @ right, device)
    source = torch.empty(side * side * 4, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_s = best_s(lambda: target.copy_(source), device)
    return 2 * side**3 / product_s, 2 * source.numel() * source.element_size() / copy_s


def row(model: PerceptionDLM, images: int, regions: int, steps: int, rate: tuple[float, float]) -> str:
    """One decode, the second of two: the first compiles and warms up."""
    batch = scene(model, images, regions)
    options = DecodeOptions(length=LENGTH, steps=steps, suppress_special=False)
    measure(model, batch, options)
    found = measure(model, batch, options)
    passes = found.forwards / images
    weights = sum(p.numel() * p.element_size() for p in model.language_model.layers.parameters())
    floor_s = max(sum(found.flop.values()) / rate[0], passes * weights / rate[1])
    peak = torch.cuda.max_memory_allocated() / 1e9 if model.device.type == "cuda" else float("nan")
    return (
        f"| {images} | {regions} | {steps} | {found.seconds / images:.3f} | {images / found.seconds:.2f} | "
        f"{len(found.tokens) / found.forwards:.1f} | {floor_s / images:.3f} | {peak:.1f} |"
    )


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mid-size", action="store_true")
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    if not arguments.mid_size and not torch.cuda.is_available():
        print("no GPU here; --mid-size runs the same on whatever there is")
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(arguments.mid_size, device)
    rate = rates(device, model.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {rate[0] / 1e12:.1f} TFLOP/s, {rate[1] / 1e9:.0f} GB/s")
    sweep = [(1, regions) for regions in range(1, 7)] + [(images, 6) for images in (2, 4, 8, 16)]
    for compiled in (False, True) if device.type == "cuda" else (False,):
        if compiled:
            model.language_model.compile(dynamic=True)
        print(f"\n{'compiled' if compiled else 'plain'}")
        print("| images | regions | steps | s/image | images/s | tokens/forward | floor s/image | peak GB |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for images, regions in sweep[:8] if device.type == "cpu" else sweep:
            print(row(model, images, regions, arguments.steps, rate), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
