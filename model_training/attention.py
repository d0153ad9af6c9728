"""Structured attention: one rule about region ids, as a dense mask (SDPA) and a block mask (FlexAttention).

Legend: B rows, Q queries, L keys, C distinct codes, M and N blocks of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

SHARED = 0
"""Region id of what every caption sees: prompt text and image tokens."""
HIDDEN = -(1 << 20)
"""Region id of what only the prompt sees: newlines between replay spans, in the reference layout."""

BLOCK = 128

Mask = Tensor | BlockMask
"""A BQL additive mask in the model's dtype (SDPA), or a BlockMask (FlexAttention)."""


class Structure(NamedTuple):
    """What decides who attends to whom, per position.

    Attributes:
        region_ids_BL: +i for the caption block of a sequence's i-th region (from 1), -i for its replay span,
            SHARED or HIDDEN for the rest.
        documents_BL: number of the sequence within a packed row; -1 for padding. Sequences do not see each
            other, and padding sees padding only, so that no row of the softmax is empty.
    """

    region_ids_BL: Tensor
    documents_BL: Tensor

    def at(self, rows_BQ: Tensor) -> Structure:
        """The structure of some positions."""
        return Structure(self.region_ids_BL.gather(1, rows_BQ), self.documents_BL.gather(1, rows_BQ))


def may_attend(
    region_q: Tensor, document_q: Tensor, region_k: Tensor, document_k: Tensor, isolate_prefix: bool
) -> Tensor:
    """The rule, elementwise: may a query attend to a key? Shapes broadcast.

    A caption sees the shared prefix, its own replay span and its own block. Everything else sees everything,
    or, with `isolate_prefix`, everything but captions. There is no causality.
    """
    caption = region_q > 0
    of_caption = (region_k == SHARED) | (region_k.abs() == region_q)
    of_prefix = (region_k <= 0) if isolate_prefix else torch.ones_like(of_caption)
    return (document_q == document_k) & torch.where(caption, of_caption, of_prefix)


def dense_mask(queries: Structure, keys: Structure, isolate_prefix: bool) -> Tensor:
    """The rule for all pairs: True where query Q may attend to key L. BQL bool."""
    return may_attend(
        queries.region_ids_BL[:, :, None],
        queries.documents_BL[:, :, None],
        keys.region_ids_BL[:, None, :],
        keys.documents_BL[:, None, :],
        isolate_prefix,
    )


def mask_mod(queries: Structure, keys: Structure, isolate_prefix: bool) -> Callable[..., Tensor]:
    """The rule as FlexAttention takes it."""
    region_BQ, document_BQ = queries
    region_BL, document_BL = keys

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return may_attend(
            region_BQ[b, q], document_BQ[b, q], region_BL[b, k], document_BL[b, k], isolate_prefix
        )

    return allowed


def block_mask(queries: Structure, keys: Structure, isolate_prefix: bool, block: int = BLOCK) -> BlockMask:
    """The rule as a BlockMask, without the Q x L mask in between.

    A block of positions holds few distinct codes (document and region). Which codes may attend to which is a
    small table; whether two blocks have any allowed pair, or no forbidden one, follows from the table and
    from which codes each block holds, as two matrix products.
    """
    codes_C2, codes_BQ, codes_BL = _codes(queries, keys)
    allowed_CC = may_attend(
        codes_C2[:, None, 1], codes_C2[:, None, 0], codes_C2[None, :, 1], codes_C2[None, :, 0], isolate_prefix
    )
    held_BMC = _held(codes_BQ, len(codes_C2), block)
    held_BNC = _held(codes_BL, len(codes_C2), block)
    some_BMN = held_BMC @ allowed_CC.float() @ held_BNC.mT > 0
    not_all_BMN = held_BMC @ (~allowed_CC).float() @ held_BNC.mT > 0
    q_whole_M = torch.arange(1, held_BMC.shape[1] + 1, device=some_BMN.device) * block <= codes_BQ.shape[1]
    k_whole_N = torch.arange(1, held_BNC.shape[1] + 1, device=some_BMN.device) * block <= codes_BL.shape[1]
    full_BMN = some_BMN & ~not_all_BMN & q_whole_M[:, None] & k_whole_N
    return BlockMask.from_kv_blocks(
        *_listed(some_BMN & ~full_BMN),
        *_listed(full_BMN),
        BLOCK_SIZE=block,
        mask_mod=mask_mod(queries, keys, isolate_prefix),
        seq_lengths=(codes_BQ.shape[1], codes_BL.shape[1]),
    )


def build(
    queries: Structure, keys: Structure, isolate_prefix: bool, kind: str, dtype: torch.dtype = torch.float32
) -> Mask:
    """The mask that `attend` takes, built once and used by every layer and head.

    Args:
        queries: structure of the rows that attend; `keys.at(rows)` for some of them.
        keys: structure of the whole rows.
        isolate_prefix: as the model's config has it.
        kind: `flex`, or `sdpa` (dense, and for that the reference).
        dtype: of the additive mask of `sdpa`; the model's.
    """
    if kind == "flex":
        return block_mask(queries, keys, isolate_prefix)
    assert kind == "sdpa", kind
    allowed_BQL = dense_mask(queries, keys, isolate_prefix)
    zero = torch.zeros((), dtype=dtype, device=allowed_BQL.device)
    return torch.where(allowed_BQL, zero, torch.finfo(dtype).min)


def attend(q_BQHE: Tensor, k_BLGE: Tensor, v_BLGE: Tensor, mask: Mask) -> Tensor:
    """Attention under a mask, by the kernel the mask is for. G key heads divide the H query heads. BQHE."""
    q, k, v = (x.transpose(1, 2) for x in (q_BQHE, k_BLGE, v_BLGE))
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, Tensor):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None], enable_gqa=grouped
        )
    else:
        out = _flex()(q, k, v, block_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


_compiled: Callable[..., Tensor] | None = None


def _flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once: uncompiled it would materialise the scores."""
    global _compiled
    if _compiled is None:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled = torch.compile(flex_attention, dynamic=None)
    return _compiled


def _codes(queries: Structure, keys: Structure) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct (document, region) pairs, and each position's index among them."""
    pairs = [torch.stack((s.documents_BL, s.region_ids_BL), -1) for s in (queries, keys)]
    (B, Q), L = queries.region_ids_BL.shape, keys.region_ids_BL.shape[1]
    codes_C2, index = torch.cat(pairs, 1).flatten(0, 1).unique(dim=0, return_inverse=True)
    index = index.view(B, Q + L)
    return codes_C2, index[:, :Q], index[:, Q:]


def _held(codes_BL: Tensor, num_codes: int, block: int) -> Tensor:
    """Which codes each block of positions holds. BMC float, 0 or 1."""
    B, L = codes_BL.shape
    blocks = -(-L // block)
    held = torch.zeros(B, blocks * num_codes, device=codes_BL.device)
    at = torch.arange(L, device=codes_BL.device) // block * num_codes
    return held.scatter_(1, at + codes_BL, 1.0).view(B, blocks, num_codes)


def _listed(chosen_BMN: Tensor) -> tuple[Tensor, Tensor]:
    """(count B1M, indices B1MN) of the chosen key blocks of each query block, the chosen ones first."""
    count = chosen_BMN.sum(-1, dtype=torch.int32)
    order = chosen_BMN.to(torch.uint8).argsort(-1, descending=True, stable=True)
    return count[:, None], order[:, None].to(torch.int32)
