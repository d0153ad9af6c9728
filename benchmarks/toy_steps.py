"""Fewer decoding steps: tokens per forward against right captions, in the toy world of many wordings.

    python -m benchmarks.toy_steps world             # draw the world's splits, and build them
    python -m benchmarks.toy_steps base              # the sample model learns this world's captions
    python -m benchmarks.toy_steps teacher --seed 0  # goes on from there by masked diffusion, with a seed
    python -m benchmarks.toy_steps paths --seed 0    # records that model's decoding paths
    python -m benchmarks.toy_steps student --seed 0  # distills them; --name and --set try other options
    python -m benchmarks.toy_steps measure --seed 0  # decodes held-out scenes with both, in many ways
    python -m benchmarks.toy_steps report            # the tables and the plot of all seeds
    python -m benchmarks.toy_steps all               # everything, for seeds 0, 1 and 2

What is done is not done again, and a training goes on where it was stopped. Everything lies in
out/toy-steps, or in the folder that PARACAPTION_STEPS names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.model_training.model.saved import load_model, read_model_config
from paracaption.model_training.model.tokenizer import load_tokenizer, num_rows, special_token_ids
from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.parallelism import lay_out, position_thresholds, score_decoding
from paracaption.model_training.train import metrics, trainer
from paracaption.model_training.train.record_paths import record_paths
from paracaption.pipeline.config_file import load_training
from paracaption.schemas.decoding import DecodeOptions

from .toy import ROOT, end_when_terminated, run_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOLDER = Path(os.environ.get("PARACAPTION_STEPS", ROOT / "out/toy-steps"))
RECIPE, SAMPLE = ROOT / "configs/train/sample.yaml", ROOT / "samples/model"
SEEDS = (0, 1, 2)
SLOTS = 32
SPLITS = {"train": ("train", 4000, 0), "distill": ("train", 600, 1), "heldout": ("heldout", 200, 0)}
"""Of each corpus: the world's split, the number of scenes, and the seed."""

STEPS = {"base": 3000, "teacher": 1000, "student": 2500}
NOISE = {"level": "region", "stratified": True, "loss_weighting": "none", "eps": 0.02}
RECORDED_TOKENS = 12288
"""Tokens of a batch whose decoding paths are recorded; in training it is the recipe's 1,536."""

AGREEMENTS = (0.99, 0.95, 0.9)
THRESHOLDS = (0.9, 0.7, 0.5)
FACTORS = (0.5, 1.0, 2.0)
SCHEDULES = (16, 8, 4)
CALIBRATED = 24
"""Scenes that the thresholds of positions are calibrated on; they are of the corpus `distill`."""


def world(name: str) -> Path:
    """Draw a split and build its corpus, unless it is there. Returns the corpus."""
    folder = FOLDER / name
    if not (folder / "corpus" / "stats.json").exists():
        if not (folder / "build.yaml").exists():
            split, images, seed = SPLITS[name]
            shutil.rmtree(folder, ignore_errors=True)
            toy.write_world(folder, images, seed, toy.HARD, split)
        run_command("build", "--local", folder / "build.yaml")
    return folder / "corpus"


def start() -> Path:
    """The sample model with this world's words: what it knows of pictures stays, new words are random."""
    return begin_with_sample(FOLDER / "start", toy.make_tokenizer())


def begin_with_sample(
    folder: Path, tokenizer: PreTrainedTokenizerFast, fresh_parts: tuple[str, ...] = ()
) -> Path:
    """Save the sample model with another tokenizer: the tokens that it does not know have random rows.

    Args:
        folder: where it is saved, unless it is there.
        tokenizer: the new one.
        fresh_parts: parts of the model that start from random weights.
    """
    if (folder / "model.safetensors").exists():
        return folder
    old_config, old = read_model_config(SAMPLE), load_tokenizer(SAMPLE)
    model = load_model(SAMPLE, dtype=torch.float32)
    fields = old_config.to_dict() | special_token_ids(tokenizer, old_config.num_prompts, SAMPLE)
    fields["text_config"] = fields["text_config"] | {"vocab_size": num_rows(tokenizer)}
    torch.manual_seed(0)
    fresh = PerceptionDLM._from_config(type(old_config)(**fields), dtype=torch.float32)
    weights, known = model.state_dict(), old.get_vocab()
    shared = [(row, known[token]) for token, row in tokenizer.get_vocab().items() if token in known]
    rows, old_rows = (list(each) for each in zip(*shared, strict=True))
    for name, weight in fresh.state_dict().items():
        if name.startswith(fresh_parts):
            continue
        if weight.shape == weights[name].shape:
            weight.copy_(weights[name])
        else:  # a row for each token
            weight[rows] = weights[name][old_rows]
    fresh.save_pretrained(folder)
    PerceptionDLMProcessor(tokenizer, fresh.config).save_pretrained(folder)
    return folder


def write_config(name: str, begin: Path, corpus: Path, rate: float, **changes: Any) -> Path:
    """A training by the sample model's recipe with some changes. Returns the configuration's path."""
    folder = FOLDER / name
    config = yaml.safe_load(RECIPE.read_text())
    config |= {"out": str(folder), "model": {"path": str(begin)}, "export_dtype": "float32"}
    config |= {"corpora": [{"corpus": str(corpus)}], "noise": NOISE}
    config["data"] |= {"max_new_tokens": SLOTS, "cache": str(FOLDER / "cache")}
    config["log"] |= {"peak_tflops": 0.05}
    config["learning_rate"] = dict.fromkeys(config["learning_rate"], rate)
    config |= changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def train(config: Path) -> Path:
    """Train, or go on with it. Returns the model."""
    loaded, model = load_training(config), config.parent / "model"
    done = metrics.read_metrics(config.parent) if (model / "model.safetensors").exists() else []
    if not done or done[-1]["step"] < (loaded.steps or 0):
        trainer.fit(loaded)  # in this process: Prefect's server would take part of the core
    return model


def base(steps: int) -> Path:
    """The model that the seeds have in common."""
    return train(write_config("base", start(), world("train"), 1e-3, steps=steps, min_lr_ratio=0.3))


def teacher(seed: int, steps: int) -> Path:
    """A model trained by masked diffusion."""
    begin = FOLDER / "base/model"
    return train(write_config(f"teacher-{seed}", begin, world("train"), 5e-4, seed=seed, steps=steps))


def student_config(seed: int, name: str, steps: int, changes: dict[str, Any]) -> Path:
    """The training that distills a teacher's decoding paths."""
    distillation: dict[str, Any] = {"order": "confidence", "window_end": SLOTS} | changes
    distillation["paths"] = str(FOLDER / f"paths-{distillation['order']}-{seed}")
    begin, fields = FOLDER / f"teacher-{seed}/model", {"seed": seed, "steps": steps}
    config = write_config(f"{name}-{seed}", begin, world("train"), 5e-4, **fields, distillation=distillation)
    values = yaml.safe_load(config.read_text())
    values["data"] |= {"on_bad_sample": "skip", "max_dropped_share": None}  # a part of the paths will do
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    return config


def ways(model: PerceptionDLM, processor: PerceptionDLMProcessor) -> dict[str, DecodeOptions]:
    """The ways of decoding that are compared, by name."""

    def options(**fields: Any) -> DecodeOptions:
        return DecodeOptions(max_new_tokens=SLOTS, **{"steps": SLOTS} | fields)

    photos = list(iter_photo_regions(FOLDER / "distill/corpus"))[:CALIBRATED]
    calibrated = position_thresholds(model, lay_out(processor, photos, SLOTS), SLOTS, AGREEMENTS)
    return {
        "one token": options(strategy="per-region"),
        "left to right": options(strategy="left-to-right"),
        **{f"schedule {steps}": options(strategy="per-region", steps=steps) for steps in SCHEDULES},
        **{
            f"threshold {each}": options(strategy="threshold", threshold=each)
            for each in (0.95, 0.9, 0.7, 0.5)
        },
        **{
            f"position thresholds {share}": options(strategy="threshold", position_thresholds=numbers)
            for share, numbers in zip(AGREEMENTS, calibrated, strict=True)
        },
        **{f"factor {each}": options(strategy="factor", factor=each) for each in FACTORS},
    }


def measure(seed: int, name: str, images: int) -> None:
    """Decode held-out scenes in all ways, and write the scores."""
    done = FOLDER / "scores" / f"{name}-{seed}.json"
    known = json.loads(done.read_text()) if done.exists() else {}
    folder = FOLDER / f"{name}-{seed}/model"
    model = load_model(folder, dtype=torch.float32).eval()
    processor = PerceptionDLMProcessor(load_tokenizer(folder), model.config)
    held_out = lay_out(processor, list(iter_photo_regions(world("heldout")))[:images], SLOTS)
    done.parent.mkdir(exist_ok=True)
    for way, options in ways(model, processor).items():
        if way in known:
            continue
        scores = score_decoding(model, processor, held_out, options)
        known[way] = scores._asdict()
        done.write_text(json.dumps(known, indent=1))
        print(
            f"{name}-{seed} {way}: {scores.tokens_per_forward:.2f} a forward, {scores.right:.1%}", flush=True
        )


def main() -> None:
    """Run what is asked for."""
    end_when_terminated()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    stages = ["world", "base", "teacher", "paths", "student", "measure", "report", "all"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the training, instead of the default")
    parser.add_argument("--name", default="student", help="of a student with other options")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of `distillation`")
    parser.add_argument("--part", default="1/3", metavar="I/N", help="the part of the paths to record")
    parser.add_argument("--images", type=int, default=SPLITS["heldout"][1], help="held-out scenes")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    changes = {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in args.set)}
    if args.stage == "report":
        from .toy_steps_report import report

        print(report(FOLDER))
        return
    wanted = stages[:-2] if args.stage == "all" else [args.stage]
    for seed in SEEDS if args.stage == "all" else (args.seed,):
        for stage in wanted:
            run(stage, seed, args, changes)


def run(stage: str, seed: int, args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """One stage for one seed."""
    steps, name = args.steps or STEPS.get(stage, 0), args.name
    if stage == "world":
        print(*map(world, SPLITS))
    elif stage == "base":
        base(steps)
    elif stage == "teacher":
        teacher(seed, steps)
    elif stage == "paths":
        part, parts = map(int, args.part.split("/"))
        config = load_training(student_config(seed, name, 1, changes))
        data = config.data.model_copy(update={"max_tokens": RECORDED_TOKENS})
        record_paths(config.model_copy(update={"data": data}), part - 1, parts)
    elif stage == "student":
        train(student_config(seed, name, steps, changes))
    else:
        for each in ("teacher", name):
            if (FOLDER / f"{each}-{seed}/model").exists():
                measure(seed, each, args.images)


if __name__ == "__main__":
    main()
