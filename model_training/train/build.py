"""What is trained: a saved or a new model, its parts with their learning rates, and LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...schemas.errors import ConfigError
from ..model.config import PerceptionDLMConfig
from ..model.perceptiondlm import PerceptionDLM
from ..model.processor import PerceptionDLMProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...schemas.training import Lora, Model, TrainConfig

PARTS = {
    "vision_tower": "vision",
    "projector": "projector",
    "language_model": "language",
    "lm_head": "language",
    "region_prompts": "prompts",
}
"""The part of each of the model's modules; `learning_rate` has a rate for each."""

ADDED = "additions"
"""LoRA's name for its matrices within a layer."""


def part_of(name: str) -> str:
    """Which part a parameter belongs to, by its name."""
    return PARTS[name.partition(".")[0]]


def open_model(config: TrainConfig, attention: str = "sdpa") -> tuple[PerceptionDLM, PerceptionDLMProcessor]:
    """The model to start from, in float32 on the CPU, and its processor.

    Raises:
        ConfigError: no model in the folder, or a field of its config that it does not take.
    """
    torch.manual_seed(config.seed)
    if config.model.path is not None:
        model, processor = _saved(config.model, attention)
    else:
        model, processor = _new(config.model, attention)
    freeze(model, config)
    if config.lora:
        add_lora(model, config.lora, config.seed)
    return model, processor


def _saved(chosen: Model, attention: str) -> tuple[PerceptionDLM, PerceptionDLMProcessor]:
    from transformers import AutoTokenizer

    folder = Path(chosen.path or "")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path: {folder}: no saved model (no config.json); `paracaption models convert`"
        )
    saved = PerceptionDLMConfig.from_pretrained(folder)
    if fixed := sorted(chosen.config.keys() & {"vision_config", "text_config"}):
        raise ConfigError(f"model.config.{fixed[0]}: the saved model's sizes are what they are; leave it out")
    config = _config(saved.to_dict(), chosen.config)
    model = PerceptionDLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation=attention
    )
    return model, PerceptionDLMProcessor(AutoTokenizer.from_pretrained(folder), config)


def _new(chosen: Model, attention: str) -> tuple[PerceptionDLM, PerceptionDLMProcessor]:
    from ..model import tokenizer as vocabulary

    folder = chosen.tokenizer or ""
    tokenizer = _tokenizer(folder)
    text = {"vocab_size": vocabulary.num_ids(tokenizer)} | dict(chosen.config.get("text_config", {}))
    special = vocabulary.token_ids(tokenizer, chosen.config.get("num_prompts", 6), Path(folder))
    config = _config(special, chosen.config | {"text_config": text})
    model = PerceptionDLM._from_config(config, dtype=torch.float32, attn_implementation=attention)
    return model, PerceptionDLMProcessor(tokenizer, config)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name == "toy":
        from ..toy.world import make_tokenizer

        return make_tokenizer()
    from ..model import tokenizer as vocabulary

    tokenizer = vocabulary.load(Path(name))
    vocabulary.add_special(tokenizer)
    return tokenizer


def _config(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> PerceptionDLMConfig:
    _check(changes, PerceptionDLMConfig().to_dict(), "model.config")
    try:
        return PerceptionDLMConfig(**(dict(fields) | dict(changes)))
    except ConfigError:
        raise
    except Exception as error:  # the strict dataclass's own, of several types
        raise ConfigError(f"model.config: {' '.join(str(error).split())}") from error


def _check(changes: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Names and types; a misspelt size would be ignored, and a model of 8B weights be made."""
    for name, value in changes.items():
        if name not in known:
            raise ConfigError(f"{where}.{name}: the model's config has no such field")
        kind = type(known[name])
        if name in ("vision_config", "text_config") and isinstance(value, Mapping):
            _check(value, known[name], f"{where}.{name}")
        elif known[name] is not None and not (type(value) is kind or (kind is float and type(value) is int)):
            raise ConfigError(f"{where}.{name}: {value!r}; it takes {kind.__name__}")


def freeze(model: PerceptionDLM, config: TrainConfig) -> None:
    """Parts whose rate is 0 stay as they are, and so does what the model does not use."""
    rates = config.learning_rate.model_dump()
    for name, parameter in model.named_parameters():
        used = model.config.region_prompting or part_of(name) != "prompts"
        parameter.requires_grad_(rates[part_of(name)] > 0 and used)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("learning_rate: only prompts are trained, which the model does not use")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, what the optimizer moves."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a group for each part, matrices apart from vectors, which do not decay."""
    rates, groups = config.learning_rate.model_dump(), {}
    for name, parameter in trained(model).items():
        groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates[part],
                "highest": rates[part],
                "part": part,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (part, decays), parameters in groups.items()
        ],
        betas=config.betas,
    )


# LoRA.


def add_lora(model: PerceptionDLM, lora: Lora, seed: int) -> None:
    """Freeze the language model, and add small trainable matrices to its layers, in place.

    Raises:
        ConfigError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("lora: peft is not installed; `pip install paracaption[train]`") from error
    model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    names = {name.rpartition(".")[2] for name, each in model.language_model.named_modules() if _linear(each)}
    if absent := [name for name in lora.targets if name not in names]:
        raise ConfigError(f"lora.targets: {absent[0]!r} is none; take some of {', '.join(sorted(names))}")
    torch.manual_seed(seed)
    options = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inject_adapter_in_model(options, model.language_model, ADDED)
    for name, parameter in model.named_parameters():  # peft freezes and thaws at its own will
        parameter.requires_grad_(f".{ADDED}." in name or frozen.get(name, False))


def merge_lora(weights: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Weights of the model without additions: each is added to its matrix, in float32."""
    merged = {name: each for name, each in weights.items() if f".{ADDED}." not in name}
    for name in [name for name in merged if ".base_layer." in name]:
        matrix, plain = merged.pop(name), name.replace(".base_layer.", ".")
        first = name.replace("base_layer", f"lora_A.{ADDED}")
        if first in weights:
            second = weights[name.replace("base_layer", f"lora_B.{ADDED}")]
            matrix = matrix + (lora.alpha / lora.rank) * (second @ weights[first])
        merged[plain] = matrix
    return merged


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


# How much there is to compute.


def step_flops(
    model: PerceptionDLM, num_tokens: int, num_pairs: int, num_views: int, num_logits: int
) -> float:
    """Floating-point operations of a batch's forward and backward pass, recomputing left out, as MFU has it.

    Args:
        model: tells which parts are trained.
        num_tokens: of the language model.
        num_pairs: of tokens that attend to each other.
        num_views: that the vision tower encodes.
        num_logits: tokens for which the head is computed.
    """
    vision, text = model.config.vision_config, model.config.text_config
    patches = num_views * model.config.patches_per_side**2
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            sizes[name.partition(".")[0]] += parameter.numel()
    depth = len(model.vision_tower.layers)
    passes = dict(_passes(model))
    attention = {
        "vision_tower": 4 * depth * vision.hidden_size * patches * model.config.patches_per_side**2,
        "language_model": 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * num_pairs,
    }
    counts = {
        "vision_tower": patches,
        "projector": patches / 4,
        "language_model": num_tokens,
        "lm_head": num_logits,
    }
    return sum(
        passes[name] * (2 * sizes[name] * count + attention.get(name, 0)) for name, count in counts.items()
    )


def _passes(model: PerceptionDLM) -> Iterator[tuple[str, float]]:
    """For each module, in forward passes: 1; 2 if gradients go through it; 3 if it is trained too."""
    below = any(parameter.requires_grad for parameter in model.region_prompts.parameters())
    for name in ("vision_tower", "projector", "language_model", "lm_head"):
        own = [parameter for parameter in getattr(model, name).parameters() if parameter.requires_grad]
        whole = bool(own) and not any(
            re.search(r"lora_", n) for n, _ in getattr(model, name).named_parameters()
        )
        below = below or bool(own)
        yield name, 1.0 + below + whole
