"""A tiny Base, trained by the four stage configs of the paper on scenes of shapes, answers questions.

    python -m benchmarks.toy_base world     # draw scenes, and write conversations about them for each stage
    python -m benchmarks.toy_base 1         # train stage 1 (configs/train/base-1.yaml); then 2, 3, 4 and 5
    python -m benchmarks.toy_base ask       # ask held-out questions: by Chat, and by `paracaption ask`
    python -m benchmarks.toy_base report    # the table
    python -m benchmarks.toy_base all       # everything

What is done is not done again, and a training goes on where it was stopped. Everything lies in out/toy-base,
or in the folder that PARACAPTION_TOY_BASE names. Stage 5 is the paper's stage 4 again, with questions alone.
The vision tower and the language model begin as those of samples/model, which knows the look of these things;
the projector and all new words begin at random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.scenes import Scene, paint_scene
from paracaption.model_training.train import metrics, trainer
from paracaption.pipeline.config_file import load_training

from . import toy_base_questions as questions
from .toy import ROOT, end_when_terminated
from .toy_steps import begin_with_sample

FOLDER = Path(os.environ.get("PARACAPTION_TOY_BASE", ROOT / "out/toy-base"))
SCENES = {"train": 8000, "heldout": 300}
CONVERSATIONS = {1: 1, 2: 3, 3: 6, 4: 8, 5: 16}
"""Of each stage about each scene."""
STEPS = {1: 150, 2: 1500, 3: 3500, 4: 13000, 5: 9000}
EACH = 60
"""Held-out questions of each type."""

CHANGES: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "device": "cpu",
    "activation_checkpointing": False,
    "export_dtype": "float32",
    "noise": {"stratified": True, "loss_weighting": "none", "eps": 0.6},
    "betas": [0.9, 0.95],
    "checkpoint": {"every": 250},
    "log": {"every": 50, "peak_tflops": 0.05},
}
"""What a tiny run on one core changes in all four configs, besides paths, steps and rates."""
DATA = {"packed": False, "max_tokens": 2048, "max_examples": None, "workers": 0}
"""The size of a batch."""
RATES = {2: 1.5e-3, 3: 1.5e-3, 4: 1.2e-3, 5: 1.2e-3}
"""Of the others, whose configs have 4e-5 for a model of 8 billion parameters. Stage 1 keeps its own."""
FLOORS = {2: 0.5, 3: 0.75, 4: 0.75}
"""Of the rate at the end of stages that another one follows, which goes on from there."""


def scenes(split: str) -> list[Scene]:
    """The scenes of a split. No scene of one holds the same things as a scene of the other."""
    return list(toy.draw_scenes(SCENES[split], 0, questions.WORLD, split))


def photo(split: str, number: int) -> Path:
    """The photo of a scene."""
    return FOLDER / split / f"{number:06d}.png"


def world() -> None:
    """Draw the photos of both splits, the conversations of each stage, and the held-out questions."""
    from PIL import Image

    if (FOLDER / "held-out.json").exists():
        return
    for split in SCENES:
        (FOLDER / split).mkdir(parents=True, exist_ok=True)
        drawn = scenes(split)
        for number, scene in enumerate(drawn):
            if not photo(split, number).exists():
                Image.fromarray(paint_scene(scene, 0, number, questions.WORLD)).save(photo(split, number))
        if split == "train":
            for stage in questions.STAGES:
                _write_conversations(stage, drawn)
        else:
            asked = [
                {"scene": number, **each._asdict()} for number, each in questions.held_out(drawn, EACH, 0)
            ]
            (FOLDER / "held-out.json").write_text(json.dumps(asked, indent=1))


def _write_conversations(stage: int, drawn: list[Scene]) -> None:
    rng, records = np.random.default_rng([0, stage]), []
    for again, (number, scene) in itertools.product(range(CONVERSATIONS[stage]), enumerate(drawn)):
        turns = []
        for each in questions.conversation(scene, stage, rng):
            image = "" if turns else "<image>\n"
            turns += [
                {"from": "human", "value": image + each.question},
                {"from": "gpt", "value": each.answer},
            ]
        if turns:  # a question of none of the stage's types suits a few scenes
            records.append(
                {"id": f"{stage}-{number}-{again}", "image": f"{number:06d}.png", "conversations": turns}
            )
    (FOLDER / f"stage-{stage}.json").write_text(json.dumps(records))


def start() -> Path:
    """What LLaDA and SigLIP are for the paper: towers that know words and pictures, but not each other."""
    tokenizer = toy.make_tokenizer(questions.words())
    return begin_with_sample(FOLDER / "base-0/model", tokenizer, ("projector.",))


def write_config(stage: int, steps: int) -> Path:
    """The paper's config of a stage with what a tiny run changes. Returns its path."""
    config = yaml.safe_load((ROOT / f"configs/train/base-{min(stage, 4)}.yaml").read_text())
    folder = FOLDER / f"base-{stage}"
    del config["epochs"], config["ray"]
    config |= CHANGES | {"out": str(folder), "steps": steps}
    config["model"]["path"] = str(FOLDER / f"base-{stage - 1}/model")
    config["conversations"] = [{"path": str(FOLDER / f"stage-{stage}.json"), "images": str(FOLDER / "train")}]
    config["data"] |= DATA | {"cache": str(FOLDER / "cache")}
    if stage in RATES:
        config["learning_rate"] = dict.fromkeys(config["learning_rate"], RATES[stage])
    if stage in FLOORS:
        config["min_lr_ratio"] = FLOORS[stage]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def train(stage: int, steps: int | None) -> None:
    """Train a stage, or go on with it."""
    start()
    loaded = load_training(write_config(stage, steps or STEPS[stage]))
    folder = FOLDER / f"base-{stage}"
    done = metrics.read_metrics(folder) if (folder / "model/model.safetensors").exists() else []
    if not done or done[-1]["step"] < (loaded.steps or 0):
        trainer.fit(loaded)


def main() -> None:
    """Run what is asked for."""
    end_when_terminated()
    from .toy_base_scores import ask, report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    stages = ["world", *map(str, STEPS), "ask", "report"]
    parser.add_argument("stage", choices=[*stages, "all"])
    parser.add_argument("--steps", type=int, help="of the training, instead of the default")
    parser.add_argument("--model", type=int, default=max(STEPS), choices=STEPS, help="the stage to ask")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for stage in stages if args.stage == "all" else [args.stage]:
        if stage == "world":
            world()
        elif stage == "ask":
            ask(FOLDER, args.model)
        elif stage == "report":
            print(report(FOLDER))
        else:
            train(int(stage), args.steps)


if __name__ == "__main__":
    main()
