"""LLaDA: a Llama whose attention is not causal.

Shape suffixes: B batch, L tokens, D width, H heads, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import AttentionMask


class KVCache:
    """Keys and values of the first tokens of each sequence, layer by layer, with room for the tokens after
    them.

    The first pass runs over whole sequences and fills the cache. Every later pass runs over tokens that
    follow the cached ones, and attends to the cached ones and to its own. The tensors stay where they are.

    Args:
        num_cached: tokens at the front of each sequence whose keys and values are kept.
        num_following: tokens of a later pass, at most.

    Attributes:
        filling: whether the next pass fills the cache; set it to fill it again.
    """

    def __init__(self, num_cached: int, num_following: int):
        self.num_cached, self.num_following = num_cached, num_following
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.filling = True

    def update(self, layer: int, k_BGLK: Tensor, v_BGLK: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer attends to, given those of the tokens of this pass.

        A pass that fills the cache keeps those of the front. A later one puts its own behind them, where the
        next one overwrites them.
        """
        if self.filling:
            if len(self.layers) == layer:
                batch, heads, _, width = k_BGLK.shape
                shape = (batch, heads, self.num_cached + self.num_following, width)
                self.layers.append((k_BGLK.new_empty(shape), v_BGLK.new_empty(shape)))
            for cached, fresh in zip(self.layers[layer], (k_BGLK, v_BGLK), strict=True):
                cached[:, :, : self.num_cached] = fresh[:, :, : self.num_cached]
            return k_BGLK, v_BGLK
        end = self.num_cached + k_BGLK.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, self.num_cached : end] = k_BGLK
        values[:, :, self.num_cached : end] = v_BGLK
        return keys[:, :, :end], values[:, :, :end]

    def put(self, rows_A: Tensor, part: KVCache, num_sequences: int) -> None:
        """Take what another cache keeps of some sequences.

        Args:
            rows_A: their numbers here.
            part: the other cache, of these sequences alone; it may keep fewer tokens of each.
            num_sequences: how many there are here.
        """
        if not self.layers:
            _, heads, _, width = part.layers[0][0].shape
            shape = (num_sequences, heads, self.num_cached + self.num_following, width)
            # Not empty: what is not a number would reach the sums even where it has no weight.
            self.layers = [(keys.new_zeros(shape), keys.new_zeros(shape)) for keys, _ in part.layers]
        for mine, theirs in zip(self.layers, part.layers, strict=True):
            for cached, fresh in zip(mine, theirs, strict=True):
                cached[:, :, : part.num_cached][rows_A] = fresh[:, :, : part.num_cached]
        self.filling = False

    def join(self, other: KVCache) -> Self:
        """The cache of these sequences, and then those of another one."""
        joined = type(self)(self.num_cached, self.num_following)
        pairs = zip(self.layers, other.layers, strict=True)
        joined.layers = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in pairs]
        joined.filling = False
        return joined

    def for_sequences(self, rows_B: Tensor) -> Self:
        """The cache of some of the sequences."""
        part = type(self)(self.num_cached, self.num_following)
        part.layers = [(keys[rows_B], values[rows_B]) for keys, values in self.layers]
        part.filling = self.filling
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
    """Self-attention with rotary positions. There may be fewer queries than keys, see `Layer`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, head, bias = config.hidden_size, cast(int, config.head_dim), config.attention_bias
        key_heads = config.num_key_value_heads or config.num_attention_heads
        self.head = head
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=bias)
        self.k_proj = nn.Linear(width, key_heads * head, bias=bias)
        self.v_proj = nn.Linear(width, key_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=bias)

    def keys_and_values(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens, (B, G, L, K) each."""
        return apply_rope(self._split(self.k_proj(x_BLD)), *rope), self._split(self.v_proj(x_BLD))

    def forward(
        self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, mask: AttentionMask
    ) -> Tensor:
        q_BHLK = apply_rope(self._split(self.q_proj(x_BLD)), *rope)
        return self.o_proj(mask.attend(q_BHLK, keys, values).transpose(1, 2).flatten(2))

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
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask,
        wanted: slice,
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """The result for some of the tokens.

        Args:
            x_BLD: hidden states.
            rope: (cos, sin) of the tokens' positions.
            mask: of the tokens `wanted`.
            wanted: the tokens whose result is asked for.
            update_cache: from the keys and values of these tokens to those that they attend to.
        """
        normed = self.input_layernorm(x_BLD)
        keys, values = self.self_attn.keys_and_values(normed, rope)
        if update_cache is not None:
            keys, values = update_cache(keys, values)
        cos_BLK, sin_BLK = rope
        wanted_rope = (cos_BLK[:, wanted], sin_BLK[:, wanted])
        x_BLD = x_BLD[:, wanted] + self.self_attn(normed[:, wanted], wanted_rope, keys, values, mask)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class LanguageModel(nn.Module):
    """From embeddings to the hidden states under the head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.theta = cast(dict[str, float], config.rope_parameters)["rope_theta"]
        self.head = cast(int, config.head_dim)

    def forward(
        self,
        x_BLD: Tensor,
        position_BL: Tensor | None,
        mask: AttentionMask,
        wanted: slice = slice(None),
        cache: KVCache | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            x_BLD: embeddings of the tokens of this pass.
            position_BL: their positions; None if `rope` is given.
            mask: which of them attends to which of them, and to which tokens in the cache.
            wanted: the tokens whose hidden states are asked for; the last layer computes no others.
            cache: keys and values of an earlier pass, or a cache to fill.
            rope: what `self.rope` gives for the positions, if they are the same in many passes.

        Returns:
            (B, number of tokens wanted, D).
        """
        mask.prepare(x_BLD.dtype)
        if rope is None:
            assert position_BL is not None, "positions, or what follows from them"
            rope = self.rope(position_BL, x_BLD.dtype)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            rows = wanted if number == last else slice(None)
            rows_mask = mask if rows == slice(None) else mask.for_queries(rows)
            update = None if cache is None else partial(cache.update, number)
            x_BLD = layer(x_BLD, rope, rows_mask, rows, update)
        if cache is not None:
            cache.filling = False
        return self.norm(x_BLD)

    def rope(self, position_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin) of tokens' positions, (B, L, K) each."""
        return rope_of(position_BL, self.theta, self.head, dtype)


def rope_of(position_BL: Tensor, theta: float, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of rotary positions, (B, L, K) each, from angles in float32 and then in the model's type."""
    exponent = torch.arange(0, width, 2, dtype=torch.int64, device=position_BL.device).float() / width
    angle = position_BL[..., None].float() / theta**exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x_BHLK: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> Tensor:
    """Rotate each channel together with its partner half a head away."""
    first, second = x_BHLK.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return x_BHLK * cos_BLK[:, None] + rotated * sin_BLK[:, None]
