"""Captions of six regions at once, against a loop that does per step what the original does.

Random weights at the mid size below, float32, a photo's worth of noise. The original's loop runs on
transformers' own SigLIP and Llama with the same weights: at every step the whole sequence under a dense mask,
logits of the full vocabulary at every position, and their softmax in float64.

    python -m benchmarks.decoder                       # both vocabularies, without a cache and with `exact`
    python -m benchmarks.decoder --vocabulary 8192     # one of them
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from paracaption.model_training.decoding import head as decoder_head
from paracaption.model_training.decoding.sampler import decode_batch
from paracaption.model_training.model.attention import dense_mask
from paracaption.model_training.model.batch import Batch, collate
from paracaption.model_training.model.config import PerceptionDLMConfig
from paracaption.model_training.model.perceptiondlm import PerceptionDLM, pixel_unshuffle
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.schemas.decoding import DecodeOptions

WIDTH, HEIGHT, REGIONS, LENGTH, STEPS = 1024, 512, 6, 32, 32
WANTED = {("none", 126_464): 3.5, ("none", 8_192): 1.15, ("exact", 126_464): 9.0, ("exact", 8_192): 4.0}

VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
VISION |= {"image_size": 512, "patch_size": 16}
TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
TEXT |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 16384}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SPECIAL = {"mask_token_id": 1, "image_token_id": 2, "eot_token_id": 3, "newline_token_id": 4}
SPECIAL |= {"region_token_ids": list(range(10, 16)), "caption_token_ids": list(range(20, 26))}


class Words:
    """Stands for the tokenizer: a token for every six letters. Nothing is measured of it."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [100 + i % 50 for i in range(max(1, len(text) // 6))]}


class Processor(PerceptionDLMProcessor):
    """The real layout without a tokenizer's files."""

    def __init__(self, config: PerceptionDLMConfig):
        self.config, self.layout, self.tokenizer = config, config.resolved_layout(), Words()


def mid_size(vocabulary: int, layout: str) -> PerceptionDLM:
    """Random weights, far enough from zero that slots disagree."""
    config = PerceptionDLMConfig(
        vision_config=VISION, text_config=TEXT | {"vocab_size": vocabulary}, layout=layout, **SPECIAL
    )
    torch.manual_seed(0)
    model = PerceptionDLM(config).eval().requires_grad_(False)
    for name, parameter in model.language_model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.06)
    return model


def scene(model: PerceptionDLM, images: int = 1, regions: int = REGIONS, length: int = LENGTH) -> Batch:
    """A batch of noise with rectangular regions, the same for every model."""
    random = np.random.default_rng(0)
    processor = Processor(model.config)
    examples = []
    for _ in range(images):
        pixels = random.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        masks = []
        for _ in range(regions):
            top, left = random.integers(0, HEIGHT - 200), random.integers(0, WIDTH - 300)
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[top : top + random.integers(40, 200), left : left + random.integers(40, 300)] = True
            masks.append(mask)
        examples.append(processor.make_example(pixels, masks, length))
    return collate(examples)


class Original:
    """The original's loop, on transformers' modules."""

    def __init__(self, model: PerceptionDLM):
        from transformers import LlamaConfig, LlamaModel, SiglipVisionModel

        self.model = model
        config = model.config
        self.tower = SiglipVisionModel(config.vision_config).eval().requires_grad_(False)
        self.tower.load_state_dict(_their_tower(model), strict=False)
        text = LlamaConfig(**config.text_config.to_dict())
        with torch.device("meta"):
            self.llama = LlamaModel(text).eval().requires_grad_(False)
        self.llama.rotary_emb = type(self.llama.rotary_emb)(text)
        self.llama.load_state_dict(model.language_model.state_dict(), assign=True, strict=True)

    @torch.inference_mode()
    def decode(self, batch: Batch, num_steps: int) -> Tensor:
        """The slots' tokens, (regions * length)."""
        model, tokens = self.model, batch.tokens()
        features = self._see(batch)
        embeds = model.embed(tokens, features, model.replay_regions(features, batch.images))
        mask = dense_mask(tokens.roles, tokens.roles, model.layout.isolate_prefix)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
        ids = tokens.ids_BL.clone()
        is_slot = ids == model.config.mask_token_id
        slots = int(is_slot.sum())
        open_slots = is_slot.clone()
        table = model.language_model.embed_tokens.weight
        for step in range(num_steps):
            hidden = self.llama(
                inputs_embeds=embeds, attention_mask=bias, position_ids=tokens.position_BL, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden).float()
            guess = logits.argmax(-1)
            probability = logits.double().softmax(-1).gather(-1, guess[..., None])[..., 0]
            ids = torch.where(open_slots, guess, ids)
            left = int(slots * ((num_steps - 1 - step) / num_steps))
            if left == 0:
                break
            doubtful = probability.masked_fill(~is_slot, torch.inf).topk(left, largest=False).indices
            open_slots = torch.zeros_like(is_slot).scatter(1, doubtful, True)
            ids = ids.masked_fill(open_slots, model.config.mask_token_id)
            embeds = torch.where(is_slot[..., None], table[ids], embeds)
        return ids[is_slot]

    def _see(self, batch: Batch) -> Tensor:
        """All layers, the final norm and the pooling head, of which the last two are thrown away."""
        model, images = self.model, batch.images
        pixels = (images.views_N3SS.float() / 255 - 0.5) / 0.5
        prompts = torch.einsum("npq,pc->nqc", images.prompts_NPQ.float(), model.region_prompts.weight)
        hidden = self.tower.embeddings(pixels) + prompts
        states = []
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden, None)
            states.append(hidden)
        self.tower.head(self.tower.post_layernorm(hidden))
        return model.projector(pixel_unshuffle(states[-2], model.config.patches_per_side))


def _their_tower(model: PerceptionDLM) -> dict[str, Tensor]:
    ours = model.vision_tower.state_dict()
    return {f"encoder.{name}" if name.startswith("layers") else name: part for name, part in ours.items()}


class Measured(NamedTuple):
    """A decode: its seconds, forwards and tokens; seconds and arithmetic (FLOP) of its parts."""

    seconds: float
    forwards: int
    tokens: Tensor
    parts: dict[str, float]
    flop: dict[str, float]


def measure(model: PerceptionDLM, batch: Batch, options: DecodeOptions) -> Measured:
    """One whole decode, vision included."""
    parts: dict[str, float] = defaultdict(float)
    flop: dict[str, float] = defaultdict(float)

    def watched(part: str, function: Callable[..., Any], cost: Callable[..., float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            parts[part] += time.perf_counter() - start
            flop[part] += cost(result, *args, **kwargs)
            return result

        return call

    costs = Costs(model.config)
    with (
        mock.patch.object(model, "encode_images", watched("vision", model.encode_images, costs.vision)),
        mock.patch.object(
            model.language_model, "forward", watched("backbone", model.language_model.forward, costs.backbone)
        ),
        mock.patch.object(decoder_head, "likeliest", watched("head", decoder_head.likeliest, costs.head)),
    ):
        start = time.perf_counter()
        last = decode_batch(model, batch, options)
        seconds = time.perf_counter() - start
    parts["rest"] = seconds - sum(parts.values())
    return Measured(seconds, int(last.forwards_B.sum()), last.tokens_BNS.flatten(), dict(parts), dict(flop))


class Costs:
    """The arithmetic that a part needs at least: products of matrices, two operations for each number."""

    def __init__(self, config: PerceptionDLMConfig):
        self.config = config

    def vision(self, _: Any, images: Any) -> float:
        tower, text = self.config.vision_config, self.config.text_config
        width, patches = tower.hidden_size, self.config.patches_per_side**2
        layers = tower.num_hidden_layers + 1 + self.config.vision_select_layer
        layer = 2 * patches * width * (4 * width + 2 * tower.intermediate_size) + 4 * patches**2 * width
        embed = 2 * patches * width * 3 * tower.patch_size**2
        project = 2 * self.config.tokens_per_tile * text.hidden_size * (4 * width + text.hidden_size)
        return len(images.views_N3SS) * (layers * layer + embed + project)

    def backbone(self, out: Tensor, x: Tensor, _: Any, mask: Any, *__: Any, **___: Any) -> float:
        text = self.config.text_config
        width, inner = text.hidden_size, text.intermediate_size
        keys = mask.keys.sample_BL.shape[1]
        num_all, num_out = x.shape[0] * x.shape[1], out.shape[0] * out.shape[1]

        def layer(queries: int) -> float:
            of_queries = 2 * queries * width * (2 * width + 3 * inner) + 4 * queries * keys * width
            return of_queries + 2 * num_all * width * 2 * width

        return (text.num_hidden_layers - 1) * layer(num_all) + layer(num_out)

    def head(self, _: Any, hidden: Tensor, weight: Tensor, *__: Any) -> float:
        return 2 * len(hidden) * weight.numel()


def product_rate() -> float:
    """Operations per second of a plain product of large matrices here, the best of five."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = min(_seconds(lambda: left @ right) for _ in range(5))
    return 2 * 2048**3 / best


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(vocabulary: int, cache: str, rate: float) -> bool:
    """Print one row: ours and the original's loop on the same weights; whether it is as fast as wanted."""
    model = mid_size(vocabulary, "corrected" if cache == "exact" else "reference")
    batch, original = scene(model), Original(model)
    options = DecodeOptions(max_new_tokens=LENGTH, steps=STEPS, cache=cache, suppress_special=False)
    start = time.perf_counter()
    theirs = original.decode(batch, STEPS)
    original_s = time.perf_counter() - start
    ours = measure(model, batch, options)
    uncached = ours
    if cache == "exact":
        uncached = measure(model, batch, options.model_copy(update={"cache": "none"}))
    same = torch.equal(ours.tokens, uncached.tokens)
    ratio, wanted = original_s / ours.seconds, WANTED[cache, vocabulary]
    rate = max(rate, product_rate())  # the machine may have been busy a while ago
    like_theirs = torch.equal(ours.tokens, theirs)
    floor_s = sum(ours.flop.values()) / rate
    shares = ", ".join(f"{name} {spent / ours.seconds:.0%}" for name, spent in ours.parts.items())
    floors = ", ".join(f"{name} {flop / rate:.2f} s" for name, flop in ours.flop.items())
    print(f"vocabulary {vocabulary:,}, cache {cache}: {len(set(theirs.tolist()))} different tokens")
    print(f"  the original's loop {original_s:.2f} s, ours {ours.seconds:.2f} s")
    print(f"  {ratio:.2f} times as fast (wanted {wanted})")
    print(f"  same tokens as the original's loop: {like_theirs}; as uncached: {same}")
    print(f"  forwards {ours.forwards}, tokens per forward {len(ours.tokens) / ours.forwards:.1f}")
    print(f"  {shares}")
    print(f"  floor {floor_s:.2f} s ({floors}), ours {ours.seconds / floor_s:.2f} times it")
    return ratio >= wanted and same and like_theirs


def approximate(vocabulary: int) -> None:
    """Print what the approximate cache costs and how often it agrees with none, on the published layout."""
    model = mid_size(vocabulary, "reference")
    batch = scene(model)
    exact = measure(model, batch, DecodeOptions(cache="none", suppress_special=False))
    for every in (1, 2, 4, 8, 32):
        options = DecodeOptions(cache="approximate", refresh_every=every, suppress_special=False)
        found = measure(model, batch, options)
        agreement = float((found.tokens == exact.tokens).double().mean())
        print(
            f"approximate, refreshed every {every} steps: {exact.seconds / found.seconds:.2f} times as fast "
            f"as uncached, {agreement:.0%} of the tokens equal (random weights)"
        )


def growth(vocabulary: int, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> None:
    """Print images per second against the size of the batch."""
    model = mid_size(vocabulary, "corrected")
    for size in sizes:
        found = measure(model, scene(model, size), DecodeOptions(steps=8, suppress_special=False))
        print(f"batch of {size}: {size / found.seconds:.2f} images/s (8 steps, cache exact)")


def main() -> int:
    """Run what the arguments ask for; 1 if something is slower than wanted or not the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocabulary", type=int, choices=(8_192, 126_464), action="append")
    parser.add_argument("--cache", choices=("none", "exact"), action="append")
    parser.add_argument("--only", choices=("compare", "approximate", "growth"))
    arguments = parser.parse_args()
    rate = product_rate()
    print(f"{torch.get_num_threads()} threads; a plain product runs at {rate / 1e9:.0f} GFLOP/s")
    fine = True
    if arguments.only in (None, "compare"):
        for vocabulary in arguments.vocabulary or (8_192, 126_464):
            fine &= all([compare(vocabulary, cache, rate) for cache in arguments.cache or ("none", "exact")])
    if arguments.only in (None, "approximate"):
        approximate(8_192)
    if arguments.only in (None, "growth"):
        growth(8_192)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
