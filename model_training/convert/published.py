"""Checkpoints from and to the published layouts, tensor by tensor: neither side is ever whole in memory.

| from | to | function |
| --- | --- | --- |
| published PerceptionDLM, or its Base | ours | `from_published` |
| ours | published PerceptionDLM | `to_published` |
| LLaDA and SigLIP 2 | ours, untrained between the two | `from_parts` |

No code of a checkpoint is run: published folders carry some, and name it in config.json; it is copied as data
into `unused/`, with all else that our model has no use for, so that the way back gives what was published.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.io import files, tensor_files, weights
from ...pipeline.io.tensor_files import SHARD_BYTES, LazyTensor, check_tensors, list_tensors, write_tensors
from ...schemas.errors import ConfigError
from ..model.config import PerceptionDLMConfig
from ..model.tokenizer import add_special_tokens, load_tokenizer, special_token_ids
from . import leftovers, state_dict_adapter
from .new_weights import EMBEDDING, PROMPTS, add_rows, draw_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        source: what was read.
        target: what was written.
        layout: of the model.
        seed: of what is drawn.
        tensors: in the model that was written.
        num_bytes: of these.
        unused: tensors that our model has no use for: kept aside, or put back.
        unused_bytes: of these.
        drawn: tensors, or rows of them, that are new and random.
        notes: what else one should know.
        verbatim: whether config and tokenizer are the published files.
    """

    source: str
    target: Path
    layout: str
    seed: int = 0
    tensors: int = 0
    num_bytes: int = 0
    unused: int = 0
    unused_bytes: int = 0
    drawn: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verbatim: bool = False

    def text(self) -> str:
        """For the terminal."""
        lines = [
            f"{self.source} -> {self.target} ({self.layout} layout)",
            f"  tensors  {self.tensors:,} with {self.num_bytes:,} bytes",
            f"  unused   {self.unused:,} with {self.unused_bytes:,} bytes",
            f"  random   {', '.join(self.drawn)}, seed {self.seed}" if self.drawn else "  random   nothing",
        ]
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def convert(
    path: str | Path,
    to: str | Path,
    *,
    vision: str | Path | None = None,
    layout: str | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Convert a folder into the other layout; which one it has, its config.json says.

    Args:
        path: a published PerceptionDLM, its Base, or a model of ours.
        to: folder to write; it appears whole or not at all.
        vision: see `to_published`.
        layout: see `from_published`.
        seed: see `from_published`.
        shard_bytes: largest file.

    Raises:
        ConfigError: as the two, or it is neither.
    """
    folder = weights.folder(path, "models convert")
    kind = weights.read_json(folder / "config.json").get("model_type")
    if kind in (state_dict_adapter.TYPE, state_dict_adapter.BASE_TYPE):
        if vision is not None:
            raise ConfigError(
                f"{folder}: this is a published checkpoint, which has its vision model; leave out --vision"
            )
        return from_published(folder, to, layout or "reference", seed, shard_bytes)
    if kind == PerceptionDLMConfig.model_type:
        if layout is not None:
            raise ConfigError(f"{folder}: a published checkpoint has no layout option; leave out --layout")
        return to_published(folder, to, vision, shard_bytes)
    raise ConfigError(
        f"{folder}: of type {kind!r}, neither a published PerceptionDLM ({state_dict_adapter.TYPE}, "
        f"{state_dict_adapter.BASE_TYPE}) nor ours ({PerceptionDLMConfig.model_type}); a language model "
        "goes with --language and --vision"
    )


def from_published(
    path: str | Path,
    to: str | Path,
    layout: str = "reference",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Make a published PerceptionDLM, or its Base, ours.

    What it stores and never uses goes to `unused/`, its small files too. What the Base lacks is added as
    the released code adds it: region prompts from N(0, 1), and the tokens of regions, whose rows exist.

    Args:
        path: the published folder.
        to: folder to write.
        layout: "reference", as which it was trained; another one is for training on.
        seed: of what is drawn.
        shard_bytes: largest file.

    Raises:
        ConfigError: it is partial, wrong or unsound, or the target is there. Nothing has been written.
    """
    folder, target = weights.folder(path, "models convert"), Path(to).absolute()
    files.refuse_existing(target)
    file = folder / "config.json"
    found, raw = list_tensors(folder), weights.read_json(file)
    embedding = _entry(found, state_dict_adapter.theirs(EMBEDDING, state_dict_adapter.PERCEPTION_DLM), folder)
    fields = state_dict_adapter.fields_of(raw, file, embedding.shape[0])
    fields |= {"layout": layout, "max_tiles": _max_tiles(folder)}
    tokenizer = load_tokenizer(folder)
    added = add_special_tokens(tokenizer) if raw["model_type"] == state_dict_adapter.BASE_TYPE else 0
    config = _our_config(fields, tokenizer, folder, embedding.dtype)
    report = Report(f"published {folder}", target, layout, seed)

    ours_shapes = shapes(config)
    names = {name: state_dict_adapter.theirs(name, state_dict_adapter.PERCEPTION_DLM) for name in ours_shapes}
    wanted = {names[name]: shape for name, shape in ours_shapes.items()}
    spare = leftovers.spare(raw["vision_model_config"], file, wanted, found)
    drawn = {}
    if names[PROMPTS] not in found:
        drawn[PROMPTS] = draw_tensor(PROMPTS, wanted.pop(names[PROMPTS]), config, seed)
        report.drawn.append(f"{PROMPTS} from N(0, 1)")
    check_tensors(folder, found, wanted, spare)
    ours = {name: found[other] for name, other in names.items() if other in found} | drawn
    if rows := add_rows(ours, config, tokenizer, report.seed):
        report.drawn.append(rows)
    rest = {name: entry for name, entry in found.items() if name not in wanted}
    if added:
        report.notes.append(f"{added} tokens added to the tokenizer")
    if absent := {name for name, shape in spare.items() if shape} - rest.keys():
        report.notes.append(f"it lacks {len(absent)} tensors that the released code loads and never uses")
    report.unused, report.unused_bytes = len(rest), _size(rest)
    with _writing(target, _size(ours, rest)) as room:
        (room / leftovers.FOLDER).mkdir()
        write_tensors(room / leftovers.FOLDER, rest, shard_bytes)
        _copy(folder, room / leftovers.FOLDER)
        _finish(room, ours, config, tokenizer, report, shard_bytes)
    return report


def to_published(
    path: str | Path, to: str | Path, vision: str | Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Report:
    """Make a model of ours one that PerceptionDLM's released code loads.

    With `unused/` from the way here, all tensors, the config and the tokenizer's files are what was published
    (and of a Base what the released code makes of it).

    Args:
        path: our folder.
        to: folder to write.
        vision: folder of the SigLIP 2 that has what the released code stores and never uses; needed
            where our folder has no `unused/`.
        shard_bytes: largest file.

    Raises:
        ConfigError: it is partial, wrong or unsound, no model of the released code, lacks `unused/`, or the
            target is there. Nothing has been written.
    """
    folder, target = weights.folder(path, "models convert"), Path(to).absolute()
    files.refuse_existing(target)
    found, config = list_tensors(folder), load_config(folder)
    if not (config.region_prompting and config.feature_replay):
        raise ConfigError(
            f"{folder}: this model has no region prompts or no feature replay, which the released code "
            "requires; it cannot be converted"
        )
    wanted = shapes(config)
    check_tensors(folder, found, wanted)
    names = {name: state_dict_adapter.theirs(name, state_dict_adapter.PERCEPTION_DLM) for name in wanted}
    theirs = {names[name]: entry for name, entry in found.items()}
    report = Report(str(folder), target, config.layout)
    if config.layout != "reference" or config.layout_options:
        report.notes.append("the released code always computes the reference layout")
    tokenizer = load_tokenizer(folder)
    if vision is None:
        raw, rest, report.verbatim = leftovers.kept_aside(folder, config, theirs, tokenizer)
    else:
        raw, rest = leftovers.from_siglip(vision, config, theirs)
    report.tensors, report.num_bytes = len(theirs) + len(rest), _size(theirs, rest)
    report.unused, report.unused_bytes = len(rest), _size(rest)
    if not report.verbatim:
        report.notes.append("config.json and the tokenizer's files were written again")
    with _writing(target, report.num_bytes) as room:
        write_tensors(room, theirs | rest, shard_bytes)
        if vision is None:
            _copy(folder / leftovers.FOLDER, room)
        if not report.verbatim:
            tokenizer.save_pretrained(room)
            weights.write_json(room / "config.json", raw)
    return report


def from_parts(
    language: str | Path,
    vision: str | Path,
    to: str | Path,
    layout: str = "corrected",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Join LLaDA and SigLIP 2 to a model that is ready to be trained.

    Projector and region prompts are drawn. Tensors keep their types; the model is loaded in the language
    model's. The tokens that the model needs are added to the tokenizer; the embedding grows only if they do
    not fit.

    Args:
        language: folder of LLaDA, in its own naming or Llama's.
        vision: folder of a SigLIP 2 of fixed resolution.
        to: folder to write.
        layout: of the model.
        seed: of what is drawn.
        shard_bytes: largest file.

    Raises:
        ConfigError: one of them is partial, wrong or unsound, or the target is there. Nothing has been
            written.
    """
    text_folder, target = weights.folder(language, "--language"), Path(to).absolute()
    tower_folder = weights.folder(vision, "--vision")
    files.refuse_existing(target)
    text, parts, text_fields = _language(text_folder)
    tower, tower_fields, tower_spare = _siglip(tower_folder)
    tokenizer = load_tokenizer(text_folder)
    added = add_special_tokens(tokenizer)
    fields = {"vision_config": tower_fields, "text_config": text_fields, "layout": layout}
    config = _our_config(
        fields, tokenizer, text_folder, text[state_dict_adapter.theirs(EMBEDDING, parts)].dtype
    )
    _same_mask(text_folder, config)
    report = Report(f"{text_folder} and {tower_folder}", target, layout, seed)

    ours = _joined(shapes(config), (text_folder, text, parts), (tower_folder, tower, tower_spare))
    for name, shape in shapes(config).items():
        if name not in ours:
            ours[name] = draw_tensor(name, shape, config, seed)
    report.drawn += [f"projector from N(0, {config.initializer_range}^2)", f"{PROMPTS} from N(0, 1)"]
    if rows := add_rows(ours, config, tokenizer, report.seed):
        report.drawn.append(rows)
    report.notes.append(f"{added} tokens added to the tokenizer")
    report.notes.append(f"to convert this model to the published form later, give --vision {tower_folder}")
    with _writing(target, _size(ours)) as room:
        _finish(room, ours, config, tokenizer, report, shard_bytes)
    return report


@contextmanager
def _writing(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder that gets the target's name when the block ends.

    Raises:
        ConfigError: the target exists, cannot be written, or its disk has less room than `num_bytes`.
    """
    try:
        with files.write_folder_atomic(target) as folder:
            free = shutil.disk_usage(folder).free
            if free < num_bytes:
                raise ConfigError(
                    f"{target}: {num_bytes:,} bytes to write, but only {free:,} are free there; free space, "
                    "or choose another folder"
                )
            yield folder
    except OSError as error:
        raise ConfigError(
            f"{target}: the checkpoint cannot be written there ({error}); choose another folder"
        ) from error


def load_config(folder: Path) -> PerceptionDLMConfig:
    """Of a model of ours. Raises ConfigError if it is unsound."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return PerceptionDLMConfig.from_dict(weights.read_json(folder / "config.json"))
    except ConfigError:
        raise
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'config.json'}: {' '.join(str(error).split())}; correct it, or download it again"
        ) from error


def shapes(config: PerceptionDLMConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, by name. Raises ConfigError if the sizes make no model."""
    import torch

    from ..model.perceptiondlm import PerceptionDLM

    try:
        with torch.device("meta"):
            model = PerceptionDLM(copy.deepcopy(config))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"config.json: no model can be made with these sizes ({error}); correct them, or download the "
            "file again"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _finish(
    room: Path,
    ours: Mapping[str, LazyTensor],
    config: PerceptionDLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    shard_bytes: int,
) -> None:
    report.tensors, report.num_bytes = len(ours), write_tensors(room, ours, shard_bytes)
    config.save_pretrained(room)
    tokenizer.save_pretrained(room)


def _our_config(
    fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str
) -> PerceptionDLMConfig:
    import torch
    from huggingface_hub.errors import StrictDataclassError

    ids = special_token_ids(tokenizer, fields.get("num_prompts", PerceptionDLMConfig.num_prompts), folder)
    try:
        config = PerceptionDLMConfig(**fields, **ids)
    except (StrictDataclassError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'config.json'}: {' '.join(str(error).split())}; correct it, or download it again"
        ) from error
    config.architectures = ["PerceptionDLM"]
    config.dtype = getattr(torch, tensor_files.FLOATS.get(dtype, "float32"))
    return config


def _language(folder: Path) -> tuple[dict[str, LazyTensor], state_dict_adapter.Parts, dict[str, Any]]:
    """(tensors, naming, config in Llama's terms) of a LLaDA."""
    found, file = list_tensors(folder), folder / "config.json"
    raw = weights.read_json(file)
    own_naming = "d_model" in raw
    parts = state_dict_adapter.LLADA if own_naming else state_dict_adapter.LLAMA
    rows = _entry(found, state_dict_adapter.theirs(EMBEDDING, parts), folder).shape[0]
    return (
        found,
        parts,
        (state_dict_adapter.llada_fields if own_naming else state_dict_adapter.llama_fields)(raw, file, rows),
    )


def _siglip(folder: Path) -> tuple[dict[str, LazyTensor], dict[str, Any], dict[str, tuple[int, ...] | None]]:
    """(tensors, sizes, what it may hold) of a SigLIP; the vision model's names bare."""
    file = folder / "config.json"
    raw, found = weights.read_json(file), list_tensors(folder)
    sizes, may = state_dict_adapter.vision_fields(raw, file), state_dict_adapter.siglip_shapes(raw, file)
    spare = {**may, **leftovers.constants(found)}
    bare = {name.removeprefix("vision_model."): entry for name, entry in found.items()}
    return bare, sizes, {name.removeprefix("vision_model."): shape for name, shape in spare.items()}


def _joined(
    wanted: Mapping[str, tuple[int, ...]],
    language: tuple[Path, dict[str, LazyTensor], state_dict_adapter.Parts],
    vision: tuple[Path, dict[str, LazyTensor], dict[str, tuple[int, ...] | None]],
) -> dict[str, LazyTensor]:
    """What our model takes from (folder, tensors, naming) and (folder, tensors, what it may hold)."""
    text_folder, text, parts = language
    tower_folder, tower, spare = vision
    seen = {
        name: state_dict_adapter.theirs(name, state_dict_adapter.SIGLIP)
        for name in wanted
        if name.startswith("vision")
    }
    heard = {
        name: state_dict_adapter.theirs(name, parts)
        for name in wanted
        if name.startswith(("language_model.", "lm_head."))
    }
    check_tensors(text_folder, text, {heard[name]: wanted[name] for name in heard}, leftovers.constants(text))
    check_tensors(tower_folder, tower, {seen[name]: wanted[name] for name in seen}, spare)
    return {name: text[heard[name]] for name in heard} | {name: tower[seen[name]] for name in seen}


def _same_mask(folder: Path, config: PerceptionDLMConfig) -> None:
    said = weights.read_json(folder / "config.json").get("mask_token_id", config.mask_token_id)
    if said != config.mask_token_id:
        raise ConfigError(
            f"{folder}: config.json says mask_token_id {said}, its tokenizer {config.mask_token_id}"
        )


def _max_tiles(folder: Path) -> int:
    """Of an image; the released code keeps it with its processor."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        said = weights.read_json(folder / name).get("max_sub_img") if (folder / name).is_file() else None
        if said:
            return int(said)
    return PerceptionDLMConfig.max_tiles


def _entry(found: Mapping[str, LazyTensor], name: str, folder: Path) -> LazyTensor:
    if name not in found or not found[name].shape:
        raise ConfigError(f"{folder}: missing: {name}; download it again, or name the right model's folder")
    return found[name]


def _size(*tables: Mapping[str, LazyTensor]) -> int:
    return sum(entry.num_bytes for entries in tables for entry in entries.values())


def _copy(source: Path, target: Path) -> None:
    """All small files of a checkpoint: all but tensors, their index, and what is hidden."""
    for file in sorted(source.iterdir()):
        weighty = file.suffix == ".safetensors" or file.name == weights.INDEX
        if file.is_file() and not file.name.startswith(".") and not weighty:
            shutil.copyfile(file, target / file.name)
