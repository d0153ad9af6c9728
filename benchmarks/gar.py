"""The GAR captioner against the same weights one region at a time, as the original works.

    python -m benchmarks.gar [--runs N] [--original PYTHON]
    python -m benchmarks.gar --shapes 8b --device cuda [--photos N] [--max-tokens N]

Without `--shapes`: a tiny random checkpoint, float32, one thread on each side, three photos of `samples/`
with 16 regions each (the annotated masks, then pieces cut from them), 64 new tokens. One at a time means:
for each region the photo is read, cut and encoded whole, and transformers' `generate` continues one prompt;
its tokens are what ours are compared with, once with each of transformers' attentions. With `--original`,
`generate` runs once more in that interpreter, whose transformers should be the one that the original pins
(4.56.2; docs/experiments.md says how); the original's other steps are as measured here. The machine may be
shared: ratios of CPU seconds are printed beside those of the clock. A tiny model is all overhead, so none of
this says what real weights on a GPU gain; that is what `--shapes` measures, with random weights of the
published shapes: regions per second, and the GPU-days that 5.7 million regions would take.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import argparse
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paracaption.filters import rle
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import Limits
from paracaption.schemas.records import ImageRecord, Region
from tests.tiny.gar import FULL, Sizes, write_gar

SAMPLES = Path(__file__).resolve().parents[1] / "samples/build.yaml"
PHOTOS = [("sa1b", "sa_1"), ("sa1b", "sa_4"), ("coconut", "china")]
REGIONS = 16
END_TO_END, LANGUAGE_MODEL, TILES = 5, 8, 0.65
CORPUS = 5_700_000
ATTENTIONS = ("eager", "sdpa")
"""Of transformers: what the original's code sets without flash-attention, and the library's own default."""


class Took(NamedTuple):
    """Wall and CPU seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    def __truediv__(self, other: Any) -> str:
        return f"{self.wall / other.wall:.1f} by the clock, {self.cpu / other.cpu:.1f} by CPU seconds"

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.cpu:.2f} s CPU)"


class Watch:
    """Adds up seconds by name; what runs inside another name counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, Took] = defaultdict(Took)
        self._open: list[list[Any]] = []

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        now = self._now()
        if self._open:
            self._add(self._open[-1], now)
        self._open.append([name, now])
        try:
            yield
        finally:
            now = self._now()
            self._add(self._open.pop(), now)
            if self._open:
                self._open[-1][1] = now

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.on(name):
                return function(*args, **kwargs)

        return timed

    def wrap_items(self, name: str, function: Callable) -> Callable:
        """Of a function that returns an iterator."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = function(*args, **kwargs)
            while True:
                with self.on(name):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        return timed

    def _add(self, entry: list[Any], now: Took) -> None:
        old = self.seconds[entry[0]]
        self.seconds[entry[0]] = Took(old.wall + now.wall - entry[1].wall, old.cpu + now.cpu - entry[1].cpu)

    @staticmethod
    def _now() -> Took:
        return Took(time.perf_counter(), time.process_time())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=["tiny", *FULL], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--photos", type=int, default=0, help="of a run with --shapes; default 48")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2, help="of ours; the best counts")
    parser.add_argument("--original", help="a Python that has the original's transformers")
    parser.add_argument("--one-by-one", type=int, default=8, help="regions of the other side with --shapes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.shapes == "tiny":
            return compare(Path(folder), options)
        return measure(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> int:
    """Both sides on three photos; returns 0 if all targets are met against the faster attention."""
    import torch

    torch.set_num_threads(1)
    model = write_gar(folder / "tiny", sizes=Sizes())
    images = [with_regions(record_of(*name), REGIONS) for name in PHOTOS]
    captioner = start(model, options.max_tokens, "cpu")
    captioner.caption([with_regions(images[0], 1)])  # both sides are warm
    before = captioner.encoder.counts
    runs = [run_ours(captioner, images) for _ in range(options.runs)]
    counts = captioner.encoder.counts
    language = min((run_language_model(captioner, images) for _ in runs), key=lambda took: took.cpu)
    ours, answers = min(runs, key=lambda run: total(run[0]).cpu)
    tiles = (counts.tiles - before.tiles) // options.runs
    tiles_one_by_one = (counts.tiles_one_by_one - before.tiles_one_by_one) // options.runs

    print(f"{len(images)} photos, {len(answers)} regions, one thread")
    mean = np.mean([len(answer) for answer in answers])
    print(f"new tokens: {mean:.1f} a region, at most {options.max_tokens}")
    print(f"tile encodes: {tiles} of {tiles_one_by_one}, {tiles / tiles_one_by_one:.2f} (at most {TILES})")
    print(f"ours {total(ours)}; the language model alone {language}")
    show(ours)
    missed = tiles > TILES * tiles_one_by_one
    file = save_prompts(captioner, images, folder) if options.original else None
    for attention in ATTENTIONS:
        theirs, baseline = run_one_by_one(captioner, images, options.max_tokens, attention)
        same = sum(mine == yours for mine, yours in zip(answers, baseline, strict=True))
        print(f"one at a time, {attention} attention: {total(theirs)}")
        print(f"  end to end: ours is faster {total(theirs) / total(ours)} (at least {END_TO_END})")
        generate = theirs.seconds["generate"]
        print(f"  language model: {generate / language} (at least {LANGUAGE_MODEL})")
        print(f"  same tokens: {same} of {len(answers)}, {len(set(map(tuple, answers)))} different answers")
        show(theirs)
        missed |= total(theirs).cpu < END_TO_END * total(ours).cpu
        missed |= generate.cpu < LANGUAGE_MODEL * language.cpu or same < len(answers)
        if file is not None:
            original = run_original(options.original, captioner, file, attention, options.max_tokens)
            generate, rest = Took(original["wall"], original["cpu"]), total(theirs)
            own = theirs.seconds["generate"]
            whole = Took(rest.wall - own.wall + generate.wall, rest.cpu - own.cpu + generate.cpu)
            same = sum(mine == yours for mine, yours in zip(answers, original["answers"], strict=True))
            print(f"generate in transformers {original['transformers']}, {attention} attention: {generate}")
            print(f"  end to end, its other steps as above: ours is faster {whole / total(ours)}")
            print(f"  language model: {generate / language}")
            print(f"  same tokens: {same} of {len(answers)}")
            missed |= same < len(answers)
    return int(missed)


def save_prompts(captioner: Any, images: list[ImageRecord], folder: Path) -> Path:
    """Our prompts as a file, for `run_original`."""
    from safetensors.torch import save_file

    prompts = [request.prompt["prompt_embeds"].contiguous() for request in captioner.requests(images)]
    file = folder / "prompts.safetensors"
    save_file({str(number): prompt for number, prompt in enumerate(prompts)}, file)
    return file


def run_original(python: str, captioner: Any, file: Path, attention: str, max_tokens: int) -> dict[str, Any]:
    """What `gar_original.py` prints in another interpreter, which sees nothing of this environment's path."""
    from paracaption.pipeline.models.gar import export

    language = str(export.default_folder(captioner.options.model))
    script = str(Path(__file__).with_name("gar_original.py"))
    command = [python, script, language, str(file), attention, str(max_tokens), str(captioner.prompts.stop)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(watch: Watch) -> None:
    """Where the time goes."""
    whole = total(watch)
    for part, took in sorted(watch.seconds.items(), key=lambda item: -item[1].cpu):
        print(f"  {took.cpu / whole.cpu:5.0%} {part:24} {took}")


def run_one_by_one(
    captioner: Any, images: list[ImageRecord], max_tokens: int, attention: str
) -> tuple[Watch, list[list[int]]]:
    """The other side; its answers as tokens."""
    side = OneByOne(captioner, max_tokens, attention)
    side.caption(with_regions(images[0], 1))
    side.watch = Watch()
    with side.watch.on("rest"):
        answers = [answer for image in images for answer in side.caption(image)]
    return side.watch, answers


def measure(folder: Path, options: argparse.Namespace) -> int:
    """Regions per second at published shapes with random weights."""
    start_s = time.perf_counter()
    tiles = {"1b": 16, "8b": 8}[options.shapes]
    kind = "bfloat16"
    model = write_gar(folder / "m", options.shapes, max_tiles=tiles, dtype=kind, sizes=FULL[options.shapes])
    written_s = time.perf_counter() - start_s
    captioner = start(model, options.max_tokens, options.device)
    ready_s = time.perf_counter() - start_s - written_s
    print(f"weights written in {written_s:.0f} s, exported, loaded and started in {ready_s:.0f} s")
    photos = [with_regions(record_of(*name), REGIONS) for name in PHOTOS]
    captioner.caption([with_regions(photos[0], 2)])
    one_by_one = OneByOne(captioner, options.max_tokens) if options.one_by_one else None
    images = [photos[i % len(photos)] for i in range(options.photos or 48)]
    before = captioner.encoder.counts
    watch, answers = run_ours(captioner, images, sync=options.device == "cuda")
    counts = captioner.encoder.counts
    took = total(watch)
    rate = len(answers) / took.wall
    print(f"{len(answers)} regions of {len(images)} photos, {sum(map(len, answers)):,} new tokens: {took}")
    print(f"{rate:.2f} regions/s; {CORPUS:,} regions take {CORPUS / rate / 86_400:.1f} days on one device")
    share = (counts.tiles - before.tiles) / (counts.tiles_one_by_one - before.tiles_one_by_one)
    print(f"tile encodes {share:.2f} of one at a time")
    for part, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1].wall):
        print(f"  {seconds.wall / took.wall:5.0%} {part:24} {seconds}")
    if one_by_one is not None:
        one_by_one.watch = Watch()
        one_by_one.caption(with_regions(photos[0], 1))
        start_s = time.perf_counter()
        one_by_one.caption(with_regions(photos[1], options.one_by_one))
        alone = options.one_by_one / (time.perf_counter() - start_s)
        print(f"one at a time: {alone:.2f} regions/s; ours is {rate / alone:.1f} times as fast")
    return 0


def run_ours(captioner: Any, images: list[ImageRecord], sync: bool = False) -> tuple[Watch, list[list[int]]]:
    """One call of the captioner, taken apart by time; the answers as tokens."""
    watch = Watch()
    encoder, engine = captioner.encoder, captioner.engine.engine
    tower = encoder.vision.forward

    def timed_tower(*args: Any) -> Any:
        import torch

        found = tower(*args)
        if sync:
            torch.cuda.synchronize()
        return found

    places = [
        (captioner.prompts, "read", watch.wrap("decode text", captioner.prompts.read)),
        (encoder, "prepare", watch.wrap_items("photos and masks", encoder.prepare)),
        (encoder, "run", watch.wrap_items("prompts", encoder.run)),
        (encoder.vision, "forward", watch.wrap("vision tower", timed_tower)),
        (engine, "step", watch.wrap("vLLM steps", engine.step)),
        (engine, "add_request", watch.wrap("vLLM takes requests", engine.add_request)),
    ]
    tokens: list[list[int]] = []
    for place, name, timed in places:
        setattr(place, name, timed)
    read = captioner.prompts.read
    captioner.prompts.read = lambda found: "_".join(map(str, found)) + read(found)[:0]
    try:
        with watch.on("rest"):
            texts = captioner.caption(images)
    finally:
        for place, name, _ in places:
            delattr(place, name)
    tokens += [[int(token) for token in text.split("_")] for row in texts for text in row]
    return watch, tokens


def run_language_model(captioner: Any, images: list[ImageRecord]) -> Took:
    """The engine alone on prompts made before."""
    requests = list(captioner.requests(images))
    watch = Watch()
    with watch.on("all"):
        done = list(captioner.engine.run(requests))
    assert len(done) == len(requests)
    return watch.seconds["all"]


class OneByOne:
    """The same weights as the original runs them: every region alone, everything anew for each."""

    def __init__(self, captioner: Any, max_tokens: int, attention: str = "sdpa"):
        import torch
        from transformers import LlamaForCausalLM

        from paracaption.pipeline.models.gar import export

        self.encoder, self.prompts = captioner.encoder, captioner.prompts
        self.max_tokens, self.watch = max_tokens, Watch()
        folder = export.default_folder(captioner.options.model)
        embed = self.encoder.embed
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=embed.dtype, attn_implementation=attention, trust_remote_code=False
        )
        self.model = model.to(embed.device).eval()
        self.torch = torch

    def caption(self, image: ImageRecord) -> list[list[int]]:
        """The tokens of each region."""
        from paracaption.pipeline.io.photos import read_pixels
        from paracaption.pipeline.models.gar.image import box_of, cut_mask, cut_photo, tile_grid
        from paracaption.pipeline.models.gar.roi_align import replay

        torch, config, encoder = self.torch, self.encoder.config, self.encoder
        answers = []
        for region in image.regions:
            with self.watch.on("photos and masks"):
                pixels = read_pixels(image)
                grid = tile_grid(pixels.shape[1], pixels.shape[0], config.tile_px, config.max_tiles)
                tiles = cut_photo(pixels, config.tile_px, grid)
                assert region.rle is not None
                mask = rle.decode(region.rle)
                masks = cut_mask(mask, config.tile_px, grid)
            with self.watch.on("vision tower"):
                features = encoder.vision(tiles, masks)
            with self.watch.on("prompts"), torch.inference_mode():
                layout = self.prompts.write(len(tiles))
                prompt = encoder.embed[torch.tensor(layout.ids, device=encoder.embed.device)]
                prompt[slice(*layout.image)] = features.flatten(0, 1)
                prompt[slice(*layout.crop)] = replay([features[1:]], grid, [box_of(mask)], config.side)[0]
            with self.watch.on("generate"), torch.inference_mode():
                tokens = self.model.generate(
                    inputs_embeds=prompt[None],
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=prompt.device),
                    max_new_tokens=self.max_tokens,
                    do_sample=False,
                    eos_token_id=self.prompts.stop,
                    pad_token_id=self.prompts.stop,
                )
                answers.append(tokens[0].tolist())
        return answers


def start(model: Path, max_tokens: int, device: str) -> Any:
    from paracaption.pipeline.models.gar.captioner import GarCaptioner

    return GarCaptioner(model=str(model), max_tokens=max_tokens, device=device)


def total(watch: Watch) -> Took:
    seconds = watch.seconds.values()
    return Took(sum(took.wall for took in seconds), sum(took.cpu for took in seconds))


def record_of(subset: str, key: str) -> ImageRecord:
    """An image of the committed samples."""
    source = open_source(load_config(SAMPLES), subset)
    return next(source.read(entry, Limits()) for entry in source.catalog() if entry.key == key)


def with_regions(image: ImageRecord, count: int) -> ImageRecord:
    """The image with its first masks, and pieces of its largest one where it has too few."""
    regions = list(image.live())
    largest = max(regions, key=lambda region: region.area)
    assert largest.rle is not None
    mask = rle.decode(largest.rle)
    x, y, width, height = largest.bbox
    for parts in range(2, 12):
        for cell in range(parts * parts):
            if len(regions) >= count:
                break
            piece = np.zeros_like(mask)
            rows = slice(y + cell // parts * height // parts, y + (cell // parts + 1) * height // parts)
            columns = slice(x + cell % parts * width // parts, x + (cell % parts + 1) * width // parts)
            piece[rows, columns] = mask[rows, columns]
            found = rle.from_mask(piece)
            if found.area >= 256:
                ident = 10_000 + len(regions)
                regions.append(Region(id=ident, rle=found.rle, bbox=found.bbox, area=found.area))
    return ImageRecord(
        image.key, image.subset, image.photo, image.width, image.height, regions=regions[:count]
    )


if __name__ == "__main__":
    raise SystemExit(main())
