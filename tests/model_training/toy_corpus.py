"""A committed corpus of the toy world, without Ray, and a configuration that trains a tiny model on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paracaption.model_training.toy.world import TruthCaptioner, WorldOptions, write_world
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import work_list, writer
from paracaption.pipeline.corpus.merge import merge
from paracaption.pipeline.corpus.owner import own
from paracaption.pipeline.executor.committer import write_config
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.training import TrainConfig

TINY = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "replay_size": 2,
    "max_tiles": 1,
}
"""A model of the toy's words that trains at a hundred steps a second or so."""


def write_corpus(folder: Path, num_images: int = 60, options: WorldOptions | None = None) -> Path:
    """Draw scenes and commit them with their true captions; returns `out` of the corpus."""
    options = options or WorldOptions(places=False)
    config = load_config(write_world(folder, num_images, 0, options))
    truth = TruthCaptioner(str(folder / "captions.json"))
    target = Path(config.out) / "coconut"
    writer.prepare(target)
    source = open_source(config, "coconut")
    planned = work_list.make_work_list(source, config, target)
    for index in range(planned.num_units):
        images = [source.read(entry, config.limits) for entry in planned.read_unit(index)]
        for image, captions in zip(images, truth.caption(images), strict=True):
            for region, caption in zip(image.live(), captions, strict=True):
                region.caption = caption
        draft = writer.write_unit(target, planned.unit_name(index), images, planned.digest, "toy")
        writer.commit(target, draft)
    return Path(config.out)


def write_merged(folder: Path, num_images: int) -> Path:
    """The same, merged: as a finished build leaves it."""
    out = write_corpus(folder, num_images)
    config = load_config(folder / "build.yaml")
    with own(str(out), "build", config.failures.lease_s) as owner:
        write_config(config, owner)
        merge(out, config, owner)
    return out


def config_of(out: Path, corpus: Path, **changes: Any) -> TrainConfig:
    """A run of a tiny model on the CPU; batches of a few examples, everything logged."""
    values: dict[str, Any] = {
        "out": str(out),
        "model": {"tokenizer": "toy", "config": TINY},
        "corpora": [{"corpus": str(corpus)}],
        "data": {"max_tokens": 256, "workers": 0, "cache": str(corpus.parent / "cache")},
        "steps": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": {"vision": 1e-3, "projector": 1e-3, "language": 1e-3, "prompts": 1e-3},
        "device": "cpu",
        "activation_checkpointing": False,
        "checkpoint": {"every": 4, "keep": 2},
        "log": {"samples": True, "peak_tflops": 0.05},
    }
    return TrainConfig.model_validate(values | changes)
