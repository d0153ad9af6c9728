"""The loader: every item once an epoch over all ranks, in an order that neither ranks nor workers change."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ...schemas.errors import ConfigError, IntegrityError, ParaCaptionError
from ...schemas.training import ConversationSource, CorpusSource, DataOptions
from .conversations import open_conversations
from .corpus import open_corpus
from .epoch_plan import Mixture, Pick, Plan, count_batches
from .samples import BatchMaker, TrainBatch
from .table import cached, default_cache

StartMethod = Literal["forkserver", "spawn", "fork"]

if TYPE_CHECKING:
    from ..model.processor import PerceptionDLMProcessor


class Loader:
    """Batches of one rank; iterating gives what is left of the current epoch, and the next one after it.

    All ranks have the same number of steps: a last round that has not a batch for every rank is filled up
    with fillers, whose weight is 0. What a rank gets at a step follows from the epoch, the number of batches
    that all ranks together have had, and the number of ranks; so a resume is immediate, and may have more
    ranks or fewer.

    Attributes:
        epoch: the current one, from 0.
        position: batches of the epoch that all ranks together have had.
        skipped: samples and captions that this rank has left out since it was made, by reason.
        fingerprint: of the data and what orders it; trainers compare it over ranks before they start.
    """

    def __init__(
        self,
        sources: Sequence[CorpusSource | ConversationSource],
        processor: PerceptionDLMProcessor,
        options: DataOptions = DataOptions(),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        start_method: StartMethod = "forkserver",
    ):
        """Open the sources. The first to open them writes their tables to the cache, the others wait for it.

        Args:
            sources: at least one.
            processor: the model's.
            options: the `data` part of a training configuration.
            seed: decides the order, the groups and the prompts of regions.
            rank: number of this process among all ranks.
            world_size: number of ranks.
            pin_memory: copy batches to page-locked memory, from which a GPU fetches them on its own.
            start_method: how worker processes start. "forkserver" and "spawn" are safe beside threads, CUDA
                and Ray, but import the main module anew (guard it with `if __name__ == "__main__"`); "fork"
                starts faster.

        Raises:
            ConfigError: a source is missing, empty or not of a form that is read; an option that cannot be.
            IntegrityError: a corpus is damaged.
        """
        _check(sources, options, processor, rank, world_size)
        self.cache = Path(options.cache) if options.cache is not None else default_cache()
        opened = [
            open_corpus(source, processor, options, seed, self.cache)
            if isinstance(source, CorpusSource)
            else open_conversations(source, processor, self.cache)
            for source in sources
        ]
        self.options, self.rank, self.world_size = options, rank, world_size
        self.pin_memory, self.start_method = pin_memory, start_method
        self.mixture = Mixture(opened, [source.weight for source in sources], seed)
        self.make = BatchMaker(opened, processor, options, seed)
        self.epoch = self.position = 0
        self.skipped: Counter[str] = Counter()
        facts = [(source.fingerprint, str(weight)) for source, weight in _pairs(self.mixture)]
        config = processor.config  # what decides how long samples are, and so which share a batch
        lengths = (processor.prefix(0, 0).shape[1], config.tokens_per_tile, config.replay_tokens)
        known = f"({facts!r}, {recorded_options(options, seed)}, {lengths!r}, {config.num_prompts!r})"
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()[:16]
        self._plan: Plan | None = None
        self._batches: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Steps of the current epoch, from its beginning."""
        return self.num_steps(self.epoch)

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch; counting them takes a second for a million items, but only once for a cache."""
        return -(-self._plan_of(epoch).num_batches // self.world_size)

    def __iter__(self) -> Iterator[TrainBatch]:
        """The rest of the epoch.

        Raises:
            BadSample: a sample is damaged or too long, and the options say that this is an error.
        """
        self._begin()
        for made in self._loading():
            if isinstance(made, Failed):
                raise made.error
            self.skipped.update(each.reason for each in made.skipped)
            self.position += self.world_size
            yield made
        self._begin()

    def state_dict(self) -> dict[str, int | str]:
        """Where the loader is: after the batch that it gave last. The same on every rank."""
        self._begin()
        return {"epoch": self.epoch, "position": self.position, "data": self.fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on where a state was taken, with any number of ranks.

        Raises:
            IntegrityError: the state is of other data, or of other options of it.
        """
        if state["data"] != self.fingerprint:
            raise IntegrityError(
                f"the checkpoint's data are {state['data']}, these {self.fingerprint}: sources, seed or "
                "batches have changed, so samples would come twice or never; start a new run from its weights"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def close(self) -> None:
        """Stop the workers."""
        self._batches = None

    def _begin(self) -> None:
        """Go to the next epoch if this one is over."""
        if self.position and self.position >= self._plan_of(self.epoch).num_batches:
            self.epoch, self.position = self.epoch + 1, 0

    def _plan_of(self, epoch: int) -> Plan:
        if self._plan is None or self._plan.epoch != epoch:
            self._plan = Plan(self.mixture, self.options, epoch, self._counts(epoch))
        return self._plan

    def _counts(self, epoch: int) -> np.ndarray:
        def write(folder: Path) -> None:
            np.save(folder / "counts.npy", count_batches(self.mixture, self.options, epoch))

        return np.load(cached(self.cache, f"plan-{self.fingerprint}-{epoch}", write) / "counts.npy")

    def _loading(self) -> DataLoader[Any]:
        if self._batches is None:
            several = self.options.workers > 0
            self._batches = DataLoader(
                _Made(self.make),
                batch_size=None,
                sampler=_Requests(self),
                num_workers=self.options.workers,
                collate_fn=_as_it_is,
                pin_memory=self.pin_memory and torch.cuda.is_available(),
                prefetch_factor=self.options.prefetch if several else None,
                persistent_workers=several,
                multiprocessing_context=_context(self.start_method) if several else None,
                worker_init_fn=_quiet_tokenizers,
                generator=torch.Generator(),  # else each epoch would draw from the trainer's own
            )
        return self._batches


class Failed(NamedTuple):
    """An error in a worker, to be raised where the trainer sees it as it is."""

    error: ParaCaptionError


class _Requests:
    """The picks of this rank's batches from where the loader is; none where the epoch has no more."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __iter__(self) -> Iterator[list[Pick]]:
        loader = self.loader
        plan = loader._plan_of(loader.epoch)
        for first in range(loader.position, plan.num_batches, loader.world_size):
            number = first + loader.rank
            yield plan.batch(number) if number < plan.num_batches else []


class _Made(Dataset[Any]):
    """What workers hold: picks to a batch."""

    def __init__(self, make: BatchMaker):
        self.make = make

    def __getitem__(self, picks: list[Pick]) -> TrainBatch | Failed:
        try:
            return self.make(picks)
        except ParaCaptionError as error:
            return Failed(error)


_RECORDED = (
    *("packed", "max_tokens", "max_examples", "regions_per_group", "group_sizes", "caption_length"),
    *("caption_slots", "max_caption_tokens", "labels", "on_too_long", "on_bad_sample", "max_pixels"),
)


def recorded_options(options: DataOptions, seed: int) -> str:
    """The options that decide what batches are, as fingerprints contain them since release 0.1.

    Checkpoints and caches hold the fingerprint, so this text keeps its names and its order.
    """
    values = options.model_dump() | {"caption_slots": options.max_new_tokens}
    fields = ", ".join(f"{name}={values[name]!r}" for name in _RECORDED)
    return f"DataOptions({fields}, seed={seed!r})"


def _as_it_is(made: Any) -> Any:
    return made


def _quiet_tokenizers(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker has one core, and texts come a few at a time


def _context(method: str) -> Any:
    context = multiprocessing.get_context(method)
    if method == "forkserver":  # imports once what every worker needs
        context.set_forkserver_preload(["paracaption.model_training.data.samples"])
    return context


def _pairs(mixture: Mixture) -> Iterator[tuple[Any, Any]]:
    return zip(mixture.sources, mixture.weights, strict=True)


def _check(
    sources: Sequence[CorpusSource | ConversationSource],
    options: DataOptions,
    processor: PerceptionDLMProcessor,
    rank: int,
    world_size: int,
) -> None:
    if not sources:
        raise ConfigError("no sources; give a corpus to train on")
    for source in sources:
        if not source.weight > 0:
            raise ConfigError(f"{source}: weight has to be above 0; leave the source out instead")
    most = processor.config.num_prompts
    if not 1 <= options.regions_per_group <= most:
        raise ConfigError(
            f"regions_per_group: {options.regions_per_group}; take 1 to {most}, the model's prompts"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size}")
