"""A published GAR checkpoint: what its config says, and which tensors of which shape it must hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ....schemas.errors import ConfigError
from ...io import tensor_files, weights
from ...io.tensor_files import LazyTensor

if TYPE_CHECKING:
    import torch

TOWER = "mllm.model.vision_tower.timm_model."
PROJECTOR = "mllm.model.multi_modal_projector."
LANGUAGE = "mllm.model.language_model."
HEAD = "mllm.lm_head.weight"
MASK_WEIGHT = "mask_patch_embedding.weight"


class _Tower(NamedTuple):
    """What timm knows of an architecture by its name, and the config therefore leaves out."""

    width: int
    depth: int
    heads: int
    class_token: bool
    rope_offset: float


TOWERS = {
    "vit_pe_core_large_patch14_336": _Tower(1024, 24, 16, True, 1.0),
    "vit_pe_core_gigantic_patch14_448": _Tower(1536, 50, 16, False, 0.0),
}
"""The Perception Encoders of the published models: GAR-1B's and GAR-8B's. All have patches of 14."""

_PATCH = 14
_MODEL_ARGS = {"depth", "embed_dim", "global_pool", "img_size", "init_values", "num_heads", "ref_feat_shape"}
_MODEL_ARGS |= {"use_post_transformer_norm"}
_GAR_FIELDS = {
    *("architectures", "auto_map", "crop_tokens_ids", "dtype", "torch_dtype", "kernel_size"),
    *("mask_path_embedding_out_channels", "mllm_config", "model_type", "patch_size_h", "patch_size_w"),
    *("prompt_numbers", "transformers_version", "output_attentions", "use_cache"),
}
_BUFFERS = ("rotary_emb.inv_freq", "rope.pos_embed", "rope.bands")
"""Ends of the names of tables that some savers store, and that we compute."""


class GarConfig(NamedTuple):
    """What the checkpoint's JSON files say, as far as it decides what is computed.

    Attributes:
        folder: where it was read.
        tile_px: side of a tile.
        max_tiles: most tiles an image is cut into, the thumbnail not counted.
        patch_px: side of a patch.
        pooling: patches along a side that become one token.
        width, depth, heads: of the vision tower.
        class_token: whether the tower has one.
        rope_offset: added to the patches' grid coordinates.
        prompt_numbers: ids that a painted mask may have; this one is the background.
        crop_tokens: token ids of the places that are replaced by the region's replayed features, by prompt.
        image_token: token id of the places that the image's features take.
        text: the language model's own config (a Llama).
        dtype: name of the dtype that the weights were saved in.
        notes: fields we know nothing of.
    """

    folder: Path
    tile_px: int
    max_tiles: int
    patch_px: int
    pooling: int
    width: int
    depth: int
    heads: int
    class_token: bool
    rope_offset: float
    prompt_numbers: int
    crop_tokens: tuple[int, ...]
    image_token: int
    text: dict[str, Any]
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> int:
        """Patches along a tile's side."""
        return self.tile_px // self.patch_px

    @property
    def side(self) -> int:
        """Tokens along a tile's side."""
        return self.grid // self.pooling

    @property
    def hidden(self) -> int:
        """Width of the language model."""
        return self.text["hidden_size"]


def read_config(model: str | Path, what: str = "captioner.options.model") -> GarConfig:
    """Read a checkpoint's config.json and preprocessor_config.json.

    Raises:
        ConfigError: not a checkpoint, a pickle in it, or a config that asks for what we do not compute; names
            the file, the field and the fix.
    """
    folder = weights.folder(model, what)
    path = folder / "config.json"
    config = weights.read_json(path)
    if config.get("model_type") != "GAR":
        raise ConfigError(
            f"{path}: model_type is {config.get('model_type')!r}, not 'GAR'; give {what} a GAR checkpoint, "
            "such as GAR-1B or GAR-8B"
        )
    mllm = _get(config, "mllm_config", path)
    vision, text = _get(mllm, "vision_config", path), _get(mllm, "text_config", path)
    name, arguments = _get(vision, "architecture", path), vision.get("model_args") or {}
    if name not in TOWERS:
        raise ConfigError(f"{path}: vision architecture {name!r} is none of {sorted(TOWERS)}")
    tower = TOWERS[name]
    unknown = sorted(set(arguments) - _MODEL_ARGS)
    if unknown:
        raise ConfigError(
            f"{path}: vision_config.model_args has {unknown}, which would change what is computed, and "
            f"we only know {sorted(_MODEL_ARGS)}; use a published GAR checkpoint, or extend {__name__}"
        )
    processor_path = folder / "preprocessor_config.json"
    processor = weights.read_json(processor_path)
    tile = int(_get(processor, "tile_size", processor_path))
    found = GarConfig(
        folder=folder,
        tile_px=tile,
        max_tiles=int(_get(processor, "max_num_tiles", processor_path)),
        patch_px=_PATCH,
        pooling=int(mllm.get("projector_pooling_ratio", 1)),
        width=int(arguments.get("embed_dim", tower.width)),
        depth=int(arguments.get("depth", tower.depth)),
        heads=int(arguments.get("num_heads", tower.heads)),
        class_token=tower.class_token,
        rope_offset=tower.rope_offset,
        prompt_numbers=int(_get(config, "prompt_numbers", path)),
        crop_tokens=tuple(_get(config, "crop_tokens_ids", path)),
        image_token=int(_get(mllm, "image_token_id", path)),
        text=text,
        dtype=_dtype(config, text),
        notes=tuple(f"{path.name}: {field} is not used" for field in sorted(set(config) - _GAR_FIELDS)),
    )
    _refuse_others(found, config, processor)
    return found


def check_tensors(config: GarConfig) -> dict[str, LazyTensor]:
    """Check that every tensor is there in the shape that the config says, and no other one.

    Returns:
        The tensors by name, without tables that we compute ourselves.

    Raises:
        ConfigError: names the folder, the tensors and their files.
    """
    stored = tensor_files.list_tensors(config.folder)
    found = {name: tensor for name, tensor in stored.items() if not name.endswith(_BUFFERS)}
    wanted = _shapes(config, found)
    tensor_files.check_tensors(config.folder, found, wanted, {HEAD: None})
    return found


def load_into(module: torch.nn.Module, prefix: str, config: GarConfig, dtype: Any, device: str) -> None:
    """Fill a module built on the meta device with the checkpoint's tensors below `prefix`."""
    state = {
        name.removeprefix(prefix): tensor.load().to(device=device, dtype=dtype)
        for name, tensor in tensor_files.list_tensors(config.folder).items()
        if name.startswith(prefix) and not name.endswith(_BUFFERS)
    }
    module.load_state_dict(state, strict=True, assign=True)


def tensor(config: GarConfig, name: str, dtype: Any, device: str) -> torch.Tensor:
    """One tensor of the checkpoint by its full name."""
    return tensor_files.list_tensors(config.folder)[name].load().to(device=device, dtype=dtype)


def _refuse_others(found: GarConfig, config: dict[str, Any], processor: dict[str, Any]) -> None:
    """Raise ConfigError where the files ask for something other than what the published models compute."""
    path, processor_path = found.folder / "config.json", found.folder / "preprocessor_config.json"
    mllm = config["mllm_config"]
    text, arguments = found.text, mllm["vision_config"].get("model_args") or {}
    tile = found.tile_px
    grid = [found.grid, found.grid]
    _agree(path, "vision_config.model_args.img_size", arguments.get("img_size", [tile, tile]), [tile, tile])
    _agree(path, "vision_config.model_args.ref_feat_shape", arguments.get("ref_feat_shape", grid), grid)
    _agree(path, "vision_config.model_args.global_pool", arguments.get("global_pool", ""), "")
    norm = arguments.get("use_post_transformer_norm", False)
    _agree(path, "vision_config.model_args.use_post_transformer_norm", norm, False)
    _agree(path, "mllm_config.vision_use_cls_token", mllm.get("vision_use_cls_token"), found.class_token)
    _agree(path, "kernel_size", config.get("kernel_size", [_PATCH, _PATCH]), [_PATCH, _PATCH])
    _agree(path, "text_config.model_type", text.get("model_type"), "llama")
    _agree(path, "text_config.hidden_act", text.get("hidden_act", "silu"), "silu")
    for bias in ("attention_bias", "mlp_bias"):
        _agree(path, f"text_config.{bias}", bool(text.get(bias, False)), False)
    fixed = {"vision_input_type": "thumb+tile", "resample": 3, "do_center_crop": False}
    fixed |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for field, only in fixed.items():
        _agree(processor_path, field, processor.get(field, only), only)
    if tile % (_PATCH * found.pooling) or found.width % (4 * found.heads):
        raise ConfigError(
            f"{path}: a tile of {tile} px is not a whole number of {found.pooling} x {_PATCH} px, or "
            f"width {found.width} not a multiple of 4 x {found.heads} heads"
        )
    if len(found.crop_tokens) != found.prompt_numbers:
        raise ConfigError(f"{path}: {len(found.crop_tokens)} crop_tokens_ids, {found.prompt_numbers} prompts")


def _shapes(config: GarConfig, found: Mapping[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor. The width of the tower's MLP is nowhere in the config: block 0 decides."""
    width, hidden, text = config.width, config.hidden, config.text
    first = found.get(f"{TOWER}blocks.0.mlp.fc1.bias")
    mlp = first.shape[0] if first is not None else 4 * width
    tokens = config.grid**2 + config.class_token
    patch = (width, 3, config.patch_px, config.patch_px)
    shapes: dict[str, tuple[int, ...]] = {MASK_WEIGHT: patch}
    tower: dict[str, tuple[int, ...]] = {
        **({"cls_token": (1, 1, width)} if config.class_token else {}),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": patch,
        **{f"norm_pre.{end}": (width,) for end in ("weight", "bias")},
    }
    for block in range(config.depth):
        at = f"blocks.{block}."
        tower |= {f"{at}{norm}.{end}": (width,) for norm in ("norm1", "norm2") for end in ("weight", "bias")}
        tower |= {f"{at}gamma_1": (width,), f"{at}gamma_2": (width,)}
        sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        sizes |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
        for name, size in sizes.items():
            tower |= {f"{at}{name}.weight": size, f"{at}{name}.bias": size[:1]}
    shapes |= {TOWER + name: shape for name, shape in tower.items()}
    for name, size in {"linear_1": (hidden, width), "linear_2": (hidden, hidden)}.items():
        shapes |= {f"{PROJECTOR}{name}.weight": size, f"{PROJECTOR}{name}.bias": size[:1]}
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or hidden // heads
    query, key = heads * head_dim, (text.get("num_key_value_heads") or heads) * head_dim
    inner = text["intermediate_size"]
    layer = {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden)}
    layer |= {"self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query)}
    layer |= {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layer |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    for index in range(text["num_hidden_layers"]):
        shapes |= {f"{LANGUAGE}layers.{index}.{name}.weight": size for name, size in layer.items()}
    vocab = (text["vocab_size"], hidden)
    shapes |= {f"{LANGUAGE}embed_tokens.weight": vocab, f"{LANGUAGE}norm.weight": (hidden,)}
    if HEAD in found or not text.get("tie_word_embeddings", False):
        shapes[HEAD] = vocab
    return shapes


def _dtype(config: dict[str, Any], text: dict[str, Any]) -> str:
    for where in (config, text):
        for field in ("dtype", "torch_dtype"):
            if where.get(field):
                return str(where[field])
    return "bfloat16"


def _get(values: dict[str, Any], field: str, path: Path) -> Any:
    if values.get(field) is None:
        raise ConfigError(f"{path}: no {field}; use the file that came with the weights")
    return values[field]


def _agree(path: Path, field: str, value: Any, only: Any) -> None:
    if value != only:
        raise ConfigError(f"{path}: {field} is {value!r}; this model is only computed for {only!r}")
