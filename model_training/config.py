"""What a PerceptionDLM is: sizes, token ids, and its layout as named options.

A layout is data. `reference` is what published weights were trained with, quirks included; `corrected` is
what the paper describes and the default for new training. Each difference is an option of its own, so that
its effect can be measured apart from the others.

| option | reference | corrected |
| --- | --- | --- |
| `roi_tiles` | `all_but_first`: the thumbnail is taken for the last real tile, all shift by one | `real` |
| `roi_divisor`, `roi_divisor_training` | 32 and 28: coordinates, already in cells, are divided again | 1 |
| `box_edges` | `inclusive`: the far edge is the last pixel | `exclusive`: one past it |
| `mask_resize` | `bicubic`: rings at edges, overshoot is cut | `area`: the covered share of each pixel |
| `patch_rule` | `corner`: its top-left pixel marks a patch; a small region may get none | `overlap`, below |
| `replay_newlines` | `hidden`: captions do not see the newlines between replayed regions | `shared` |
| `isolate_prefix` | no: the prompt attends to captions, so captions influence each other | yes |
| `caption_end` | `last`: newlines between captions, one end of text after all | `each`: one in every block |
| `block_positions` | `running`: positions 0..L-1 | `running`; `restart`: all blocks start at the same one |

`overlap`: a region marks the patches that it covers at least half as much as the one it covers most.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig

LAYOUTS: dict[str, dict[str, Any]] = {
    "reference": {
        "roi_tiles": "all_but_first",
        "roi_divisor": 32.0,
        "roi_divisor_training": 28.0,
        "box_edges": "inclusive",
        "mask_resize": "bicubic",
        "patch_rule": "corner",
        "replay_newlines": "hidden",
        "isolate_prefix": False,
        "caption_end": "last",
        "block_positions": "running",
    },
    "corrected": {
        "roi_tiles": "real",
        "roi_divisor": 1.0,
        "roi_divisor_training": 1.0,
        "box_edges": "exclusive",
        "mask_resize": "area",
        "patch_rule": "overlap",
        "replay_newlines": "shared",
        "isolate_prefix": True,
        "caption_end": "each",
        "block_positions": "running",
    },
}

CHOICES = {
    "roi_tiles": ("all_but_first", "real"),
    "box_edges": ("inclusive", "exclusive"),
    "mask_resize": ("bicubic", "area"),
    "patch_rule": ("corner", "overlap"),
    "replay_newlines": ("hidden", "shared"),
    "caption_end": ("last", "each"),
    "block_positions": ("running", "restart"),
}


@strict
class LladaConfig(PreTrainedConfig):
    """Sizes of the language model. The defaults are LLaDA-8B's."""

    model_type = "perceptiondlm_llada"
    base_config_key = "text_config"

    vocab_size: int = 126464
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    rope_base: float = 5e5
    rms_norm_eps: float = 1e-5


@strict
class PerceptionDLMConfig(PreTrainedConfig):
    """Sizes, token ids and layout of a PerceptionDLM. The defaults are the published model's sizes.

    Args:
        layout: `reference` or `corrected`; presets the options of the table above that are not given.
        vision_select_layer: the tower's output is that of this block, counted from the end; later blocks, the
            final norm and the pooling head are not built. -2: last but one.
        max_tiles: real tiles per image at most; an image of more than one tile has a thumbnail besides.
        num_prompts: regions that one sequence can mark; more are split into groups.
        replay_size: replayed tokens per region, (height, width).
        region_prompting: ablation; off: no region is marked in the image.
        feature_replay: ablation; off: a region's replay span is its one placeholder token.
        mask_token_id, eot_token_id: what the decoder fills, and what ends a caption.
    """

    model_type = "perceptiondlm"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "vision_config": SiglipVisionConfig,
        "text_config": LladaConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    layout: str = "corrected"

    roi_tiles: str | None = None
    roi_divisor: float | None = None
    roi_divisor_training: float | None = None
    box_edges: str | None = None
    mask_resize: str | None = None
    patch_rule: str | None = None
    replay_newlines: str | None = None
    isolate_prefix: bool | None = None
    caption_end: str | None = None
    block_positions: str | None = None

    region_prompting: bool = True
    feature_replay: bool = True

    vision_select_layer: int = -2
    max_tiles: int = 6
    num_prompts: int = 6
    replay_size: list[int] | tuple[int, int] = (4, 4)
    instruction: str = "Describe each masked region in detail."
    caption_length: int = 32
    mask_token_id: int = 126336
    eot_token_id: int = 126348
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _vision(self.vision_config)
        if not isinstance(self.text_config, LladaConfig):
            self.text_config = LladaConfig(**(self.text_config or {}))
        self.replay_size = tuple(self.replay_size)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: {self.layout!r} is none of {', '.join(LAYOUTS)}")
        for name, value in LAYOUTS[self.layout].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.vision_select_layer > -2 or -self.vision_select_layer > self.vision_config.num_hidden_layers:
            raise ValueError(
                f"vision_select_layer: {self.vision_select_layer} is not between -2 and "
                f"-{self.vision_config.num_hidden_layers}; the tower is read before its final norm"
            )
        if self.grid % 2 or self.vision_config.image_size % self.vision_config.patch_size:
            raise ValueError("vision_config: image_size must be an even number of patches")
        super().__post_init__(**kwargs)

    @property
    def tile_px(self) -> int:
        """Side of a tile, in pixels."""
        return self.vision_config.image_size

    @property
    def grid(self) -> int:
        """Patches along a tile's side."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of a tile, after the pixel unshuffle."""
        return (self.grid // 2) ** 2

    @property
    def replay_tokens(self) -> int:
        """Length of a region's replay span."""
        return self.replay_size[0] * self.replay_size[1] if self.feature_replay else 1


def _vision(given: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    so400m = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 512,
        "patch_size": 16,
    }
    return SiglipVisionConfig(**(so400m | (given or {})))


AutoConfig.register("perceptiondlm", PerceptionDLMConfig, exist_ok=True)
