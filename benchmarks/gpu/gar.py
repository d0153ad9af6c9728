"""GAR at the published 8B shapes without an engine: its vision tower, and a prefill of its language model.

Together they bound what any engine can reach: a region's prompt is some 2,700 tokens, its answer about 100,
so captions per GPU-hour are a matter of the prefill. The prefill here is transformers' Llama on a batch of
embedded prompts. Weights are random and made on the device.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import Call, Machine, fill, forget_peak, median_s, peak_gb
from benchmarks.gpu.parts import PIPELINE, Part, missing
from benchmarks.gpu.rows import Measured, Rows, free
from tests.tiny.gar import FULL, Sizes, write_gar

TILES, PATCHES = 8, 32 * 32
"""Tiles of a photo at most, without the thumbnail; patches of a tile of 448 pixels."""

PROMPT = (TILES + 2) * PATCHES // 4 + 100
"""Tokens of the longest prompt: tiles, thumbnail, replayed region, and text."""


def run(rows: Rows, machine: Machine) -> None:
    """The tower, then the prefill."""
    sizes = sizes_of(machine)
    lacking = missing(Part("", "", 0, PIPELINE[:-1]))
    if lacking:
        rows.skip("vision tower", f"missing package: {', '.join(lacking)}")
    else:
        rows.measure("vision tower", lambda: _tower(machine, sizes), needs_s=5)
        free()
    rows.measure("prefill of the language model", lambda: _prefill(machine, sizes), needs_s=5)


def sizes_of(machine: Machine) -> Sizes:
    """Of GAR-8B, or tiny ones."""
    return Sizes(vocab=512) if machine.tiny else FULL["8b"]


def write(folder: Path, machine: Machine) -> Path:
    """A checkpoint of GAR-8B in the published layout, whose weights are still to be drawn on the device."""
    dtype = str(machine.dtype).removeprefix("torch.")
    return write_gar(
        folder, "8b", max_tiles=TILES, dtype=dtype, sizes=sizes_of(machine)._replace(vocab=0), hollow=True
    )


def _tower(machine: Machine, sizes: Sizes) -> Measured:
    from paracaption.pipeline.models.gar import checkpoint
    from paracaption.pipeline.models.gar.vision import load_vision

    with tempfile.TemporaryDirectory() as folder:
        config = checkpoint.read_config(write(Path(folder) / "GAR-8B", machine))
        vision = load_vision(config, machine.dtype, machine.device.type)
    fill(vision)
    tiles = 2 if machine.tiny else 32
    side = config.tile_px
    pixels = torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8, device=machine.device)
    masks = torch.rand(tiles, side, side, device=machine.device) > 0.5
    forget_peak(machine.device)
    seconds = median_s(lambda: vision(pixels, masks), machine.device, times=3 if machine.tiny else 10)
    numbers: dict[str, Any] = {
        "tiles": tiles,
        "tiles_per_s": tiles / seconds,
        "ms_per_tile": 1000 * seconds / tiles,
    }
    numbers["peak_gb"] = peak_gb(machine.device)
    num_bytes = sum(each.numel() * each.element_size() for each in vision.parameters())
    roofline = machine.roofline([Call(tiles * tower_flop(sizes), num_bytes)], seconds)
    return Measured(f"{tiles / seconds:,.1f} tiles/s", numbers, roofline)


def _prefill(machine: Machine, sizes: Sizes) -> Measured:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=11_520,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(machine.dtype)
    try:
        with machine.device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    prompts, length = (1, 64) if machine.tiny else (4, PROMPT)
    embeds = torch.randn(prompts, length, sizes.hidden, device=machine.device, dtype=machine.dtype) * 0.02

    @torch.inference_mode()
    def prefill() -> torch.Tensor:
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, -1])

    forget_peak(machine.device)
    seconds = median_s(prefill, machine.device, times=3 if machine.tiny else 5)
    flop = prefill_flop(sizes, length)
    peaks = machine.published or machine.measured
    numbers = {
        "prompts": prompts,
        "prompt_tokens": length,
        "tokens_per_s": prompts * length / seconds,
        "regions_per_gpu_hour": 3600 * prompts / seconds,
        "regions_per_gpu_hour_at_the_prefill_limit": 3600 * peaks.flops / flop,
        "peak_gb": peak_gb(machine.device),
    }
    num_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
    roofline = machine.roofline([Call(prompts * flop, num_bytes)], seconds)
    hourly = numbers["regions_per_gpu_hour"]
    return Measured(
        f"{hourly:,.0f} regions a GPU-hour, {roofline['share']:.0%} of the limit", numbers, roofline
    )


def tower_flop(sizes: Sizes, patches: int = PATCHES) -> float:
    """Operations of a tile's way through tower and projector."""
    width = sizes.width
    layer = 2 * patches * width * (4 * width + 2 * sizes.vision_inner) + 4 * patches**2 * width
    embed = 2 * patches * width * 2 * 3 * 14 * 14  # pixels and masks
    project = 2 * patches * sizes.hidden * (width + sizes.hidden)
    return sizes.depth * layer + embed + project


def prefill_flop(sizes: Sizes, length: int) -> float:
    """Operations of a prompt's way through the language model, with logits at its end."""
    attention = 2 * length**2 * sizes.heads * sizes.head_dim  # causal: half the pairs
    return length * token_flop(sizes) + sizes.layers * attention + 2 * sizes.vocab * sizes.hidden


def token_flop(sizes: Sizes) -> float:
    """Operations of the products of a token's way through all layers."""
    return 2 * layer_weights(sizes)


def layer_weights(sizes: Sizes) -> int:
    """Numbers in the matrices of all layers of the language model."""
    heads = 2 * sizes.heads * sizes.head_dim + 2 * sizes.kv_heads * sizes.head_dim
    return sizes.layers * sizes.hidden * (heads + 3 * sizes.inner)
