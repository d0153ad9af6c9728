"""LLaDA: a Llama without causality.

Shape suffixes: B batch, L tokens, D width, H heads, G heads of keys and values, K width
of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Pattern


class Kept:
    """Keys and values of the first tokens of each sequence, layer by layer, with room for more after them.

    The first pass, over whole sequences, fills it; every later one sees what is kept before its own tokens.

    Args:
        num_kept: tokens at the front whose keys and values are kept.
        num_more: tokens of a later pass at most.
    """

    def __init__(self, num_kept: int, num_more: int):
        self.num_kept, self.num_more = num_kept, num_more
        self.layers: list[tuple[Tensor, Tensor]] = []

    def see(self, layer: int, k_BGLK: Tensor, v_BGLK: Tensor) -> tuple[Tensor, Tensor]:
        """What a pass attends to. Keys and values of a later pass are overwritten by the next one."""
        if len(self.layers) == layer:
            batch, heads, _, width = k_BGLK.shape
            shape = (batch, heads, self.num_kept + self.num_more, width)
            self.layers.append((k_BGLK.new_empty(shape), v_BGLK.new_empty(shape)))
            for room, fresh in zip(self.layers[layer], (k_BGLK, v_BGLK), strict=True):
                room[:, :, : self.num_kept] = fresh[:, :, : self.num_kept]
            return k_BGLK, v_BGLK
        end = self.num_kept + k_BGLK.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, self.num_kept : end] = k_BGLK
        values[:, :, self.num_kept : end] = v_BGLK
        return keys[:, :, :end], values[:, :, :end]

    def rows(self, rows_B: Tensor) -> Kept:
        """Of some of the sequences only."""
        part = Kept(self.num_kept, self.num_more)
        part.layers = [(keys[rows_B], values[rows_B]) for keys, values in self.layers]
        return part


class RMSNorm(nn.Module):
    """Statistics in float32, cast back before the weight is applied, as LLaDA was trained."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        dtype = x_BLD.dtype
        if dtype == torch.float32:
            return functional.rms_norm(x_BLD, self.weight.shape, self.weight, self.eps)
        wide = x_BLD if dtype == torch.float64 else x_BLD.float()
        return self.weight * functional.rms_norm(wide, self.weight.shape, eps=self.eps).to(dtype)


class Attention(nn.Module):
    """Self-attention with rotary positions. Queries may be fewer than keys: see `Layer`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, head, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head = head
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=bias)

    def keys_and_values(self, x_BLD: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> tuple[Tensor, Tensor]:
        k_BGLK = rotate(self._split(self.k_proj(x_BLD)), cos_BLK, sin_BLK)
        return k_BGLK, self._split(self.v_proj(x_BLD))

    def forward(
        self, x_BLD: Tensor, cos_BLK: Tensor, sin_BLK: Tensor, keys: Tensor, values: Tensor, pattern: Pattern
    ) -> Tensor:
        q_BHLK = rotate(self._split(self.q_proj(x_BLD)), cos_BLK, sin_BLK)
        return self.o_proj(pattern(q_BHLK, keys, values).transpose(1, 2).flatten(2))

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (-1, self.head)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class Layer(GradientCheckpointingLayer):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BLD: Tensor,
        cos_BLK: Tensor,
        sin_BLK: Tensor,
        pattern: Pattern,
        wanted: slice,
        kept: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """The tokens `wanted` of the result; `pattern` is theirs, `kept` adds keys to their own."""
        normed = self.input_layernorm(x_BLD)
        keys, values = self.self_attn.keys_and_values(normed, cos_BLK, sin_BLK)
        if kept is not None:
            keys, values = kept(keys, values)
        turn = (cos_BLK[:, wanted], sin_BLK[:, wanted])
        x_BLD = x_BLD[:, wanted] + self.self_attn(normed[:, wanted], *turn, keys, values, pattern)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class LanguageModel(nn.Module):
    """From embeddings to the hidden states under the head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.theta, self.head = config.rope_parameters["rope_theta"], config.head_dim

    def forward(
        self,
        x_BLD: Tensor,
        position_BL: Tensor,
        pattern: Pattern,
        wanted: slice = slice(None),
        kept: Kept | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            x_BLD: embeddings.
            position_BL: their positions.
            pattern: who of them attends to what they and `kept` hold.
            wanted: tokens whose hidden states are asked for; the last layer computes no others.
            kept: keys and values of an earlier pass; an empty one is filled.

        Returns:
            (B, wanted, D).
        """
        pattern.ready(x_BLD.dtype)
        cos_BLK, sin_BLK = rope(position_BL, self.theta, self.head, x_BLD.dtype)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            rows = wanted if number == last else slice(None)
            see = None if kept is None else partial(kept.see, number)
            shown = pattern if rows == slice(None) else pattern.of(rows)
            x_BLD = layer(x_BLD, cos_BLK, sin_BLK, shown, rows, see)
        return self.norm(x_BLD)


def rope(position_BL: Tensor, theta: float, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), (B, L, K): angles in float32, cast to the model's type before use."""
    exponent = torch.arange(0, width, 2, dtype=torch.int64, device=position_BL.device).float() / width
    angle = position_BL[..., None].float() / theta**exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BHLK: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> Tensor:
    """Turn each channel with its partner half a head away."""
    first, second = x_BHLK.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_BHLK * cos_BLK[:, None] + turned * sin_BLK[:, None]
