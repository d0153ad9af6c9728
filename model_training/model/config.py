"""The model's configuration, as transformers saves and loads it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig, SiglipVisionConfig

from .layout import Layout, resolve


@strict
class PerceptionDLMConfig(PreTrainedConfig):
    """Sizes, layout and special tokens of a PerceptionDLM.

    The defaults are the published model's. `text_config` describes LLaDA in Llama's terms; the attention is
    bidirectional.

    Attributes:
        vision_select_layer: which hidden state leaves the vision tower, counted after each block: -2 is the
            last but one block, -1 the last with the tower's final norm.
        num_prompts: regions that one sequence can hold: each is marked in the image by a prompt of its own.
        replay_size: a region's features are replayed as this many squared vectors.
        max_tiles: of an image, without the thumbnail.
        region_prompting: whether regions are marked in the image; False is an ablation of the paper.
        feature_replay: whether regions' features are replayed; False is an ablation of the paper: one learnt
            token stands for each region.
        layout: "corrected" for new training, "reference" for published weights.
        layout_options: options of the layout that differ from it, see `layout.Layout`.
        image_token_id: stands for the image's features.
        mask_token_id: a slot whose token is not decided yet.
        eot_token_id: ends a caption.
        newline_token_id: the line break by itself.
        region_token_ids: stand for the replayed features of region 0, 1, ...
        caption_token_ids: open the caption of region 0, 1, ...
        region_prompt_std: of new prompts. The original's 1 drowns the patches of an untrained tower.
        position_std: of an untrained tower's positions; None: SigLIP's, one over the root of the width.
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

    def resolved_layout(self) -> Layout:
        """The layout with its options.

        Raises:
            ConfigError: an unknown layout or option.
        """
        return resolve(self.layout, self.layout_options)

    @property
    def patches_per_side(self) -> int:
        """Of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Two by two patches make a token."""
        return (self.patches_per_side // 2) ** 2

    @property
    def replay_tokens(self) -> int:
        """Positions that stand for a region before the captions."""
        return self.replay_size**2 if self.feature_replay else 1


_SIGLIP2_SO400M_512 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 512,
    "patch_size": 16,
}
_LLADA_8B = {
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
