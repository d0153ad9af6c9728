"""Rates and configurations by hand, with numbers that can be checked on paper."""

from __future__ import annotations

from paracaption.pipeline.executor.estimate.rates import Rates, StageRate, SubsetRates
from paracaption.pipeline.executor.estimate.sizes import Size
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


SA1B = [
    *("source", "usable_masks", "whole_objects", "caption", "extract_category"),
    *("agree_with_segmenter", "clean_text", "write"),
]


def mixed_config(**changes) -> BuildConfig:
    """Both recipes, with five captioners, a judge and a segmenter on a GPU each."""
    models = {"captioner": ("gar", 5), "judge": ("vllm", 1), "segmenter": ("sam3", 1)}
    pools = {
        place: {"name": name, "num_gpus": 1, "concurrency": [count, count]}
        for place, (name, count) in models.items()
    }
    return config(**{"sa1b": [{"paths": ["/a.tar"]}], **pools, **changes})


def mixed_rates(load_s=0.0) -> Rates:
    """What the two recipes cost: COCONut 10 regions an image, SA-1B 40."""
    free = StageRate(1.0, 0.0, 0.0)
    caption = StageRate(1.0, 0.0, 0.05, load_s=load_s)
    coconut = {"caption": caption, "verify_category": StageRate(1.0, 0.0, 0.005)}
    sa1b = {
        "caption": caption,
        "extract_category": StageRate(1.0, 0.0, 0.006),
        "agree_with_segmenter": StageRate(1.0, 0.0, 0.015),
    }
    return Rates(
        0.0,
        {
            "coconut": SubsetRates(100, 1_000, 0.8, 0.0, 1, 1, 1, dict.fromkeys(COCONUT, free) | coconut),
            "sa1b": SubsetRates(100, 4_000, 0.8, 0.0, 1, 1, 1, dict.fromkeys(SA1B, free) | sa1b),
        },
    )


MIXED = {"coconut": Size(10_000, 100_000), "sa1b": Size(2_500, 100_000)}
"""100 units with 5,000 s of captions, 25 units with as many."""
