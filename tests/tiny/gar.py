"""A random GAR checkpoint in the published layout, of any size: tiny for tests, full for measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROMPTS = 5
_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|video|>"]
_SPECIALS += ["<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>"]
_SPECIALS += ["<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
_SPECIALS += ["<|reserved_special_token_5|>", "<|reserved_special_token_6|>"]
_SPECIALS += [f"<Prompt{k}>" for k in range(PROMPTS)] + ["<NO_Prompt>"]

_WORDS = [
    "You are a helpful language and vision assistant. You are able to understand the visual content.",
    "There are some objects I am curious about: Describe this masked region in detail.",
    "A small red cup stands on the wooden table near the window, and its handle points to the left.",
    "The dog's fur is brown and white; it doesn't look at the camera. They're standing, I've seen, on grass.",
]
_TEMPLATE = (
    "{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{{- 'You are a helpful language and vision assistant.' }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<|image|>' }}"
    "{%- endfor %}"
    "{%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{- content['text'] | trim }}{%- endfor %}{{'<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


class Sizes(NamedTuple):
    """Of a checkpoint; the defaults are tiny. A vocabulary of 0 is as large as the tokenizer."""

    width: int = 48
    depth: int = 2
    vision_heads: int = 3
    vision_inner: int = 192
    hidden: int = 64
    layers: int = 3
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    inner: int = 160
    vocab: int = 0


FULL = {
    "1b": Sizes(1024, 23, 16, 4096, 2048, 16, 32, 8, 64, 8192, 128_262),
    "8b": Sizes(1536, 47, 16, 8960, 4096, 32, 32, 8, 128, 14_336, 128_262),
}
"""The published models."""


def write_gar(
    folder: Path,
    kind: str = "1b",
    *,
    tile_px: int = 448,
    max_tiles: int = 4,
    dtype: str = "float32",
    sizes: Sizes = Sizes(),
    shard_bytes: int | None = None,
    seed: int = 0,
    hollow: bool = False,
    patch_px: int = 14,
) -> Path:
    """Write a checkpoint whose greedy answers are nonsense and differ between regions.

    Args:
        folder: created.
        kind: "1b" has a class token and a tied head, "8b" neither; and 8b's weights come in several files.
        tile_px: side of a tile, a multiple of two patches. Small tiles make short prompts.
        max_tiles: most tiles of a photo.
        dtype: of the weights.
        sizes: of the layers.
        shard_bytes: largest file.
        seed: of the weights.
        patch_px: side of a patch; if it is not the published 14, the config names it and the MLP's ratio.
        hollow: the weights are zeros that take neither time nor room, see `hollow.py`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = _write_tokenizer(folder)
    sizes = sizes._replace(vocab=sizes.vocab or len(vocab))
    _write_configs(folder, kind, tile_px, max_tiles, dtype, sizes, vocab, patch_px)
    if hollow:
        from torch._subclasses.fake_tensor import FakeTensorMode

        from tests.tiny.hollow import write_hollow

        with FakeTensorMode():
            write_hollow(folder / "model.safetensors", _tensors(kind, tile_px, dtype, sizes, seed, patch_px))
        return folder
    default = 256 << 10 if kind == "8b" and sizes.hidden < 1024 else 4 << 30
    _write_weights(folder, _tensors(kind, tile_px, dtype, sizes, seed, patch_px), shard_bytes or default)
    return folder


def _write_tokenizer(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_WORDS, trainer)
    tokenizer.add_special_tokens(_SPECIALS)
    vocab = tokenizer.get_vocab()
    start = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, vocab[start])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": start, "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
    _write_json(folder / "special_tokens_map.json", names)
    settings = {"clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"model_max_length": 11_520, "model_input_names": ["input_ids", "attention_mask"]}
    _write_json(folder / "tokenizer_config.json", names | settings)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return vocab


def _write_configs(
    folder: Path,
    kind: str,
    tile_px: int,
    max_tiles: int,
    dtype: str,
    sizes: Sizes,
    vocab: dict[str, int],
    patch_px: int,
) -> None:
    large = kind == "1b"
    grid = tile_px // patch_px
    architecture = "vit_pe_core_large_patch14_336" if large else "vit_pe_core_gigantic_patch14_448"
    rope = {"factor": 32.0 if large else 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
    text = {
        "model_type": "llama",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.inner,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 11_520,
        "rope_theta": 500_000.0,
        "rope_scaling": {**rope, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": large,
        "bos_token_id": vocab["<|begin_of_text|>"],
        "eos_token_id": [vocab["<|end_of_text|>"], vocab["<|eot_id|>"]],
    }
    vision = {
        "model_type": "timm_wrapper",
        "architecture": architecture,
        "num_features": sizes.width,
        "do_pooling": True,
        "model_args": {
            "depth": sizes.depth,
            "embed_dim": sizes.width,
            "num_heads": sizes.vision_heads,
            "img_size": [tile_px, tile_px],
            "ref_feat_shape": [grid, grid],
            "global_pool": "",
            "init_values": 0.1,
            "use_post_transformer_norm": False,
        },
    }
    if patch_px != 14:
        vision["model_args"] |= {"patch_size": patch_px, "mlp_ratio": sizes.vision_inner / sizes.width}
    crops = [vocab[f"<|reserved_special_token_{k + 2}|>"] for k in range(PROMPTS)]
    config = {
        "model_type": "GAR",
        "architectures": ["GARModel"],
        "auto_map": {"AutoConfig": "configuration_gar.GARConfig", "AutoModel": "modeling_gar.GARModel"},
        "prompt_numbers": PROMPTS,
        "crop_tokens_ids": crops,
        "kernel_size": [patch_px, patch_px],
        "patch_size_h": patch_px,
        "patch_size_w": patch_px,
        "mask_path_embedding_out_channels": sizes.width,
        "dtype": dtype,
        "mllm_config": {
            "model_type": "perception_lm",
            "image_token_id": vocab["<|image|>"],
            "video_token_id": vocab["<|video|>"],
            "projector_pooling_ratio": 2,
            "vision_use_cls_token": large,
            "text_config": text,
            "vision_config": vision,
        },
    }
    _write_json(folder / "config.json", config)
    processor = {"tile_size": tile_px, "max_num_tiles": max_tiles, "vision_input_type": "thumb+tile"}
    processor |= {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    processor |= {"image_processor_type": "PerceptionLMImageProcessorFast", "do_center_crop": False}
    processor |= {"size": {"height": tile_px, "width": tile_px}}
    processor |= {"auto_map": {"AutoProcessor": "processing_gar.GARPerceptionLMProcessor"}}
    _write_json(folder / "preprocessor_config.json", processor)
    sides = {"patch_size": patch_px, "pooling_ratio": 2, "processor_class": "GARPerceptionLMProcessor"}
    _write_json(folder / "processor_config.json", sides)


def _tensors(
    kind: str, tile_px: int, dtype: str, s: Sizes, seed: int, patch_px: int
) -> Iterator[tuple[str, object]]:
    """(name, tensor). The gains are such that tiny models react to the region and have few near-ties."""
    import torch

    source = torch.Generator().manual_seed(seed)
    strong = 3.0 if s.hidden < 1024 else 1.0  # deep models would overflow

    def draw(*shape: int, std: float, mean: float = 0.0):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        return tensor.normal_(mean, std, generator=source)

    def linear(name: str, out: int, into: int, gain: float = 1.0, bias: bool = True):
        yield f"{name}.weight", draw(out, into, std=gain / math.sqrt(into))
        if bias:
            yield f"{name}.bias", draw(out, std=0.05)

    def norm(name: str, size: int, bias: bool = True):
        yield f"{name}.weight", draw(size, std=0.1, mean=1.0)
        if bias:
            yield f"{name}.bias", draw(size, std=0.05)

    patch = (s.width, 3, patch_px, patch_px)
    yield "mask_patch_embedding.weight", draw(*patch, std=2 / math.sqrt(3 * patch_px**2))
    tower = "mllm.model.vision_tower.timm_model."
    if kind == "1b":
        yield f"{tower}cls_token", draw(1, 1, s.width, std=0.5)
    yield f"{tower}pos_embed", draw(1, (tile_px // patch_px) ** 2 + (kind == "1b"), s.width, std=0.5)
    yield f"{tower}patch_embed.proj.weight", draw(*patch, std=1 / math.sqrt(3 * patch_px**2))
    yield from norm(f"{tower}norm_pre", s.width)
    for index in range(s.depth):
        block = f"{tower}blocks.{index}."
        yield from norm(f"{block}norm1", s.width)
        yield from linear(f"{block}attn.qkv", 3 * s.width, s.width)
        yield from linear(f"{block}attn.proj", s.width, s.width)
        yield f"{block}gamma_1", draw(s.width, std=0.1, mean=0.5)
        yield from norm(f"{block}norm2", s.width)
        yield from linear(f"{block}mlp.fc1", s.vision_inner, s.width)
        yield from linear(f"{block}mlp.fc2", s.width, s.vision_inner)
        yield f"{block}gamma_2", draw(s.width, std=0.1, mean=0.5)
    projector = "mllm.model.multi_modal_projector."
    yield from linear(f"{projector}linear_1", s.hidden, s.width)
    yield from linear(f"{projector}linear_2", s.hidden, s.hidden)
    language = "mllm.model.language_model."
    yield f"{language}embed_tokens.weight", draw(s.vocab, s.hidden, std=0.35)
    for index in range(s.layers):
        layer = f"{language}layers.{index}."
        yield from norm(f"{layer}input_layernorm", s.hidden, bias=False)
        yield from norm(f"{layer}post_attention_layernorm", s.hidden, bias=False)
        query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim
        for name, out, into, gain in (
            ("self_attn.q_proj", query, s.hidden, min(strong, 2.0)),
            ("self_attn.k_proj", key, s.hidden, min(strong, 2.0)),
            ("self_attn.v_proj", key, s.hidden, strong),
            ("self_attn.o_proj", s.hidden, query, strong),
            ("mlp.gate_proj", s.inner, s.hidden, strong),
            ("mlp.up_proj", s.inner, s.hidden, strong),
            ("mlp.down_proj", s.hidden, s.inner, strong),
        ):
            yield from linear(layer + name, out, into, gain, bias=False)
    yield from norm(f"{language}norm", s.hidden, bias=False)
    if kind == "8b":
        yield "mllm.lm_head.weight", draw(s.vocab, s.hidden, std=0.35)


def _write_weights(folder: Path, tensors: Iterator[tuple[str, object]], shard_bytes: int) -> None:
    """One file, or several and an index."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict = {}
    total = 0

    def flush() -> None:
        shards.append(list(held))
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        size = tensor.nbytes  # pyright: ignore - a tensor
        if held and sum(each.nbytes for each in held.values()) + size > shard_bytes:
            flush()
        held[name] = tensor
        total += size
    flush()
    if len(shards) == 1:
        (folder / "part-1").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2))
