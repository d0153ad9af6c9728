"""Each region once an epoch, whatever reads it; and what becomes of what is damaged, too long or stale."""

import json
import math
import multiprocessing
import pickle
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paracaption.model_training.convert.published import convert
from paracaption.model_training.data.corpus import token_lists
from paracaption.model_training.data.epoch_plan import cut_packed, cut_padded
from paracaption.model_training.data.loader import recorded_options
from paracaption.model_training.data.order import Permutation, even_groups, keys_of, num_groups, varied_groups
from paracaption.model_training.data.samples import TrainBatch
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.pipeline.corpus import reader
from paracaption.pipeline.corpus.merge import merge
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import BadSample, ConfigError, IntegrityError
from paracaption.schemas.training import CorpusSource, DataOptions
from tests.model_training.corpora import (
    loader,
    masks_of,
    processor,
    regions_of,
    visits,
    write,
    write_photo,
    write_unit,
)
from tests.model_training.recorded_perceptiondlm import golden
from tests.shared_data import recorded

UNITS = [[3, 9, 1, 0, 4], [0, 0], [7, 12, 2]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "out"
    write(out, UNITS)
    return out


def copy(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "out"))


# Order.


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_has_each_number_once(size: int, key: int):
    assert sorted(Permutation(size, key)(np.arange(size)).tolist()) == list(range(size))


@given(regions=st.integers(1, 200), per_group=st.sampled_from([1, 2, 3.5, 5, 6]), key=st.integers(0, 99))
def test_groups_have_each_region_once(regions: int, per_group: float, key: int):
    total = math.ceil(regions / per_group)
    every, groups = np.full(total, regions), num_groups(np.full(total, regions), per_group)
    numbers = np.arange(total)
    keys = keys_of(np.full(total, 7), np.full(total, key), "a")
    assert groups[0] == total
    for start, size in (
        even_groups(every, groups, numbers),
        varied_groups(every, groups, numbers, 6, keys),
    ):
        parts = zip(start.tolist(), size.tolist(), strict=True)
        assert [each for first, many in parts for each in range(first, first + many)] == list(range(regions))
        assert max(size) <= 6
    _, size = even_groups(every, groups, numbers)
    assert max(size) - min(size) <= 1 and min(size) >= 1


def test_varied_groups_have_every_size_and_are_others_in_every_pass():
    images = np.repeat(np.arange(500), 2)
    number = np.tile([0, 1], 500)
    seen = []
    for turn in (0, 1):
        keys = keys_of(images, np.full(1000, turn), 3)
        start, size = varied_groups(np.full(1000, 6), np.full(1000, 2), number, 6, keys)
        first, second = size.reshape(-1, 2).T
        assert (first + second == 6).all() and (start[1::2] == first).all()
        counts = np.bincount(first, minlength=7)
        assert counts[0] == 0 and counts[1:].min() > 50
        seen.append(first)
    assert (seen[0] != seen[1]).mean() > 0.7


@given(
    lengths=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 300)), min_size=16, max_size=16),
    most=st.integers(1, 16),
)
def test_no_batch_is_over_the_budget_unless_one_sample_is(lengths: list[tuple[int, int]], most: int):
    prefix, captions = np.array(lengths).T.reshape(2, 2, 8)
    for cut in (cut_packed, cut_padded):
        bins = cut(prefix, captions, 1000, most)
        for window in range(2):
            assert sorted(set(bins[window].tolist())) == list(range(bins[window].max() + 1))
            for number in range(bins[window].max() + 1):
                p, c = prefix[window][bins[window] == number], captions[window][bins[window] == number]
                tokens = (p + c).sum() if cut is cut_packed else len(p) * (p.max() + c.max())
                assert len(p) <= most and (tokens <= 1000 or len(p) == 1)


# Exactly once.


@settings(max_examples=6, deadline=None)
@given(
    units=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    packed=st.booleans(),
    workers=st.sampled_from([0, 2]),
    seed=st.integers(0, 9),
)
def test_each_region_once_an_epoch_and_equal_steps_on_any_number_of_ranks(
    units: list[list[int]], packed: bool, workers: int, seed: int
):
    units[0][0] = max(1, units[0][0])
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        wanted = Counter(write(out, units))
        for world in (1, 2, 3, 8):
            ahead = {"workers": workers if world == 3 else 0, "start_method": "fork"}
            options = {"packed": packed, "seed": seed} | ahead
            ranks = [loader(out, rank, world, **options) for rank in range(world)]
            for epoch in range(2 if world == 3 else 1):
                steps = {len(each) for each in ranks}
                batches = [list(each) for each in ranks]
                assert {len(own) for own in batches} == steps
                assert regions_of(batch for own in batches for batch in own) == wanted
                assert all(each.state_dict()["epoch"] == epoch + 1 for each in ranks)
            for each in ranks:
                each.close()


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
@pytest.mark.soak
def test_workers_change_neither_batches_nor_their_order(corpus: Path, method: str):
    made = loader(corpus, 1, 2, workers=2, start_method=method)
    random = torch.get_rng_state()
    for _ in range(2):  # the workers stay for the next epoch
        alone = loader(corpus, 1, 2)
        alone.load_state_dict(made.state_dict())
        assert_equal(list(made), list(alone))
    assert torch.equal(torch.get_rng_state(), random)
    made.close()


@pytest.mark.soak
def test_a_resume_with_workers_leaves_out_what_they_made_ahead(corpus: Path):
    ours = loader(corpus, max_tokens=300, workers=2, prefetch=4, start_method="fork")
    batches = iter(ours)
    seen = [next(batches) for _ in range(3)]
    state = ours.state_dict()
    batches.close()
    ours.load_state_dict(state)
    assert_equal(seen + list(ours), list(loader(corpus, max_tokens=300)))
    ours.close()


def assert_equal(found: list[TrainBatch], wanted: list[TrainBatch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ours.images, theirs.images))
        assert torch.equal(ours.tokens.ids_BL, theirs.tokens.ids_BL)
        assert torch.equal(ours.label_BL, theirs.label_BL)


def test_epochs_differ_in_order_groups_and_prompts_and_seeds_too(corpus: Path):
    ours = loader(corpus)
    first, second = list(ours), list(ours)
    other = list(loader(corpus, seed=1))
    keys = [[key for batch in batches for key in batch.keys] for batches in (first, second, other)]
    assert len({tuple(each) for each in keys}) == 3
    assert len({frozenset(each) for each in keys}) == 3
    used = torch.cat([batch.images.prompts_NPQ for batch in first]).any(dim=2)
    assert used.any(dim=0).all()  # of six prompts, all are in use for groups of four regions


def test_images_have_as_many_groups_as_in_the_original(corpus: Path):
    groups = Counter(key.partition("#")[0] for batch in loader(corpus) for key in batch.keys)
    assert groups == visits(UNITS)


# Resume.


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.soak(keep=2)
def test_a_resume_in_mid_epoch_gives_what_was_left_to_any_number_of_ranks(
    corpus: Path, before: int, after: int
):
    ranks = [loader(corpus, rank, before, max_tokens=300) for rank in range(before)]
    seen, states = [], []
    for each in ranks:
        batches = iter(each)
        seen += [next(batches) for _ in range(2)]
        states.append(each.state_dict())
    assert all(state == states[0] for state in states)
    left = []
    for rank in range(after):
        resumed = loader(corpus, rank, after, max_tokens=300)
        resumed.load_state_dict(states[0])
        left += list(resumed)
        assert resumed.state_dict()["epoch"] == 1
    if before == after:
        assert_equal(left, [batch for each in ranks for batch in each])
    assert set((regions_of(seen) + regions_of(left)).values()) == {1}
    assert regions_of(seen) + regions_of(left) == regions_of(loader(corpus))


def test_a_state_is_a_few_numbers_and_the_end_of_an_epoch_is_the_start_of_the_next(corpus: Path):
    ours = loader(corpus)
    assert len(json.dumps(ours.state_dict())) < 100
    states = [ours.state_dict() for _ in ours]
    assert states[0]["position"] == 1
    assert states[-1] == {"epoch": 1, "position": 0, "data": ours.fingerprint}


def test_the_count_of_batches_is_kept_for_the_next_start(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    steps = len(loader(corpus, seed=5))
    monkeypatch.setattr("paracaption.model_training.data.loader.count_batches", None)
    assert len(loader(corpus, seed=5)) == steps


def test_a_state_of_other_data_or_options_is_refused(corpus: Path):
    state = loader(corpus).state_dict()
    for options in ({"seed": 1}, {"packed": False}, {"regions_per_group": 2.0}, {"group_sizes": "even"}):
        with pytest.raises(IntegrityError, match="restore the data and the configuration, or, if"):
            loader(corpus, **options).load_state_dict(state)


def test_a_fingerprint_has_the_options_in_the_words_of_release_0_1():
    options = {
        "packed": False,
        "max_tokens": 900,
        "max_examples": 5,
        "regions_per_group": 2,
        "group_sizes": "even",
        "caption_length": "fixed",
        "max_new_tokens": 40,
        "max_caption_tokens": 18,
        "labels": "captions",
        "on_too_long": "skip",
        "on_bad_sample": "skip",
        "max_pixels": 1000,
    }
    assert recorded_options(DataOptions(**options, workers=9, prefetch=9, cache="elsewhere"), 7) == (
        "DataOptions(packed=False, max_tokens=900, max_examples=5, regions_per_group=2.0, "
        "group_sizes='even', caption_length='fixed', caption_slots=40, max_caption_tokens=18, "
        "labels='captions', on_too_long='skip', on_bad_sample='skip', max_pixels=1000, seed=7)"
    )


def test_a_plan_is_of_the_model_whose_tokens_it_counts(corpus: Path):
    every = [loader(corpus, processor=processor(replay_size=size)) for size in (1, 4)]
    assert every[0].fingerprint != every[1].fingerprint
    assert [regions_of(ours) for ours in every] == [regions_of(loader(corpus))] * 2


def test_a_corpus_may_be_moved_between_runs(corpus: Path, tmp_path: Path):
    assert loader(copy(corpus, tmp_path)).fingerprint == loader(corpus).fingerprint


def test_what_a_worker_is_given_does_not_grow_with_the_corpus(corpus: Path, tmp_path: Path):
    write(tmp_path / "out", [[9] * 40])
    small, large = (pickle.dumps(loader(out).make.sources) for out in (corpus, tmp_path / "out"))
    assert abs(len(large) - len(small)) < 300


# What is in a batch.


@pytest.mark.parametrize("layout", ["corrected", "reference"])
def test_a_sample_is_what_the_processor_makes_of_the_masks_themselves(corpus: Path, layout: str):
    made = processor(layout)
    ours = loader(corpus, packed=False, max_examples=1, processor=made)
    for batch in ours:
        name, _, regions = batch.keys[0].partition("#")
        seed = int(name.rpartition("_")[2])
        pixels = np.array(Image.open(corpus.parent / "photos" / f"{seed}.jpg"))
        every = masks_of(seed, 20, pixels.shape[1::-1])
        numbers = [int(region) for region in regions.split(",")][::-1]  # of equals, the later comes first
        texts = [f"number {i} of {seed}" + " very" * (i % 3) + " red" for i in numbers]
        active = batch.images.prompts_NPQ.any(dim=0).any(dim=1).nonzero().flatten()
        wanted = made.make_example(
            pixels, [every[i] for i in numbers], [made.tokenize(text) for text in texts]
        )
        assert torch.equal(batch.images.views_N3SS, torch.from_numpy(wanted.views))
        assert torch.equal(batch.images.boxes_R4, torch.tensor(wanted.boxes).float())
        tokens = np.concatenate([wanted.prefix, wanted.captions], axis=1)
        found = (batch.tokens.ids_BL, batch.tokens.position_BL, batch.tokens.roles.region_BL)
        assert np.array_equal(torch.cat(found).numpy(), tokens)
        assert len(active) <= len(numbers)
        if layout == "corrected":  # a region's patches do not depend on its prompt
            patches = sorted(batch.images.prompts_NPQ[:, active].transpose(0, 1).flatten(1).tolist())
            assert patches == sorted(
                wanted.prompts[:, : len(numbers)].swapaxes(0, 1).reshape(len(numbers), -1).tolist()
            )


def test_tokens_and_labels_of_a_photo_in_a_shard_are_the_recorded_ones(tmp_path: Path):
    convert(recorded("perceptiondlm/checkpoint"), tmp_path / "model")
    made = PerceptionDLMProcessor.from_pretrained(tmp_path / "model")
    which = golden("train")
    write_photo(tmp_path / "out", which.pixels, which.masks, which.meta["captions_in"])
    (batch,) = loader(tmp_path / "out", processor=made, max_tokens=4096)
    assert torch.equal(batch.tokens.ids_BL, which.numbers["input_ids_after"])
    assert torch.equal(batch.label_BL, which.numbers["labels_after"] != -100)
    assert batch.label_BL.sum() == 83
    assert torch.allclose(batch.images.boxes_R4, which.numbers["bboxes_xyxy"].float())


def test_labels_of_captions_alone_leave_out_what_opens_a_block(corpus: Path):
    made = processor()
    for options, openers in (({}, True), ({"labels": "captions"}, False)):
        batch = next(iter(loader(corpus, **options)))
        opens = torch.isin(batch.tokens.ids_BL, torch.tensor(made.config.caption_token_ids))
        ends = batch.tokens.ids_BL == made.config.eot_token_id
        assert bool(batch.label_BL[opens].any()) is openers
        assert batch.label_BL[ends & batch.tokens.roles.caption_BL].all()
        assert not batch.label_BL[~batch.tokens.roles.caption_BL].any()


def test_captions_of_fixed_length_fill_their_slots_with_eot(corpus: Path):
    made = processor()
    for packed in (True, False):
        ours = loader(corpus, caption_length="fixed", max_new_tokens=40, max_tokens=900, packed=packed)
        for batch in ours:
            codes = batch.tokens.roles.region_BL[batch.tokens.roles.caption_BL]
            sample = batch.tokens.roles.sample_BL[batch.tokens.roles.caption_BL]
            _, lengths = torch.stack([sample, codes]).unique_consecutive(dim=1, return_counts=True)
            assert lengths.unique().tolist() == [1 + 40 + 1]
            assert (batch.tokens.ids_BL == made.config.eot_token_id).sum() > 10
            assert batch.label_BL.sum() == lengths.sum()


@pytest.mark.parametrize("packed", [True, False])
def test_batches_keep_to_the_budget(corpus: Path, packed: bool):
    for budget in (300, 600, 2000):
        batches = list(loader(corpus, packed=packed, max_tokens=budget))
        assert all(batch.tokens.ids_BL.numel() <= budget for batch in batches)
    assert max(len(batch.keys) for batch in batches) > 3
    assert {len(batch.keys) for batch in loader(corpus, packed=packed, max_examples=1)} == {1}


# Too long, damaged, stale.


def test_what_is_too_long_is_an_error_or_counted(corpus: Path):
    with pytest.raises(BadSample, match=r"sample_too_long: coconut/image_.*max_tokens"):
        list(loader(corpus, max_tokens=100))
    ours = loader(corpus, max_tokens=150, on_too_long="skip")
    batches = list(ours)
    assert len(batches) == len(loader(corpus, max_tokens=150))
    assert ours.skipped["sample_too_long"] > 0 and sum(regions_of(batches).values()) > 0
    with pytest.raises(BadSample, match=r"caption_too_long: .*coconut-00000\d.tar: image_\d+: region \d+"):
        list(loader(corpus, max_caption_tokens=18))
    ours = loader(corpus, max_caption_tokens=18, on_too_long="skip")
    found = regions_of(ours)
    assert ours.skipped["caption_too_long"] == sum(map(sum, UNITS)) - len(found) > 0


def damage(out: Path, kind: str) -> str:
    """Damage the second image of the first shard; how it is reported."""
    shard = out / "coconut" / "shards" / "coconut-000000.tar"
    rows = reader.read_ledger(out / "coconut" / "ledger" / "coconut-000000.parquet").to_pylist()
    row = next(row for row in rows if row["key"] == "image_1" and row["kept"])
    data = bytearray(shard.read_bytes())
    photo, photo_bytes, record = row["photo_offset"], row["photo_length"], row["json_offset"]
    if kind == "truncated":
        data = data[: photo + photo_bytes // 2]
    elif kind == "gone":
        shard.unlink()
        return "shard_unreadable"
    elif kind == "photo":
        data[photo : photo + photo_bytes] = b"\0" * photo_bytes
    elif kind == "mask":
        place = data.index(b'"counts":"', record) + len(b'"counts":"')
        data[place : place + 2] = b"~~"
    elif kind == "json":
        data[record] = ord("x")
    elif kind == "other":
        data[record : record + row["json_length"]] = data[record : record + row["json_length"]].replace(
            b'"image_1"', b'"image_9"'
        )
    shard.write_bytes(data)
    reasons = {"photo": "photo_unreadable", "mask": "mask_undecodable"}
    return reasons.get(kind, "shard_unreadable")


@pytest.mark.parametrize("kind", ["truncated", "gone", "photo", "mask", "json", "other"])
@pytest.mark.soak(keep=2)
def test_a_damaged_shard_is_an_error_with_shard_and_key_or_counted(corpus: Path, tmp_path: Path, kind: str):
    out = copy(corpus, tmp_path)
    reason = damage(out, kind)
    with pytest.raises(IntegrityError, match=rf"{reason}: .*coconut-000000.tar: image_\d"):
        list(loader(out))
    whole = list(loader(corpus))
    ours = loader(out, on_bad_sample="skip")
    batches = list(ours)
    assert len(batches) == len(whole)
    lost = regions_of(whole) - regions_of(batches)
    assert not regions_of(batches) - regions_of(whole)
    assert lost and set(ours.skipped) == {reason}
    if kind not in ("truncated", "gone"):
        assert {name.partition("#")[0] for name in lost} == {"coconut/image_1"}
    details = [each.detail for batch in batches for each in batch.skipped]
    assert any("coconut-000000.tar: image_1" in detail for detail in details)


def test_errors_and_counts_of_workers_are_the_trainers(corpus: Path, tmp_path: Path):
    out = copy(corpus, tmp_path)
    reason = damage(out, "photo")
    workers = {"workers": 2, "start_method": "fork"}
    before = set(multiprocessing.active_children())
    with pytest.raises(BadSample, match=r"^photo_unreadable: .*coconut-000000.tar: image_1"):
        list(loader(out, **workers))
    assert set(multiprocessing.active_children()) == before
    ours = loader(out, **workers, on_bad_sample="skip")
    list(ours)
    ours.close()
    assert set(multiprocessing.active_children()) == before
    assert ours.skipped == {reason: math.ceil(9 / 3.5)}


@pytest.fixture
def merged(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the corpus with its index, but without plots and a card."""
    out = copy(corpus, tmp_path)
    monkeypatch.setattr("paracaption.pipeline.corpus.plots.draw_plots", lambda *_: {})
    monkeypatch.setattr("paracaption.pipeline.corpus.card.render_card", lambda *_: "")
    merge(out, BuildConfig.model_construct(subsets={}))
    return out


def test_index_and_ledgers_lead_to_the_same_batches(merged: Path, caplog: pytest.LogCaptureFixture):
    by_index = loader(merged)
    assert "no index" not in caplog.text
    shutil.rmtree(merged.parent / "cache")
    (merged / "index.parquet").unlink()
    by_ledgers = loader(merged)
    assert "paracaption merge" in caplog.text
    assert by_ledgers.fingerprint == by_index.fingerprint
    assert_equal(list(by_ledgers), list(by_index))


@pytest.mark.soak
def test_a_stale_index_is_passed_by_and_a_shard_without_manifest_too(merged: Path):
    before = regions_of(loader(merged))
    write_unit(merged, 777, [3, 2])
    found = regions_of(loader(merged))
    new = {f"coconut/image_{777000 + i}#{region}" for i, n in enumerate([3, 2]) for region in range(1, n + 1)}
    assert found - before == dict.fromkeys(new, 1)
    (merged / "coconut" / "manifests" / "coconut-000000.json").unlink()
    with pytest.raises(
        IntegrityError,
        match=r"coconut-000000\.json: gone, though its unit is committed; run `paracaption build",
    ):
        loader(merged)
    shutil.rmtree(merged / "log")  # as in a corpus of an early release, manifests count
    without = regions_of(loader(merged))
    assert {name.split("#")[0] for name in found - without} == {f"coconut/image_{i}" for i in (0, 1, 2, 4)}


def test_a_damaged_index_or_ledger_says_what_mends_it(merged: Path):
    size = (merged / "index.parquet").stat().st_size
    (merged / "index.parquet").write_bytes(b"\0" * size)
    with pytest.raises(IntegrityError, match="paracaption merge"):
        loader(merged)
    (merged / "index.parquet").unlink()
    ledger = next((merged / "coconut" / "ledger").glob("*.parquet"))
    ledger.write_bytes(ledger.read_bytes()[:100])
    with pytest.raises(IntegrityError, match=rf"{ledger.name}.*run `paracaption build CONFIG` again"):
        loader(merged)
    next((merged / "coconut" / "manifests").glob("*.json")).write_text("{")
    with pytest.raises(IntegrityError, match="not a manifest"):
        loader(merged)


def test_a_ledger_that_names_another_shard_than_its_manifest_is_an_error(merged: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (merged / "index.parquet").unlink()
    ledger = sorted((merged / "coconut" / "ledger").glob("*.parquet"))[0]
    table = pq.read_table(ledger)
    column = table.schema.get_field_index("shard")
    other = pa.array(["shards/other.tar"] * table.num_rows, table.schema.field(column).type)
    pq.write_table(table.set_column(column, table.schema.field(column), other), ledger)
    with pytest.raises(IntegrityError, match=r"its ledger names shards/other\.tar"):
        loader(merged)


def test_a_manifest_with_kept_regions_and_no_shard_is_an_error(merged: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (merged / "index.parquet").unlink()
    ledger = sorted((merged / "coconut" / "ledger").glob("*.parquet"))[0]
    table = pq.read_table(ledger)
    field = table.schema.field("shard")
    nothing = pa.nulls(table.num_rows, field.type)
    pq.write_table(table.set_column(table.schema.get_field_index("shard"), field, nothing), ledger)
    manifest = merged / "coconut" / "manifests" / f"{ledger.stem}.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shard": None}))
    with pytest.raises(IntegrityError, match="its ledger names no shard, the manifest none"):
        loader(merged)


def test_no_corpus_no_regions_and_impossible_options_are_said_so(corpus: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no corpus here"):
        loader(tmp_path)
    with pytest.raises(ConfigError, match="nothing of sa1b"):
        loader(corpus, sources=[CorpusSource(corpus=str(corpus), subsets=("sa1b",))])
    write(tmp_path / "out", [[0, 0]])
    with pytest.raises(ConfigError, match="no region was kept"):
        loader(tmp_path / "out")
    for options in ({"regions_per_group": 9}, {"rank": 2, "world": 2}, {"sources": []}):
        with pytest.raises(ConfigError):
            loader(corpus, **options)


def test_a_corpus_in_a_store_is_read_as_one_on_a_disk(corpus: Path, tmp_path: Path):
    import fsspec

    fsspec.filesystem("memory").put(str(corpus), "/training/out", recursive=True)
    ours = loader(tmp_path / "out", sources=[CorpusSource(corpus="memory://training/out")])
    assert_equal(list(ours), list(loader(corpus)))


def test_captions_cannot_forge_special_tokens(tmp_path: Path):
    made = processor()
    (ids,) = token_lists(made, ["a <|eot_id|> <img>"])
    assert not {made.config.eot_token_id, *made.tokenize("<img>")} & set(ids)
    assert made.tokenizer.decode(ids) == "a <|eot_id|> <img>"
    assert len(made.tokenize("<|eot_id|>")) == 1


def test_a_filler_is_one_grey_image_without_weight(corpus: Path):
    last = list(loader(corpus, 7, 8, max_tokens=4000))[-1]
    assert last.weight_E.tolist() == [0.0] and not last.label_BL.any()
    assert last.images.views_N3SS.shape[0] == 1
