"""Checkpoints in and out: published PerceptionDLM and PerceptionDLM-Base, LLaDA with SigLIP 2, our layout.

Every tensor of a checkpoint is accounted for by name and shape before anything is written. Tensors are read,
renamed and written a shard at a time, never computed with, so a round trip gives the same bits.

What a published checkpoint holds and the model does not use (SigLIP's text tower, its last block and its
pooling head) is kept in `published/` beside ours, with the published config, for the way back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model_training.config import PerceptionDLMConfig
from model_training.model import PerceptionDLM
from model_training.processing import ADDED_TOKENS, EOT, MASK, PerceptionDLMProcessor
from schemas.errors import ConfigError

SHARD_BYTES = 2 << 30
KEPT = "published"
"""Folder of what only the published layout has."""

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

_SIGLIP = "vision_model."
_PUBLISHED = (
    ("vision_model.vision_model.embeddings.", "vision.embeddings."),
    ("vision_model.vision_model.encoder.layers.", "vision.layers."),
    ("vision_abstractor.projection.", "projector."),
    ("language_model.model.", "language."),
    ("language_model.lm_head.", "lm_head."),
    ("mask_id_embedding.", "prompt_embedding."),
)
_UNUSED = re.compile(
    r"vision_model\.(text_model\..*|logit_scale|logit_bias|vision_model\.(post_layernorm|head)\..*)"
)
_VISION_LAYER = re.compile(r"vision_model\.vision_model\.encoder\.layers\.(\d+)\.")
_LLADA_BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight")
_LLADA_PARTS = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LLADA_ENDS = {
    "model.transformer.wte.weight": "language.embed_tokens.weight",
    "model.transformer.ln_f.weight": "language.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}


class Converted(NamedTuple):
    """What a conversion did.

    Attributes:
        folder: the new checkpoint.
        tensors, bytes: of the model.
        initialised: tensors that the source does not have, drawn at random.
        unused: tensors of the source that the model does not use, kept for the way back.
    """

    folder: Path
    tensors: int
    bytes: int
    initialised: list[str]
    unused: list[str]


def from_published(source: Path, out: Path, layout: str = "reference", seed: int = 0) -> Converted:
    """A published PerceptionDLM or PerceptionDLM-Base to our layout.

    Args:
        source: folder with config.json, safetensors and tokenizer.
        out: folder to make; must not exist.
        layout: `reference` for weights to be used as they are; `corrected` to train them further.
        seed: of the region prompts' embedding, N(0, 1), which PerceptionDLM-Base lacks.

    Raises:
        ConfigError: a tensor or a file is missing, unknown or of another shape; names it. Nothing is left.
    """
    store = _Store(source)
    published = _json(source / "config.json")
    _check_pixels(source)
    config = _from_published_config(published, store, layout)
    found: dict[str, str] = {}
    unused = []
    for name in store.shapes:
        ours = _ours(name, config)
        if ours is None:
            unused.append(name)
        else:
            found[ours] = name
    drawn = {}
    if "prompt_embedding.weight" not in found:
        drawn["prompt_embedding.weight"] = lambda shape: torch.randn(shape, generator=_seeded(seed))
    with _made(out) as folder:
        tokenizer = _write_tokenizer(source, folder, config)
        config.mask_token_id, config.eot_token_id = tokenizer.convert_tokens_to_ids([MASK, EOT])
        config.dtype = store.dtype(found["lm_head.weight"]) if "lm_head.weight" in found else None
        size = _write(folder, config, {ours: (store, name) for ours, name in found.items()}, drawn, source)
        kept = folder / KEPT
        kept.mkdir()
        shutil.copyfile(source / "config.json", kept / "config.json")
        for name in ("preprocessor_config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, kept / name)
        _save(kept, {name: (lambda name=name: store.read(name), store.bytes(name)) for name in unused})
    return Converted(out, len(found) + len(drawn), size, sorted(drawn), unused)


def from_parts(
    language: Path, vision: Path, out: Path, layout: str = "corrected", seed: int = 0, **options: Any
) -> Converted:
    """LLaDA-8B-Instruct and SigLIP 2 to a model to train: projector and region prompts are drawn at random.

    Args:
        language: folder of LLaDA as its authors publish it.
        vision: folder of SigLIP 2, fixed resolution, both towers.
        out: folder to make; must not exist.
        layout: of the new model.
        seed: of what is drawn.
        options: more of the new model's config.

    Raises:
        ConfigError: as `from_published`.
    """
    words, eyes = _Store(language), _Store(vision)
    llada, siglip = _json(language / "config.json"), _json(vision / "config.json")
    _check_pixels(vision)
    config = PerceptionDLMConfig(
        layout=layout,
        vision_config=_known(siglip.get("vision_config", {}), PerceptionDLMConfig().vision_config.to_dict()),
        text_config=_from_llada_config(llada, words),
        **options,
    )
    found: dict[str, tuple[_Store, str]] = {}
    unused, strange = [], []
    for name in words.shapes:
        ours = _from_llada(name)
        if ours is None:
            strange.append(name)
        else:
            found[ours] = (words, name)
    if strange:
        raise _wrong(language, [], strange, [])
    for name in eyes.shapes:
        ours = _ours(_SIGLIP + name, config)
        if ours is None:
            unused.append(name)
        else:
            found[ours] = (eyes, name)
    generator = _seeded(seed)
    width = config.vision_config.hidden_size

    def linear(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator) * config.initializer_range

    drawn: dict[str, Callable[[torch.Size], Tensor]] = {
        "prompt_embedding.weight": lambda shape: torch.randn(shape, generator=generator) / width**0.5,
        "projector.0.weight": linear,
        "projector.0.bias": torch.zeros,
        "projector.2.weight": linear,
        "projector.2.bias": torch.zeros,
    }
    with _made(out) as folder:
        tokenizer = _write_tokenizer(language, folder, config)
        config.mask_token_id, config.eot_token_id = tokenizer.convert_tokens_to_ids([MASK, EOT])
        config.dtype = words.dtype("model.transformer.ff_out.weight")
        size = _write(folder, config, found, drawn, language)
        kept = folder / KEPT
        kept.mkdir()
        _save(
            kept, {_SIGLIP + name: (lambda name=name: eyes.read(name), eyes.bytes(name)) for name in unused}
        )
    return Converted(out, len(found) + len(drawn), size, sorted(drawn), unused)


def to_published(source: Path, out: Path, unused_from: Path | None = None, base: bool = False) -> Converted:
    """Our layout to the published one, for the reference implementation.

    Args:
        source: folder of one of our models, layout `reference`.
        out: folder to make; must not exist.
        unused_from: folder of our layout with `published/`, for a model saved without; default `source`.
        base: leave the region prompts out, as PerceptionDLM-Base does.

    Raises:
        ConfigError: the layout is not `reference`, or what only the published layout has is missing.
    """
    config = PerceptionDLMConfig.from_pretrained(source)
    if config.layout != "reference":
        raise ConfigError(
            f"{source / 'config.json'}: layout {config.layout!r}; the reference implementation would run "
            "these weights in its own layout, so only `reference` models are converted back"
        )
    store = _Store(source)
    _check_own(store, config, source)
    kept = (unused_from or source) / KEPT
    if not kept.is_dir():
        raise ConfigError(
            f"{kept}: not there; the published layout has tensors that the model does not "
            "use, name the converted model this one was trained from as `unused_from`"
        )
    rest = _Store(kept)
    names = {ours: _published(ours) for ours in store.shapes}
    if base:
        del names["prompt_embedding.weight"]
    tensors = {
        theirs: (lambda ours=ours: store.read(ours), store.bytes(ours)) for ours, theirs in names.items()
    }
    tensors |= {name: (lambda name=name: rest.read(name), rest.bytes(name)) for name in rest.shapes}
    with _made(out) as folder:
        for file in kept.iterdir():
            if file.suffix == ".json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if not (folder / "config.json").is_file():
            text = json.dumps(_published_config(config, store.dtype("lm_head.weight")), indent=2)
            (folder / "config.json").write_text(text + "\n")
        size = _save(folder, tensors)
    return Converted(out, len(tensors), size, [], [])


class _Store:
    """The safetensors of a folder: names and shapes at once, tensors when asked, mapped from their files."""

    def __init__(self, folder: Path):
        self.folder = folder
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES) if folder.is_dir() else []
        index = folder / "model.safetensors.index.json"
        files = sorted(folder.glob("*.safetensors"))
        if index.is_file():
            files = [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
        missing = [file for file in files if not file.is_file()]
        if missing or not files:
            also = f"; {pickled[0]} is a pickle, which is not read" if pickled else ""
            raise ConfigError(f"{(missing or [folder / '*.safetensors'])[0]}: not there; download it{also}")
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ConfigError(
                    f"{file}: not a whole safetensors file ({error}); download it again"
                ) from error
            for name in opened.keys():
                self._files[name] = opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())
        if index.is_file():
            lost = sorted(set(_json(index)["weight_map"]) ^ set(self.shapes))
            if lost:
                raise ConfigError(
                    f"{index}: {lost[0]} is not where the index says; download the folder again"
                )

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name).dtype

    def bytes(self, name: str) -> int:
        count = 1
        for side in self.shapes[name]:
            count *= side
        return count * self.dtype(name).itemsize


def _ours(published: str, config: PerceptionDLMConfig) -> str | None:
    """Our name of a published tensor. None: not used. An unknown name stays, and is reported later."""
    layer = _VISION_LAYER.match(published)
    depth = config.vision_config.num_hidden_layers + config.vision_select_layer + 1
    if _UNUSED.fullmatch(published) or (
        layer and depth <= int(layer[1]) < config.vision_config.num_hidden_layers
    ):
        return None
    for theirs, ours in _PUBLISHED:
        if published.startswith(theirs):
            return ours + published[len(theirs) :]
    return published


def _published(ours: str) -> str:
    for theirs, prefix in _PUBLISHED:
        if ours.startswith(prefix):
            return theirs + ours[len(prefix) :]
    raise AssertionError(ours)


def _from_llada(name: str) -> str | None:
    block = _LLADA_BLOCK.fullmatch(name)
    if block and block[2] in _LLADA_PARTS:
        return f"language.layers.{block[1]}.{_LLADA_PARTS[block[2]]}.weight"
    return _LLADA_ENDS.get(name)


def _from_published_config(published: dict, store: _Store, layout: str) -> PerceptionDLMConfig:
    """Our config of a published one. What that leaves out is as in the published model."""
    language = published.get("language_model_config", {})
    sizes = PerceptionDLMConfig()
    text = _known(language, sizes.text_config.to_dict())
    text["rope_base"] = language.get("rope_theta", sizes.text_config.rope_base)
    text.setdefault("num_key_value_heads", text.get("num_attention_heads", 32))
    text["vocab_size"] = _rows(store, "language_model.lm_head.weight", sizes.text_config.vocab_size)
    replay = published.get("roi_output_size", 4)
    if replay is None:
        raise ConfigError("config.json: roi_output_size null (the whole map) is not supported")
    return PerceptionDLMConfig(
        layout=layout,
        vision_config=_known(
            published.get("vision_model_config", {}).get("vision_config", {}), sizes.vision_config.to_dict()
        ),
        text_config=text,
        vision_select_layer=published.get("vision_select_layer", -2),
        num_prompts=_rows(store, "mask_id_embedding.weight", published.get("prompt_numbers", 6)),
        replay_size=(replay, replay) if isinstance(replay, int) else tuple(replay),
    )


def _published_config(config: PerceptionDLMConfig, dtype: torch.dtype) -> dict:
    """The config of a model that was never a published one; `_from_published_config` reads it back."""
    language = {
        name: value
        for name, value in config.text_config.to_dict().items()
        if name not in ("model_type", "rope_base", "transformers_version")
    }
    vision = config.vision_config.to_dict()
    return {
        "architectures": ["PDMLLM"],
        "model_type": "pdmllm",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "image_size": config.tile_px,
        "patch_size": vision["patch_size"],
        "num_image_token": config.tokens_per_tile,
        "downsample_ratio": 0.5,
        "prompt_numbers": config.num_prompts,
        "roi_output_size": config.replay_size[0]
        if config.replay_size[0] == config.replay_size[1]
        else list(config.replay_size),
        "vision_select_layer": config.vision_select_layer,
        "vision_abstractor_config": {"projection_type": "mlp2x_gelu"},
        "language_model_config": language
        | {"model_type": "llada", "rope_theta": config.text_config.rope_base},
        "vision_model_config": {"model_type": "siglip", "vision_config": vision},
    }


def _from_llada_config(llada: dict, store: _Store) -> dict:
    names = {
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "rope_base": "rope_theta",
        "rms_norm_eps": "rms_norm_eps",
    }
    text = {ours: llada[theirs] for ours, theirs in names.items() if llada.get(theirs) is not None}
    text.setdefault("num_key_value_heads", text.get("num_attention_heads", 32))
    return text | {"vocab_size": _rows(store, "model.transformer.ff_out.weight", 126464)}


def _known(given: dict, ours: dict) -> dict:
    """The entries of a config that ours has too."""
    ignored = {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype"}
    return {name: given[name] for name in ours if name in given and name not in ignored}


def _rows(store: _Store, name: str, default: int) -> int:
    return store.shapes[name][0] if name in store.shapes else default


def _check_pixels(source: Path) -> None:
    """The model normalises with mean and deviation 0.5; another preprocessing would silently be wrong."""
    file = source / "preprocessor_config.json"
    if not file.is_file():
        return
    given = _json(file)
    for name in ("image_mean", "image_std"):
        if given.get(name, [0.5] * 3) != [0.5] * 3:
            raise ConfigError(f"{file}: {name} is {given[name]}, this model takes 0.5")


def _expected(config: PerceptionDLMConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in PerceptionDLM(config).state_dict().items()}


def _check_own(store: _Store, config: PerceptionDLMConfig, source: Path) -> None:
    expected = _expected(config)
    missing = [name for name in expected if name not in store.shapes]
    unknown = [name for name in store.shapes if name not in expected]
    shapes = [
        f"{name}: {list(store.shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in store.shapes and store.shapes[name] != tuple(shape)
    ]
    if missing or unknown or shapes:
        raise _wrong(source, missing, unknown, shapes)


def _write(
    folder: Path,
    config: PerceptionDLMConfig,
    found: dict[str, tuple[_Store, str]],
    drawn: dict[str, Callable[[torch.Size], Tensor]],
    source: Path,
) -> int:
    """Write the model in our layout; returns its bytes.

    Raises:
        ConfigError: what was found and drawn is not exactly the model.
    """
    expected = _expected(config)
    missing = [_theirs(name, found) for name in expected if name not in found and name not in drawn]
    unknown = [found[name][1] for name in found if name not in expected]
    shapes = [
        f"{theirs}: {list(store.shapes[theirs])}, expected {list(expected[name])}"
        for name, (store, theirs) in found.items()
        if name in expected and store.shapes[theirs] != tuple(expected[name])
    ]
    if missing or unknown or shapes:
        raise _wrong(source, missing, unknown, shapes)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    tensors: dict[str, tuple[Callable[[], Tensor], int]] = {}
    for name, shape in expected.items():
        if name in found:
            store, theirs = found[name]
            tensors[name] = (lambda store=store, theirs=theirs: store.read(theirs), store.bytes(theirs))
        else:
            draw = drawn[name]
            tensors[name] = (
                lambda draw=draw, shape=shape: draw(shape).to(dtype),
                shape.numel() * dtype.itemsize,
            )
    config.architectures = [PerceptionDLM.__name__]
    config.save_pretrained(folder)
    return _save(folder, tensors)


def _theirs(ours: str, found: dict[str, tuple[_Store, str]]) -> str:
    """What the source would call a tensor of ours that it lacks."""
    if any(name.startswith("model.transformer.") for _, name in found.values()):
        for theirs, name in _LLADA_ENDS.items():
            if name == ours:
                return theirs
        for part, name in _LLADA_PARTS.items():
            if layer := re.fullmatch(rf"language\.layers\.(\d+)\.{re.escape(name)}\.weight", ours):
                return f"model.transformer.blocks.{layer[1]}.{part}.weight"
        return _published(ours).removeprefix(_SIGLIP)
    return _published(ours)


def _save(folder: Path, tensors: dict[str, tuple[Callable[[], Tensor], int]]) -> int:
    """Write tensors as shards with an index, one shard in memory at a time. Returns their bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (_, size) in tensors.items():
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: tensors[name][0]().contiguous() for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(names, file)
    total = sum(size for _, size in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def _write_tokenizer(source: Path, folder: Path, config: PerceptionDLMConfig) -> PreTrainedTokenizerFast:
    """The source's tokenizer, as it is if nothing is missing in it, else with our tokens added."""
    if not (source / "tokenizer.json").is_file():
        raise ConfigError(f"{source / 'tokenizer.json'}: not there; download the tokenizer too")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in ADDED_TOKENS if token not in vocabulary]
    if absent:
        tokenizer.add_tokens(absent, special_tokens=True)
        tokenizer.save_pretrained(folder)
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.text_config.vocab_size:
        raise ConfigError(
            f"{source / 'tokenizer.json'}: token {largest}, but the weights have "
            f"{config.text_config.vocab_size} rows; this tokenizer belongs to other weights"
        )
    PerceptionDLMProcessor(tokenizer, config)
    return tokenizer


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is whole, or not at all."""
    if out.exists():
        raise ConfigError(f"{out}: exists; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _wrong(source: Path, missing: list[str], unknown: list[str], shapes: list[str]) -> ConfigError:
    said = [
        f"{len(names)} {what} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    return ConfigError(f"{source}: not the checkpoint its config.json describes: tensors {'; '.join(said)}")


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not there; download it") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); download it again") from error


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
