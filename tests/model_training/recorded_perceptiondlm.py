"""What was recorded from PerceptionDLM's released code, and our model with the same weights."""

import json
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from paracaption.model_training.model.batch import Example, collate
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from tests.shared_data import recorded


class Golden(NamedTuple):
    """One recorded case; the masks are in the caller's order."""

    numbers: dict[str, Tensor]
    meta: dict[str, Any]
    pixels: np.ndarray
    masks: list[np.ndarray]


@lru_cache(None)
def golden(case: str) -> Golden:
    """Case a, b or c; "train" has the image and masks of b."""
    root = recorded("perceptiondlm")
    folder = root / ("case_b" if case == "train" else f"case_{case}")
    pixels = np.array(Image.open(folder / "image.png").convert("RGB"))
    size = (pixels.shape[1], pixels.shape[0])
    files = sorted(folder.glob("mask_*.png"))
    masks = [np.array(Image.open(f).convert("L").resize(size, Image.Resampling.NEAREST)) > 0 for f in files]
    if case == "train":
        meta = json.loads((root / "train/meta.json").read_text())
        return Golden(load_file(root / "train/tensors.safetensors"), meta, pixels, masks)
    meta = json.loads((root / "meta.json").read_text())["cases"][case]
    return Golden(load_file(folder / "tensors.safetensors"), meta, pixels, masks)


class Ours(NamedTuple):
    """The recorded checkpoint in our layout."""

    model: PerceptionDLM
    processor: PerceptionDLMProcessor

    def with_layout(self, **options: Any) -> "Ours":
        """The same weights in the reference layout with some options set differently."""
        config = type(self.model.config).from_dict({**self.model.config.to_dict(), "layout_options": options})
        model = PerceptionDLM(config).eval()
        model.load_state_dict(self.model.state_dict())
        return Ours(model, PerceptionDLMProcessor(self.processor.tokenizer, config))

    def example(self, which: Golden, slots: int = 8) -> Example:
        return self.processor.make_example(which.pixels, which.masks, slots)


@lru_cache(None)
def forward(ours: Ours, case: str) -> dict[str, Any]:
    """Every intermediate of the first step of a case, by the recorded names where there are such."""
    example = ours.example(golden(case))
    batch = collate([example])
    found: dict[str, Any] = {"example": example, "batch": batch, "tokens": batch.tokens()}

    def note(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        found["vit_layer0_input"] = inputs[0]

    def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
        found["vit_selected_hidden"] = output

    hooks = [
        ours.model.vision_tower.layers[0].register_forward_pre_hook(note),
        ours.model.vision_tower.register_forward_hook(keep),
    ]
    with torch.inference_mode(), RoiAlign() as roi:
        features, replay = ours.model.encode_images(batch.images)
        found |= {"vision_embeds": features, "replay": replay, "roi": roi}
        found["inputs_embeds"] = ours.model.embed(found["tokens"], features, replay)
        found["logits"] = ours.model(found["tokens"], batch.images)
    for hook in hooks:
        hook.remove()
    return found


class RoiAlign:
    """Within it, what the model hands to `roi_align` is kept, in the form that torchvision's takes it."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []
        self.boxes: list[Tensor] = []
        self.scales: list[float] = []

    def __enter__(self) -> "RoiAlign":
        from paracaption.model_training.model import perceptiondlm as model

        self.module, self.original = model, model.roi_align
        model.roi_align = self
        return self

    def __exit__(self, *_: Any) -> None:
        self.module.roi_align = self.original

    def __call__(self, maps: Tensor, boxes: Tensor, which: Tensor, size: int, scale: float) -> Tensor:
        self.maps.append(maps.permute(0, 3, 1, 2))
        self.boxes.append(torch.cat([which[:, None].to(boxes), boxes], dim=1))
        self.scales.append(scale)
        return self.original(maps, boxes, which, size, scale)
