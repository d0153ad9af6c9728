"""PerceptionDLM at the published 8B shapes: what captions cost by number of regions and cache.

Random weights in bfloat16, images of 3 x 2 tiles and a thumbnail, 32 slots a region, 32 steps. The strategy
is the published one, which takes all its steps whatever the weights are, so that random ones cost what
trained ones do; rows with few steps are forced to keep several tokens in each. The layouts are that for new
training, whose prefix sees no captions, and that of published weights (`reference`).

`waits` is how often the host waits for the GPU in a whole decode, as torch notices. The wait for the event
that says what the step before left open, one a step, comes on top.

The floor adds up, call by call, the slower of arithmetic and memory traffic: the vision tower, every pass of
the language model with its weights and the keys and values it reads, and the head.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.decoder import LENGTH, Costs
from benchmarks.gpu import perceptiondlm
from benchmarks.gpu.machine import Call, Machine, forget_peak, now, peak_gb, waits_of
from benchmarks.gpu.rows import Measured, Rows
from paracaption.model_training.decoding import head as decoder_head
from paracaption.model_training.decoding.sampler import Decoder
from paracaption.model_training.model.batch import Batch, collate
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.schemas.decoding import DecodeOptions

SIZE = (1536, 1024)
STEPS, TINY_STEPS = 32, 4
FEW_STEPS, TINY_FEW_STEPS = 4, 2
"""Of 32 slots: 8 tokens of a region for each forward pass."""


class Case(NamedTuple):
    """A row of the part.

    Attributes:
        regions: of the image.
        cache: of the keys and values.
        layout: "corrected" or "reference".
        few: whether the tokens are decoded in few steps.
        captures: whether a step is captured as a CUDA graph.
    """

    regions: int
    cache: str
    layout: str = "corrected"
    few: bool = False
    captures: bool = True

    def name(self, steps: int) -> str:
        """For the report."""
        what = f"{self.regions} region{'s' * (self.regions > 1)}, cache {self.cache}, {steps} steps"
        published = ", published layout" * (self.layout == "reference")
        return what + published + ", no graphs" * (not self.captures)


class Decoded(NamedTuple):
    """One decode.

    Attributes:
        vision_s: until the images are encoded.
        first_s: the first pass, over whole sequences.
        step_s: median of the later ones.
        seconds: of it all.
        forwards: passes of the language model for each image.
        tokens: of all images.
        calls: its work.
    """

    vision_s: float
    first_s: float
    step_s: float
    seconds: float
    forwards: int
    tokens: int
    calls: list[Call]


def cases(machine: Machine) -> list[Case]:
    """The most wanted first."""
    most = [Case(6, "exact"), Case(6, "exact", few=True)]
    most += [Case(6, cache, "reference", few) for cache in ("approximate", "none") for few in (False, True)]
    most += [Case(6, "exact", captures=False), Case(6, "approximate", "reference", captures=False)]
    return most + [Case(regions, "exact") for regions in ((1,) if machine.tiny else (1, 2, 4))]


def run(rows: Rows, machine: Machine) -> None:
    """A row for each case."""
    model = open_model(machine)
    for case in cases(machine):
        options = options_of(machine, case.cache, case.few)
        set_layout(model, case.layout)
        rows.measure(
            case.name(options.steps),
            lambda c=case, o=options: measure(model, machine, 1, c.regions, o, c.captures),
            needs_s=5,
        )


def set_layout(model: PerceptionDLM, name: str) -> None:
    """Have the same weights read their tokens in another layout."""
    model.config.layout = name
    model.layout = model.config.resolved_layout()


def options_of(machine: Machine, cache: str, few: bool = False) -> DecodeOptions:
    """The published strategy and number of steps; a dry run takes fewer."""
    most, least = (TINY_STEPS, TINY_FEW_STEPS) if machine.tiny else (STEPS, FEW_STEPS)
    steps = least if few else most
    return DecodeOptions(max_new_tokens=LENGTH, steps=steps, cache=cache, suppress_special=False)


def open_model(machine: Machine) -> PerceptionDLM:
    """Random weights, for decoding."""
    config = perceptiondlm.config_of(machine.tiny)
    model = perceptiondlm.make(config, machine, machine.dtype, "sdpa")
    return model.eval().requires_grad_(False)


def measure(
    model: PerceptionDLM,
    machine: Machine,
    images: int,
    regions: int,
    options: DecodeOptions,
    captures: bool = True,
) -> Measured:
    """Decode once to warm up, then up to three times for five seconds; the fastest one is the row.

    The first decode captures the step as a CUDA graph; its seconds stand apart.
    """
    decoder = Decoder(model, captures)
    batch = collate([perceptiondlm.example(model.config, SIZE, regions)] * images).to(machine.device)
    first = decode(decoder, batch, options, machine)
    forget_peak(machine.device)
    found = [decode(decoder, batch, options, machine)]
    while not machine.tiny and len(found) < 3 and sum(each.seconds for each in found) < 5:
        found.append(decode(decoder, batch, options, machine))
    best = min(found, key=lambda each: each.seconds)
    roofline = machine.roofline(best.calls, best.seconds)
    most_gb = peak_gb(machine.device)
    numbers = {
        "images": images,
        "regions": regions,
        "positions": batch.prefix.ids_BL.shape[1] + batch.captions.ids_BL.shape[1],
        "seconds_per_image": best.seconds / images,
        "images_per_s": images / best.seconds,
        "tokens_per_forward": best.tokens / images / best.forwards,
        "tokens_per_s": best.tokens / best.seconds,
        "ms_per_step": 1000 * best.step_s,
        "vision_ms": 1000 * best.vision_s,
        "first_pass_ms": 1000 * best.first_s,
        "peak_gb": most_gb,
        "warm_up_s": first.seconds,
        "waits": waits_of(lambda: decoder.decode(batch, options), machine.device),
    }
    headline = f"{numbers['tokens_per_s']:,.0f} tokens/s, {numbers['ms_per_step']:.1f} ms a step"
    return Measured(f"{headline}, {numbers['tokens_per_forward']:.1f} tokens a forward", numbers, roofline)


def decode(decoder: Decoder, batch: Batch, options: DecodeOptions, machine: Machine) -> Decoded:
    """One decode with its times. Each number needs a decode of its own.

    Listening to single steps makes all of them slower, and the work of a step that is replayed as a graph
    cannot be recorded.
    """
    times = [now(machine.device)]
    times.extend(now(machine.device) for _ in decoder.steps(batch, options))
    spans = [end - start for start, end in itertools.pairwise(times)]
    start = now(machine.device)
    last = decoder.decode(batch, options)
    seconds = now(machine.device) - start
    calls: list[Call] = []
    with Recorder(decoder.model, calls):
        Decoder(decoder.model, captures=False).decode(batch, options)
    return Decoded(
        vision_s=spans[0],
        first_s=spans[1],
        step_s=statistics.median(spans[2:] or spans[1:]),
        seconds=seconds,
        forwards=int(last.forwards_B.max()),
        tokens=last.tokens_BNS.numel(),
        calls=calls,
    )


class Recorder:
    """Within it, each call of a model's vision tower, language model and head adds its work to a list."""

    def __init__(self, model: PerceptionDLM, calls: list[Call]):
        self.model, self.calls, self.costs = model, calls, Costs(model.config)
        self.inside = False
        text = model.config.text_config
        size = model.lm_head.weight.element_size()
        self.layer_bytes = _bytes_of(model.language_model.layers)
        self.vision_bytes = _bytes_of(model.vision_tower) + _bytes_of(model.projector)
        self.key_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * size
        self.patches = [
            mock.patch.object(model, "encode_images", self._watched(model.encode_images, self._vision)),
            mock.patch.object(
                model.language_model, "forward", self._watched(model.language_model.forward, self._backbone)
            ),
            mock.patch.object(decoder_head, "likeliest", self._watched(decoder_head.likeliest, self._head)),
        ]

    def __enter__(self) -> None:
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_: Any) -> None:
        for patch in self.patches:
            patch.stop()

    def _watched(self, function: Callable[..., Any], call_of: Callable[..., Call]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # the head calls itself for parts of many slots
                return function(*args, **kwargs)
            self.inside = True
            try:
                result = function(*args, **kwargs)
            finally:
                self.inside = False
            self.calls.append(call_of(result, *args, **kwargs))
            return result

        return watched

    def _vision(self, result: Any, *args: Any) -> Call:
        return Call(self.costs.vision(result, *args), self.vision_bytes)

    def _backbone(
        self, out: torch.Tensor, x: torch.Tensor, position: Any, mask: Any, *rest: Any, **more: Any
    ):
        keys = mask.keys.sample_BL.numel()
        flop = self.costs.backbone(out, x, position, mask, *rest, **more)
        return Call(flop, self.layer_bytes + keys * self.key_bytes)

    def _head(self, result: Any, hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Call:
        return Call(self.costs.head(result, hidden, weight), weight.numel() * weight.element_size())


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
