"""How fast whole decodes are, against a loop that does in every step what the original does.

    python -m benchmarks.decode                              # CPU, mid size: a minute or two per row at 32 steps
    python -m benchmarks.decode --vocabulary 8192 --steps 8  # a quick look
    python -m benchmarks.decode --device cuda --shapes 8b    # a GPU: latency per region, images/s per batch

The configuration: one image of 2 x 1 tiles and a thumbnail (768 image tokens), 6 regions of 32 slots, 1,174
positions, random weights in float32. The loop computes the whole sequence in every step under a dense mask,
logits of the whole vocabulary at every position, and a softmax over them in float64; vision once. It uses the
same modules as the decoder, so the difference is what the decoder leaves out.

The floor is arithmetic: the products and attention a decode cannot do without, over the rate of a plain matrix
product of the same shape as the model's on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from model_training import decode as decoding
from model_training.batch import Batch
from model_training.config import PerceptionDLMConfig
from model_training.decode import Decoded, Decoding
from model_training.model import PerceptionDLM
from tests.model_training import made

MID_VISION = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
    "image_size": 512, "patch_size": 16,
}  # fmt: skip
"""Five layers run, in the loop too: the last one is not read."""
MID_TEXT = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
PROMPT = 50
"""Words before the image and after the replayed regions, each: 1,174 positions with six regions of 32 slots."""


@torch.inference_mode()
def original(model: PerceptionDLM, batch: Batch, num_steps: int, clock: Clock) -> Tensor:
    """What the original does in every step, for one image. Returns the slots' ids."""
    slots = batch.slots_BS[0]
    with clock("vision and embedding"):
        x_BLD = model.embed(batch)
        mask = model.mask(batch, kind="sdpa")
        mask_D = model.embed_tokens(torch.tensor(model.config.mask_token_id))
    ids = batch.input_ids_BL[0, slots].clone()
    for step in range(num_steps):
        open_N = ids == model.config.mask_token_id
        if not open_N.any():
            break
        with clock("backbone"):
            hidden_BLD = model.language(x_BLD, batch.positions_BL, mask)
        with clock("head"):
            logits_BLV = model.head(hidden_BLD)
        with clock("choice"):
            share_BLV = logits_BLV.to(torch.float64).softmax(-1)
            best_BL = logits_BLV.argmax(-1)
            surety_N = share_BLV.gather(-1, best_BL[..., None])[0, slots, 0]
            ids = torch.where(open_N, best_BL[0, slots], ids)
            k = int(len(slots) * ((num_steps - 1 - step) / num_steps))
            x_BLD[0, slots] = model.embed_tokens(ids)
            if k == 0:
                break
            again = surety_N.topk(k, largest=False).indices
            ids[again] = model.config.mask_token_id
            x_BLD[0, slots[again]] = mask_D
    return ids


class Clock:
    """Seconds by part."""

    def __init__(self, device: str = "cpu"):
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self.began, self.began_cpu = self.now(), time.process_time()

    def stop(self) -> Clock:
        """Note the time since the clock was made."""
        self.wall, self.cpu = self.now() - self.began, time.process_time() - self.began_cpu
        return self

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = self.now()
        yield
        self.seconds[part] += self.now() - began

    @contextmanager
    def around(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Count the calls of a function or a module's forward as a part."""
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return plain(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            if isinstance(owner, torch.nn.Module):
                delattr(owner, name)
            else:
                setattr(owner, name, plain)


def ours(model: PerceptionDLM, batch: Batch, how: Decoding, clock: Clock) -> Decoded:
    """Our decode, by part."""
    with (
        clock.around(model, "embed", "vision and embedding"),
        clock.around(model.language, "forward", "backbone"),
        clock.around(decoding, "_predict", "head and choice"),
    ):
        return decoding.decode(model, batch, how)


def mid(vocabulary: int, layout: str, device: str = "cpu") -> tuple[PerceptionDLM, Batch]:
    """The mid-size model and its image."""
    config = PerceptionDLMConfig(
        vision_config=MID_VISION, text_config=MID_TEXT | {"vocab_size": vocabulary}, layout=layout,
        mask_token_id=made.MASK, eot_token_id=made.EOT,
    )  # fmt: skip
    model = made.fill(PerceptionDLM(config).eval()).to(device)
    return model, made.batch(config, [((2, 1), 6, 1)], length=32, prompt=PROMPT).to(device)


def rate(dtype: torch.dtype = torch.float32, device: str = "cpu", shape: tuple[int, int, int] = (1174, 512, 1408)) -> float:
    """Operations a second of a plain matrix product."""
    clock = Clock(device)
    a, b = (torch.randn(shape[i], shape[i + 1], dtype=dtype, device=device) for i in (0, 1))
    best = 0.0
    for _ in range(5):
        began = clock.now()
        for _ in range(20):
            a @ b
        best = max(best, 20 * 2 * shape[0] * shape[1] * shape[2] / (clock.now() - began))
    return best


def operations(config: PerceptionDLMConfig, rows: int, keys: int, slots: int) -> float:
    """Of one step: the products of the layers for some rows, attention to all keys, the head for the slots.

    In the last layer only the slots go on after keys and values.
    """
    text = config.text_config
    width, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    wide = width * text.num_key_value_heads // text.num_attention_heads
    weights = 2 * width * width + 2 * width * wide + 3 * width * inner
    last = 2 * rows * 2 * width * wide + 2 * slots * (2 * width * width + 3 * width * inner)
    attention = 4 * width * keys
    return (
        (layers - 1) * rows * (2 * weights + attention)
        + last + slots * attention
        + 2 * slots * width * text.vocab_size
    )  # fmt: skip


def vision_operations(config: PerceptionDLMConfig, tiles: int, layers: int) -> float:
    """Of the vision tower and the projector."""
    vision, width = config.vision_config, config.text_config.hidden_size
    patches, C, inner = config.grid**2, vision.hidden_size, vision.intermediate_size
    layer = patches * (2 * (4 * C * C + 2 * C * inner) + 4 * C * patches)
    embedding = patches * 2 * C * 3 * vision.patch_size**2
    projector = patches // 4 * 2 * (4 * C * width + width * width)
    return tiles * (layers * layer + embedding + projector)


def floor(model: PerceptionDLM, batch: Batch, passes: int, cached: bool, speed: float) -> float:
    """Seconds of the arithmetic alone."""
    L, slots = batch.input_ids_BL.shape[1], batch.slots_BS.shape[1]
    captions = int((batch.region_ids_BL > 0).sum())
    whole = operations(model.config, L, L, slots)
    step = operations(model.config, captions, L, slots) if cached else whole
    vision = vision_operations(model.config, len(batch.pixels_TCSS), len(model.vision.layers))
    return (vision + whole + (passes - 1) * step) / speed


def report(name: str, clock: Clock, tokens_per_forward: float, **more: Any) -> None:
    """One row, as a line of JSON. Processor time is what a busy machine leaves of a ratio."""
    parts = {part: f"{share / clock.wall:.0%}" for part, share in clock.seconds.items()}
    parts["rest"] = f"{1 - sum(clock.seconds.values()) / clock.wall:.0%}"
    row = {"run": name, "seconds": round(clock.wall, 2), "cpu_seconds": round(clock.cpu, 2)}
    row |= {"tokens_per_forward": round(tokens_per_forward, 2), "shares": parts}
    print(json.dumps(row | more), flush=True)


def side_by_side(vocabulary: int, num_steps: int) -> None:
    """The original's loop and our decoder with the same weights, in one run."""
    for layout in ("reference", "corrected"):
        model, batch = mid(vocabulary, layout)
        name = f"{vocabulary:,} words, {'isolated prefix' if model.config.isolate_prefix else 'reference'}"
        with torch.inference_mode():
            model(batch, batch.slots_BS[:, :1])  # first use allocates
        speed = rate()
        num_slots = batch.slots_BS.numel()
        loop = Clock()
        ids = original(model, batch, num_steps, loop).tolist()
        report(f"{name}: the original's loop", loop.stop(), num_slots / num_steps)
        for cache in ("none", "exact") if model.config.isolate_prefix else ("none", "approximate"):
            clock = Clock()
            done = ours(model, batch, Decoding(steps=num_steps, cache=cache), clock)
            clock.stop()
            same = sum(a == b for a, b in zip(ids, sum(done.tokens, []), strict=True))
            more = {"stale_agreement": done.stale_agreement}
            if cache != "approximate":
                least = floor(model, batch, done.forwards, cache == "exact", speed)
                more = {"floor_seconds": round(least, 2), "of_floor": f"{least / clock.wall:.0%}"}
            report(
                f"{name}: cache {cache}", clock, done.tokens_per_forward,
                times_faster=round(loop.wall / clock.wall, 2), times_less_cpu=round(loop.cpu / clock.cpu, 2),
                tokens_equal=f"{same}/{num_slots}", gflops=round(speed / 1e9), **more,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 126464])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for vocabulary in arguments.vocabulary:
        side_by_side(vocabulary, arguments.steps)


if __name__ == "__main__":
    main()
