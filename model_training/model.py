"""PerceptionDLM: a vision tower whose patches are marked with regions, and a bidirectional language model.

The order of the file is the order of computation: marked tiles -> vision tower -> projector -> replay of each
region's features -> language model under structured attention -> logits. Nothing here reads a file, tokenizes
or trains; see `processing` for what comes before and `decode` for what comes after.

Legend of shape suffixes:
    B rows           L positions of a row    Q positions that are computed   O of these, the wanted ones
    T tiles          S tile side, pixels     P patches of a tile             U tokens of a tile, projected
    N regions        K region prompts        I image tokens                  R replayed tokens
    C vision width   D model width           V vocabulary                    H heads, G for keys, width E
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torchvision.ops import roi_align
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from model_training import attention
from model_training.attention import Mask
from model_training.batch import Batch
from model_training.config import LladaConfig, PerceptionDLMConfig


def normalise(pixels_TCSS: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit pixels to -1..1, as SigLIP takes them."""
    return ((pixels_TCSS.float() / 255 - 0.5) / 0.5).to(dtype)


class VisionTower(nn.Module):
    """SigLIP 2 up to the block that is read; no final norm, no pooling head."""

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__()
        depth = config.vision_config.num_hidden_layers + config.vision_select_layer + 1
        if config.vision_config._attn_implementation is None:
            config.vision_config._attn_implementation = "sdpa"
        self.embeddings = SiglipVisionEmbeddings(config.vision_config)
        self.layers = nn.ModuleList(SiglipEncoderLayer(config.vision_config) for _ in range(depth))

    def forward(self, pixels_TCSS: Tensor, marks_TPC: Tensor | None) -> Tensor:
        """Features of every patch, TPC. The marks are added to the patch embeddings."""
        x_TPC = self.embeddings(pixels_TCSS)
        if marks_TPC is not None:
            x_TPC = x_TPC + marks_TPC
        for layer in self.layers:
            x_TPC = layer(x_TPC, attention_mask=None)
        return x_TPC


def unshuffle(x_TPC: Tensor) -> Tensor:
    """Four neighbouring patches become one token, TU(4C): top left, top right, bottom left, bottom right."""
    T, P, C = x_TPC.shape
    side = int(P**0.5)
    x = x_TPC.view(T, side // 2, 2, side // 2, 2, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(T, P // 4, 4 * C)


def feature_map(features_TUD: Tensor, grid: tuple[int, int], roi_tiles: str) -> Tensor:
    """An image's tiles side by side as one map, D x height x width in cells.

    Args:
        features_TUD: the features of one image's tiles, thumbnail last if there are several.
        grid: (columns, rows) of real tiles.
        roi_tiles: `real` leaves the thumbnail out. `all_but_first` leaves the first tile out instead, as the
            reference does: every place holds its neighbour's tile, the last one the thumbnail.
    """
    columns, rows = grid
    T, U, D = features_TUD.shape
    if T > 1:
        features_TUD = features_TUD[1:] if roi_tiles == "all_but_first" else features_TUD[:-1]
    side = int(U**0.5)
    tiles = features_TUD.reshape(rows, columns, side, side, D)
    return tiles.permute(4, 0, 2, 1, 3).reshape(D, rows * side, columns * side)


def replay_regions(
    map_DYX: Tensor, boxes_N4: Tensor, size: tuple[int, int], divisor: float
) -> tuple[Tensor, Tensor]:
    """RoI-Align of every region on its image's map, in float32.

    Args:
        map_DYX: features, one vector a cell.
        boxes_N4: x1, y1, x2, y2 as shares of the image.
        size: tokens per region, (height, width).
        divisor: 1 samples the box. The reference divides the cell coordinates by 32 (28 in training) once
            more, so that only the top left corner of the map is sampled.

    Returns:
        (tokens N(height*width)D row by row, boxes in cells N4).
    """
    height, width = map_DYX.shape[-2:]
    cells_N4 = boxes_N4.float() * boxes_N4.new_tensor([width, height, width, height], dtype=torch.float32)
    out_NDyx = roi_align(
        map_DYX[None].float(), [cells_N4], size, spatial_scale=1 / divisor, sampling_ratio=2, aligned=True
    )
    return out_NDyx.flatten(2).mT.to(map_DYX.dtype), cells_N4


class RmsNorm(nn.Module):
    """Statistics in float32, rounded to the model's dtype before the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BQD: Tensor) -> Tensor:
        x = x_BQD.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).to(x_BQD.dtype)


def rotary(positions_BQ: Tensor, head_width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, BQ1E; angles in float32, results in the model's dtype."""
    steps = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions_BQ.device)
    angles = positions_BQ[..., None].float() * (1.0 / base ** (steps / head_width))
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BQHE: Tensor, cos_BQ1E: Tensor, sin_BQ1E: Tensor) -> Tensor:
    """Rotary embedding: the two halves of a head are the two coordinates."""
    first, second = x_BQHE.chunk(2, -1)
    return x_BQHE * cos_BQ1E + torch.cat((-second, first), -1) * sin_BQ1E


class Cache:
    """Keys and values of whole rows, per layer, for calls that compute only some positions. For inference.

    Fill it by a call without `rows_BQ`; later calls write the positions they compute in place and attend to
    all. With `isolate_prefix` the prefix's entries stay exact while captions change; without, they age, and
    the next full call refreshes them.
    """

    def __init__(self) -> None:
        self.keys_BLGE: list[Tensor] = []
        self.values_BLGE: list[Tensor] = []

    def update(
        self, layer: int, rows_BQ: Tensor | None, k_BQGE: Tensor, v_BQGE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; returns those of the whole rows."""
        if rows_BQ is None:
            del self.keys_BLGE[layer:], self.values_BLGE[layer:]
            self.keys_BLGE.append(k_BQGE)
            self.values_BLGE.append(v_BQGE)
        else:
            row = torch.arange(len(rows_BQ), device=rows_BQ.device)[:, None]
            self.keys_BLGE[layer][row, rows_BQ] = k_BQGE
            self.values_BLGE[layer][row, rows_BQ] = v_BQGE
        return self.keys_BLGE[layer], self.values_BLGE[layer]


class Attention(nn.Module):
    """Multi-head attention with rotary positions, without biases and without causality."""

    def __init__(self, config: LladaConfig, layer: int):
        super().__init__()
        width, self.layer = config.hidden_size, layer
        self.head_width = width // config.num_attention_heads
        keys = config.num_key_value_heads * self.head_width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x_BQD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | None,
        rows_BQ: Tensor | None,
        out_BO: Tensor | None,
    ) -> Tensor:
        heads = (*x_BQD.shape[:2], -1, self.head_width)
        k_BLGE = rotate(self.k_proj(x_BQD).view(heads), *cos_sin)
        v_BLGE = self.v_proj(x_BQD).view(heads)
        if cache is not None:
            k_BLGE, v_BLGE = cache.update(self.layer, rows_BQ, k_BLGE, v_BLGE)
        if out_BO is not None:
            x_BQD, cos_sin = take(x_BQD, out_BO), tuple(take(x, out_BO) for x in cos_sin)
        heads = (*x_BQD.shape[:2], -1, self.head_width)
        q_BQHE = rotate(self.q_proj(x_BQD).view(heads), *cos_sin)
        return self.o_proj(attention.attend(q_BQHE, k_BLGE, v_BLGE, mask).flatten(2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LladaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BQD: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x_BQD)) * self.up_proj(x_BQD))


class Block(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: LladaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(
        self,
        x_BQD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | None = None,
        rows_BQ: Tensor | None = None,
        out_BO: Tensor | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BQD), cos_sin, mask, cache, rows_BQ, out_BO)
        x_BQD = (x_BQD if out_BO is None else take(x_BQD, out_BO)) + attended
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))


class Language(nn.Module):
    """LLaDA: a bidirectional transformer."""

    def __init__(self, config: LladaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BQD: Tensor,
        positions_BQ: Tensor,
        mask: Mask,
        *,
        cache: Cache | None = None,
        rows_BQ: Tensor | None = None,
        out_BO: Tensor | None = None,
        out_mask: Mask | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, BQD, or BOD of the wanted ones.

        Args:
            x_BQD: embeddings of the positions to compute.
            positions_BQ: their places for the rotary embedding.
            mask: queries Q against all L keys, from `PerceptionDLM.mask`.
            cache: filled if `rows_BQ` is None, else read and written at these rows.
            rows_BQ: which positions x_BQD are; None: all, in order. A row that has fewer repeats one of its.
            out_BO: the wanted ones, as indices into Q; the last block computes no others. None: all.
            out_mask: queries O against all keys; goes with `out_BO`.
        """
        head_width = self.config.hidden_size // self.config.num_attention_heads
        cos_sin = rotary(positions_BQ, head_width, self.config.rope_base, x_BQD.dtype)
        for layer in self.layers[:-1]:
            x_BQD = layer(x_BQD, cos_sin, mask, cache, rows_BQ)
        last_mask = mask if out_BO is None else out_mask
        return self.norm(self.layers[-1](x_BQD, cos_sin, last_mask, cache, rows_BQ, out_BO))


class PerceptionDLM(PreTrainedModel):
    """Captions every region of an image at once.

    A decoder uses the parts: `embed` (vision, projector, replay, token embeddings) and `mask` once, then per
    step `embed_tokens` of what changed, `language`, and `head` of the open slots. `forward` does it all.
    """

    config_class = PerceptionDLMConfig
    base_model_prefix = ""
    main_input_name = "batch"
    _no_split_modules = ["SiglipEncoderLayer", "Block"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__(config)
        vision_width, width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.prompt_embedding = nn.Embedding(config.num_prompts, vision_width)
        self.vision = VisionTower(config)
        self.projector = nn.Sequential(nn.Linear(4 * vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.language = Language(config.text_config)
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def marks(self, prompts_TPK: Tensor) -> Tensor | None:
        """What is added to each patch's embedding, TPC: the prompts of the regions on it. Overlaps add up."""
        if not self.config.region_prompting:
            return None
        return prompts_TPK.to(self.prompt_embedding.weight.dtype) @ self.prompt_embedding.weight

    def image_features(self, pixels_TCSS: Tensor, prompts_TPK: Tensor) -> Tensor:
        """Tokens of every tile at the language model's width, TUD."""
        x_TPC = self.vision(normalise(pixels_TCSS, self.dtype), self.marks(prompts_TPK))
        return self.projector(unshuffle(x_TPC))

    def replay(self, features_TUD: Tensor, batch: Batch) -> Tensor:
        """The replayed tokens of every region of the batch, RD."""
        config = self.config
        divisor = config.roi_divisor_training if self.training else config.roi_divisor
        tiles = [w * h + (w * h > 1) for w, h in batch.grids]
        replayed = [
            replay_regions(feature_map(f_TUD, grid, config.roi_tiles), b_N4, config.replay_size, divisor)[0]
            for f_TUD, grid, b_N4 in zip(
                features_TUD.split(tiles), batch.grids, batch.boxes_N4.split(batch.regions), strict=True
            )
        ]
        return torch.cat(replayed).flatten(0, 1)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids, of any shape."""
        return self.language.embed_tokens(ids)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings BLD: tokens, with image features and replayed features in their places."""
        x_BLD = self.embed_tokens(batch.input_ids_BL)
        B, L, D = x_BLD.shape
        features_TUD = self.image_features(batch.pixels_TCSS, batch.prompts_TPK)
        x_XD = x_BLD.flatten(0, 1).index_copy(0, batch.image_at_I, features_TUD.flatten(0, 1).to(x_BLD.dtype))
        if self.config.feature_replay:
            x_XD = x_XD.index_copy(0, batch.replay_at_R, self.replay(features_TUD, batch).to(x_BLD.dtype))
        return x_XD.view(B, L, D)

    def mask(self, batch: Batch, rows_BQ: Tensor | None = None, kind: str | None = None) -> Mask:
        """Attention of some positions (None: all) to whole rows. Build it once, not once a step.

        Args:
            batch: for its structure and device.
            rows_BQ: positions that attend.
            kind: `flex` or `sdpa`; None: `flex` on a GPU.
        """
        keys = batch.structure
        queries = keys if rows_BQ is None else keys.at(rows_BQ)
        kind = kind or ("flex" if batch.input_ids_BL.is_cuda else "sdpa")
        return attention.build(queries, keys, self.config.isolate_prefix, kind, self.dtype)

    def head(self, h_BOD: Tensor) -> Tensor:
        """Logits BOV in float32. The product is in the model's dtype. Hand in the wanted positions only."""
        return self.lm_head(h_BOD).float()

    def forward(self, batch: Batch, out_BO: Tensor | None = None) -> Tensor:
        """Logits in float32, BOV: of the positions out_BO of each row, or of all, BLV."""
        mask = self.mask(batch)
        out_mask = None if out_BO is None else self.mask(batch, out_BO)
        h_BOD = self.language(self.embed(batch), batch.positions_BL, mask, out_BO=out_BO, out_mask=out_mask)
        return self.head(h_BOD)


def take(x_BQ___: Tensor, at_BO: Tensor) -> Tensor:
    """Rows `at_BO` of axis 1."""
    return x_BQ___[torch.arange(len(at_BO), device=at_BO.device)[:, None], at_BO]


AutoModel.register(PerceptionDLMConfig, PerceptionDLM, exist_ok=True)
