"""Fewer decoding steps: tokens per forward against right captions, in the toy world of many wordings.

python -m benchmarks.toy_steps world           # draw and build the world
python -m benchmarks.toy_steps teacher 0       # train a model by masked diffusion, with a seed
python -m benchmarks.toy_steps student 0       # record that model's decoding paths, and distill them
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.model_training.model.saved import load_model, read_model_config
from paracaption.model_training.model.tokenizer import load_tokenizer, num_rows, special_token_ids
from paracaption.model_training.toy import world as toy
from paracaption.model_training.train import trainer
from paracaption.pipeline.config_file import load_training

from .toy import ROOT, end_when_terminated, run_command

FOLDER = Path(os.environ.get("PARACAPTION_STEPS", ROOT / "out/toy-steps"))
RECIPE, SAMPLE = ROOT / "configs/train/sample.yaml", ROOT / "samples/model"
TRAINED, HELD_OUT = 4000, 200
SLOTS = 32


def world(split: str) -> Path:
    """Draw a split and build its corpus, unless it is there. Returns the corpus."""
    folder = FOLDER / split
    if not (folder / "corpus" / "stats.json").exists():
        if not (folder / "build.yaml").exists():
            shutil.rmtree(folder, ignore_errors=True)
            toy.write_world(folder, TRAINED if split == "train" else HELD_OUT, 0, toy.HARD, split)
        run_command("build", "--local", folder / "build.yaml")
    return folder / "corpus"


def start() -> Path:
    """The sample model with this world's words: what it knows of pictures stays, new words are random."""
    folder = FOLDER / "start"
    if (folder / "model.safetensors").exists():
        return folder
    old_config, old, new = read_model_config(SAMPLE), load_tokenizer(SAMPLE), toy.make_tokenizer()
    model = load_model(SAMPLE, dtype=torch.float32)
    vocab = num_rows(new)
    fields = old_config.to_dict() | special_token_ids(new, old_config.num_prompts, SAMPLE)
    fields["text_config"] = fields["text_config"] | {"vocab_size": vocab}
    torch.manual_seed(0)
    fresh = PerceptionDLM._from_config(type(old_config)(**fields), dtype=torch.float32)
    weights, known = model.state_dict(), old.get_vocab()
    shared = [(token, row) for token, row in new.get_vocab().items() if token in known]
    rows, old_rows = [row for _, row in shared], [known[token] for token, _ in shared]
    for name, weight in fresh.state_dict().items():
        if weight.shape == weights[name].shape:
            weight.copy_(weights[name])
        else:  # a row for each token
            weight[rows] = weights[name][old_rows]
    fresh.save_pretrained(folder)
    PerceptionDLMProcessor(new, fresh.config).save_pretrained(folder)
    return folder


def train(name: str, begin: Path, **changes: Any) -> Path:
    """Train by the sample model's recipe with some changes, or go on with it. Returns the run's folder."""
    folder = FOLDER / name
    if (folder / "model/model.safetensors").exists():
        return folder
    config = yaml.safe_load(RECIPE.read_text())
    config |= {"out": str(folder), "model": {"path": str(begin)}, "export_dtype": "float32"}
    config["corpora"] = [{"corpus": str(world("train"))}]
    config["data"] |= {"max_new_tokens": SLOTS, "cache": str(FOLDER / "cache")}
    config["log"] |= {"peak_tflops": 0.05}
    config |= changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    trainer.fit(load_training(path))  # in this process: Prefect's server would take a share of the core
    return folder


def teacher(seed: int, steps: int) -> Path:
    """A model trained by masked diffusion, as a captioner is."""
    noise = {"level": "region", "stratified": True, "loss_weighting": "none", "eps": 0.02}
    return train(f"teacher-{seed}", start(), seed=seed, steps=steps, noise=noise)


def main() -> None:
    """Run what is asked for."""
    end_when_terminated()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["world", "teacher", "student", "measure", "report"])
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    if args.what == "world":
        print(world("heldout"), world("train"))
    elif args.what == "teacher":
        teacher(args.seed, args.steps)


if __name__ == "__main__":
    main()
