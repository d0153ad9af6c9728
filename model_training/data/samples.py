"""From the picks of a plan to a batch: read, decoded and laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...filters import rle
from ...pipeline.io import photos
from ...schemas.errors import BadRecord, BadSample
from ...schemas.records import Blob
from ...schemas.sample import SampleRegion
from ...schemas.training import DataOptions
from ..model.batch import Example, Images, Tokens, collate, pack
from ..model.tiling import Runs
from . import conversations
from .conversations import Conversations
from .corpus import Corpus, token_lists
from .epoch_plan import Pick
from .order import shuffled

if TYPE_CHECKING:
    from ..model.processor import PerceptionDLMProcessor

FILLER = "filler"
"""The name of an example that only keeps all ranks at the same number of steps; its weight is 0."""


class Skipped(NamedTuple):
    """What was left out, counted by `reason`; `detail` names file and record."""

    reason: str
    detail: str


class TrainBatch(NamedTuple):
    """A batch to train on; E examples.

    Attributes:
        images: what it shows.
        tokens: the clean sequences; `structure.sample_BL` is the number of each token's example.
        label_BL: bool, which tokens may be noised and are learnt.
        weight_E: float32, each example's share in the loss; 0 for fillers.
        keys: name of each example: "subset/key#region,region" or the conversation's file and id.
        skipped: what was left out while this batch was made.
    """

    images: Images
    tokens: Tokens
    label_BL: Tensor
    weight_E: Tensor
    keys: list[str]
    skipped: list[Skipped]

    def to(self, device: torch.device | str) -> TrainBatch:
        """On a device."""
        moved = (part.to(device) for part in (self.images, self.tokens, self.label_BL, self.weight_E))
        return TrainBatch(*moved, self.keys, self.skipped)


class Sample(NamedTuple):
    """An example, which of its captions' tokens are labelled, and its name."""

    example: Example
    labels: np.ndarray
    name: str
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Of the sequence."""
        return self.example.prefix.shape[1] + self.example.captions.shape[1]


class BatchMaker:
    """Makes batches; one in each worker."""

    def __init__(
        self,
        sources: Sequence[Corpus | Conversations],
        processor: PerceptionDLMProcessor,
        options: DataOptions,
        seed: int,
    ):
        self.sources, self.processor, self.options, self.seed = sources, processor, options, seed

    def __call__(self, picks: Sequence[Pick]) -> TrainBatch:
        """The batch of some picks; no picks, or none that can be used: a filler.

        Raises:
            BadSample: a sample is damaged or too long, and the options say that this is an error.
        """
        skipped: list[Skipped] = []
        samples = [sample for pick in picks if (sample := self._sample(pick, skipped))]
        samples = samples or [self._filler()]
        examples = [sample.example for sample in samples]
        if self.options.packed:
            images, tokens = pack(examples)
        else:
            batch = collate(examples)
            images, tokens = batch.images, batch.tokens()
        label = torch.zeros_like(tokens.structure.caption_BL)
        label[tokens.structure.caption_BL] = torch.from_numpy(np.concatenate([s.labels for s in samples]))
        weight = torch.tensor([sample.weight for sample in samples])
        return TrainBatch(images, tokens, label, weight, [sample.name for sample in samples], skipped)

    def _sample(self, pick: Pick, skipped: list[Skipped]) -> Sample | None:
        source = self.sources[pick.source]
        try:
            make = self._group if isinstance(source, Corpus) else self._conversation
            sample = make(source, pick, skipped)
            if sample and sample.num_tokens > self.options.max_tokens:
                detail = (
                    f"{sample.name}: {sample.num_tokens} tokens; raise max_tokens, or set on_too_long: skip"
                )
                raise BadSample("sample_too_long", detail)
            return sample
        except BadSample as error:
            self._skip(error, skipped)
            return None

    def _skip(self, error: BadSample, skipped: list[Skipped]) -> None:
        too_long = error.reason.endswith("too_long")
        if (self.options.on_too_long if too_long else self.options.on_bad_sample) == "error":
            raise error
        skipped.append(Skipped(error.reason, error.detail))

    def _conversation(self, source: Conversations, pick: Pick, _: list[Skipped]) -> Sample:
        record, photo, name = source.read(pick.item, self.options.max_pixels)
        return Sample(*conversations.lay_out(record, photo, self.processor, name), name)

    def _group(self, source: Corpus, pick: Pick, skipped: list[Skipped]) -> Sample | None:
        """A group of an image's regions; None if every caption of it is too long."""
        image, group, chosen = source.place(pick.item, pick.turn)
        sample, data = source.read(image)
        shard, key = source.name(image)
        seeds = (self.seed, pick.source, pick.turn, sample.subset, key)
        order = shuffled(len(sample.regions), *seeds)
        regions = [sample.regions[number] for number in order[chosen]]
        captions = token_lists(self.processor, [region.caption for region in regions])
        kept = self._short_enough(regions, captions, f"{shard}: {key}", skipped)
        if not kept:
            return None
        regions, captions = [regions[i] for i in kept], [self._filled(captions[i]) for i in kept]
        where = Blob(f"{shard}: {key}")
        try:
            runs = _runs(regions, (sample.height, sample.width))
            photo = photos.decode_image(where, data, self.options.max_pixels)
        except BadRecord as error:
            detail = error.detail if error.detail.startswith(where.url) else f"{where}: {error.detail}"
            raise BadSample(str(error.reason), detail) from error
        if photo.size != (sample.width, sample.height):
            shown = f"{photo.width}x{photo.height}, its masks {sample.width}x{sample.height}"
            raise BadSample("size_mismatch", f"{where}: the photo is {shown}; build the unit again")
        prompts = shuffled(self.processor.config.num_prompts, *seeds, group)[: len(regions)].tolist()
        example = self.processor.example(photo, runs, captions, prompts)
        name = f"{sample.subset}/{key}#{','.join(str(regions[number].id) for number in example.order)}"
        return Sample(example, self._labels(example), name)

    def _short_enough(
        self, regions: list[SampleRegion], captions: list[list[int]], where: str, skipped: list[Skipped]
    ) -> list[int]:
        """Which regions' captions are; the others are an error or skipped."""
        limit, kept = self.options.caption_limit(), []
        for number, (region, ids) in enumerate(zip(regions, captions, strict=True)):
            if limit is None or len(ids) <= limit:
                kept.append(number)
                continue
            detail = f"{where}: region {region.id}: a caption of {len(ids)} tokens, {limit} are allowed"
            self._skip(BadSample("caption_too_long", f"{detail}; or set on_too_long: skip"), skipped)
        return kept

    def _filled(self, ids: list[int]) -> list[int]:
        """A caption in all of its slots, if their number is fixed."""
        if self.options.caption_length == "natural":
            return ids
        return ids + [self.processor.config.eot_token_id] * (self.options.max_new_tokens - len(ids))

    def _labels(self, example: Example) -> np.ndarray:
        """(L,) bool of the captions' tokens."""
        ids = example.captions[0]
        labels = np.ones(len(ids), bool)
        if self.options.labels == "captions":
            opens = np.append(True, np.diff(example.captions[2]) != 0)
            labels[opens] = False
            if self.processor.layout.block_end == "newline":
                labels[np.append(opens[1:], False)] = False
        return labels

    def _filler(self) -> Sample:
        """A grey photo and one region without a caption: as any other for the model, but it costs little."""
        side = self.processor.config.vision_config.image_size
        mask = np.ones((side, side), bool)
        example = self.processor.example(np.full((side, side, 3), 128, np.uint8), [mask], [[]])
        return Sample(example, np.zeros(example.captions.shape[1], bool), FILLER, weight=0.0)


def _runs(regions: list[SampleRegion], size: tuple[int, int]) -> list[Runs]:
    """The masks of regions.

    Raises:
        BadRecord: one does not decode, is empty or has another size.
    """
    found = rle.check_all([{"counts": r.rle.counts, "size": list(r.rle.size)} for r in regions], *size)
    runs = []
    for region, mask in zip(regions, found, strict=True):
        if isinstance(mask, BadRecord):
            raise BadRecord(mask.reason, f"region {region.id}: {mask.detail}")
        runs.append(Runs(size, rle.to_counts(mask.rle), mask.area, mask.bbox))
    return runs
