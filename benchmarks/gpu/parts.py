"""The parts of the GPU benchmark: what each needs, how long it may take, and where its code is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple

from paracaption.schemas.errors import ConfigError

TOTAL_S = 470.0
"""Of all parts together: under 8 minutes, with room for the starts of their processes."""


class Part(NamedTuple):
    """One part of the benchmark.

    Attributes:
        name: names its module in this package, its log and its rows; a dash stands for an underscore.
        title: for people.
        seconds: its time limit on a GPU; what earlier parts left unused is added.
        needs: packages without which it is skipped. torch and transformers are needed by nearly all.
    """

    name: str
    title: str
    seconds: float
    needs: tuple[str, ...] = ("torch", "transformers", "PIL", "pydantic")


PIPELINE = ("torch", "transformers", "PIL", "numpy", "yaml", "msgspec", "pydantic", "pycocotools")
ENGINE = (*PIPELINE, "torchvision", "vllm")

PARTS = (
    Part("peak", "What the device gives: a large matrix product and a large copy", 20, ("torch",)),
    Part("decode", "PerceptionDLM: regions of one image", 70),
    Part("batch", "PerceptionDLM: images in a batch", 60),
    Part("train", "PerceptionDLM: a training step with FSDP2", 90),
    Part("gar", "GAR without an engine: vision tower and prefill", 25),
    Part("gar-vllm", "GAR through vLLM: captions", 65, ENGINE),
    Part("judge", "Qwen3 through vLLM: verdicts", 45, ENGINE),
    Part("sam", "SAM 3: image encoder and segmenter", 25),
    Part("build", "From photos to shards, with tiny models", 70, (*ENGINE, "ray", "pyarrow", "prefect")),
)
"""In the order in which they run: the most wanted numbers first."""


OLDEST = {"transformers": 5}
"""Major release of a package before which our models do not load."""


def missing(part: Part) -> list[str]:
    """Packages that a part needs and this Python does not have, or has in too old a release."""
    found = []
    for name in part.needs:
        if importlib.util.find_spec(name) is None:
            found.append(name)
        elif name in OLDEST and int((version := metadata.version(name)).partition(".")[0]) < OLDEST[name]:
            found.append(f"{name} {OLDEST[name]} or newer (here {version})")
    return found


def chosen(names: Sequence[str]) -> list[Part]:
    """The named parts, in their own order; without names, all.

    Raises:
        ConfigError: an unknown name.
    """
    known = [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise ConfigError(f"--parts: unknown part {name!r}; choose from {', '.join(known)}")
    return [part for part in PARTS if not names or part.name in names]


def limit_s(waiting: Sequence[Part], elapsed_s: float, total_s: float = TOTAL_S) -> float:
    """Time limit of the first of the parts that still wait: its own, and what earlier parts left unused."""
    part, *later = waiting
    return max(part.seconds, total_s - elapsed_s - sum(each.seconds for each in later))
