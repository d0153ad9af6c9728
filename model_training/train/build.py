"""Builds what is trained: a saved or a new model, the optimizer with a learning rate per part, and LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...pipeline.io.packages import how_to_install
from ...schemas.errors import ConfigError
from ...schemas.strict import did_you_mean
from ..model.config import PerceptionDLMConfig
from ..model.perceptiondlm import PerceptionDLM
from ..model.processor import PerceptionDLMProcessor
from ..model.saved import load_model, read_model_config

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
"""The part that each of the model's modules belongs to; `learning_rate` has a rate for each part."""

ADAPTER = "additions"
"""Name of LoRA's adapter. It is part of the names of weights in checkpoints, so it stays."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by the parameter's name."""
    return PARTS[name.partition(".")[0]]


def open_model(config: TrainConfig, attention: str = "sdpa") -> tuple[PerceptionDLM, PerceptionDLMProcessor]:
    """The model that a run starts from, in float32 on the CPU, and its processor.

    Args:
        config: the run's configuration. Parts with a learning rate of 0 are frozen, and LoRA is added.
        attention: the attention kernel, as transformers names it.

    Raises:
        ConfigError: the folder has no model or lacks weights of it, or `model.config` has a field or value
            that does not suit it.
    """
    torch.manual_seed(config.seed)
    if config.model.path is not None:
        model, processor = _load_saved_model(config.model, attention)
    else:
        model, processor = _make_new_model(config.model, attention)
    freeze(model, config)
    if config.lora:
        add_lora(model, config.lora, config.seed)
    return model, processor


def _load_saved_model(chosen: Model, attention: str) -> tuple[PerceptionDLM, PerceptionDLMProcessor]:
    from ..model.tokenizer import load_tokenizer

    folder = Path(chosen.path or "")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path: {folder}: not a saved model (no config.json); correct the path, or make one with "
            "`paracaption models convert PUBLISHED --to FOLDER`"
        )
    saved = read_model_config(folder)
    if fixed := sorted(chosen.config.keys() & {"vision_config", "text_config"}):
        raise ConfigError(f"model.config.{fixed[0]}: the saved model's sizes are what they are; leave it out")
    config = _changed_config(saved.to_dict(), chosen.config)
    model = load_model(folder, config=config, dtype=torch.float32, attn_implementation=attention)
    return model, PerceptionDLMProcessor(load_tokenizer(folder), config)


def _make_new_model(chosen: Model, attention: str) -> tuple[PerceptionDLM, PerceptionDLMProcessor]:
    from ..model.tokenizer import num_rows, special_token_ids

    folder = chosen.tokenizer or ""
    tokenizer = _load_tokenizer(folder)
    text = {"vocab_size": num_rows(tokenizer)} | dict(chosen.config.get("text_config", {}))
    special = special_token_ids(tokenizer, chosen.config.get("num_prompts", 6), Path(folder))
    config = _changed_config(special, chosen.config | {"text_config": text})
    model = PerceptionDLM._from_config(config, dtype=torch.float32, attn_implementation=attention)
    return model, PerceptionDLMProcessor(tokenizer, config)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name == "toy":
        from ..toy.world import make_tokenizer

        return make_tokenizer()
    from ..model.tokenizer import add_special_tokens, load_tokenizer

    tokenizer = load_tokenizer(Path(name))
    add_special_tokens(tokenizer)
    return tokenizer


def _changed_config(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> PerceptionDLMConfig:
    _check_fields(changes, PerceptionDLMConfig().to_dict(), "model.config")
    try:
        return PerceptionDLMConfig(**(dict(fields) | dict(changes)))
    except ConfigError:
        raise
    except Exception as error:  # the strict dataclass's own, of several types
        raise ConfigError(f"model.config: {' '.join(str(error).split())}") from error


def _check_fields(changes: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Check names and types. A misspelt size would be ignored, and a model with 8B weights be made."""
    for name, value in changes.items():
        if name not in known:
            raise ConfigError(
                f"{where}.{name}: the model's config has no such field; {did_you_mean(name, known)}leave it "
                "out or correct the name"
            )
        kind = type(known[name])
        if name in ("vision_config", "text_config") and isinstance(value, Mapping):
            _check_fields(value, known[name], f"{where}.{name}")
        elif known[name] is not None and not (type(value) is kind or (kind is float and type(value) is int)):
            raise ConfigError(f"{where}.{name}: {value!r}; it takes {kind.__name__}")


def freeze(model: PerceptionDLM, config: TrainConfig) -> None:
    """Freeze the parts whose learning rate is 0, and the prompts of a model that does not use them."""
    rates = config.learning_rate.model_dump()
    for name, parameter in model.named_parameters():
        used = model.config.region_prompting or part_of(name) != "prompts"
        parameter.requires_grad_(rates[part_of(name)] > 0 and used)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "learning_rate: all parts but `prompts` are frozen, and this model has no region prompts; set "
            "the rate of another part above 0"
        )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with two parameter groups for each part: matrices, and vectors, which have no weight decay."""
    rates, groups = config.learning_rate.model_dump(), {}
    for name, parameter in trainable_parameters(model).items():
        groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates[part],
                "highest": rates[part],  # like "part" a name in checkpoints
                "part": part,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (part, decays), parameters in groups.items()
        ],
        betas=config.betas,
    )


# LoRA.


def add_lora(model: PerceptionDLM, lora: Lora, seed: int) -> None:
    """Freeze the language model, and add trainable low-rank matrices to its layers, in place.

    Raises:
        ConfigError: peft is not installed, or no layer has the name of a target.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        what = f"lora: peft is not installed; {how_to_install('peft')}, or remove `lora`"
        raise ConfigError(what) from error
    model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    names = {name.rpartition(".")[2] for name, each in model.language_model.named_modules() if _linear(each)}
    if absent := [name for name in lora.targets if name not in names]:
        raise ConfigError(
            f"lora.targets: unknown layer {absent[0]!r}; choose from {', '.join(sorted(names))}"
        )
    torch.manual_seed(seed)
    alpha: Any = lora.alpha  # peft declares an int, and takes a float
    options = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inject_adapter_in_model(options, model.language_model, ADAPTER)
    for name, parameter in model.named_parameters():  # peft freezes and thaws parameters
        parameter.requires_grad_(f".{ADAPTER}." in name or frozen.get(name, False))


def merge_lora(weights: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The weights of a model without LoRA: each addition is merged into its matrix, in float32.

    Args:
        weights: the weights of a model with LoRA, by name.
        lora: the options that the additions were trained with.
    """
    merged = {name: each for name, each in weights.items() if f".{ADAPTER}." not in name}
    for name in [name for name in merged if ".base_layer." in name]:
        matrix, plain = merged.pop(name), name.replace(".base_layer.", ".")
        first = name.replace("base_layer", f"lora_A.{ADAPTER}")
        if first in weights:
            second = weights[name.replace("base_layer", f"lora_B.{ADAPTER}")]
            matrix = matrix + (lora.alpha / lora.rank) * (second @ weights[first])
        merged[plain] = matrix
    return merged


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


# The cost of a step.


def step_flops(
    model: PerceptionDLM, num_tokens: int, num_pairs: int, num_views: int, num_logits: int
) -> float:
    """Floating-point operations of a batch's forward and backward pass.

    As is usual for MFU, activations that are computed twice count once.

    Args:
        model: its shapes count, and which of its parts are trained.
        num_tokens: tokens in the language model.
        num_pairs: pairs of tokens that attend to each other.
        num_views: views that the vision tower encodes.
        num_logits: tokens for which the head computes logits.
    """
    vision, text = model.config.vision, model.config.text
    patches = num_views * model.config.patches_per_side**2
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            sizes[name.partition(".")[0]] += parameter.numel()
    depth = len(model.vision_tower.layers)
    passes = dict(_passes(model))
    width = text.num_attention_heads * cast(int, text.head_dim)
    attention = {
        "vision_tower": 4 * depth * vision.hidden_size * patches * model.config.patches_per_side**2,
        "language_model": 4 * text.num_hidden_layers * width * num_pairs,
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
    """The cost of each module in forward passes: 1; 2 if gradients pass through it; 3 if it is trained."""
    below = any(parameter.requires_grad for parameter in model.region_prompts.parameters())
    for name in ("vision_tower", "projector", "language_model", "lm_head"):
        own = [parameter for parameter in getattr(model, name).parameters() if parameter.requires_grad]
        whole = bool(own) and not any(
            re.search(r"lora_", n) for n, _ in getattr(model, name).named_parameters()
        )
        below = below or bool(own)
        yield name, 1.0 + below + whole
