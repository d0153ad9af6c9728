"""GAR at the published 8B shapes as the captioner `gar` runs it: photos and masks in, captions out of vLLM.

Photos of `samples/` with 16 regions each. Weights are random and made on the device: in the vision side by
us, in vLLM by its own `load_format="dummy"`. Such a model rarely ends an answer, so every caption has the
number of tokens that a real one has on average. vLLM runs without compiling (`enforce_eager`), which would
take most of the part's time and gains little where the prefill decides.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu.gar import layer_weights, prefill_flop, sizes_of, token_flop, tower_flop, write
from benchmarks.gpu.machine import Call, Machine, fill, forget_peak, peak_gb, seconds_of
from benchmarks.gpu.rows import Measured, Rows
from tests.tiny.gar import Sizes

NEW_TOKENS = 100
IN_FLIGHT = 256


def run(rows: Rows, machine: Machine) -> None:
    """Start the engine once, then caption more and more photos."""
    from benchmarks.gar import PHOTOS, record_of, with_regions

    with tempfile.TemporaryDirectory() as folder:
        start_s, captioner = seconds_of(lambda: start(Path(folder), machine), machine.device)
        photos = [with_regions(record_of(*name), 2 if machine.tiny else 16) for name in PHOTOS]
        captioner.caption([with_regions(photos[0], 2)])  # warm
        needs_s = 3.0
        for repeats in (1,) if machine.tiny else (1, 4):
            images = photos * repeats
            num = sum(len(image.live()) for image in images)
            before_s = rows.left_s()
            rows.measure(
                f"{num} regions of {len(images)} photos",
                lambda images=images: _caption(captioner, images, machine, start_s),
                needs_s=needs_s,
            )
            needs_s = 4 * (before_s - rows.left_s())
        captioner.close()


def start(folder: Path, machine: Machine) -> Any:
    """The captioner, with random weights everywhere."""
    from paracaption.pipeline.models.gar.captioner import GarCaptioner

    model = write(folder / "GAR-8B", machine)
    with dummy_engine(), hollow_export(folder / "language"):
        captioner = GarCaptioner(
            model=str(model),
            max_tokens=8 if machine.tiny else NEW_TOKENS,
            max_in_flight=IN_FLIGHT,
            device=machine.device.type,
            dtype=str(machine.dtype).removeprefix("torch."),
            engine={"enforce_eager": True},
        )
    fill(captioner.encoder.vision)
    captioner.encoder.embed.normal_(0, 0.02)
    return captioner


@contextmanager
def dummy_engine() -> Iterator[None]:
    """Within it, engines draw random weights on the device instead of reading files."""
    from paracaption.pipeline.models import vllm_engine

    with mock.patch.object(vllm_engine, "Engine", partial(vllm_engine.Engine, load_format="dummy")):
        yield


@contextmanager
def hollow_export(folder: Path) -> Iterator[None]:
    """Within it, the export of a language model for vLLM is its configuration alone."""
    from paracaption.pipeline.models.gar import checkpoint, export

    def prepare(model: str, *_: Any) -> Path:
        config = checkpoint.read_config(model)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(export._llama_config(config, tied=False)))
        return folder

    with mock.patch.object(export, "prepare", prepare):
        yield


def _caption(captioner: Any, images: list[Any], machine: Machine, start_s: float) -> Measured:
    from benchmarks.gar import run_ours, total

    before = captioner.encoder.counts
    forget_peak(machine.device)
    watch, answers = run_ours(captioner, images, sync=machine.device.type == "cuda")
    seconds = total(watch).wall
    after = captioner.encoder.counts
    tiles, regions, tokens = after.tiles - before.tiles, len(answers), sum(map(len, answers))
    sizes = sizes_of(machine)._replace(vocab=captioner.config.text["vocab_size"])
    prompts = [length for image in images for length in [_prompt_len(captioner, image)] * len(image.live())]
    peaks = machine.published or machine.measured
    limit = 3600 * peaks.flops * regions / sum(prefill_flop(sizes, length) for length in prompts)
    hourly = 3600 * regions / seconds
    shares = {
        f"share_{name.replace(' ', '_')}": took.wall / seconds
        for name, took in sorted(watch.seconds.items(), key=lambda item: -item[1].wall)
    }
    numbers = {
        "regions": regions,
        "seconds": seconds,
        "captions_per_s": regions / seconds,
        "regions_per_gpu_hour": hourly,
        "regions_per_gpu_hour_at_the_prefill_limit": limit,
        "share_of_the_prefill_limit": hourly / limit,
        "new_tokens": tokens,
        "mean_prompt_tokens": sum(prompts) / regions,
        "tiles": tiles,
        "tiles_share_of_one_at_a_time": tiles / (after.tiles_one_by_one - before.tiles_one_by_one),
        "start_s": start_s,
        "peak_gb": peak_gb(machine.device),
        **shares,
    }
    calls = work_of(sizes, tiles, prompts, tokens)
    headline = f"{hourly:,.0f} regions a GPU-hour, {hourly / limit:.0%} of the prefill limit"
    return Measured(headline, numbers, machine.roofline(calls, seconds))


def _prompt_len(captioner: Any, image: Any) -> int:
    from paracaption.pipeline.models.gar.image import tile_grid

    config = captioner.config
    across, down = tile_grid(image.width, image.height, config.tile_px, config.max_tiles)
    return len(captioner.prompts.write(1 + across * down).ids)


def work_of(sizes: Sizes, tiles: int, prompts: list[int], tokens: int) -> list[Call]:
    """Tower, prefills, and decoding, which reads weights, keys and values at each step."""
    number_bytes = 2
    prefill = sum(prefill_flop(sizes, length) for length in prompts)
    steps = tokens / min(len(prompts), IN_FLIGHT)
    weights = layer_weights(sizes) + sizes.vocab * sizes.hidden
    keys = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * sum(prompts) / len(prompts) * tokens
    decoding = tokens * (token_flop(sizes) + 2 * sizes.vocab * sizes.hidden)
    return [
        Call(tiles * tower_flop(sizes)),
        Call(prefill),
        Call(decoding, number_bytes * (steps * weights + keys)),
    ]
