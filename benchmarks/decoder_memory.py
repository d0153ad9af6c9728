"""Peak memory of a forward pass: counted on real tensors at mid size, and on fake ones at the 8B shapes.

The count follows every storage from its first use to its end. At mid size it is held against fake tensors of
the same shapes and against the process's own peak; at 8B shapes (bfloat16) only fake tensors run. The
attention is SDPA with its mask. FlexAttention is compiled for the CPU, to see that it holds no (L, L) scores.

    python -m benchmarks.decoder_memory
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.decoder import SPECIAL, TEXT, VISION
from paracaption.model_training.model.attention import AttentionMask, TokenRoles
from paracaption.model_training.model.config import PerceptionDLMConfig
from paracaption.model_training.model.perceptiondlm import PerceptionDLM

LENGTH = 32


class Live(TorchDispatchMode):
    """Bytes that are alive, of storages that came to be while it was on.

    Attributes:
        peak: the most at once.
        squares: shapes of floating tensors whose last two sizes are at least `side` each.
    """

    def __init__(self, side: int):
        super().__init__()
        self.side = side
        self.now = self.peak = 0
        self.seen: dict[int, int] = {}
        self.squares: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_floating_point() and tensor.ndim > 1 and min(tensor.shape[-2:]) >= self.side:
            self.squares.add(tuple(tensor.shape))
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.seen[key] = storage.nbytes()
        self.now += self.seen[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.now -= self.seen.pop(key)


def roles_of(views_tokens: int, regions: int, replay: int) -> TokenRoles:
    """One sequence of about the published length: prompt and image, replays, instruction, captions."""
    head, foot = 30 + views_tokens, 20
    codes = [0] * head
    for region in range(regions):
        codes += [1 + region] * replay + [0]
    codes += [0] * foot
    prefix = len(codes)
    for region in range(regions):
        codes += [1 + region] * (LENGTH + 2)
    region_BL = torch.tensor([codes])
    caption_BL = (torch.arange(len(codes)) >= prefix)[None]
    return TokenRoles(torch.zeros_like(region_BL), region_BL, caption_BL)


def forwards(model: PerceptionDLM, views: int, regions: int) -> dict[str, Callable[[], Any]]:
    """The passes of a decode, at one image of so many views: vision, whole sequence, head."""
    config = model.config
    known = roles_of(views * config.tokens_per_tile, regions, config.replay_tokens)
    length, dtype = known.region_BL.shape[1], model.dtype
    size = config.vision_config.image_size

    def vision() -> Any:
        images = torch.zeros(views, 3, size, size, dtype=torch.uint8)
        prompts = torch.zeros(views, config.num_prompts, config.patches_per_side**2, dtype=torch.bool)
        return model.encode_views(images, prompts)

    def sequence() -> Any:
        x_BLD = torch.zeros(1, length, config.text_config.hidden_size, dtype=dtype)
        here = TokenRoles(*(torch.zeros_like(field) for field in known))
        mask = object.__new__(AttentionMask)
        mask.queries = mask.keys = here
        mask.isolate_prefix, mask.kernel = True, "sdpa"
        mask.mask = torch.zeros(1, 1, length, length, dtype=dtype)
        return model.language_model(x_BLD, torch.arange(length)[None], mask)

    def head() -> Any:
        hidden_KD = torch.zeros(regions * LENGTH, config.text_config.hidden_size, dtype=dtype)
        return hidden_KD @ model.lm_head.weight.T

    return {"vision": vision, "whole sequence": sequence, "head": head}


def peak(function: Callable[[], Any], side: int = 1 << 30) -> int:
    """Bytes at most alive at once that the call itself made."""
    with torch.no_grad(), Live(side) as live:
        function()
    return live.peak


def make(config: PerceptionDLMConfig, dtype: torch.dtype) -> PerceptionDLM:
    """The model; under a fake mode, nothing of it is there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return PerceptionDLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def mid_config() -> PerceptionDLMConfig:
    return PerceptionDLMConfig(vision_config=VISION, text_config=TEXT | {"vocab_size": 8192}, **SPECIAL)


def mid_size() -> None:
    """Counted on real tensors, on fake ones, and the process's own peak."""
    model = make(mid_config(), torch.float32)
    counted = {name: peak(run) for name, run in forwards(model, 3, 6).items()}
    with FakeTensorMode():
        fake = {name: peak(run) for name, run in forwards(make(mid_config(), torch.float32), 3, 6).items()}
    for name, run in forwards(model, 3, 6).items():
        grown = grown_peak(run)
        print(
            f"mid size, {name}: {counted[name] / 1e6:.1f} MB counted, {fake[name] / 1e6:.1f} MB on fake "
            f"tensors, {grown / 1e6:.1f} MB by the process's peak"
        )


def grown_peak(function: Callable[[], Any]) -> int:
    """How far the process's peak rises above what it held before, in bytes (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _held("VmRSS")
    with torch.no_grad():
        function()
    return _held("VmHWM") - before


def _held(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def published_shapes() -> None:
    """Counted on fake tensors, at 7 views and 6 regions."""
    config = PerceptionDLMConfig(**SPECIAL)
    with FakeTensorMode():
        model = make(config, torch.bfloat16)
        weights = sum(parameter.numel() for parameter in model.parameters()) * 2
        text = config.text_config
        length = roles_of(7 * config.tokens_per_tile, 6, config.replay_tokens).region_BL.shape[1]
        kept = 2 * 2 * text.num_hidden_layers * length * text.num_key_value_heads * text.head_dim
        print(
            f"8B, bfloat16: weights {weights / 1e9:.2f} GB; {length} positions; "
            f"kept keys and values of an image {kept / 1e9:.2f} GB"
        )
        for name, run in forwards(model, 7, 6).items():
            print(f"8B, {name}: {peak(run) / 1e9:.2f} GB beside the weights")


def flexible() -> bool:
    """Whether FlexAttention, compiled for the CPU, equals SDPA and never holds the scores of one head."""
    from torch.nn.attention.flex_attention import flex_attention

    known = roles_of(24 * 256, 6, 16)
    length = known.region_BL.shape[1]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 64) for _ in range(3))
    with Live(length) as made:
        mask = AttentionMask(known, known, True, "flex_attention")
    compiled = torch.compile(flex_attention)
    with torch.no_grad():
        got = compiled(q, k, v, block_mask=mask.mask)
    grown = grown_peak(lambda: compiled(q, k, v, block_mask=mask.mask))
    difference = float((got - AttentionMask(known, known, True, "sdpa").attend(q, k, v)).abs().max())
    print(
        f"FlexAttention, {length} positions: {difference:.0e} from SDPA; the process's peak grew by "
        f"{grown / 1e6:.1f} MB, where one head's scores are {4 * length**2 / 1e6:.0f} MB; float tensors of "
        f"(L, L) for the mask: {sorted(made.squares) or 'none'}"
    )
    return difference < 1e-4 and not made.squares and grown < length**2


def main() -> int:
    mid_size()
    published_shapes()
    return 0 if flexible() else 1


if __name__ == "__main__":
    sys.exit(main())
