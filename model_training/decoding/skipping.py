"""Predictions on CPUs: only of regions whose predictions a step selects from and could have changed.

Shape suffixes: B rows, N regions of a row, S slots of a region, L tokens of a caption, R some of the rows, M
regions that are computed, K slots that are predicted, D width.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..model.attention import PADDING, AttentionMask, TokenRoles, join_roles
from ..model.llada import KVCache
from .refresh import RefreshedCache
from .rows import Rows
from .selection import predicted_slots


class Skipping:
    """Steps on rows that compute as little as they can. It works on tensors of the CPU."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.kv_cache: KVCache | None = None
        self.cached_R = np.arange(rows.bucket.num_rows)  # the rows in the cache
        self.mask: AttentionMask | None = None
        self.mask_of: tuple[Any, ...] = ()
        self.first: dict[int, Tensor] = {}  # hidden states (regions, L, D) of new rows, for their first step

    def prepare(self, places_A: Tensor, prefix_len: int) -> None:
        """Take notice of new rows, and fill an exact cache for them, see `Rows.prepare`.

        The pass that fills it is over whole sequences, so that the first step of these rows needs none.
        """
        self.mask_of = ()
        if self.rows.bucket.cache != "exact":
            return
        new = places_A.numpy()
        filled, fresh = KVCache(prefix_len, 0), KVCache(*self._places())
        regions = int((self.rows.roles.sample_BL[places_A] != PADDING).any(-1).sum(1).max())
        hidden_ANLD = self._pass_over_all(places_A, prefix_len, max(regions, 1), filled)
        self.first |= dict(zip(new.tolist(), hidden_ANLD, strict=True))
        if self.kv_cache is not None and np.isin(new, self.cached_R).all():
            self.kv_cache.put(torch.from_numpy(self._cached_at(new)), filled, len(self.cached_R))
            return
        fresh.put(torch.arange(len(new)), filled, len(new))
        if self.kv_cache is None:
            self.kv_cache, self.cached_R = fresh, new
            return
        stay_R = ~np.isin(self.cached_R, new)
        self.kv_cache = self.kv_cache.for_sequences(torch.from_numpy(stay_R)).join(fresh)
        self.cached_R = np.concatenate([self.cached_R[stay_R], new])

    def step(
        self, wanted_BN: np.ndarray, active_B: np.ndarray, whole_B: np.ndarray, uniform_BNS: Tensor | None
    ) -> None:
        """Predict the slots of some regions, and select.

        Args:
            wanted_BN: bool, the regions.
            active_B: bool, the rows with an open slot.
            whole_B: bool, the active rows to compute over their whole sequences, which fills their cache. The
                others are computed over captions alone.
            uniform_BNS: random numbers, for rows that are drawn.
        """
        rows = self.rows
        rows.receive(uniform_BNS)
        rows.fresh_B.copy_(torch.from_numpy(whole_B))
        if whole_B.any():
            wanted_of_whole_BN = wanted_BN & whole_B[:, None]
            self._predict(wanted_of_whole_BN, self._forward_all(wanted_of_whole_BN, active_B, whole_B))
        rest_BN = wanted_BN & ~whole_B[:, None]
        if self.first:
            known_BN = rest_BN & np.isin(np.arange(len(rest_BN)), list(self.first))[:, None]
            self._predict(known_BN, self._hidden_of_new(known_BN))
            rest_BN &= ~known_BN
            self.first = {}
        if rest_BN.any():
            self._predict(rest_BN, self._forward_captions(rest_BN, active_B))
        rows.settle()

    def _hidden_of_new(self, known_BN: np.ndarray) -> Tensor:
        """Hidden states (M, L, D) of regions in new rows, from the pass that filled their cache."""
        known = torch.from_numpy(known_BN)
        found = [hidden_NLD[known[row, : len(hidden_NLD)]] for row, hidden_NLD in sorted(self.first.items())]
        return torch.cat(found)

    def _predict(self, wanted_BN: np.ndarray, hidden_MLD: Tensor) -> None:
        """Tokens and doubts of the wanted regions from their hidden states."""
        rows = self.rows
        wanted = torch.from_numpy(wanted_BN)
        at_BNS = predicted_slots(rows.options, rows.open_BNS) & wanted[..., None]
        if at_BNS.any():
            hidden_KD = hidden_MLD[:, 1:-1][at_BNS[wanted]]
            token_K, doubt_K = rows.sample(hidden_KD, *rows.chances(at_BNS))
            rows.predicted_BNS[at_BNS] = token_K
            rows.doubt_BNS[at_BNS] = doubt_K

    def _forward_all(self, wanted_BN: np.ndarray, active_B: np.ndarray, whole_B: np.ndarray) -> Tensor:
        """Hidden states (M, L, D) of the wanted regions, from a pass over whole sequences."""
        bucket, chosen_R = self.rows.bucket, np.flatnonzero(whole_B)
        kv_cache = None if bucket.cache == "none" else self._cache_to_fill(chosen_R, active_B)
        rows_R = torch.from_numpy(chosen_R)
        hidden_RNLD = self._pass_over_all(rows_R, bucket.prefix_len, bucket.regions, kv_cache)
        return hidden_RNLD[torch.from_numpy(wanted_BN[chosen_R])]

    def _pass_over_all(
        self, rows_R: Tensor, prefix_len: int, regions: int, kv_cache: KVCache | None
    ) -> Tensor:
        """Hidden states (R, N, L, D) of the first captions of some rows, from a pass over whole sequences.

        Args:
            rows_R: the rows.
            prefix_len: tokens of the longest of their prefixes.
            regions: the number of captions, N.
            kv_cache: what the pass fills, if anything.
        """
        rows, front = self.rows, (rows_R, slice(prefix_len))
        parts = (rows.ids_BNL, rows.position_BNL, *rows.roles)
        ids, position, *captions = (part[rows_R, :regions].flatten(1, 2) for part in parts)
        x_RLD = torch.cat([rows.x_BPD[front], rows.model.language_model.embed_tokens(ids)], dim=1)
        position_RL = torch.cat([rows.prefix_position_BP[front], position], dim=1)
        roles = join_roles(rows.prefix_roles.at(front), TokenRoles(*captions))
        mask = self._mask(roles, roles, f"all from {prefix_len}, {regions}", rows_R.numpy())
        x_RLD = rows.model.language_model(x_RLD, position_RL, mask, slice(prefix_len, None), kv_cache)
        return x_RLD.unflatten(1, (regions, -1))

    def _cached_at(self, chosen_R: np.ndarray) -> np.ndarray:
        """Where some of the cached rows are in the cache."""
        order_R = np.argsort(self.cached_R)
        return order_R[np.searchsorted(self.cached_R, chosen_R, sorter=order_R)]

    def _cache_to_fill(self, chosen_R: np.ndarray, active_B: np.ndarray) -> RefreshedCache:
        """The cache that a pass over some rows fills: a new one, if no other row needs the old one."""
        cache = cast(RefreshedCache | None, self.kv_cache)
        if cache is None or len(chosen_R) == active_B.sum():
            cache = RefreshedCache(*self._places())
            self.kv_cache, self.cached_R = cache, chosen_R
            return cache
        new_R = chosen_R[~np.isin(chosen_R, self.cached_R)]
        if len(new_R):
            stay_R = active_B[self.cached_R]
            room = RefreshedCache(*self._places())
            shapes = [(keys, (len(new_R), *keys.shape[1:])) for keys, _ in cache.layers]
            room.layers = [(keys.new_zeros(shape), keys.new_zeros(shape)) for keys, shape in shapes]
            self.kv_cache = cache = cache.for_sequences(torch.from_numpy(stay_R)).join(room)
            self.cached_R = np.concatenate([self.cached_R[stay_R], new_R])
        cache.filling = True
        cache.rows_R = torch.from_numpy(self._cached_at(chosen_R))
        return cache

    def _places(self) -> tuple[int, int]:
        """Tokens of a row before its captions, and of its captions."""
        return self.rows.bucket.prefix_len, self.rows.ids_BNL[0].numel()

    def _forward_captions(self, wanted_BN: np.ndarray, active_B: np.ndarray) -> Tensor:
        """Hidden states (M, L, D) of the wanted regions, from a pass over their captions alone."""
        rows = self.rows
        assert self.kv_cache is not None, "the first pass is over whole sequences"
        going_R = active_B[self.cached_R]
        if going_R.sum() <= len(going_R) // 2:  # worth the copy of what stays cached
            self.kv_cache = self.kv_cache.for_sequences(torch.from_numpy(going_R))
            self.cached_R = self.cached_R[going_R]
        rows_R = torch.from_numpy(self.cached_R)
        wanted_RN = wanted_BN[self.cached_R]
        most = int(wanted_RN.sum(1).max())
        pick_RM = np.argsort(~wanted_RN, axis=1, kind="stable")[:, :most]
        real_RM = torch.from_numpy(np.take_along_axis(wanted_RN, pick_RM, 1))
        at = (rows_R[:, None], torch.from_numpy(pick_RM))
        parts = (part[at] for part in (rows.ids_BNL, rows.position_BNL, *rows.roles))
        ids, position, sample, region, caption = parts
        sample = sample.masked_fill(~real_RM[..., None], PADDING)
        roles = TokenRoles(sample.flatten(1), region.flatten(1), caption.flatten(1))
        keys = join_roles(rows.prefix_roles.at(rows_R), roles)
        mask = self._mask(roles, keys, "captions", self.cached_R, wanted_RN)
        x_RLD = rows.model.language_model.embed_tokens(ids.flatten(1))
        x_RLD = rows.model.language_model(x_RLD, position.flatten(1), mask, cache=self.kv_cache)
        order_R = torch.from_numpy(np.argsort(self.cached_R))  # rows that came later are last in the cache
        return x_RLD.unflatten(1, (most, -1))[order_R][real_RM[order_R]]

    def _mask(self, queries: TokenRoles, keys: TokenRoles, what: str, *chosen: np.ndarray) -> AttentionMask:
        """The mask for the chosen rows and regions; the last one again, if they are the same."""
        mask_of = (what, *(each.tobytes() for each in chosen))
        if self.mask is None or mask_of != self.mask_of:
            self.mask, self.mask_of = self.rows.model.attention_mask(queries, keys, "sdpa"), mask_of
        return self.mask
