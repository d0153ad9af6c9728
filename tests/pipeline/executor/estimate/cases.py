"""Rates and configurations by hand, with numbers that can be checked on paper."""

from __future__ import annotations

from paracaption.pipeline.executor.estimate.rates import Rates, StageRate, SubsetRates
from paracaption.schemas.config import BuildConfig

COCONUT = ["source", "usable_masks", "caption", "verify_category", "clean_text", "write"]


def config(**changes) -> BuildConfig:
    values = {
        "out": "/nowhere/out",
        "coconut": [{"annotations": ["/a.json"], "labels": "/l", "photos": ["/p"]}],
        "images_per_shard": 100,
        "captioner": {"name": "gar", "num_gpus": 1, "concurrency": [1, 64]},
        "judge": {"name": "vllm", "num_gpus": 1, "concurrency": [1, 64]},
        "segmenter": {"name": "sam3", "num_gpus": 1, "concurrency": [1, 64]},
    }
    return BuildConfig.model_validate({**values, **changes})


def measured(ray_s=0.0, launch_s=0.0, **stages: StageRate) -> Rates:
    """COCONut's rates: nothing costs anything but what is given."""
    free = {name: StageRate(1.0, 0.0, 0.0) for name in COCONUT}
    known = SubsetRates(100, 1_000, 0.8, launch_s, 1e5, 50.0, 30.0, {**free, **stages})
    return Rates(ray_s, {"coconut": known})


def actors(estimate, number=0) -> dict[str, int]:
    return {each.pool.name: each.actors for each in estimate.subsets[number].pools}
