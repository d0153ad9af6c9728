"""Tiny SAM and SAM 3, in the files and names that the publishers use, with random weights.

The weights are drawn wide enough that masks have outlines and scores differ; what they mean is nothing.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

SAM3_IMAGE_PX = 112
"""Side of the square that the tiny SAM 3 sees: 8 x 8 patches of 14 pixels, as the published 72 x 72."""


def write_sam(folder: Path, embed_dim: int = 32, depth: int = 2, grid: int = 8, seed: int = 0) -> Path:
    """A tiny `sam_vit_b_01ec64.pth`: a pure state dict, as the publisher saves it.

    Args:
        folder: made if absent.
        embed_dim: width of the image encoder; heads are 16 wide.
        depth: its blocks; the last one attends globally, the others in windows.
        grid: patches of 16 pixels on a side.
        seed: of the weights.

    Returns:
        The file. Its name says `vit_b`, which it is not: a reader that trusts names is wrong.
    """
    import torch

    torch.manual_seed(seed)
    sam = plain_sam(embed_dim, depth, grid)
    _widen(sam, 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sam_vit_b_01ec64.pth"
    torch.save(sam.state_dict(), path)
    return path


def plain_sam(embed_dim: int = 32, depth: int = 2, grid: int = 8) -> Any:
    """The publisher's classes at this size, put together by hand, with whatever weights they start with."""
    import torch
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    return Sam(
        image_encoder=ImageEncoderViT(
            depth=depth,
            embed_dim=embed_dim,
            img_size=16 * grid,
            num_heads=embed_dim // 16,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
            out_chans=32,
            use_rel_pos=True,
            global_attn_indexes=(depth - 1,),
            window_size=3,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=32,
            image_embedding_size=(grid, grid),
            input_image_size=(16 * grid, 16 * grid),
            mask_in_chans=4,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=32,
            transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=8),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=32,
        ),
    )  # fmt: skip


def write_sam3(
    folder: Path, seed: int = 0, detector_only: bool = False, published: bool = False, hollow: bool = False
) -> Path:
    """A tiny `facebook/sam3` folder: configuration and names of a video model, with some of its tracker.

    Args:
        folder: made if absent.
        seed: of the weights.
        detector_only: as `Sam3Model.save_pretrained` writes it, without the video model around it.
        published: the published size, 3.4 GB, for measurements; its weights are as transformers draws them.
        hollow: the weights are zeros that take neither time nor room, see `hollow.py`.

    Returns:
        The folder.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Sam3Config, Sam3Model, Sam3VideoConfig

    from tests.tiny.hollow import write_hollow

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder, 49408 if published else 0)
    config = Sam3Config(**({} if published else sam3_shapes(vocabulary)))
    torch.manual_seed(seed)
    with torch.device("meta" if hollow else "cpu"):
        model: Any = Sam3Model(config).eval()
    if not published and not hollow:
        _widen(model, 0.35)
    with torch.no_grad():  # so that some queries pass a threshold, and masks are not saturated
        model.detr_decoder.presence_head.layer2.bias.fill_(2.0)
        model.mask_decoder.instance_projection.weight.mul_(0.01)
        model.mask_decoder.instance_projection.bias.zero_()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if detector_only:
        config.architectures = ["Sam3Model"]
        config.save_pretrained(folder)
    else:
        whole = Sam3VideoConfig(detector_config=config.to_dict(), architectures=["Sam3VideoModel"])
        whole.save_pretrained(folder)
        tensors = {f"detector_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["tracker_model.no_memory_embedding"] = torch.zeros(1, 1, 32)
        tensors["tracker_neck.fpn_layers.0.proj1.bias"] = torch.zeros(32)
    if hollow:
        write_hollow(folder / "model.safetensors", tensors.items())
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    side_px = 1008 if published else SAM3_IMAGE_PX
    side = {"height": side_px, "width": side_px}
    processor = {
        "image_processor": {
            "image_processor_type": "Sam3ImageProcessorFast",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "size": side,
            "mask_size": {"height": side_px // 14 * 4, "width": side_px // 14 * 4},
        },
        "processor_class": "Sam3VideoProcessor",
        "target_size": side_px,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
    return folder


def sam3_shapes(vocabulary: int) -> dict[str, Any]:
    """The arguments of a tiny `Sam3Config`."""
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    grid = SAM3_IMAGE_PX // 14
    return {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam3_vit_model",
                **small,
                "num_hidden_layers": 2,
                "image_size": SAM3_IMAGE_PX,
                "pretrain_image_size": SAM3_IMAGE_PX // 2,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        },
        "text_config": {
            **small,
            "vocab_size": vocabulary,
            "projection_dim": 16,
            "num_hidden_layers": 2,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
        "geometry_encoder_config": {**small, "num_layers": 1},
        "detr_encoder_config": {**small, "num_layers": 2},
        "detr_decoder_config": {**small, "num_layers": 2, "num_queries": 12},
        "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
    }


def _write_tokenizer(folder: Path, size: int = 0) -> int:
    """CLIP's byte-level tokenizer with two merges, in the published files; returns the vocabulary's size.

    Words that no text has fill it up to `size`.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("c", "a"), ("ca", "t</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += [f"<|filler {number}|>" for number in range(len(words) + 2, size)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=32)  # pyright: ignore
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return len(words)


def _widen(model: Any, spread: float) -> None:
    """Draw every matrix anew with this spread over the root of its fan-in, so that layers hand signals on."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 1.0 if "embed" in name else spread * 4 / weight[0].numel() ** 0.5)


def write_sam3_tracker(folder: Path, seed: int = 0) -> Path:
    """A tiny `facebook/sam3` folder as `write_sam3` makes it, with the whole tracker and its neck."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Sam3TrackerConfig, Sam3TrackerModel, Sam3VideoConfig

    write_sam3(folder, seed)
    config = Sam3VideoConfig.from_pretrained(folder)
    vision = config.detector_config.vision_config.to_dict()
    small = {"hidden_size": 32}
    prompts = {**small, "image_size": SAM3_IMAGE_PX, "mask_input_channels": 4}
    decoder = {**small, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    tracker = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
    whole = Sam3VideoConfig(
        detector_config=config.detector_config.to_dict(),
        tracker_config={**tracker, "image_size": SAM3_IMAGE_PX},
        architectures=["Sam3VideoModel"],
    )
    whole.save_pretrained(folder)
    torch.manual_seed(seed)
    model: Any = Sam3TrackerModel(Sam3TrackerConfig(**tracker)).eval()
    _widen(model, 0.35)
    stored = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name.startswith("vision_encoder.neck."):
            stored[name.replace("vision_encoder.neck.", "tracker_neck.", 1)] = tensor.contiguous().clone()
        elif not name.startswith("vision_encoder."):
            stored[f"tracker_model.{name}"] = tensor.contiguous().clone()
    stored["tracker_model.memory_encoder.projection.bias"] = torch.zeros(8)  # of what only videos need
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
