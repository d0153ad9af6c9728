"""SAM 3 at its published size: the image encoder alone, then the segmenter `sam3` with its phrases and masks.

Weights are random and made on the device. The encoder's row needs nothing but torch and transformers; its
floor counts the products of its layers. The segmenter's row has the same floor, so its share says how much of
a photo's time is the encoder's arithmetic.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.machine import Call, Machine, fill, forget_peak, median_s, peak_gb
from benchmarks.gpu.parts import PIPELINE, Part, missing
from benchmarks.gpu.rows import Measured, Rows, free

PHRASES = ["cat", "dog", "person", "red car", "tree", "wooden table", "cup", "street lamp"]
REGIONS, INSTANCES = 16, 3
NEEDS = (*PIPELINE, "torchvision")


def run(rows: Rows, machine: Machine) -> None:
    """The encoder, then the segmenter where its packages are."""
    flop: list[float] = []
    rows.measure("image encoder", lambda: _encoder(machine, flop), needs_s=5)
    free()
    name = f"segmenter, {REGIONS} regions of {len(PHRASES)} phrases"
    lacking = missing(Part("", "", 0, NEEDS))
    if lacking:
        rows.skip(name, f"missing package: {', '.join(lacking)}")
    elif not flop:
        rows.skip(name, "the image encoder did not run")
    else:
        rows.measure(name, lambda: _segmenter(machine, flop[0]), needs_s=8)


def _model(machine: Machine) -> Any:
    from transformers import Sam3Config, Sam3Model

    from tests.tiny.sam import sam3_shapes

    config = Sam3Config(**(sam3_shapes(512) if machine.tiny else {}))
    with machine.device:
        model = Sam3Model(config).eval().requires_grad_(False)
    return model


def _encoder(machine: Machine, flop: list[float]) -> Measured:
    model: Any = _model(machine)
    side = model.config.vision_config.backbone_config.image_size
    pixels = torch.randn(1, 3, side, side, device=machine.device)
    autocast = torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.device.type == "cuda")

    @torch.inference_mode()
    def encode() -> Any:
        with autocast:
            return model.get_vision_features(pixels)

    with FlopCounterMode(display=False) as counter:
        encode()
    flop.append(float(counter.get_total_flops()))
    forget_peak(machine.device)
    seconds = median_s(encode, machine.device, times=3 if machine.tiny else 10)
    numbers = {
        "ms_per_photo": 1000 * seconds,
        "photos_per_s": 1 / seconds,
        "tflop": flop[0] / 1e12,
        "encoder_millions": sum(each.numel() for each in model.vision_encoder.parameters()) / 1e6,
        "peak_gb": peak_gb(machine.device),
    }
    return Measured(f"{1000 * seconds:.1f} ms a photo", numbers, machine.roofline([Call(flop[0])], seconds))


def _segmenter(machine: Machine, flop: float) -> Measured:
    import msgspec
    import numpy as np

    from paracaption.pipeline.models.sam3 import Sam3Segmenter
    from tests.tiny.sam import write_sam3

    with tempfile.TemporaryDirectory() as folder:
        model = write_sam3(Path(folder), published=not machine.tiny, hollow=True)
        segmenter = Sam3Segmenter(model=str(model), device=machine.device.type, threshold=0.0)
    fill(segmenter.model)
    height, width = (120, 160) if machine.tiny else (480, 640)
    random = np.random.default_rng(0)
    photo = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
    phrases = [PHRASES[number % len(PHRASES)] for number in range(REGIONS)]
    boxes = np.tile(np.float32([0, 0, width, height]), (REGIONS, 1))
    scores = sorted(found.score for found in segmenter.segment(photo, PHRASES[:1], boxes[:1])[0])
    if len(scores) > INSTANCES:  # a phrase finds about as many objects as with a trained model
        threshold = min(scores[-INSTANCES - 1], 0.99)
        segmenter.options = msgspec.structs.replace(segmenter.options, threshold=threshold)
    forget_peak(machine.device)
    seconds = median_s(lambda: segmenter.segment(photo, phrases, boxes), machine.device, times=3)
    numbers = {
        "ms_per_photo": 1000 * seconds,
        "ms_per_region": 1000 * seconds / REGIONS,
        "regions_per_gpu_hour": 3600 * REGIONS / seconds,
        "peak_gb": peak_gb(machine.device),
    }
    headline = f"{1000 * seconds:.0f} ms a photo, {1000 * seconds / REGIONS:.1f} ms a region"
    return Measured(headline, numbers, machine.roofline([Call(flop)], seconds))
