"""Random checkpoints of what a PerceptionDLM is made of, tiny and in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = 256
"""Tokens of the tokenizer that are single bytes."""

SPECIALS = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS += ["<|mdm_mask|>", *(f"<|reserved_token_{i}|>" for i in range(8))]

MASK_ID = WORDS + SPECIALS.index("<|mdm_mask|>")

_LLAMA_LAYER = {  # what each tensor of a layer is called: in LLaDA's naming, in Llama's
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def write_tokenizer(folder: Path, more: tuple[str, ...] = ()) -> None:
    """LLaDA's special tokens over single bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (*SPECIALS, *more)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": ["tokenization_llada.LLaDATokenizer", None]},
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_llada(
    folder: Path,
    naming: str = "llada",
    rows: int = 320,
    width: int = 32,
    layers: int = 2,
    inner: int = 48,
    dtype: str = "bfloat16",
) -> Path:
    """A language model.

    Args:
        folder: created.
        naming: "llada", as LLaDA-8B is published, or "llama".
        rows: of the embedding.
        width: of the hidden states.
        layers: of them.
        inner: width within the MLP.
        dtype: of the weights.
    """
    import torch
    from safetensors.torch import save_file

    write_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul(0.1).to(getattr(torch, dtype))

    block = {name: (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
    block |= {"ff_proj": (inner, width), "up_proj": (inner, width), "ff_out": (width, inner)}
    block |= {"attn_norm": (width,), "ff_norm": (width,)}
    tensors = {f"model.transformer.{name}.weight": drawn(rows, width) for name in ("wte", "ff_out")}
    tensors["model.transformer.ln_f.weight"] = drawn(width)
    for name, shape in block.items():
        first = drawn(*shape)
        for layer in range(layers):  # rolled, as that is cheaper than drawn
            tensors[f"model.transformer.blocks.{layer}.{name}.weight"] = first.roll(layer)
    config = {
        "model_type": "llada",
        "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
        "activation_type": "silu",
        "block_type": "llama",
        "d_model": width,
        "embedding_size": rows,
        "include_bias": False,
        "layer_norm_type": "rms",
        "mask_token_id": MASK_ID,
        "max_sequence_length": 4096,
        "mlp_hidden_size": inner,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": layers,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 500000.0,
        "vocab_size": rows,
        "weight_tying": False,
    }
    if naming == "llama":
        tensors = {_llama_name(name): tensor for name, tensor in tensors.items()}
        config = {
            "model_type": "llada",
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": inner,
            "max_position_embeddings": 4096,
            "num_attention_heads": 4,
            "num_hidden_layers": layers,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": rows,
        }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_siglip(folder: Path, whole: bool = True) -> Path:
    """A SigLIP of fixed resolution, by transformers; not `whole`: its vision model alone."""
    import torch
    from transformers import SiglipConfig, SiglipModel, SiglipVisionModel

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=sizes
        | {"num_hidden_layers": 1, "vocab_size": 32, "max_position_embeddings": 8}
        | {"bos_token_id": None, "eos_token_id": None},
        vision_config=sizes | {"num_hidden_layers": 3, "image_size": 64, "patch_size": 16},
    )
    torch.manual_seed(1)
    model = SiglipModel(config) if whole else SiglipVisionModel(config.vision_config)
    model.save_pretrained(folder)
    return folder


def _llama_name(name: str) -> str:
    ends = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    parts = name.split(".")
    if parts[2] != "blocks":
        return f"{ends[parts[2]]}.weight"
    return f"model.layers.{parts[3]}.{_LLAMA_LAYER[parts[4]]}.weight"
