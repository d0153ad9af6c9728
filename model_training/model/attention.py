"""Who may attend to whom: one pure function of the tokens' roles, in the form that each kernel wants.

Shape suffixes: B batch, Q queries, K keys, L tokens, H heads, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SHARED, HIDDEN = 0, -1
"""Region codes besides 1, 2, ...: what every caption sees, and what no caption sees."""

PADDING = -1
"""Sample of the tokens that only fill up a batch. They see each other, so that no row of scores is empty."""


class TokenRoles(NamedTuple):
    """What each token is; attention follows from this alone.

    Attributes:
        sample_BL: int64, the number of the token's sequence. Sequences packed in one row do not see each
            other.
        region_BL: int64, SHARED, HIDDEN, or 1 + the region whose replay or caption the token belongs to.
        caption_BL: bool, whether the token belongs to a caption.
    """

    sample_BL: Tensor
    region_BL: Tensor
    caption_BL: Tensor

    def at(self, index: Any) -> TokenRoles:
        """The roles of some tokens, by an index into (B, L)."""
        return TokenRoles(*(field[index] for field in self))

    def replay_BL(self) -> Tensor:
        """Bool, where regions' features are replayed."""
        return (self.region_BL > SHARED) & ~self.caption_BL


def join_roles(*parts: TokenRoles) -> TokenRoles:
    """The roles of sequences whose parts follow each other."""
    sample, region, caption = (torch.cat(fields, dim=1) for fields in zip(*parts, strict=True))
    return TokenRoles(sample, region, caption)


_Roles = tuple[Tensor, Tensor, Tensor]


def may_attend(query: _Roles, key: _Roles, isolate_prefix: bool) -> Tensor:
    """Whether a query may attend to a key, each given as (sample, region, caption); the arguments broadcast.

    A caption sees what is shared, the replay of its own region and itself. Every other token sees all of its
    sequence, or, with `isolate_prefix`, all of it but the captions.
    """
    q_sample, q_region, q_caption = query
    k_sample, k_region, k_caption = key
    of_caption = (k_region == SHARED) | (k_region == q_region)
    of_prefix = ~k_caption if isolate_prefix else torch.ones_like(k_caption)
    return (q_sample == k_sample) & ((q_caption & of_caption) | (~q_caption & of_prefix))


def dense_mask(queries: TokenRoles, keys: TokenRoles, isolate_prefix: bool) -> Tensor:
    """The mask as (B, Q, K) bool."""
    q_sample, q_region, q_caption = (field[:, :, None] for field in queries)
    k_sample, k_region, k_caption = (field[:, None, :] for field in keys)
    return may_attend((q_sample, q_region, q_caption), (k_sample, k_region, k_caption), isolate_prefix)


def mask_mod(queries: TokenRoles, keys: TokenRoles, isolate_prefix: bool) -> Callable[..., Tensor]:
    """The mask as FlexAttention asks for it, one pair of tokens at a time."""

    def mod(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query = (queries.sample_BL[b, q], queries.region_BL[b, q], queries.caption_BL[b, q])
        key = (keys.sample_BL[b, k], keys.region_BL[b, k], keys.caption_BL[b, k])
        return may_attend(query, key, isolate_prefix)

    return mod


class AttentionMask:
    """A mask in the form of one attention kernel, made once for all layers and heads.

    Args:
        queries: roles of the queries.
        keys: roles of the keys.
        isolate_prefix: see `may_attend`.
        kernel: "sdpa": a mask of (B, 1, Q, K) that is added to the scores, or none where on the CPU all may
            attend to all. "flex_attention": blocks of 128 x 128, compiled on a GPU, where no (Q, K) tensor is
            made.
    """

    def __init__(self, queries: TokenRoles, keys: TokenRoles, isolate_prefix: bool, kernel: str = "sdpa"):
        self.queries, self.keys, self.isolate_prefix, self.kernel = queries, keys, isolate_prefix, kernel
        if kernel == "flex_attention":
            self.mask = _block_mask(queries, keys, isolate_prefix)
        elif kernel == "sdpa":
            mask = dense_mask(queries, keys, isolate_prefix)[:, None]
            # Not asked on GPUs, whose host would wait for the answer.
            self.mask = None if mask.is_cpu and bool(mask.all()) else mask
        else:
            raise ValueError(f"unknown attention kernel {kernel!r}; choose 'sdpa' or 'flex_attention'")

    def for_queries(self, tokens: slice) -> AttentionMask:
        """The mask of some of the queries."""
        part = copy.copy(self)
        part.queries = self.queries.at((slice(None), tokens))
        if self.kernel == "flex_attention":
            part.mask = _block_mask(part.queries, self.keys, self.isolate_prefix)
        elif self.mask is not None:
            part.mask = self.mask[:, :, tokens]
        return part

    def pick(self, rows: Tensor | None, tokens_BQ: Tensor | None = None) -> AttentionMask:
        """The mask of some sequences, None for all of them, and of some queries of each. For "sdpa" alone."""
        part = copy.copy(self)
        if part.mask is not None and rows is not None:
            part.mask = part.mask[rows]
        if part.mask is not None and tokens_BQ is not None:
            index_B1Q1 = tokens_BQ[:, None, :, None]
            part.mask = part.mask.gather(2, index_B1Q1.expand(-1, -1, -1, part.mask.shape[3]))
        return part

    def prepare(self, dtype: torch.dtype) -> None:
        """Turn the mask into what is added to scores of a type, once for all layers.

        This cannot happen inside a layer: a compiled layer under activation checkpointing would find a
        changed mask when it computes its forward pass again.
        """
        if self.kernel == "sdpa" and self.mask is not None and self.mask.dtype == torch.bool:
            self.mask = torch.zeros_like(self.mask, dtype=dtype).masked_fill_(~self.mask, -torch.inf)

    def attend(self, q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor) -> Tensor:
        """Attention under this mask: (B, H, Q, D). Fewer heads of keys than of queries are shared evenly."""
        grouped = q_BHQD.shape[1] != k_BHKD.shape[1]
        if self.kernel == "flex_attention":
            attend = _flex_attention(q_BHQD.device.type)
            return attend(q_BHQD, k_BHKD, v_BHKD, block_mask=self.mask, enable_gqa=grouped)
        return functional.scaled_dot_product_attention(
            q_BHQD, k_BHKD, v_BHKD, attn_mask=self.mask, enable_gqa=grouped
        )


def _block_mask(queries: TokenRoles, keys: TokenRoles, isolate_prefix: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, num_queries = queries.sample_BL.shape
    device = queries.sample_BL.device
    return create_block_mask(
        mask_mod(queries, keys, isolate_prefix),
        batch,
        None,
        num_queries,
        keys.sample_BL.shape[1],
        device=device,
        _compile=device.type == "cuda",
    )


@cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
