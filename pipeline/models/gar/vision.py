"""The vision side of GAR: a Perception Encoder that sees masks, and the projector into the language model.

Shape suffixes: N tiles, P patches of a tile, S = P + class token, D tower width, H language width, h heads,
k head width, C colors, T tile side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...io import tensor_files
from ...io.transfers import upload
from . import checkpoint
from .checkpoint import GarConfig

_EPS = 1e-5


class Attention(nn.Module):
    """Self-attention with rotary positions on the patches; the class token has none."""

    def __init__(self, config: GarConfig):
        super().__init__()
        self.heads = config.heads
        self.skip = int(config.class_token)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_nsd: Tensor, cos_pk: Tensor, sin_pk: Tensor) -> Tensor:
        qkv = self.qkv(x_nsd).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_nhsk, k_nhsk, v_nhsk = qkv.unbind(0)
        q_nhsk = self._turn(q_nhsk, cos_pk, sin_pk)
        k_nhsk = self._turn(k_nhsk, cos_pk, sin_pk)
        mixed_nhsk = functional.scaled_dot_product_attention(q_nhsk, k_nhsk, v_nhsk)
        return self.proj(mixed_nhsk.transpose(1, 2).flatten(2))

    def _turn(self, x_nhsk: Tensor, cos_pk: Tensor, sin_pk: Tensor) -> Tensor:
        """Turn pairs of neighboring channels. The tables are float32: the sum is rounded only once."""
        first, patches = x_nhsk[:, :, : self.skip], x_nhsk[:, :, self.skip :]
        even, odd = patches[..., 0::2], patches[..., 1::2]
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        patches = (patches * cos_pk + turned * sin_pk).to(x_nhsk.dtype)
        return torch.cat([first, patches], dim=2) if self.skip else patches


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x_nsd: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x_nsd)))


class Block(nn.Module):
    def __init__(self, config: GarConfig, inner: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=_EPS)
        self.attn = Attention(config)
        self.gamma_1 = nn.Parameter(torch.empty(config.width))
        self.norm2 = nn.LayerNorm(config.width, eps=_EPS)
        self.mlp = Mlp(config.width, inner)
        self.gamma_2 = nn.Parameter(torch.empty(config.width))

    def forward(self, x_nsd: Tensor, cos_pk: Tensor, sin_pk: Tensor) -> Tensor:
        x_nsd = x_nsd + self.gamma_1 * self.attn(self.norm1(x_nsd), cos_pk, sin_pk)
        return x_nsd + self.gamma_2 * self.mlp(self.norm2(x_nsd))


class Tower(nn.Module):
    """Perception Encoder up to its last kept block, without the final norm and pooling head."""

    def __init__(self, config: GarConfig, inner: int):
        super().__init__()
        size, width = config.patch_px, config.width
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, size, size, bias=False)})
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2 + config.class_token, width))
        self.norm_pre = nn.LayerNorm(width, eps=_EPS)
        self.blocks = nn.ModuleList(Block(config, inner) for _ in range(config.depth))
        self.skip = int(config.class_token)

    def forward(self, x_nct: Tensor, mask_npd: Tensor | None, cos_pk: Tensor, sin_pk: Tensor) -> Tensor:
        x_npd = self.patch_embed["proj"](x_nct).flatten(2).transpose(1, 2)
        if mask_npd is not None:
            x_npd = x_npd + mask_npd
        if self.skip:
            x_npd = torch.cat([self.cls_token.expand(len(x_npd), -1, -1), x_npd], dim=1)
        x_nsd = self.norm_pre(x_npd + self.pos_embed)
        for block in self.blocks:
            x_nsd = block(x_nsd, cos_pk, sin_pk)
        return x_nsd[:, self.skip :]


class Projector(nn.Module):
    """Two layers on every patch, then the mean of each square of patches."""

    def __init__(self, config: GarConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.width, config.hidden)
        self.linear_2 = nn.Linear(config.hidden, config.hidden)
        self.grid, self.pooling = config.grid, config.pooling

    def forward(self, x_npd: Tensor) -> Tensor:
        x_nph = self.linear_2(functional.gelu(self.linear_1(x_npd)))
        map_nh = x_nph.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return functional.avg_pool2d(map_nh, self.pooling).flatten(2).transpose(1, 2)


class Vision(nn.Module):
    """Tiles and masks in, language model tokens out. Tiles do not see each other."""

    def __init__(self, config: GarConfig, inner: int):
        super().__init__()
        self.tower = Tower(config, inner)
        self.projector = Projector(config)
        self.mask = nn.Conv2d(3, config.width, config.patch_px, config.patch_px, bias=False)
        self.cos_pk, self.sin_pk = rope_tables(config)

    @torch.inference_mode()
    def forward(self, tiles_nct: Tensor, masks_nt: Tensor | None = None) -> Tensor:
        """Encode tiles.

        Args:
            tiles_nct: (N, 3, T, T) uint8.
            masks_nt: (N, T, T) bool, or None if there is none in any; an empty mask adds exactly nothing.

        Returns:
            (N, side * side, H) in the weights' dtype.
        """
        weight = self.mask.weight
        pixels = upload(tiles_nct, weight.device).to(torch.float32).sub_(127.5).div_(127.5)
        mask_npd = None
        if masks_nt is not None:
            masks = upload(masks_nt, weight.device).to(weight.dtype)[:, None].expand(-1, 3, -1, -1)
            mask_npd = self.mask(masks).flatten(2).transpose(1, 2)
        return self.projector(self.tower(pixels.to(weight.dtype), mask_npd, self.cos_pk, self.sin_pk))


def rope_tables(config: GarConfig) -> tuple[Tensor, Tensor]:
    """(cos, sin), (P, k) float32: of columns in the first half of the channels, of rows in the second."""
    bands = config.width // config.heads // 4
    frequency = 1.0 / 10_000.0 ** (torch.arange(bands, dtype=torch.float32) / bands)
    place = torch.arange(config.grid, dtype=torch.float32) + config.rope_offset
    angle = place[:, None] * frequency
    columns = angle[None].expand(config.grid, -1, -1)
    rows = angle[:, None].expand(-1, config.grid, -1)
    angles_pk = torch.cat([columns, rows], dim=-1).flatten(0, 1).repeat_interleave(2, dim=-1)
    return angles_pk.cos(), angles_pk.sin()


def load_vision(config: GarConfig, dtype: torch.dtype, device: str) -> Vision:
    """The checkpoint's vision side, in `dtype` on `device`; its tensors were checked before."""
    with torch.device("meta"):
        inner = tensor_files.list_tensors(config.folder)[f"{checkpoint.TOWER}blocks.0.mlp.fc1.bias"].shape[0]
        vision = Vision(config, inner)
    vision.cos_pk, vision.sin_pk = (table.to(device) for table in rope_tables(config))
    checkpoint.load_into(vision.tower, checkpoint.TOWER, config, dtype, device)
    checkpoint.load_into(vision.projector, checkpoint.PROJECTOR, config, dtype, device)
    checkpoint.load_into(vision.mask, checkpoint.MASK_WEIGHT.removesuffix("weight"), config, dtype, device)
    return vision.eval().requires_grad_(False)
