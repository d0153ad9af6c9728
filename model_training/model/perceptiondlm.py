"""PerceptionDLM: regions are marked in the image, encoded once, replayed, and captioned all at once.

SigLIP 2 encodes the tiles with a prompt added to every patch of a region; two by two patches become a token
of the language model; each region's features are replayed as a few more tokens; and LLaDA, which attends in
both directions, predicts the masked tokens of all captions.

Shape suffixes: N views (tiles and thumbnails of all images), S side of a view in pixels, P region prompts, Q
patches of a view, C width of the vision tower, T tokens of a view, D width of the language model, I images, R
regions, W replayed tokens of a region, B batch, L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from . import published_layout
from .attention import AttentionMask, TokenRoles
from .batch import Images, Tokens
from .config import PerceptionDLMConfig
from .llada import LanguageModel
from .placement import device_of, fetched, upload
from .roi_align import roi_align


class VisionTower(nn.Module):
    """SigLIP 2 up to the selected layer, with the regions' prompts added to its patches."""

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__()
        tower, select = copy.deepcopy(config.vision), config.vision_select_layer
        tower._attn_implementation = "sdpa"  # the kernel that the model was loaded with is for our masks
        depth = tower.num_hidden_layers
        if not -depth <= select <= -1:
            raise ValueError(f"vision_select_layer: {select}; the tower has {depth} layers: -{depth} to -1")
        self.embeddings = SiglipVisionEmbeddings(tower)
        self.layers = nn.ModuleList(SiglipEncoderLayer(tower) for _ in range(depth + 1 + select))
        self.norm = nn.LayerNorm(tower.hidden_size, eps=tower.layer_norm_eps) if select == -1 else None

    def forward(self, x_N3SS: Tensor, prompt_NQC: Tensor | None) -> Tensor:
        """Features (N, Q, C) of views, with what is added to each of their patches."""
        x_NQC = self.embeddings.patch_embedding(x_N3SS).flatten(2).transpose(1, 2)
        if prompt_NQC is not None:  # the released code adds it after the positions, which is the same sum
            x_NQC = x_NQC + prompt_NQC
        with fetched(self.embeddings.position_embedding) as position_QC:
            x_NQC = x_NQC + position_QC
        for layer in self.layers:
            x_NQC = layer(x_NQC, None)
        return x_NQC if self.norm is None else self.norm(x_NQC)


class PerceptionDLM(PreTrainedModel):
    """The network.

    `encode_images` encodes images, once for all steps. `forward` is one denoising step: logits of sequences
    in which some tokens are masked. `decoding.region_captioner.RegionCaptioner` makes captions of them.
    """

    config: PerceptionDLMConfig
    config_class = PerceptionDLMConfig
    base_model_prefix = "model"
    main_input_name = "tokens"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer", "Layer"]
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: PerceptionDLMConfig):
        super().__init__(config)
        self.layout = config.resolved_layout()
        vision, text = config.vision, config.text
        self.region_prompts = nn.Embedding(config.num_prompts, vision.hidden_size)
        self.vision_tower = VisionTower(config)
        self.projector = nn.Sequential(
            nn.Linear(4 * vision.hidden_size, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        self.language_model = LanguageModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """LLaDA's and SigLIP's own scales; region prompts from N(0, 1) by default, as released."""
        super()._init_weights(module)
        if module is self.region_prompts:
            init.normal_(self.region_prompts.weight, std=self.config.region_prompt_std)
        positions = self.vision_tower.embeddings.position_embedding
        if module is positions:
            std = self.config.position_std
            init.normal_(positions.weight, std=positions.embedding_dim**-0.5 if std is None else std)

    def encode_images(self, images: Images) -> tuple[Tensor, Tensor | None]:
        """Encode images and replay their regions.

        Returns:
            Features (N, T, D) of every view, and (R, W, D) of every region; None without feature replay.
        """
        features_NTD = self.encode_views(images.views_N3SS, images.prompts_NPQ)
        if not self.config.feature_replay:
            return features_NTD, None
        return features_NTD, self.replay_regions(features_NTD, images)

    def encode_views(self, views_N3SS: Tensor, prompts_NPQ: Tensor) -> Tensor:
        """Features (N, T, D) of views: vision tower, two by two patches to a token, projector."""
        dtype = self.region_prompts.weight.dtype
        if not len(views_N3SS):
            # Text alone: a view of which nothing is kept, so that each rank runs each part.
            gray = views_N3SS.new_full((1, *views_N3SS.shape[1:]), 128)
            return self.encode_views(gray, prompts_NPQ.new_zeros((1, *prompts_NPQ.shape[1:])))[:0]
        # Rounded once, as the released code does: bfloat16 has not enough digits for the steps in between.
        wide_N3SS = views_N3SS.to(torch.promote_types(dtype, torch.float32))
        pixels_N3SS = wide_N3SS.div(255).sub(0.5).div(0.5).to(dtype)
        prompt_NQC = None
        if self.config.region_prompting:
            with fetched(self.region_prompts) as weight_PC:
                prompt_NQC = torch.einsum("npq,pc->nqc", prompts_NPQ.to(dtype), weight_PC)
        x_NQC = self.vision_tower(pixels_N3SS, prompt_NQC)
        return self.projector(pixel_unshuffle(x_NQC, self.config.patches_per_side))

    def replay_regions(self, features_NTD: Tensor, images: Images) -> Tensor:
        """Each region's features, sampled from its image's feature map on a grid over its box: (R, W, D)."""
        size, width = self.config.replay_size, features_NTD.shape[-1]
        side = self.config.patches_per_side // 2
        out_RWD = features_NTD.new_empty(len(images.boxes_R4), size * size, width)
        tiles_I = images.grids_I2.prod(dim=1)
        views_I = tiles_I + (tiles_I > 1)
        starts_I = views_I.cumsum(0) - views_I
        if self.layout.replay_map == "shifted":
            starts_I = starts_I + (tiles_I > 1)
        device = features_NTD.device
        for grid in images.grids_I2.unique(dim=0):  # maps of one shape at a time: 14 shapes at most
            across, down = grid.tolist()
            same_I = (images.grids_I2 == grid).all(dim=1).nonzero().flatten()
            views = (starts_I[same_I, None] + torch.arange(across * down)).flatten()
            maps = features_NTD[upload(views, device)].unflatten(1, (side, side))
            maps = maps.unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            regions = torch.isin(images.image_R, same_I).nonzero().flatten()
            place = upload(torch.searchsorted(same_I, images.image_R[regions]), device)
            cells = torch.tensor([across, down, across, down], dtype=torch.float32) * side
            regions = upload(regions, device)
            boxes = images.boxes_R4[regions].float() * upload(cells, device)
            maps = maps if maps.dtype == torch.float64 else maps.float()
            sampled = roi_align(maps, boxes.to(maps), place, size, self.layout.replay_scale)
            out_RWD[regions] = sampled.to(out_RWD.dtype)
        return out_RWD

    def embed(
        self, tokens: Tokens, features_NTD: Tensor | None = None, replay_RWD: Tensor | None = None
    ) -> Tensor:
        """Embeddings (B, L, D) of a batch, with the images' features and the regions' replay in their places.

        Raises:
            ValueError: the batch has not as many places for them as there are features.
        """
        x_BLD = self.language_model.embed_tokens(tokens.ids_BL)
        puts: list[tuple[str, Tensor, Tensor]] = []
        if features_NTD is not None:
            image_BL = tokens.ids_BL == self.config.image_token_id
            puts.append(("image", image_BL, features_NTD.flatten(0, 1)))
        if replay_RWD is not None:
            puts.append(("replay", tokens.roles.replay_BL(), replay_RWD.flatten(0, 1)))
        counts = torch.stack([places_BL.sum() for _, places_BL, _ in puts]).tolist() if puts else []
        for count, (what, places_BL, values_KD) in zip(counts, puts, strict=True):
            if count != len(values_KD):
                raise ValueError(f"{count} places for {len(values_KD)} {what} tokens")
            x_BLD = x_BLD.masked_scatter(places_BL[..., None], values_KD.to(x_BLD.dtype))
        return x_BLD

    def attention_mask(
        self, queries: TokenRoles, keys: TokenRoles, kernel: str | None = None
    ) -> AttentionMask:
        """Who attends to whom, for an attention kernel; by default the one that the model was loaded with."""
        kernel = kernel or self.config._attn_implementation or "sdpa"
        return AttentionMask(queries, keys, self.layout.isolate_prefix, kernel)

    def forward(
        self,
        tokens: Tokens,
        images: Images | None = None,
        inputs_embeds: Tensor | None = None,
        wanted_K: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V) of a batch, or (K, V) of some of its tokens.

        Args:
            tokens: the sequences, masked tokens among them.
            images: what the sequences are about; None for text alone.
            inputs_embeds: (B, L, D), in place of `tokens.ids_BL` and `images`.
            wanted_K: int64, the tokens whose logits are asked for, by their places in the flattened (B, L);
                None for all of them.
        """
        x_BLD = inputs_embeds
        if x_BLD is None:
            x_BLD = self.embed(tokens, *(self.encode_images(images) if images is not None else ()))
        mask = self.attention_mask(tokens.roles, tokens.roles)
        x_BLD = self.language_model(x_BLD, tokens.position_BL, mask)
        return self.lm_head(x_BLD if wanted_K is None else x_BLD.flatten(0, 1)[wanted_K])

    @property
    def device(self) -> torch.device:
        """Where the model computes, also if `device_map` has offloaded some of its weights."""
        return device_of(self)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the language model."""
        return self.language_model.embed_tokens


def pixel_unshuffle(x_NQC: Tensor, side: int) -> Tensor:
    """Two by two patches side by side: (N, Q, C) to (N, Q / 4, 4C), the lower right patch last."""
    x = x_NQC.unflatten(1, (side // 2, 2, side // 2, 2))  # N, row, down, column, across, C
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


AutoConfig.register(PerceptionDLMConfig.model_type, PerceptionDLMConfig)
AutoModel.register(PerceptionDLMConfig, PerceptionDLM)
published_layout.register()
