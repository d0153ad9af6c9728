"""The recorded numbers of the original at tiny size: its checkpoint as our model, its cases as batches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model_training.attention import HIDDEN
from model_training.batch import Batch
from model_training.config import PerceptionDLMConfig
from model_training.model import PerceptionDLM
from tests.shared_data import shared_data

IMAGE, MASK, EOT, FIRST_RESERVED, FIRST_CAPTION = 278, 261, 260, 262, 281


def golden() -> Path:
    """Folder of the recorded numbers; skips the test where it is absent."""
    return shared_data("../golden/perceptiondlm")


def tensors(case: str) -> dict[str, Tensor]:
    return load_file(golden() / f"case_{case}" / "tensors.safetensors")


RENAMED = (
    ("vision_model.vision_model.embeddings.", "vision.embeddings."),
    ("vision_model.vision_model.encoder.layers.", "vision.layers."),
    ("vision_abstractor.projection.", "projector."),
    ("language_model.model.", "language."),
    ("language_model.lm_head.", "lm_head."),
    ("mask_id_embedding.", "prompt_embedding."),
)


def config(**changes: object) -> PerceptionDLMConfig:
    """The recorded checkpoint's sizes, in its layout unless changed."""
    given = json.loads((golden() / "checkpoint" / "config.json").read_text())
    vision = given["vision_model_config"]["vision_config"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    text = given["language_model_config"]
    return PerceptionDLMConfig(
        **{
            "vision_config": {name: vision[name] for name in names},
            "text_config": {
                "vocab_size": text["vocab_size"],
                "hidden_size": text["hidden_size"],
                "intermediate_size": text["intermediate_size"],
                "num_hidden_layers": text["num_hidden_layers"],
                "num_attention_heads": text["num_attention_heads"],
                "num_key_value_heads": text["num_key_value_heads"],
            },
            "layout": "reference",
            "mask_token_id": MASK,
            "eot_token_id": EOT,
            **changes,
        }
    )


def model(**changes: object) -> PerceptionDLM:
    """The recorded weights in our model."""
    made = PerceptionDLM(config(**changes)).eval()
    kept = {}
    for name, value in load_file(golden() / "checkpoint" / "model.safetensors").items():
        for theirs, ours in RENAMED:
            if name.startswith(theirs):
                kept[ours + name.removeprefix(theirs)] = value
    unused = re.compile(rf"vision\.layers\.{len(made.vision.layers)}\.")
    made.load_state_dict({name: value for name, value in kept.items() if not unused.match(name)})
    return made


def batch(case: dict[str, Tensor]) -> Batch:
    """A recorded case as the model takes it, from the recorded arrays."""
    ids_L, spans = case["input_ids_after"][0], case["reserved_spans"].tolist()
    n = len(spans)
    captions = [int((ids_L == FIRST_CAPTION + i).nonzero()[0]) for i in range(n)]
    region_ids_L = torch.zeros_like(ids_L)
    region_ids_L[spans[0][1] : spans[-1][2]] = HIDDEN
    for i, (_, first, end) in enumerate(spans):
        region_ids_L[first:end] = -(i + 1)
        region_ids_L[captions[i] : captions[i + 1] if i + 1 < n else None] = i + 1
    slots = case["slot_positions"]
    active_TPn = case["active_patches"].flatten(2).permute(1, 2, 0)
    return Batch(
        pixels_TCSS=case["pixel_values"],
        prompts_TPK=torch.nn.functional.pad(active_TPn, (0, 6 - n)),
        grids=((int(case["aspect_ratio_wh"][0, 0]), int(case["aspect_ratio_wh"][0, 1])),),
        regions=(n,),
        boxes_N4=case["bboxes_xyxy"].float(),
        input_ids_BL=ids_L[None],
        region_ids_BL=region_ids_L[None],
        documents_BL=torch.zeros_like(ids_L)[None],
        positions_BL=case["position_ids"],
        image_at_I=(ids_L == IMAGE).nonzero()[:, 0],
        replay_at_R=torch.cat([torch.arange(first, end) for _, first, end in spans]),
        slots_BS=slots[None],
        slot_regions_BS=torch.arange(n).repeat_interleave(len(slots) // n)[None],
        origins=tuple((0, i) for i in range(n)),
    )
