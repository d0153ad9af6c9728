"""The `sam3` segmenter: SAM 3 finds every instance of a phrase; transformers' implementation, our batching.

A photo goes through the vision encoder once, whatever is asked about it. Its phrases, each once, then go
through the detector in batches; text features of a phrase are kept for the photos that follow.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from ...schemas.errors import ConfigError, one_line
from ..io import tensor_files, weights
from ..io.transfers import upload
from .batching import Batches
from .masks import check_finite, find_device, products_in, to_candidates
from .options import BackendOptions, read_options
from .protocols import Candidate, Checked

if TYPE_CHECKING:
    import torch

VERSION = "1"

TEXTS_AT_ONCE = 64
"""Phrases that the text encoder sees at once: 32 tokens each, little next to the detector's 5,184 patches."""

PREFIX = "detector_model."
"""Of the image model's tensors in the published checkpoint, which is a video model's."""


class Sam3Options(BackendOptions, frozen=True):
    """The options of `sam3`.

    Attributes:
        model: folder of the checkpoint, in transformers' layout with safetensors.
        threshold: candidates must score more; 0.5 is what the published video model detects with.
        mask_threshold: a pixel is in the mask above this probability.
        device: "auto", "cpu" or "cuda".
        dtype: of matrix products; "auto" is bfloat16 on a GPU and float32 on a CPU.
        phrases_at_once: in the detector; halved when memory runs out.
        phrase_cache: phrases whose text features are kept, 32 KB each.
    """

    model: str
    threshold: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    mask_threshold: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    phrases_at_once: Annotated[int, Meta(ge=1)] = 16
    phrase_cache: Annotated[int, Meta(ge=0)] = 4096


class Sam3Segmenter:
    """Predicts the instances of each phrase. The boxes are not read.

    Args:
        options: see `Sam3Options`.

    Raises:
        ConfigError: an option, the folder or the device is wrong; the message names the fix.
    """

    reads_boxes = False

    def __init__(self, **options: Any):
        import torch
        from transformers import Sam3Model

        self.options = read_options(Sam3Options, options, "segmenter.options")
        folder = checkpoint_folder(self.options.model)
        self.device, self.dtype = find_device(self.options.device, self.options.dtype)
        self.processor = load_processor(folder, _check_tensors(folder).config.text_config.vocab_size)
        model: Any = Sam3Model.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        self.model = model.to(self.device).eval()
        self._max_tokens = self.model.config.text_config.max_position_embeddings
        self._texts: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._photo = Batches(1, "sam3: the vision encoder")
        self._phrases = Batches(self.options.phrases_at_once, "sam3: phrases of one photo")
        self._new_texts = Batches(TEXTS_AT_ONCE, "sam3: the text encoder")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Weights, thresholds, dtype, and the release of transformers, whose code computes the answers."""
        given = read_options(Sam3Options, options, "segmenter.options")
        return {
            "version": VERSION,
            "weights": weights.identity(checkpoint_folder(given.model)),
            "threshold": repr(float(given.threshold)),
            "mask_threshold": repr(float(given.mask_threshold)),
            "dtype": given.dtype,
            "transformers": ".".join(importlib.metadata.version("transformers").split(".")[:2]),
        }

    @classmethod
    def check(cls, **options: Any) -> Checked:
        """Read configuration, tokenizer and tensor shapes, not the weights.

        Raises:
            ConfigError: something does not fit; the message names the file and the fix.
        """
        given = read_options(Sam3Options, options, "segmenter.options")
        folder = checkpoint_folder(given.model)
        model = _check_tensors(folder)
        processor = load_processor(folder, model.config.text_config.vocab_size)
        tower = model.config.vision_config.backbone_config
        size = processor.image_processor.size
        what = (
            f"SAM 3: vision {tower.num_hidden_layers} x {tower.hidden_size} at {size['width']} px, "
            f"{model.config.detr_decoder_config.num_queries} queries a phrase"
        )
        num_bytes = 4 * sum(tensor.numel() for tensor in model.parameters())
        return Checked(what, num_bytes, ["weights stay in float32; bfloat16 is for matrix products only"])

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> list[list[Candidate]]:
        """Every instance of each region's phrase, best first; the same ones for regions with the same phrase.

        Args:
            photo: (H, W, 3) uint8 RGB.
            phrases: N core categories; an empty one is not asked and finds nothing.
            boxes: (N, 4); not read.

        Raises:
            OutOfMemory: one phrase alone does not fit.
            StageFailed: the model says NaN or infinity.
        """
        if len(phrases) != len(boxes):
            raise ValueError(f"{len(phrases)} phrases for {len(boxes)} boxes")
        words = [" ".join(phrase.split()) for phrase in phrases]
        asked = [phrase for phrase in dict.fromkeys(words) if phrase]
        if not asked:
            return [[] for _ in phrases]
        import torch

        size = (photo.shape[0], photo.shape[1])
        with torch.no_grad():
            (seen,) = self._photo.run([photo], lambda photos: [self._see(photos[0])])
            found = self._phrases.run(asked, lambda batch: self._find(seen, batch, size))
        by_phrase = dict(zip(asked, found, strict=True))
        return [list(by_phrase.get(phrase, [])) for phrase in words]

    def _see(self, photo: np.ndarray) -> Any:
        """Vision features of one photo, without the coarsest level, which the detector does not read."""
        import torch

        pixels = torch.tensor(photo).permute(2, 0, 1)  # channels named, for photos 3 pixels high
        inputs = self.processor.image_processor(
            images=pixels, input_data_format="channels_first", return_tensors="pt"
        )
        with products_in(self.device, self.dtype):
            seen = self.model.get_vision_features(upload(inputs["pixel_values"], self.device))
        seen.last_hidden_state = None
        return seen

    def _find(self, seen: Any, phrases: Sequence[str], size: tuple[int, int]) -> list[list[Candidate]]:
        """Candidates of each phrase on one photo of `size` (height, width)."""
        from torch.nn import functional
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features, mask = self._read(phrases)
        seen = type(seen)(
            fpn_hidden_states=tuple(_repeated(level, len(phrases)) for level in seen.fpn_hidden_states),
            fpn_position_encoding=tuple(
                _repeated(level, len(phrases)) for level in seen.fpn_position_encoding
            ),
        )
        texts = BaseModelOutputWithPooling(pooler_output=features)  # pyright: ignore[reportArgumentType]
        with products_in(self.device, self.dtype):
            output = self.model(vision_embeds=seen, text_embeds=texts, attention_mask=mask)
        matches = output.pred_logits.float().sigmoid() * output.presence_logits.float().sigmoid()
        scores = check_finite(f"sam3 ({self.options.model})", matches, output.pred_masks)

        def enlarge(logits: torch.Tensor) -> torch.Tensor:
            probabilities = logits[None].float().sigmoid()
            large = functional.interpolate(probabilities, size=size, mode="bilinear", align_corners=False)
            return large[0] > self.options.mask_threshold

        return to_candidates(output.pred_masks, scores, size, enlarge, self.options.threshold)

    def _read(self, phrases: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text features (n, tokens, width) and which tokens count (n, tokens), cached ones as they are."""
        import torch

        missing = [phrase for phrase in phrases if phrase not in self._texts]
        new = dict(zip(missing, self._new_texts.run(missing, self._encode), strict=True))
        chosen = [new[phrase] if phrase in new else self._texts[phrase] for phrase in phrases]
        for phrase, text in zip(phrases, chosen, strict=True):
            self._texts[phrase] = text
            self._texts.move_to_end(phrase)
        while len(self._texts) > self.options.phrase_cache:
            self._texts.popitem(last=False)
        features, masks = zip(*chosen, strict=True)
        return torch.stack(features), torch.stack(masks)

    def _encode(self, phrases: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        tokens = self.processor.tokenizer(
            list(phrases),
            padding="max_length",
            max_length=self._max_tokens,
            truncation=True,  # the text encoder has no positions beyond
            return_tensors="pt",
        )
        ids, counts = (upload(tokens[name], self.device) for name in ("input_ids", "attention_mask"))
        with products_in(self.device, self.dtype):
            texts = self.model.get_text_features(ids, counts)
        pairs = zip(texts.pooler_output, counts, strict=True)
        return [(text.clone(), mask.clone()) for text, mask in pairs]  # a view would keep the batch alive


def _repeated(level: torch.Tensor, times: int) -> torch.Tensor:
    """One photo's features for several phrases, without a copy."""
    return level.expand(times, *level.shape[1:])


def checkpoint_folder(path: str, protocol: str = "segmenter") -> Path:
    """The checkpoint's folder, refused if it is not SAM 3."""
    folder = weights.folder(path, f"{protocol}.options.model")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in ("sam3", "sam3_video"):
        raise ConfigError(
            f"{folder / 'config.json'}: model_type is {kind!r}, not sam3 or sam3_video; "
            f"{protocol} `sam3` takes the folder of facebook/sam3"
        )
    return folder


def load_processor(folder: Path, vocab_size: int | None = None) -> Any:
    """The processor of a checkpoint: what it makes of photos and phrases.

    Args:
        folder: of the checkpoint.
        vocab_size: tokens that the text encoder knows, and the tokenizer has to know; None does not ask.

    Raises:
        ConfigError: it does not load, or its tokenizer is another one; the message names the files.
    """
    from transformers import Sam3Processor

    try:
        processor = Sam3Processor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        known = len(processor.tokenizer)
        if vocab_size not in (None, known):  # without its files transformers makes one without a word
            raise ValueError(f"the tokenizer knows {known} words, the text encoder {vocab_size}")
        return processor
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder}: processor or tokenizer do not load ({one_line(error)}); processor_config.json, "
            "tokenizer.json and tokenizer_config.json belong to the checkpoint: download it again"
        ) from error


def _check_tensors(folder: Path) -> Any:
    """Check the tensors that the image model needs; returns the model without weights."""
    import torch
    from transformers import Sam3Config, Sam3Model

    try:
        config = Sam3Config.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = Sam3Model(config)
    except Exception as error:  # strict configurations raise errors of many types
        raise ConfigError(f"{folder / 'config.json'}: {one_line(error)}; download it again") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    stored = tensor_files.list_tensors(folder)
    found = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    tensor_files.check_tensors(folder, {name: found[name] for name in wanted if name in found}, wanted)
    return model
