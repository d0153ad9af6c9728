"""From the picks of an epoch's plan to a batch: items are read, decoded and laid out as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor

from ...filters import rle
from ...pipeline.io import photos
from ...schemas.errors import REBUILD, BadRecord, BadSample
from ...schemas.records import Blob
from ...schemas.sample import Sample, SampleRegion
from ...schemas.training import DataOptions
from ..model.batch import Example, Images, Tokens, collate, pack
from ..model.tiling import MaskRuns
from .conversation_records import CaptionedMask
from .conversations import Conversations, make_conversation_example
from .corpus import TrainingCorpus, token_lists
from .epoch_plan import Pick
from .order import shuffled

if TYPE_CHECKING:
    from PIL import Image

    from ..model.processor import PerceptionDLMProcessor
    from .decoding_paths import DecodingPaths

FILLER = "filler"
"""The name of an example that only keeps all ranks at the same number of steps. Its weight is 0."""


class Skipped(NamedTuple):
    """A sample or caption that was left out. It is counted by `reason`; `detail` names file and record."""

    reason: str
    detail: str


class TrainBatch(NamedTuple):
    """A batch to train on, with E examples, on the CPU.

    Attributes:
        images: the examples' images.
        tokens: the clean sequences; `tokens.roles.sample_BL` is the number of each token's example.
        label_BL: bool, which tokens may be masked and are learned.
        weight_E: float32, the weight of each example in the loss; 0 for fillers.
        keys: name of each example: "subset/key#region,region", or the conversation's file and id.
        skipped: what was left out while this batch was made.
        num_items: number of items that the batch was to be made of; 0 for a filler.
        path_step_BL: int64, the step in which the teacher decoded each labeled token; -1 for other tokens.
            None without decoding paths.
    """

    images: Images
    tokens: Tokens
    label_BL: Tensor
    weight_E: Tensor
    keys: list[str]
    skipped: list[Skipped]
    num_items: int = 0
    path_step_BL: Tensor | None = None


class LabeledExample(NamedTuple):
    """An example of a batch.

    Attributes:
        example: the model's inputs.
        labels: (L,) bool, which tokens of the captions are labeled.
        name: the example's name, as in `TrainBatch.keys`.
        weight: the example's weight in the loss.
        path_steps: (L,) int64, the step in which the teacher decoded each token of the captions, -1 for
            tokens that it did not decode; None without decoding paths.
    """

    example: Example
    labels: np.ndarray
    name: str
    weight: float = 1.0
    path_steps: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return self.example.prefix.shape[1] + self.example.captions.shape[1]


class BatchMaker:
    """Makes batches. Each worker process has one.

    Args:
        sources: the opened sources that picks refer to.
        processor: the model's processor.
        options: how batches are made.
        seed: decides the order and the prompts of regions.
        paths: what a teacher decoded for the regions of corpora, which is learned instead of their captions.
    """

    def __init__(
        self,
        sources: Sequence[TrainingCorpus | Conversations],
        processor: PerceptionDLMProcessor,
        options: DataOptions,
        seed: int,
        paths: DecodingPaths | None = None,
    ):
        self.sources, self.processor, self.options, self.seed = sources, processor, options, seed
        self.paths = paths

    def __call__(self, picks: Sequence[Pick], upcoming: Sequence[Pick] = ()) -> TrainBatch:
        """The batch of some picks. Without picks, or if none of them can be used, it is a filler.

        Args:
            picks: what the batch is made of.
            upcoming: the picks of this process's next batch: what is in a bucket is read meanwhile.

        Raises:
            BadSample: a sample is damaged or too long, and the options say that this is an error.
            SourceUnavailable: a sample cannot be had now.
        """
        self._expect([*picks, *upcoming])
        skipped: list[Skipped] = []
        labeled = [made for pick in picks if (made := self._make(pick, skipped))] or [self._filler()]
        examples = [each.example for each in labeled]
        if self.options.packed:
            images, tokens = pack(examples)
        else:
            batch = collate(examples)
            images, tokens = batch.images, batch.tokens()
        label = torch.zeros_like(tokens.roles.caption_BL)
        label[tokens.roles.caption_BL] = torch.from_numpy(np.concatenate([each.labels for each in labeled]))
        weight = torch.tensor([each.weight for each in labeled])
        names = [each.name for each in labeled]
        path_step = None
        if self.paths is not None:
            path_step = torch.full_like(tokens.ids_BL, -1)
            steps = [each.path_steps for each in labeled if each.path_steps is not None]
            path_step[tokens.roles.caption_BL] = torch.from_numpy(np.concatenate(steps))
        return TrainBatch(images, tokens, label, weight, names, skipped, len(picks), path_step)

    def _expect(self, picks: Sequence[Pick]) -> None:
        for number, source in enumerate(self.sources):
            if isinstance(source, TrainingCorpus) and source.is_in_bucket:
                own = [pick for pick in picks if pick.source == number]
                source.expect(source.region_group(pick.item, pick.pass_index).image for pick in own)

    def _make(self, pick: Pick, skipped: list[Skipped]) -> LabeledExample | None:
        source = self.sources[pick.source]
        try:
            if isinstance(source, TrainingCorpus):
                made = self._region_group(source, pick, skipped)
            else:
                made = self._conversation(source, pick, skipped)
            if made and made.num_tokens > self.options.max_tokens:
                detail = f"{made.name}: {made.num_tokens} tokens; raise max_tokens, or set on_too_long: skip"
                raise BadSample("sample_too_long", detail)
            return made
        except BadSample as error:
            self._skip(error, skipped)
            return None

    def _skip(self, error: BadSample, skipped: list[Skipped]) -> None:
        too_long = error.reason.endswith("too_long")
        if (self.options.on_too_long if too_long else self.options.on_bad_sample) == "error":
            raise error
        skipped.append(Skipped(error.reason, error.detail))

    def _conversation(
        self, source: Conversations, pick: Pick, skipped: list[Skipped]
    ) -> LabeledExample | None:
        record, shown, name = source.read_record(pick.item, self.options.max_pixels)
        if record.regions is not UNSET:
            return self._region_record(record.regions, shown[0], name, pick, skipped)
        example, labels = make_conversation_example(record, shown, self.processor, name)
        return LabeledExample(example, labels, name)

    def _region_record(
        self,
        regions: list[CaptionedMask],
        photo: Image.Image,
        name: str,
        pick: Pick,
        skipped: list[Skipped],
    ) -> LabeledExample | None:
        """The example of a group of regions of the released code's region data."""
        captions = token_lists(self.processor, [region.caption for region in regions])
        kept = self._short_enough(regions, captions, name, skipped)
        if not kept:
            return None
        regions, captions = [regions[i] for i in kept], [self._padded(captions[i]) for i in kept]
        size = (photo.height, photo.width)
        whole = {"counts": [0, photo.height * photo.width], "size": list(size)}
        masks = [
            (each.id, {"counts": each.counts, "size": list(each.size)} if each.counts else whole)
            for each in regions
        ]
        try:
            runs = _runs(masks, size)
        except BadRecord as error:
            raise BadSample(str(error.reason), f"{name}: {error.detail}; correct the record") from error
        seeds = (self.seed, pick.source, pick.pass_index, pick.item)
        prompts = shuffled(self.processor.config.num_prompts, *seeds)[: len(regions)].tolist()
        example = self.processor.make_example(photo, runs, captions, prompts)
        numbers = ",".join(str(regions[number].id) for number in example.order)
        return LabeledExample(example, self._labels(example), f"{name}#{numbers}")

    def _region_group(
        self, source: TrainingCorpus, pick: Pick, skipped: list[Skipped]
    ) -> LabeledExample | None:
        """The example of a group of an image's regions; None if all of their captions are too long."""
        image, group, chosen = source.region_group(pick.item, pick.pass_index)
        sample, data = source.read_sample(image)
        shard, key = source.shard_and_key(image)
        seeds = (self.seed, pick.source, pick.pass_index, sample.subset, key)
        order = shuffled(len(sample.regions), *seeds)
        regions = [sample.regions[number] for number in order[chosen]]
        steps = None
        if self.paths is None:
            captions = token_lists(self.processor, [region.caption for region in regions])
            kept = self._short_enough(regions, captions, f"{shard}: {key}", skipped)
            regions, captions = [regions[i] for i in kept], [self._padded(captions[i]) for i in kept]
        else:
            regions, captions, steps = self._decoded(self.paths, sample, regions, skipped)
        if not regions:
            return None
        where = Blob(f"{shard}: {key}")
        try:
            masks = [(each.id, {"counts": each.rle.counts, "size": list(each.rle.size)}) for each in regions]
            runs = _runs(masks, (sample.height, sample.width))
            photo = photos.decode_image(where, data, self.options.max_pixels)
        except BadRecord as error:
            detail = error.detail if error.detail.startswith(where.url) else f"{where}: {error.detail}"
            raise BadSample(str(error.reason), detail) from error
        if photo.size != (sample.width, sample.height):
            shown = f"{photo.width}x{photo.height}, its masks {sample.width}x{sample.height}"
            raise BadSample("size_mismatch", f"{where}: the photo is {shown}; {REBUILD}")
        prompts = shuffled(self.processor.config.num_prompts, *seeds, group)[: len(regions)].tolist()
        example = self.processor.make_example(photo, runs, captions, prompts)
        name = f"{sample.subset}/{key}#{','.join(str(regions[number].id) for number in example.order)}"
        path_steps = None
        if steps is not None:
            path_steps = np.concatenate([[-1, *steps[number], -1] for number in example.order])
        return LabeledExample(example, self._labels(example), name, path_steps=path_steps)

    def _decoded(
        self, paths: DecodingPaths, sample: Sample, regions: list[SampleRegion], skipped: list[Skipped]
    ) -> tuple[list[SampleRegion], list[list[int]], list[np.ndarray]]:
        """The regions whose decoding paths are known, with the tokens and steps of these."""
        found, captions, steps = [], [], []
        for region in regions:
            try:
                path = paths.find(sample.subset, sample.key, region.id)
            except BadSample as error:
                self._skip(error, skipped)
                continue
            found.append(region)
            captions.append(path.tokens_S.tolist())
            steps.append(path.step_S)
        return found, captions, steps

    def _short_enough(
        self,
        regions: Sequence[SampleRegion | CaptionedMask],
        captions: list[list[int]],
        where: str,
        skipped: list[Skipped],
    ) -> list[int]:
        """Indices of the regions whose captions are short enough; the others are an error or skipped."""
        limit, kept = self.options.caption_limit(), []
        for number, (region, ids) in enumerate(zip(regions, captions, strict=True)):
            if limit is None or len(ids) <= limit:
                kept.append(number)
                continue
            detail = f"{where}: region {region.id}: a caption of {len(ids)} tokens, {limit} are allowed"
            self._skip(BadSample("caption_too_long", f"{detail}; {self._fix(limit)}"), skipped)
        return kept

    def _fix(self, limit: int) -> str:
        """What to do about a caption that is longer than the limit."""
        is_fixed = self.options.caption_length == "fixed" and limit == self.options.max_new_tokens
        return (
            f"raise data.{'max_new_tokens' if is_fixed else 'max_caption_tokens'}, or set data.on_too_long: "
            "skip; a run that has a checkpoint keeps its old values, so also choose a new `out` for it"
        )

    def _padded(self, ids: list[int]) -> list[int]:
        """A caption, filled up to its fixed length if it has one."""
        if self.options.caption_length == "natural":
            return ids
        eot = self.processor.config.eot_token_id
        assert eot is not None
        return ids + [eot] * (self.options.max_new_tokens - len(ids))

    def _labels(self, example: Example) -> np.ndarray:
        """Which tokens of the captions are labeled: (L,) bool."""
        ids = example.captions[0]
        labels = np.ones(len(ids), bool)
        if self.options.labels == "captions":
            opens = np.append(True, np.diff(example.captions[2]) != 0)
            labels[opens] = False
            if self.processor.layout.block_end == "newline":
                labels[np.append(opens[1:], False)] = False
        return labels

    def _filler(self) -> LabeledExample:
        """A gray photo with one region without a caption: a normal example for the model, but a cheap one."""
        side = self.processor.config.tile_px
        mask = np.ones((side, side), bool)
        example = self.processor.make_example(np.full((side, side, 3), 128, np.uint8), [mask], [[]])
        none = np.zeros(example.captions.shape[1], bool)
        return LabeledExample(example, none, FILLER, weight=0.0, path_steps=none.astype(np.int64) - 1)


def _runs(masks: list[tuple[int, dict[str, Any]]], size: tuple[int, int]) -> list[MaskRuns]:
    """The masks of regions, given by number and RLE, in an image of `size` (height, width).

    Raises:
        BadRecord: a mask does not decode, is empty or has another size.
    """
    runs = []
    found = rle.check_all([each for _, each in masks], *size)
    for (number, _), mask in zip(masks, found, strict=True):
        if isinstance(mask, BadRecord):
            raise BadRecord(mask.reason, f"region {number}: {mask.detail}")
        runs.append(MaskRuns(size, rle.to_counts(mask.rle), mask.area, mask.bbox))
    return runs
