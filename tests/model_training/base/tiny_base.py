"""A tiny PerceptionDLM-Base with LLaDA's real special ids, and photos: the same numbers on every machine.

Everything is drawn from numpy's `RandomState`, whose streams never change, so the answers recorded from it
need no weights beside them. Imports nothing of ours: `record.py` runs it beside the released code.

All words are single bytes, at ids 0 to 255, and nothing is ever made of the ids between those and LLaDA's
special ones. The embedding has as many rows as LLaDA's, since the released code never answers with four ids
that it names by number, and almost all rows are zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROWS = 126_464
WIDTH, INNER, LAYERS, HEADS = 32, 48, 2, 4
TOWER, TOWER_INNER, TOWER_LAYERS, TOWER_HEADS = 16, 24, 3, 2
TILE_PX, PATCH_PX = 32, 8

SPECIALS = {
    "<|startoftext|>": 126_080,
    "<|endoftext|>": 126_081,
    **{f"<|reserved_token_{number}|>": 126_084 + number for number in range(8)},
    "<|mdm_mask|>": 126_336,
    "<|start_header_id|>": 126_346,
    "<|end_header_id|>": 126_347,
    "<|eot_id|>": 126_348,
    "<IMG_CONTEXT>": 126_349,
    "<img>": 126_350,
    "</img>": 126_351,
}
MASK, EOT = SPECIALS["<|mdm_mask|>"], SPECIALS["<|eot_id|>"]

LETTERS = slice(64, 90)
"""a to z."""

NEVER = (126_080, 126_081, 126_346, 126_347, MASK)
"""What the released code never answers. Here these tokens are likely, so that an answer without this rule
differs."""


def photo(seed: int, width: int, height: int) -> Image.Image:
    """A photo of large soft spots."""
    draw = np.random.RandomState(seed)
    small = draw.randint(0, 256, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def write_checkpoint(folder: Path) -> Path:
    """Write the model in the published layout: config.json, tokenizer.json and the tensors that are used."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(), indent=2))
    write_tokenizer(folder)
    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config() -> dict[str, Any]:
    """The model's config.json."""
    language = {
        "_name_or_path": "tiny-llada",
        "model_type": "llada",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": ROWS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": TOWER,
        "intermediate_size": TOWER_INNER,
        "num_hidden_layers": TOWER_LAYERS,
        "num_attention_heads": TOWER_HEADS,
        "image_size": TILE_PX,
        "patch_size": PATCH_PX,
    }
    return {
        "model_type": "dmllm",
        "image_size": TILE_PX,
        "patch_size": PATCH_PX,
        "downsample_ratio": 0.5,
        "vision_select_layer": -2,
        "image_token_id": SPECIALS["<IMG_CONTEXT>"],
        "language_model_config": language,
        "vision_model_config": vision,
        "vision_abstractor_config": {"projection_type": "mlp2x_gelu"},
    }


def write_tokenizer(folder: Path) -> None:
    """Single bytes, and LLaDA's special tokens at their own ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | SPECIALS
    filled = set(vocabulary.values())
    vocabulary |= {f"<{number}>": number for number in range(max(filled)) if number not in filled}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def tensors() -> dict[str, np.ndarray]:
    """Every tensor that an answer depends on, float32, under its published name."""
    draw = np.random.RandomState(24)

    def normal(*shape: int, std: float) -> np.ndarray:
        return (draw.standard_normal(shape) * std).astype(np.float32)

    def linear(
        name: str, out: int, into: int, gain: float = 1.0, bias: bool = False
    ) -> dict[str, np.ndarray]:
        made = {f"{name}.weight": normal(out, into, std=gain / into**0.5)}
        return made | ({f"{name}.bias": normal(out, std=0.1)} if bias else {})

    def norm(name: str, width: int, bias: bool = False) -> dict[str, np.ndarray]:
        made = {f"{name}.weight": 1 + normal(width, std=0.1)}
        return made | ({f"{name}.bias": normal(width, std=0.1)} if bias else {})

    patches = (TILE_PX // PATCH_PX) ** 2
    tower = "vision_model.vision_model."
    found = {
        f"{tower}embeddings.patch_embedding.weight": normal(TOWER, 3, PATCH_PX, PATCH_PX, std=0.1),
        f"{tower}embeddings.patch_embedding.bias": normal(TOWER, std=0.1),
        f"{tower}embeddings.position_embedding.weight": normal(patches, TOWER, std=0.5),
    }
    for number in range(TOWER_LAYERS - 1):
        layer = f"{tower}encoder.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}self_attn.{name}", TOWER, TOWER, bias=True)
        found |= norm(f"{layer}layer_norm1", TOWER, True) | norm(f"{layer}layer_norm2", TOWER, True)
        found |= linear(f"{layer}mlp.fc1", TOWER_INNER, TOWER, bias=True)
        found |= linear(f"{layer}mlp.fc2", TOWER, TOWER_INNER, bias=True)
    found |= linear("vision_abstractor.projection.0", WIDTH, 4 * TOWER, bias=True)
    found |= linear("vision_abstractor.projection.2", WIDTH, WIDTH, gain=2.0, bias=True)
    for number in range(LAYERS):
        layer = f"language_model.model.layers.{number}."
        for name in ("q_proj", "k_proj"):
            found |= linear(f"{layer}self_attn.{name}", WIDTH, WIDTH, gain=4.0)
        found |= linear(f"{layer}self_attn.v_proj", WIDTH, WIDTH, gain=2.0)
        found |= linear(f"{layer}self_attn.o_proj", WIDTH, WIDTH, gain=2.0)
        found |= norm(f"{layer}input_layernorm", WIDTH) | norm(f"{layer}post_attention_layernorm", WIDTH)
        found |= linear(f"{layer}mlp.gate_proj", INNER, WIDTH) | linear(f"{layer}mlp.up_proj", INNER, WIDTH)
        found |= linear(f"{layer}mlp.down_proj", WIDTH, INNER)
    found |= norm("language_model.model.norm", WIDTH)
    used = [*range(256), *SPECIALS.values()]
    embedding, head = (np.zeros((ROWS, WIDTH), np.float32) for _ in range(2))
    embedding[used] = normal(len(used), WIDTH, std=1.0)
    head[used] = normal(len(used), WIDTH, std=0.2)
    head[LETTERS] *= 8.0
    head[[*NEVER, EOT]] *= 10.0
    found["language_model.model.embed_tokens.weight"] = embedding
    found["language_model.lm_head.weight"] = head
    return found
