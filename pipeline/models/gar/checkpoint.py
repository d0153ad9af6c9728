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
    image_px: int
    patch_px: int = 14


TOWERS = {
    "vit_pe_core_large_patch14_336": _Tower(1024, 24, 16, True, 1.0, 336),
    "vit_pe_core_gigantic_patch14_448": _Tower(1536, 50, 16, False, 0.0, 448),
}
"""The Perception Encoders of the published models: GAR-1B's and GAR-8B's."""

_MODEL_ARGS = {"depth", "embed_dim", "global_pool", "img_size", "init_values", "num_heads", "ref_feat_shape"}
_MODEL_ARGS |= {"use_post_transformer_norm", "patch_size", "mlp_ratio"}
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
        mlp_inner: width of the tower's MLPs; None where the config leaves it to the tensors.
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
    mlp_inner: int | None
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
        raise ConfigError(f"{path}: vision architecture {name!r} is not one of {sorted(TOWERS)}")
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
    width, ratio = int(arguments.get("embed_dim", tower.width)), arguments.get("mlp_ratio")
    found = GarConfig(
        folder=folder,
        tile_px=tile,
        max_tiles=int(_get(processor, "max_num_tiles", processor_path)),
        patch_px=_square(
            path, "vision_config.model_args.patch_size", arguments.get("patch_size", tower.patch_px)
        ),
        mlp_inner=None if ratio is None else int(width * ratio),  # rounded as timm does
        pooling=int(mllm.get("projector_pooling_ratio", 1)),
        width=width,
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
    _refuse_others(found, config, processor, tower)
    sides = folder / "processor_config.json"
    if sides.is_file():
        _agree_on_sides(sides, weights.read_json(sides), found)
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
    """Fill a module built on the meta device with the checkpoint's tensors below `prefix`.

    Raises:
        ConfigError: a weight is NaN or infinite.
    """
    state = {
        name.removeprefix(prefix): tensor_files.finite(name, tensor).load().to(device=device, dtype=dtype)
        for name, tensor in tensor_files.list_tensors(config.folder).items()
        if name.startswith(prefix) and not name.endswith(_BUFFERS)
    }
    module.load_state_dict(state, strict=True, assign=True)


def tensor(config: GarConfig, name: str, dtype: Any, device: str) -> torch.Tensor:
    """One tensor of the checkpoint by its full name.

    Raises:
        ConfigError: a weight is NaN or infinite.
    """
    found = tensor_files.list_tensors(config.folder)[name]
    return tensor_files.finite(name, found).load().to(device=device, dtype=dtype)


def _refuse_others(
    found: GarConfig, config: dict[str, Any], processor: dict[str, Any], tower: _Tower
) -> None:
    """Raise ConfigError where the files ask for something other than what the published models compute."""
    path, processor_path = found.folder / "config.json", found.folder / "preprocessor_config.json"
    mllm = config["mllm_config"]
    text, arguments = found.text, mllm["vision_config"].get("model_args") or {}
    tile = found.tile_px
    for field, default, only in (
        ("img_size", tower.image_px, tile),
        ("ref_feat_shape", tower.image_px // tower.patch_px, found.grid),
    ):
        name = f"vision_config.model_args.{field}"
        if _square(path, name, arguments.get(field, default)) != only:
            _agree(path, name, arguments.get(field, [default, default]), [only, only])
    _agree(path, "vision_config.model_args.global_pool", arguments.get("global_pool", ""), "")
    norm = arguments.get("use_post_transformer_norm", False)
    _agree(path, "vision_config.model_args.use_post_transformer_norm", norm, False)
    _agree(path, "mllm_config.vision_use_cls_token", mllm.get("vision_use_cls_token"), found.class_token)
    _agree_on_patches(found, config, mllm["vision_config"])
    _agree(path, "text_config.model_type", text.get("model_type"), "llama")
    _agree(path, "text_config.hidden_act", text.get("hidden_act", "silu"), "silu")
    for bias in ("attention_bias", "mlp_bias"):
        _agree(path, f"text_config.{bias}", bool(text.get(bias, False)), False)
    fixed = {"vision_input_type": "thumb+tile", "resample": 3, "do_center_crop": False}
    fixed |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    fixed |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    for field, only in fixed.items():
        given = processor.get(field)
        _agree(processor_path, field, only if given is None else given, only)
    if abs((processor.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
        _agree(processor_path, "rescale_factor", processor["rescale_factor"], 1 / 255)
    if tile % (found.patch_px * found.pooling) or found.width % (4 * found.heads):
        raise ConfigError(
            f"{path}: a tile of {tile} px is not a whole number of {found.pooling} x {found.patch_px} px, or "
            f"width {found.width} not a multiple of 4 x {found.heads} heads; use "
            "the file that came with the weights"
        )
    if len(found.crop_tokens) != found.prompt_numbers:
        raise ConfigError(
            f"{path}: {len(found.crop_tokens)} crop_tokens_ids, but {found.prompt_numbers} prompts; use the "
            "file that came with the weights"
        )


def _agree_on_patches(found: GarConfig, config: dict[str, Any], vision: dict[str, Any]) -> None:
    """Refuse a mask embedding or a tower whose sizes, named more than once, are not those of the tower."""
    path, patch = found.folder / "config.json", found.patch_px
    for field in ("kernel_size", "patch_size_h", "patch_size_w"):
        given = config.get(field)
        if given is not None and _square(path, field, given) != patch:
            raise ConfigError(
                f"{path}: {field} is {given!r}, the vision tower's patch_size {patch}; masks are added to "
                "its patches, so they have to be equal: use the file that came with the weights"
            )
    for where, field in ((config, "mask_path_embedding_out_channels"), (vision, "num_features")):
        if where.get(field) is not None:
            _agree(path, field, where[field], found.width)


def _agree_on_sides(path: Path, sides: dict[str, Any], found: GarConfig) -> None:
    """Refuse a processor that counts other patches of a tile than the model has."""
    for field, only in (("patch_size", found.patch_px), ("pooling_ratio", found.pooling)):
        if sides.get(field) is not None:
            _agree(path, field, sides[field], only)


def _square(path: Path, field: str, value: Any) -> int:
    """A side in whole pixels, given by itself or twice."""
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if len(set(sides)) != 1 or len(sides) > 2 or type(sides[0]) is not int or sides[0] < 1:
        raise ConfigError(f"{path}: {field} is {value!r}; only square sizes are supported")
    return sides[0]


def _shapes(config: GarConfig, found: Mapping[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor. If the width of the tower's MLP is not in the config, block 0 decides."""
    width, hidden, text = config.width, config.hidden, config.text
    first = found.get(f"{TOWER}blocks.0.mlp.fc1.bias")
    mlp = config.mlp_inner or (first.shape[0] if first is not None else 4 * width)
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
        raise ConfigError(f"{path}: {field} is {value!r}; only {only!r} is supported")
