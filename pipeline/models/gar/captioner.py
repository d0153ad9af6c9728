"""The `gar` captioner: regions are encoded here and decode together in vLLM."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from ....schemas.errors import ConfigError, StageFailed
from ....schemas.records import ImageRecord, Region
from ...io import weights
from ...io.prefetch import ahead
from ..options import BackendOptions, read_options
from ..protocols import Checked
from . import checkpoint, export
from .checkpoint import GarConfig
from .prompt import TEMPLATE, Prompts

if TYPE_CHECKING:
    from vllm import SamplingParams

    from ..vllm_engine import Engine, Request

VERSION = "1"
"""Of everything between the pixels and the text; part of the evidence digest."""

_OURS = {"model", "dtype", "enable_prompt_embeds", "skip_tokenizer_init", "trust_remote_code", "load_format"}
_SAME_ANSWERS = {"gpu_memory_utilization", "max_model_len", "enforce_eager", "max_num_seqs", "block_size"}
_SAME_ANSWERS |= {"max_num_batched_tokens", "disable_log_stats", "own_process", "compilation_config"}
"""vLLM's arguments that decide on speed and memory only; all others are part of the identity."""


_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


_Positive = Annotated[int, Meta(ge=1)]


class GarOptions(BackendOptions, frozen=True):
    """The options of `gar`.

    Attributes:
        model: folder of the published checkpoint.
        language_model: folder of its export for vLLM, made if it does not exist; None for MODEL-vllm.
        max_tokens: of an answer. A longer one has over 160 words, and `text.max_words` drops it; the 1,024 of
            the released code only pay for longer loops.
        max_in_flight: regions in vLLM at once; vLLM's own limit as well.
        in_flight_gb: host memory of their prompts: 22 MB each with GAR-8B, 19 MB with GAR-1B.
        device: of the vision tower; None for cuda if there is a GPU, else cpu.
        dtype: None for the checkpoint's on a GPU and float32 on a CPU.
        mask_resample: how masks are resized; see docs/gar.md.
        tiles_per_batch: tiles in the vision tower at once, halved when memory runs out; None for 32 on a GPU
            and 4 on a CPU, whose caches hold no more.
        read_ahead: regions prepared ahead in a thread; None for 32 on a GPU and 0 on a CPU.
        max_pixels: larger photos are refused.
        engine: vLLM's arguments, such as gpu_memory_utilization (0.8) or max_num_seqs.
    """

    model: str
    language_model: str | None = None
    max_tokens: _Positive = 512
    max_in_flight: _Positive = 256
    in_flight_gb: Annotated[float, Meta(gt=0)] = 8.0
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    mask_resample: Literal["nearest", "bicubic"] = "nearest"
    tiles_per_batch: _Positive | None = None
    read_ahead: Annotated[int, Meta(ge=0)] | None = None
    max_pixels: _Positive = 200_000_000
    engine: dict[str, Any] = {}

    def check(self, where: str) -> None:
        ours = sorted(_OURS & set(self.engine))
        if ours:
            raise ConfigError(f"{where}.engine: {ours[0]} is not for the config to set; remove it")


class GarCaptioner:
    """Describes regions with GAR. One engine, kept full by a plain loop: later regions are encoded while
    earlier ones decode, and all images of a call flow through the same loop.

    Args:
        options: see `GarOptions`; `model` is needed.

    Raises:
        ConfigError: an option is wrong or the checkpoint does not fit; the message names file and fix.
    """

    version = VERSION

    def __init__(self, **options: Any):
        self.options = read_options(GarOptions, options, "captioner.options")
        self.config, self.prompts = _read(self.options)
        max_len = _model_len(self.options, self.config, self.prompts)
        checkpoint.check_tensors(self.config)
        language = export.prepare(self.options.model, self.options.language_model)
        import torch

        from .encoder import Encoder
        from .vision import load_vision

        device = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_cpu = device == "cpu"
        self.dtype = self.options.dtype or ("float32" if on_cpu else self.config.dtype)
        kind = getattr(torch, self.dtype)
        # The tower comes first: vLLM then sees how much memory is left.
        vision = load_vision(self.config, kind, device)
        embed = checkpoint.tensor(self.config, f"{checkpoint.LANGUAGE}embed_tokens.weight", kind, device)
        self.encoder = Encoder(
            self.config,
            self.prompts,
            vision,
            embed,
            self.options.tiles_per_batch or (4 if on_cpu else 32),
            self.options.mask_resample,
            self.options.max_pixels,
        )
        given = self.options.read_ahead
        self._ahead = given if given is not None else (0 if on_cpu else 32)
        self.engine = _start(self.options, language, max_len, self.dtype, on_cpu)
        self._kept: dict[tuple, str | None] = {}

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """The checkpoint's digest, the prompt, how masks are resized, and the generation."""
        given = read_options(GarOptions, options, "captioner.options")
        folder = weights.folder(given.model, "captioner.options.model")
        engine = {key: value for key, value in sorted(given.engine.items()) if key not in _SAME_ANSWERS}
        return {
            "version": VERSION,
            "weights": weights.identity(folder),
            "prompt": hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16],
            "generation": f"greedy, at most {given.max_tokens} tokens",
            "mask_resample": given.mask_resample,
            "dtype": given.dtype or "the device's",
            "engine": repr(engine),
        }

    @classmethod
    def check(cls, **options: Any) -> Checked:
        """Everything that can be wrong with options and checkpoint, without loading the weights."""
        given = read_options(GarOptions, options, "captioner.options")
        config, prompts = _read(given)
        _model_len(given, config, prompts)
        found = checkpoint.check_tensors(config)
        num_bytes = 0
        for name, tensor in found.items():
            twice = name == f"{checkpoint.LANGUAGE}embed_tokens.weight"  # next to the tower, and in vLLM
            size = math.prod(tensor.shape) * _SIZES[given.dtype] if given.dtype else tensor.num_bytes
            num_bytes += size * (1 + twice)
        target = Path(given.language_model) if given.language_model else export.default_folder(given.model)
        notes = list(config.notes)
        if not export.is_done(target, export.record_of(config)):
            notes.append(
                f"the language model will be exported to {target} on first use, or now with "
                f"`paracaption models prepare gar {given.model}`"
            )
        what = (
            f"GAR: vision {config.depth} x {config.width}, language model "
            f"{config.text['num_hidden_layers']} x {config.hidden}, up to {config.max_tiles} tiles, "
            f"prompts of up to {prompts.longest()} tokens"
        )
        return Checked(what, num_bytes, notes)

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        """One caption per live region, in the order of `image.live()`; None for an empty mask or answer.

        Raises:
            As `caption_each`.
        """
        return [captions for _, captions in self.caption_each(images)]

    def caption_each(self, images: list[ImageRecord]) -> Generator[tuple[int, list[str | None]]]:
        """(place of an image, its captions), one image after the other, while later ones are in the engine.

        Answers that were finished when a call failed are kept for the calls about what is left.

        Raises:
            BadRecord: a photo cannot be read.
            OutOfMemory: one tile, or the engine, does not fit.
            EngineLost: the engine died.
            StageFailed: features or answers say that the model computes NaN.
        """
        max_bytes = int(self.options.in_flight_gb * 1e9)
        inside = Counter[int]()  # regions of an image that the engine has
        reached = given = 0  # the image that requests are drawn from; those that have been yielded

        def drawn() -> Generator[Request]:
            nonlocal reached
            with closing(self.requests(images)) as requests:
                for request in requests:
                    reached = request.key[0]
                    inside[reached] += 1
                    yield request

        with closing(drawn()) as requests:
            for (number, place), answer in self.engine.run(requests, self.options.max_in_flight, max_bytes):
                image = images[number]
                text = self.prompts.read(_checked(answer.token_ids, self.options.model))
                self._kept[_question(image, image.live()[place])] = text or None
                inside[number] -= 1
                while given < reached and not inside[given]:
                    yield given, self._take(images[given])
                    given += 1
        yield from ((number, self._take(images[number])) for number in range(given, len(images)))

    def _take(self, image: ImageRecord) -> list[str | None]:
        return [self._kept.pop(_question(image, region), None) for region in image.live()]

    def sampling(self) -> SamplingParams:
        """Greedy, to the end of the turn or `max_tokens`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0,
            max_tokens=self.options.max_tokens,
            ignore_eos=True,  # the Llama's other end tokens are ordinary here, as published
            stop_token_ids=[self.prompts.stop],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def requests(self, images: list[ImageRecord]) -> Generator[Request]:
        """What the engine is asked about the live regions, each made when it is drawn."""
        from ..vllm_engine import Request

        params = self.sampling()
        works = self.encoder.prepare(images, lambda image, region: _question(image, region) not in self._kept)
        with closing(ahead(works, self._ahead)) as works:
            for key, prompt in self.encoder.run(works):
                yield Request(key, {"prompt_embeds": prompt}, params, prompt.nbytes)


def _checked(token_ids: Sequence[int], model: str) -> list[int]:
    """The tokens of an answer. Where logits are NaN, the most likely token is the first of the vocabulary."""
    if token_ids and not any(token_ids):
        raise StageFailed(
            f"gar ({model}): an answer consists of token 0 only ({len(token_ids)} times), as happens when "
            "the model computes NaN; set captioner.options.dtype to bfloat16 or float32, or download the "
            "checkpoint again"
        )
    return list(token_ids)


def _question(image: ImageRecord, region: Region) -> tuple:
    return (image.subset, image.key, region.id, region.rle)


def _read(options: GarOptions) -> tuple[GarConfig, Prompts]:
    config = checkpoint.read_config(options.model)
    return config, Prompts(config)


def _model_len(options: GarOptions, config: GarConfig, prompts: Prompts) -> int:
    """The longest prompt with its answer.

    Raises:
        ConfigError: longer than the model or the given `max_model_len` allows.
    """
    needed = prompts.longest() + options.max_tokens
    most = config.text.get("max_position_embeddings", needed)
    if needed > most:
        raise ConfigError(
            f"captioner.options.max_tokens: prompts of up to {prompts.longest()} tokens and answers of "
            f"{options.max_tokens} are over the model's {most}; at most {most - prompts.longest()} fit"
        )
    given = options.engine.get("max_model_len", needed)
    if given < needed:
        raise ConfigError(
            f"captioner.options.engine.max_model_len: {given} is too short for prompts of up to "
            f"{prompts.longest()} tokens and answers of {options.max_tokens}; at least {needed}"
        )
    return needed


def _start(options: GarOptions, language: Path, max_len: int, dtype: str, on_cpu: bool) -> Engine:
    """The engine on the exported language model, fed with embeddings only."""
    from ..vllm_engine import Engine

    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": max_len,
        "max_num_seqs": options.max_in_flight,
        "enable_prefix_caching": False,  # prompts differ from their first image token on
        "enforce_eager": on_cpu,  # compiling for a CPU takes minutes
    }
    if not on_cpu:
        settings["gpu_memory_utilization"] = 0.8  # the tower works in the rest
    settings |= options.engine
    try:
        return Engine(language, enable_prompt_embeds=True, skip_tokenizer_init=True, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"captioner.options.engine: vLLM refuses {settings}: {error}; correct these options"
        ) from error
