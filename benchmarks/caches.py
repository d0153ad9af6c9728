"""draft"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch

from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.model_training.model.saved import load_model, read_model_config
from paracaption.model_training.model.tokenizer import load_tokenizer
from paracaption.model_training.toy import world as toy

from . import toy_steps
from .toy import run_command

FOLDER = Path(os.environ.get("PARACAPTION_STEPS", toy_steps.FOLDER))
EASY_SPLITS = {"train": 600, "heldout": 100}
SLOTS = {"easy": 12, "hard": 32}
STEPS = {"easy": 200, "hard": 300}


def corpus(world: str, split: str) -> Path:
    if world == "hard":
        return toy_steps.world(split)
    folder = FOLDER / f"easy-{split}"
    if not (folder / "corpus" / "stats.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        toy.write_world(folder, EASY_SPLITS[split], 0, toy.EASY, split)
        run_command("build", "--local", folder / "build.yaml")
    return folder / "corpus"


def opened(world: str) -> Path:
    source = toy_steps.SAMPLE if world == "easy" else FOLDER / "base/model"
    folder = FOLDER / f"opened-{world}"
    if (folder / "model.safetensors").exists():
        return folder
    config = read_model_config(source)
    config.layout_options = (config.layout_options or {}) | {"isolate_prefix": False}
    model = load_model(source, config, dtype=torch.float32)
    model.save_pretrained(folder)
    PerceptionDLMProcessor(load_tokenizer(source), model.config).save_pretrained(folder)
    return folder


def train(world: str, seed: int) -> Path:
    slots = SLOTS[world]
    data = {"packed": False, "max_tokens": 1024, "regions_per_group": 5, "caption_length": "fixed"}
    data |= {"max_new_tokens": slots, "labels": "captions", "workers": 0, "cache": str(FOLDER / "cache")}
    config = toy_steps.write_config(
        f"opened-{world}-{seed}", opened(world), corpus(world, "train"), 5e-4, seed=seed, steps=STEPS[world], data=data
    )
    return toy_steps.train(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("world")
    parser.add_argument("seeds", nargs="*", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus(args.world, "heldout")
    for seed in args.seeds:
        print(train(args.world, seed), flush=True)
