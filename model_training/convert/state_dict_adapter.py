"""What published checkpoints call things: PerceptionDLM and its Base, LLaDA in two namings, SigLIP 2.

Each kind of checkpoint is a table of name parts and a translation of its config.json; nothing is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...schemas.errors import ConfigError

Parts = Sequence[tuple[str, str]]
"""(part of our name, part of theirs)."""

PERCEPTION_DLM: Parts = (
    ("vision_tower.embeddings.", "vision_model.vision_model.embeddings."),
    ("vision_tower.layers.", "vision_model.vision_model.encoder.layers."),
    ("vision_tower.norm.", "vision_model.vision_model.post_layernorm."),
    ("projector.", "vision_abstractor.projection."),
    ("lm_head.", "language_model.lm_head."),
    ("language_model.", "language_model.model."),
    ("region_prompts.", "mask_id_embedding."),
)
LLAMA: Parts = (("language_model.", "model."),)
LLADA: Parts = (
    ("language_model.embed_tokens.", "model.transformer.wte."),
    ("language_model.norm.", "model.transformer.ln_f."),
    ("lm_head.", "model.transformer.ff_out."),
    ("language_model.layers.", "model.transformer.blocks."),
)
_LLADA_LAYER: Parts = (
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ff_norm."),
    (".self_attn.o_proj.", ".attn_out."),
    (".self_attn.", "."),
    (".mlp.gate_proj.", ".ff_proj."),
    (".mlp.up_proj.", ".up_proj."),
    (".mlp.down_proj.", ".ff_out."),
)
SIGLIP: Parts = (
    ("vision_tower.embeddings.", "embeddings."),
    ("vision_tower.layers.", "encoder.layers."),
    ("vision_tower.norm.", "post_layernorm."),
)
"""Within the vision model; what stands before it depends on the folder."""

TYPE, BASE_TYPE = "pdmllm", "dmllm"
"""`model_type` of PerceptionDLM, and of PerceptionDLM-Base, which knows no regions yet."""

REGION_STAGE = {"prompt_numbers": 6, "roi_output_size": 4}
"""What PerceptionDLM's released code adds to its Base."""

_LLADA_8B, _SIGLIP2 = "MSALab/LLaDA-8B-Instruct-HF", "google/siglip2-so400m-patch16-512"
"""The released code looks at the first name for "llada", and loads the second one before its own weights."""

_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
_VISION += ("patch_size", "num_channels", "hidden_act", "layer_norm_eps")
_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TEXT += ("max_position_embeddings", "projection_size", "hidden_act", "layer_norm_eps")

_LLADA_IS = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "weight_tying": False,
}
_LLAMA_IS = {"hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False}
_PUBLISHED_IS = {"downsample_ratio": 0.5}
"""What the model is made for, where a config says anything about it."""


def theirs(name: str, parts: Parts) -> str:
    """What one of our tensors is called there."""
    for ours, other in parts:
        if name.startswith(ours):
            name = other + name.removeprefix(ours)
            break
    if parts is LLADA:
        for ours, other in _LLADA_LAYER:
            name = name.replace(ours, other)
    return name


def fields_of(config: Mapping[str, Any], file: Path, vocabulary: int) -> dict[str, Any]:
    """A published PerceptionDLM's, or its Base's, config in our fields, without layout and tokens.

    Args:
        config: of the folder.
        file: named in errors.
        vocabulary: rows of its embedding: the config may say otherwise.

    Raises:
        ConfigError: it lacks a size, or describes what our model cannot be.
    """
    _insist(config, _PUBLISHED_IS, file)
    projection = _part(config, "vision_abstractor_config", file).get("projection_type", "mlp2x_gelu")
    if projection != "mlp2x_gelu":
        raise ConfigError(f"{file}: projection_type {projection!r}; only mlp2x_gelu can be converted")
    vision = vision_fields(_part(config, "vision_model_config", file), file)
    for key in ("image_size", "patch_size"):
        if config.get(key, vision[key]) != vision[key]:
            raise ConfigError(f"{file}: {key} is {config[key]}, but the vision model's {vision[key]}")
    stage = config if config["model_type"] == TYPE else REGION_STAGE
    return {
        "vision_config": vision,
        "text_config": llama_fields(_part(config, "language_model_config", file), file, vocabulary),
        "vision_select_layer": _select(config, vision["num_hidden_layers"], file),
        "num_prompts": int(stage.get("prompt_numbers", REGION_STAGE["prompt_numbers"])),
        "replay_size": _replay(stage.get("roi_output_size"), file),
    }


def llama_fields(config: Mapping[str, Any], file: Path, vocabulary: int) -> dict[str, Any]:
    """A language model's config in Llama's terms. Raises ConfigError as `fields_of`."""
    _insist(config, _LLAMA_IS, file)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"{file}: rope_parameters {rope}; only rope_type default can be converted")
    heads = _need(config, "num_attention_heads", file)
    return {
        **{
            key: _need(config, key, file)
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
        },
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": config.get("max_position_embeddings", 16384),
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(rope.get("rope_theta") or _need(config, "rope_theta", file)),
        },
    }


def llada_fields(config: Mapping[str, Any], file: Path, vocabulary: int) -> dict[str, Any]:
    """The same of LLaDA as it is published, in terms of its own."""
    _insist(config, _LLADA_IS, file)
    width = _need(config, "d_model", file)
    heads = _need(config, "n_heads", file)
    llama = {
        "hidden_size": width,
        "intermediate_size": config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * width,
        "num_hidden_layers": _need(config, "n_layers", file),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or heads,
        "max_position_embeddings": _need(config, "max_sequence_length", file),
        "rms_norm_eps": _need(config, "rms_norm_eps", file),
        "rope_theta": _need(config, "rope_theta", file),
    }
    return llama_fields(llama, file, vocabulary)


def vision_fields(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The sizes of a SigLIP of fixed resolution, with or without its text model, as transformers has them.

    Raises:
        ConfigError: another vision model.
    """
    from transformers import SiglipVisionConfig

    kind = config.get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise ConfigError(
            f"{file}: a vision model of type {kind!r}; name a SigLIP 2 of fixed resolution (type siglip), "
            "such as siglip2-so400m-patch16-512"
        )
    sizes = _part(config, "vision_config", file) if kind == "siglip" else config
    full = SiglipVisionConfig(**{key: sizes[key] for key in _VISION if key in sizes})
    return {key: getattr(full, key) for key in _VISION}


def siglip_shapes(config: Mapping[str, Any], file: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a SigLIP, of its vision model alone too, by the name that it has in the whole."""
    import torch
    from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel

    whole = config["model_type"] == "siglip"
    with torch.device("meta"):
        models: dict[str, Any] = {
            "vision_model": SiglipVisionModel(SiglipVisionConfig(**vision_fields(config, file)))
        }
        if whole:
            given = _part(config, "text_config", file)
            text = {key: given[key] for key in _TEXT if given.get(key) is not None}
            models["text_model"] = SiglipTextModel(
                SiglipTextConfig(**text, bos_token_id=None, eos_token_id=None)
            )
    stored: dict[str, tuple[int, ...]] = {"logit_scale": (1,), "logit_bias": (1,)} if whole else {}
    for part, model in models.items():
        for name, tensor in model.state_dict().items():
            stored[f"{part}.{name.removeprefix(f'{part}.')}"] = tuple(tensor.shape)
    return stored


def region_stage(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A published config, its Base's too, as that of the region stage."""
    patch = fields["vision_config"]["patch_size"]
    return {
        **config,
        "architectures": ["PDMLLM"],
        "auto_map": {
            "AutoConfig": "configuration_pdmllm.PDMLLMConfig",
            "AutoModel": "modeling_pdmllm.PDMLLM",
            "AutoModelForCausalLM": "modeling_pdmllm.PDMLLM",
        },
        "model_type": TYPE,
        "prompt_numbers": fields["num_prompts"],
        "roi_output_size": fields["replay_size"],
        "mask_patch_embedding_in_channels": 3,
        "mask_patch_embedding_out_channels": fields["vision_config"]["hidden_size"],
        "kernel_size": [patch, patch],
    }


def published_config(
    fields: Mapping[str, Any], siglip: Mapping[str, Any], image_token: int, dtype: str
) -> dict[str, Any]:
    """A config.json for the released code, of a model that never had one."""
    vision, text = fields["vision_config"], dict(fields["text_config"])
    language = {
        **{key: value for key, value in text.items() if key != "rope_parameters"},
        "_name_or_path": _LLADA_8B,
        "hidden_act": "silu",
        "model_type": "llada",
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "tie_word_embeddings": False,
    }
    config = {
        "downsample_ratio": 0.5,
        "image_size": vision["image_size"],
        "image_token_id": image_token,
        "language_model_config": language,
        "num_image_token": (vision["image_size"] // vision["patch_size"] // 2) ** 2,
        "patch_size": vision["patch_size"],
        "replacement_noise_mode": False,
        "torch_dtype": dtype,
        "vision_abstractor_config": {"projection_type": "mlp2x_gelu"},
        "vision_model_config": {"_name_or_path": _SIGLIP2, **siglip},
        "vision_select_layer": fields["vision_select_layer"],
    }
    return region_stage(config, fields)


def _select(config: Mapping[str, Any], depth: int, file: Path) -> int:
    """Counted from the end. From the start, the Base counts the embeddings as a layer; regions' stage not."""
    select = config.get("vision_select_layer", -2)
    if select >= 0:
        select -= depth + (config["model_type"] == BASE_TYPE)
        if select == -1:
            raise ConfigError(
                f"{file}: vision_select_layer is the last layer without its norm, which cannot be converted"
            )
    return select


def _replay(size: Any, file: Path) -> int:
    sides = set(size) if isinstance(size, list | tuple) else {size}
    side = sides.pop()
    if sides or not isinstance(side, int):
        raise ConfigError(
            f"{file}: roi_output_size is {size!r}; without a number the released code replays whole maps, "
            "which our model does not"
        )
    return side


def _insist(config: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> None:
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{file}: {key} is {config[key]!r}; only {value!r} can be converted")


def _need(config: Mapping[str, Any], key: str, file: Path) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{file}: {key} is missing; is this the right model?")
    return config[key]


def _part(config: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    part = config.get(key)
    if not isinstance(part, dict):
        raise ConfigError(f"{file}: {key} is missing; is this the right model?")
    return part
