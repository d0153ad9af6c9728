"""The loader: gives every item once an epoch over all ranks. Ranks and workers do not change the order."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ...pipeline.corpus.reader import Corpus
from ...pipeline.io.failures import RETRYING
from ...pipeline.io.location import is_bucket
from ...schemas.errors import ConfigError, IntegrityError, ParaCaptionError
from ...schemas.training import ConversationSource, CorpusSource, DataOptions
from . import left_out
from .conversations import open_conversations
from .corpus import open_training_corpus
from .decoding_paths import DecodingPaths
from .epoch_plan import EpochPlan, Mixture, Pick, count_batches
from .samples import BatchMaker, TrainBatch
from .table import cached_folder, default_cache

StartMethod = Literal["forkserver", "spawn", "fork"]

if TYPE_CHECKING:
    from ..model.processor import PerceptionDLMProcessor


class Loader:
    """The batches of one rank. Each iteration goes through the rest of the current epoch.

    All ranks have the same number of steps: if the last round has fewer batches than ranks, the other ranks
    get fillers, whose weight is 0. What a rank gets at a step depends only on the epoch, on the number of
    batches that all ranks have had together, and on the number of ranks. So a resume costs no time, and may
    have another number of ranks.

    Attributes:
        epoch: index of the current epoch (0, 1, ...).
        position: number of batches of the epoch that all ranks have had together.
        skipped: number of samples and captions that this rank has left out since it was made, by reason.
        left_out: of each source in order, how many of its images are not trained on, by reason.
        fingerprint: identifies the data and their order; trainers compare it over the ranks at the start.
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
        held_out_share: float = 0.0,
        paths: str | Path | None = None,
    ):
        """Open the sources. The first process to do so writes their tables to the cache; others wait for it.

        Args:
            sources: the corpora and conversations to train on; at least one.
            processor: the model's processor.
            options: the `data` part of a training configuration.
            seed: decides the order, the groups and the prompts of regions.
            rank: number of this process among all ranks.
            world_size: number of ranks.
            pin_memory: copy batches to page-locked memory, from which a GPU fetches them on its own.
            start_method: how worker processes start. "forkserver" and "spawn" are safe next to threads, CUDA
                and Ray, but import the main module again (guard it with `if __name__ == "__main__"`); "fork"
                starts faster, and is refused for a corpus in a bucket.
            held_out_share: share of the images of all corpora that are left out, to be evaluated on; the
                largest that one of them holds out, if that is more.
            paths: folder of the decoding paths that are learned instead of the captions of corpora.

        Raises:
            ConfigError: a source is missing, empty or of an unknown form, or an option does not suit the
                model.
            IntegrityError: a corpus is damaged.
        """
        _check_options(sources, options, processor, rank, world_size)
        _check_start_method(sources, options, start_method)
        RETRYING.set_budget(options.read_retry_s)
        self.cache = Path(options.cache) if options.cache is not None else default_cache()
        corpora = [Corpus(each.corpus, confined=True) for each in sources if isinstance(each, CorpusSource)]
        shares = [each.held_out_share for each in corpora]
        share = max([held_out_share, *shares])  # of one photo, no corpus may train what another one holds out
        opened = [
            open_training_corpus(source, processor, options, seed, self.cache, share)
            if isinstance(source, CorpusSource)
            else open_conversations(source, processor, options, self.cache)
            for source in sources
        ]
        self.left_out = [each.left_out for each in opened]
        self.options, self.rank, self.world_size = options, rank, world_size
        self.pin_memory, self.start_method = pin_memory, start_method
        self.mixture = Mixture(opened, [source.weight for source in sources], seed)
        found = None if paths is None else DecodingPaths(paths, processor, options.max_new_tokens)
        self.make = BatchMaker(opened, processor, options, seed, found)
        self.epoch = self.position = 0
        self.skipped: Counter[str] = Counter()
        pairs = zip(self.mixture.sources, self.mixture.weights, strict=True)
        facts = [(source.fingerprint, str(weight)) for source, weight in pairs]
        config = processor.config  # what decides how long samples are, and so which share a batch
        lengths = (processor.make_prefix(0, 0).shape[1], config.tokens_per_tile, config.replay_tokens)
        known = f"({facts!r}, {recorded_options(options, seed)}, {lengths!r}, {config.num_prompts!r})"
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()[:16]
        self._plan: EpochPlan | None = None
        self._batches: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Number of steps of the whole current epoch."""
        return self.num_steps(self.epoch)

    def num_items(self, epoch: int) -> int:
        """Number of items of an epoch, over all ranks."""
        return sum(self.mixture.sizes(epoch))

    def num_steps(self, epoch: int) -> int:
        """Number of steps of an epoch. Counting takes a second for a million items, and is cached."""
        return -(-self._plan_of(epoch).num_batches // self.world_size)

    def __iter__(self) -> Iterator[TrainBatch]:
        """The batches of the rest of the epoch.

        Raises:
            BadSample: a sample is damaged or too long, and the options say that this is an error.
            SourceUnavailable: a store does not answer now, and did not for `read_retry_s`.
        """
        self._begin()
        for made in self._loading():
            if isinstance(made, WorkerError):
                self.close()
                raise made.error
            self.skipped.update(each.reason for each in made.skipped)
            self.position += self.world_size
            yield made
        self._begin()

    def state_dict(self) -> dict[str, int | str]:
        """The position after the batch that was given last; it is the same on every rank."""
        self._begin()
        return {"epoch": self.epoch, "position": self.position, "data": self.fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a position, with any number of ranks.

        Raises:
            IntegrityError: the position is one in other data, or in the same data with other options.
        """
        if state["data"] != self.fingerprint:
            raise IntegrityError(
                f"the training data are not those of the checkpoint (the fingerprint is {self.fingerprint}, "
                f"in the checkpoint {state['data']}): sources, seed or options of the batches have changed, "
                "so that some samples would be seen twice and others not at all; restore the data and the "
                "configuration, or, if a corpus has grown or was built again, train in another `out` on "
                f"`model: {{path: OUT/model}}`{left_out.advice(self.left_out)}"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def close(self) -> None:
        """Stop the worker processes, which stay between epochs.

        A loader that is only dropped may keep its process for 5 s per worker when Python collects it.
        """
        self._batches = None

    def _begin(self) -> None:
        """Move on to the next epoch if this one is over."""
        if self.position and self.position >= self._plan_of(self.epoch).num_batches:
            self.epoch, self.position = self.epoch + 1, 0

    def _plan_of(self, epoch: int) -> EpochPlan:
        if self._plan is None or self._plan.epoch != epoch:
            self._plan = EpochPlan(self.mixture, self.options, epoch, self._counts(epoch))
        return self._plan

    def _counts(self, epoch: int) -> np.ndarray:
        def write(folder: Path) -> None:
            np.save(folder / "counts.npy", count_batches(self.mixture, self.options, epoch))

        return np.load(cached_folder(self.cache, f"plan-{self.fingerprint}-{epoch}", write) / "counts.npy")

    def _loading(self) -> DataLoader[Any]:
        if self._batches is None:
            several = self.options.workers > 0
            self._batches = DataLoader(
                _Batches(self.make),
                batch_size=None,
                sampler=_Picks(self),
                num_workers=self.options.workers,
                collate_fn=_unchanged,
                pin_memory=self.pin_memory and torch.cuda.is_available(),
                prefetch_factor=self.options.prefetch if several else None,
                persistent_workers=several,
                multiprocessing_context=_context(self.start_method) if several else None,
                worker_init_fn=partial(_begin_worker, self.options.read_retry_s),
                generator=torch.Generator(),  # else each epoch would draw from the trainer's own
            )
        return self._batches


class WorkerError(NamedTuple):
    """An error of a worker process, which the loader raises in the trainer's process as it is."""

    error: ParaCaptionError


class _Picks:
    """Of each of this rank's next batches its picks, and those of the batch that its worker makes next.

    Workers take turns. No picks: the epoch has no batch left for this rank, or for this worker.
    """

    def __init__(self, loader: Loader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[list[Pick], list[Pick]]]:
        ahead = max(1, self.loader.options.workers)
        coming: deque[list[Pick]] = deque()
        for picks in self._batches():
            coming.append(picks)
            if len(coming) > ahead:
                yield coming.popleft(), picks
        while coming:
            yield coming.popleft(), []

    def _batches(self) -> Iterator[list[Pick]]:
        loader = self.loader
        plan = loader._plan_of(loader.epoch)
        for first in range(loader.position, plan.num_batches, loader.world_size):
            number = first + loader.rank
            yield plan.batch(number) if number < plan.num_batches else []


class _Batches(Dataset[Any]):
    """The dataset that workers hold: maps picks to a batch, given the picks of the next one."""

    def __init__(self, make: BatchMaker):
        self.make = make

    def __getitem__(self, picks: tuple[list[Pick], list[Pick]]) -> TrainBatch | WorkerError:
        try:
            return self.make(*picks)
        except ParaCaptionError as error:
            return WorkerError(error)


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


def _unchanged(batch: Any) -> Any:
    return batch


def _begin_worker(read_retry_s: float, _: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker has one core, and texts come a few at a time
    RETRYING.set_budget(read_retry_s)


def _context(method: str) -> Any:
    context = multiprocessing.get_context(method)
    if method == "forkserver":  # so that what every worker needs is imported once
        context.set_forkserver_preload(["paracaption.model_training.data.samples"])
    return context


def _check_options(
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
            f"regions_per_group: {options.regions_per_group}; choose 1 to {most}, the model's prompts"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank: {rank}; with {world_size} ranks it is 0 to {world_size - 1}")


def _check_start_method(
    sources: Sequence[CorpusSource | ConversationSource], options: DataOptions, method: StartMethod
) -> None:
    """A process that is forked from one that has used a bucket would wait for it for ever."""
    in_bucket = [each.corpus for each in sources if isinstance(each, CorpusSource) and is_bucket(each.corpus)]
    if in_bucket and options.workers and method == "fork":
        raise ConfigError(
            f"start_method: fork; {in_bucket[0]} is in a bucket, which no forked process can read: choose "
            "forkserver or spawn"
        )
