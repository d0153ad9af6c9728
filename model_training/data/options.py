"""What to train on and how batches are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CorpusSource:
    """Committed shards.

    Attributes:
        out: `out` of a build: a local folder or an fsspec URL.
        weight: passes over it in an epoch. 1: each region once; 0.25: every fourth group, others next epoch.
        subsets: some of its subsets; None: all.
    """

    out: str
    weight: float = 1.0
    subsets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ConversationSource:
    """Questions and answers on whole images, as LLaVA's data.

    Attributes:
        path: a .json list, a .jsonl or a .parquet of {id, image, conversations: [{from, value}, ...]}; a
            local path or fsspec URL. `image` is a path below `images`, or in Parquet the photo's bytes, alone
            or as {bytes, path}.
        images: the folder of the photos.
        weight: passes over it in an epoch.
    """

    path: str
    images: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class DataOptions:
    """How an epoch is ordered and cut into batches, and what becomes of samples that do not fit or are bad.

    Attributes:
        packed: examples of a batch follow one another in one row, instead of a padded row each.
        max_tokens: of a batch, padding included.
        max_examples: of a batch; None: as many as fit.
        regions_per_group: an image with m regions is visited at most ceil(m / this) times; 3.5 is the
            original's.
        group_sizes: "varied": each visit has any number of regions, up to the model's prompts; or "even":
            about as many each, as the original has it. A model captions no more regions together than it has
            seen together, and with 3.5 an even group has at most 4.
        caption_length: "natural", as the original trains; or "fixed": filled up with eot to `caption_slots`,
            which is what decoding in slots of fixed length sees.
        caption_slots: of a caption, if fixed.
        max_caption_tokens: longer captions are too long; None: only what does not fit its slots or batch.
        labels: what may be noised: all of the "answer", the tokens that open and close each caption included,
            as the original has it; or only what decoding fills in, the "captions" and the eot after them.
        on_too_long: "error", or "skip" and count.
        on_bad_sample: the same for damaged shards, photos and masks.
        max_pixels: of a photo.
        seed: of order, groups and prompts.
    """

    packed: bool = True
    max_tokens: int = 4096
    max_examples: int | None = None
    regions_per_group: float = 3.5
    group_sizes: Literal["varied", "even"] = "varied"
    caption_length: Literal["natural", "fixed"] = "natural"
    caption_slots: int = 32
    max_caption_tokens: int | None = None
    labels: Literal["answer", "captions"] = "answer"
    on_too_long: Literal["error", "skip"] = "error"
    on_bad_sample: Literal["error", "skip"] = "error"
    max_pixels: int = 200_000_000
    seed: int = 0

    def caption_limit(self) -> int | None:
        """Tokens that a caption may have."""
        fixed = self.caption_slots if self.caption_length == "fixed" else None
        limits = [limit for limit in (fixed, self.max_caption_tokens) if limit is not None]
        return min(limits, default=None)


@dataclass(frozen=True)
class Workers:
    """The processes that make batches ahead of the trainer. They change nothing but the speed.

    Attributes:
        number: of processes; 0: batches are made when asked for.
        prefetch: batches that each makes ahead; one of 4096 tokens is up to 13 MB in /dev/shm.
        pin_memory: copy batches to memory from which a GPU fetches on its own.
        start_method: "forkserver" and "spawn" are safe beside threads, CUDA and Ray, but import the main
            module anew (guard it with `if __name__ == "__main__"`); "fork" starts faster.
    """

    number: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    start_method: Literal["forkserver", "spawn", "fork"] = "forkserver"
