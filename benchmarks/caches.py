"""Caches of models whose prefix sees the captions: what each costs, and how many tokens it keeps.

    python -m benchmarks.caches train --world easy --seed 0    # a toy model without an isolated prefix
    python -m benchmarks.caches measure --world easy --seed 0  # decodes held-out scenes with every cache
    python -m benchmarks.caches speed                          # seconds of a pass at mid size
    python -m benchmarks.caches report                         # the tables
    python -m benchmarks.caches all                            # everything, seeds 0, 1 and 2 of both worlds

A model of the world `easy` is sure of its words, and goes on from samples/model. One of the world `hard`
often is not, since many wordings are right; it goes on from the base of `benchmarks.toy_steps`, which is
trained if it is not there. Tokens are compared with those of decoding without a cache. Speed is that of the
mid size of `benchmarks.decoder` (random weights, which are never sure): the seconds of its passes, as many of
each kind as the toy model took. Everything lies in out/toy-steps, or in the folder that PARACAPTION_STEPS
names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor

from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.decoding.sampler import decode_batch
from paracaption.model_training.decoding.skipping import Skipping
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.model_training.model.saved import load_model, read_model_config
from paracaption.model_training.model.tokenizer import load_tokenizer
from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.parallelism import LaidOut, lay_out
from paracaption.model_training.toy.wordings import judge_wording
from paracaption.schemas.decoding import DecodeOptions

from . import decoder, toy_steps
from .toy import end_when_terminated, run_command

FOLDER = toy_steps.FOLDER
WORLDS = ("easy", "hard")
EASY_SCENES = {"train": 600, "heldout": 100}
SLOTS = {"easy": 12, "hard": 32}
TRAINED_STEPS = 200


def ways(slots: int) -> dict[str, DecodeOptions]:
    """The ways of decoding that are compared, by name; the first one is exact."""

    def options(**fields: Any) -> DecodeOptions:
        return DecodeOptions(max_new_tokens=slots, steps=slots, **fields)

    once = {"cache": "approximate", "refresh_every": slots}
    return {
        "`none`": options(cache="none"),
        "`approximate`, `refresh_every` 2": options(cache="approximate", refresh_every=2),
        "`approximate`, `refresh_every` 4": options(cache="approximate", refresh_every=4),
        "`approximate`, computed once": options(**once),
        "... and `redo_below` 0.9": options(**once, redo_below=0.9),
        "... and `redo_below` 0.99": options(**once, redo_below=0.99),
        "... and `redo_below` 0.999": options(**once, redo_below=0.999),
        "`refresh_every` 8, `redo_below` 0.99": options(
            cache="approximate", refresh_every=8, redo_below=0.99
        ),
        "`auto`: and `settled` 0.9": options(cache="auto"),
        "`none`, `settled` 0.9": options(cache="none", settled=0.9),
    }


def corpus(world: str, split: str) -> Path:
    """A split of a world, drawn and built unless it is there."""
    if world == "hard":
        return toy_steps.world(split)
    folder = FOLDER / f"easy-{split}"
    if not (folder / "corpus" / "stats.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        toy.write_world(folder, EASY_SCENES[split], 0, toy.EASY, split)
        run_command("build", "--local", folder / "build.yaml")
    return folder / "corpus"


def opened(world: str) -> Path:
    """The model that the seeds have in common, now with a prefix that sees the captions."""
    folder = FOLDER / f"opened-{world}"
    if (folder / "model.safetensors").exists():
        return folder
    source = toy_steps.SAMPLE if world == "easy" else FOLDER / "base/model"
    if not source.exists():
        toy_steps.base(toy_steps.STEPS["base"])
    config = read_model_config(source)
    config.layout_options = (config.layout_options or {}) | {"isolate_prefix": False}
    model = load_model(source, config, dtype=torch.float32)
    model.save_pretrained(folder)
    PerceptionDLMProcessor(load_tokenizer(source), model.config).save_pretrained(folder)
    return folder


def train(world: str, seed: int) -> Path:
    """Go on from there with a seed, so that the prefix learns what it sees. Returns the model."""
    data = yaml.safe_load(toy_steps.RECIPE.read_text())["data"]
    data |= {"max_new_tokens": SLOTS[world], "max_tokens": 1024, "cache": str(FOLDER / "cache")}
    begin, scenes = opened(world), corpus(world, "train")
    fields = {"seed": seed, "steps": TRAINED_STEPS, "data": data}
    return toy_steps.train(toy_steps.write_config(f"opened-{world}-{seed}", begin, scenes, 5e-4, **fields))


@contextmanager
def counted_passes() -> Iterator[tuple[Counter[str], dict[str, float]]]:
    """Passes of single rows and their seconds, by kind: "whole" sequences, and "captions" alone.

    A step with both kinds counts for both; its seconds do for neither.
    """
    passes: Counter[str] = Counter()
    seconds = {"whole": 0.0, "captions": 0.0}
    step = Skipping.step

    def watched(self: Skipping, wanted_BN: Any, active_B: Any, whole_B: Any, *rest: Any) -> None:
        found = {"whole": int(whole_B.sum()), "captions": int((wanted_BN.any(1) & ~whole_B).sum())}
        start = time.perf_counter()
        step(self, wanted_BN, active_B, whole_B, *rest)
        passes.update(found)
        if len(kinds := [kind for kind, count in found.items() if count]) == 1:
            seconds[kinds[0]] += time.perf_counter() - start

    with mock.patch.object(Skipping, "step", watched):
        yield passes, seconds


def said(tokens_BNS: Tensor, slots_BNS: Tensor, eot: int) -> Tensor:
    """Which tokens belong to captions: up to the first end of text."""
    ends_BNS = tokens_BNS == eot
    return slots_BNS & (ends_BNS.cumsum(-1) - ends_BNS.long() == 0)


def is_right(world: str, caption: str, truth: str) -> bool:
    """Whether a caption says the truth and nothing else."""
    if world == "hard":
        return judge_wording(caption, truth) == "right"
    return toy.score_caption(caption, truth, []).exact


def measure(world: str, seed: int, images: int) -> None:
    """Decode held-out scenes in all ways, and write what was found."""
    folder, slots = train(world, seed), SLOTS[world]
    model = load_model(folder, dtype=torch.float32).eval()
    processor = PerceptionDLMProcessor(load_tokenizer(folder), model.config)
    photos = islice(iter_photo_regions(corpus(world, "heldout")), images)
    held_out = lay_out(processor, photos, slots)
    done = FOLDER / "caches" / f"{world}-{seed}.json"
    results: dict[str, Any] = json.loads(done.read_text()) if done.exists() else {}
    exact: list[Tensor] = []
    for name, options in ways(slots).items():
        if exact and name in results:
            continue
        found, tokens = decode_all(model, processor, world, held_out, options)
        exact = exact or tokens
        counts: Counter[str] = Counter()
        for part, mine, theirs in zip(held_out, tokens, exact, strict=True):
            exists_BN = torch.arange(mine.shape[1]) < torch.tensor([[len(row)] for row in part.truths])
            slots_BNS = exists_BN[..., None].expand(mine.shape)
            of_captions = said(theirs, slots_BNS, model.config.eot_token_id or 0)
            for kind, where in (("said", of_captions), ("all", slots_BNS)):
                counts[kind] += int(where.sum())
                counts["same " + kind] += int(((mine == theirs) & where).sum())
        found |= {kind: counts["same " + kind] / counts[kind] for kind in ("said", "all")}
        results[name] = found
        print(f"{world} {seed} {name}: {found['said']:.2%} of {counts['said']}, {found}", flush=True)
        done.parent.mkdir(exist_ok=True)
        done.write_text(json.dumps(results, indent=1))


def decode_all(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    world: str,
    held_out: list[LaidOut],
    options: DecodeOptions,
) -> tuple[dict[str, float], list[Tensor]]:
    """Passes per image by kind and the share of right captions; and the tokens of each batch."""
    right = []
    with counted_passes() as (passes, _):
        tokens = [decode_batch(model, part.batch, options).tokens_BNS for part in held_out]
    for part, found in zip(held_out, tokens, strict=True):
        for row, truths in enumerate(part.truths):
            captions = processor.read_captions(found[row, : len(truths)].numpy(), range(len(truths)))
            right += [is_right(world, *pair) for pair in zip(captions, truths, strict=True)]
    images = sum(len(part.truths) for part in held_out)
    scores = {"right": mean(right), **{kind: passes[kind] / images for kind in ("whole", "captions")}}
    return scores, tokens


def speed(steps: int = 6) -> None:
    """Measure the seconds of a pass of each kind at mid size, and write them: the fastest of three rounds."""
    model = decoder.mid_size(8_192, "reference")
    batch = decoder.scene(model)
    best = {"whole": float("inf"), "captions": float("inf")}
    rounds: list[dict[str, Any]] = [{"cache": "none"}, {"cache": "approximate", "refresh_every": 32}]
    for _ in range(3):
        for fields in rounds:
            with counted_passes() as (passes, seconds):
                decode_batch(model, batch, DecodeOptions(steps=steps, suppress_special=False, **fields))
            for kind, spent in seconds.items():
                if passes[kind] and (fields["cache"] == "none" or kind == "captions"):
                    best[kind] = min(best[kind], spent / passes[kind])
    (FOLDER / "caches").mkdir(exist_ok=True)
    (FOLDER / "caches" / "speed.json").write_text(json.dumps(best))
    print(best)


def report() -> str:
    """The tables in Markdown: mean and standard deviation over the seeds."""
    lines = []
    cost = json.loads((FOLDER / "caches" / "speed.json").read_text())
    lines.append(f"captions alone cost {cost['captions'] / cost['whole']:.2f} of a whole pass at mid size")
    for world in WORLDS:
        seeds = [json.loads(path.read_text()) for path in sorted((FOLDER / "caches").glob(f"{world}-*.json"))]
        lines += ["", f"World {world}, {len(seeds)} seeds", ""]
        lines.append("| cache | whole passes | of captions | speed | tokens equal | right captions |")
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
        for way in ways(SLOTS[world]):
            each = [seed[way] for seed in seeds if way in seed]
            if not each or len(each) < len(seeds):
                continue  # not measured with all of them
            speeds = [_seconds(seed["`none`"], cost) / _seconds(seed[way], cost) for seed in seeds]
            cells = [*(f"{mean(one[kind] for one in each):.1f}" for kind in ("whole", "captions"))]
            cells += [f"{mean(speeds):.2f}"]
            cells += [_spread([one[kind] for one in each]) for kind in ("said", "right")]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(found: dict[str, float], cost: dict[str, float]) -> float:
    return sum(found[kind] * cost[kind] for kind in cost)


def _spread(shares: list[float]) -> str:
    text = f"{mean(shares):.2%}"
    return text + (f" ± {100 * stdev(shares):.2f}" if len(shares) > 1 else "")


def main() -> None:
    """Run what is asked for."""
    end_when_terminated()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=["train", "measure", "speed", "report", "all"])
    parser.add_argument("--world", choices=WORLDS, default="easy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=32, help="held-out scenes")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pairs = [(world, seed) for world in WORLDS for seed in toy_steps.SEEDS]
    for world, seed in pairs if args.stage == "all" else [(args.world, args.seed)]:
        if args.stage in ("measure", "all"):
            measure(world, seed, args.images)
        elif args.stage == "train":
            print(train(world, seed))
    if args.stage in ("speed", "all"):
        speed()
    if args.stage in ("report", "all"):
        print(report())


if __name__ == "__main__":
    main()
