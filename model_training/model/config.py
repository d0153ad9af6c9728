"""The model's config, as transformers saves and loads it."""

from __future__ import annotations

from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig, SiglipVisionConfig

from .layout import Layout, resolve_layout


@strict
class PerceptionDLMConfig(PreTrainedConfig):
    """Sizes, layout and special tokens of a PerceptionDLM.

    The defaults are those of the published model. `text_config` describes LLaDA in Llama's terms; its
    attention is bidirectional.

    Attributes:
        vision_config: SigLIP's config, or its fields.
        text_config: the language model's config, or its fields.
        vision_select_layer: the hidden state that leaves the vision tower, counted after each block: -2 is
            that of the last block but one, -1 that of the last one, after the tower's final norm.
        num_prompts: how many regions one sequence can hold; each is marked in the image by its own prompt.
        replay_size: a region's features are sampled on a grid of this many points along each side.
        max_tiles: the most tiles that an image is cut into, not counting the thumbnail.
        region_prompting: whether regions are marked in the image. False is an ablation of the paper.
        feature_replay: whether regions' features are replayed. False is an ablation of the paper, in which
            one learned token stands for each region.
        layout: "corrected" for new training, "reference" for published weights.
        layout_options: options in which the layout differs from the named one, see `layout.Layout`.
        image_token_id: the token in whose place the image's features stand.
        mask_token_id: a token that is not decided yet.
        eot_token_id: the token that ends a caption.
        newline_token_id: the line break.
        region_token_ids: the tokens in whose place the replayed features of region 0, 1, ... stand.
        caption_token_ids: the tokens that open the caption of region 0, 1, ...
        region_prompt_std: standard deviation of new region prompts. The released code's 1 drowns the patches
            of a tower that is not trained yet.
        position_std: standard deviation of the positions of an untrained tower. None takes SigLIP's, which is
            one over the root of the width.
    """

    model_type = "perceptiondlm"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": LlamaConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_select_layer: int = -2
    num_prompts: int = 6
    replay_size: int = 4
    max_tiles: int = 6
    region_prompting: bool = True
    feature_replay: bool = True
    layout: str = "corrected"
    layout_options: dict | None = None
    image_token_id: int | None = None
    mask_token_id: int = 126336
    eot_token_id: int | None = None
    newline_token_id: int | None = None
    region_token_ids: list[int] | None = None
    caption_token_ids: list[int] | None = None
    initializer_range: float = 0.02
    region_prompt_std: float = 1.0
    position_std: float | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = SiglipVisionConfig(**(self.vision_config or _SIGLIP2_SO400M_512))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = LlamaConfig(**(self.text_config or _LLADA_8B))
        super().__post_init__(**kwargs)
        self.resolved_layout()

    @property
    def vision(self) -> SiglipVisionConfig:
        """`vision_config` as the constructor leaves it."""
        return cast(SiglipVisionConfig, self.vision_config)

    @property
    def text(self) -> LlamaConfig:
        """`text_config` as the constructor leaves it."""
        return cast(LlamaConfig, self.text_config)

    def resolved_layout(self) -> Layout:
        """The named layout with the options in which it differs.

        Raises:
            ConfigError: an unknown layout or option.
        """
        return resolve_layout(self.layout, self.layout_options)

    @property
    def tile_px(self) -> int:
        """Side of a tile in pixels."""
        return cast(int, self.vision.image_size)

    @property
    def patch_px(self) -> int:
        """Side of a patch in pixels."""
        return cast(int, self.vision.patch_size)

    @property
    def patches_per_side(self) -> int:
        """Patches along each side of a tile."""
        return self.tile_px // self.patch_px

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of a tile; two by two patches make one."""
        return (self.patches_per_side // 2) ** 2

    @property
    def replay_tokens(self) -> int:
        """Tokens that stand for a region before the captions."""
        return self.replay_size**2 if self.feature_replay else 1


_SIGLIP2_SO400M_512: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 512,
    "patch_size": 16,
}
_LLADA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 126464,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
