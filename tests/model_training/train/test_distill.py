"""Decoding paths are recorded as they are decoded, and states of them are distilled."""

import copy
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.data.decoding_paths import ABOUT, DecodingPaths
from paracaption.model_training.data.loader import Loader
from paracaption.model_training.decoding.buckets import one_token_a_step
from paracaption.model_training.decoding.sampler import decode_batch
from paracaption.model_training.train import build, metrics, record_paths, trainer
from paracaption.model_training.train.distill import PathState, draw_path_state, path_loss, window_of
from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.distillation import Distillation
from paracaption.schemas.errors import BadSample, ConfigError, IntegrityError
from paracaption.schemas.training import NoiseOptions, TrainConfig
from tests.model_training.toy_corpus import TINY, config_of, write_merged

SLOTS = 12


def distilling(folder, corpus, **changes) -> TrainConfig:
    data = {"max_tokens": 512, "workers": 0, "cache": str(corpus.parent / "cache"), "caption_length": "fixed"}
    data |= {"max_new_tokens": SLOTS, "labels": "captions", "packed": False}
    distillation = {"paths": str(folder / "paths"), "window_start": 2, "window_end": SLOTS}
    return config_of(folder / "run", corpus, **{"data": data, "distillation": distillation} | changes)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> SimpleNamespace:
    """A corpus of a dozen scenes, and the paths of an untrained model."""
    folder = tmp_path_factory.mktemp("paths")
    corpus = write_merged(folder / "toy", 12)
    config = distilling(folder, corpus)
    done = record_paths.record_paths(config)
    model, processor = build.open_model(config)
    loader = Loader(config.corpora, processor, config.data, config.seed, paths=config.distillation.paths)
    return SimpleNamespace(
        config=config, folder=folder, done=done, model=model, processor=processor, batches=list(loader)
    )


@pytest.mark.soak
def test_each_region_has_a_path_and_nothing_is_decoded_twice(recorded):
    regions = sum(len(key.partition("#")[2].split(",")) for batch in recorded.batches for key in batch.keys)
    assert recorded.done.regions == regions == len(paths_of(recorded))
    assert record_paths.record_paths(recorded.config).regions == 0


def paths_of(recorded, slots=SLOTS):
    return DecodingPaths(recorded.folder / "paths", recorded.processor, slots)


def test_a_worker_process_gets_the_files_and_not_their_content(recorded):
    paths = paths_of(recorded)
    sent = pickle.dumps(paths)
    assert len(sent) < 1000
    again = copy.deepcopy(paths)  # by the same way as `pickle` takes
    assert len(again) == len(paths)
    assert (again.keys == paths.keys).all()


def test_parts_together_have_what_one_process_has(recorded, tmp_path):
    changed = recorded.config.distillation.model_copy(update={"paths": str(tmp_path / "paths")})
    config = recorded.config.model_copy(update={"distillation": changed})
    numbers = [record_paths.record_paths(config, part, 2).regions for part in range(2)]
    assert all(numbers)
    assert sum(numbers) == recorded.done.regions
    ours, theirs = DecodingPaths(tmp_path / "paths", recorded.processor, SLOTS), paths_of(recorded)
    for batch in recorded.batches:
        for image in batch.keys:
            subset, key, region = (
                *image.partition("#")[0].split("/"),
                int(image.partition("#")[2].split(",")[0]),
            )
            for one, other in zip(
                ours.find(subset, key, region), theirs.find(subset, key, region), strict=True
            ):
                assert one.tolist() == other.tolist()


def test_batches_have_the_teachers_tokens_and_one_step_for_each(recorded):
    batch = recorded.batches[0]
    tokens, step_BL = batch.tokens, batch.path_step_BL
    assert batch.label_BL[step_BL >= 0].all()
    example, region = int(tokens.roles.sample_BL.max()), 1
    slots = (step_BL[example] >= 0) & (tokens.roles.region_BL[example] == region)
    assert slots.sum() == SLOTS
    masked = record_paths.masked_batch(batch, SLOTS, recorded.model.config.mask_token_id)
    options = DecodeOptions(strategy="per-region", max_new_tokens=SLOTS, steps=SLOTS)
    decoded = decode_batch(recorded.model.eval(), masked, options)
    assert tokens.ids_BL[example][slots].tolist() == decoded.tokens_BNS[example, region - 1].tolist()
    steps = step_BL[example][slots].tolist()
    assert set(steps) == set(range(max(steps) + 1)), "a token a step, but for what follows the end"


def test_a_sure_model_is_recorded_one_token_a_step_in_every_layout(recorded, tmp_path):
    """Where `auto` would end a caption as soon as all of it is sure."""
    opened = TINY | {"layout": "reference"}
    changes = {"model": {"tokenizer": "toy", "config": opened}}
    config = distilling(tmp_path, recorded.folder / "toy/corpus", **changes)
    model, _ = build.open_model(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    sure = model.eval()
    options = one_token_a_step(sure, "per-region", SLOTS)
    assert (options.cache, options.settled, options.redo_below) == ("none", None, None)
    [batch] = recorded.batches[:1]
    steps = [path.step_S.tolist() for _, path in record_paths.decode_paths(sure, batch, options)]
    auto = options.model_copy(update={"cache": "auto"})
    assert all(set(each.step_S) == {0} for _, each in record_paths.decode_paths(sure, batch, auto))
    assert all(set(each) == set(range(max(each) + 1)) and max(each) > 1 for each in steps)
    assert one_token_a_step(recorded.model, "per-region", SLOTS).cache == "exact"


def test_the_cache_is_among_the_facts_of_a_folder(recorded, tmp_path):
    about = json.loads((recorded.folder / "paths" / ABOUT).read_text())
    assert about["cache"] == "exact"
    early = {name: value for name, value in about.items() if name != "cache"}
    (tmp_path / ABOUT).write_text(json.dumps(early))
    record_paths._check_about(tmp_path, about)
    with pytest.raises(ConfigError, match="has the paths of another cache; name another folder"):
        record_paths._check_about(tmp_path, about | {"cache": "none"})


def test_a_region_without_a_path_is_named(recorded):
    with pytest.raises(BadSample, match=r"no decoding path of coconut/nowhere#3; .*paracaption models paths"):
        paths_of(recorded).find("coconut", "nowhere", 3)


def test_paths_of_another_length_or_without_files_are_refused(recorded, tmp_path):
    with pytest.raises(ConfigError, match="recorded with another max_new_tokens"):
        paths_of(recorded, SLOTS + 1)
    with pytest.raises(ConfigError, match="there are no decoding paths; record them"):
        DecodingPaths(tmp_path, recorded.processor, SLOTS)
    (tmp_path / ABOUT).write_text(json.dumps({}))
    (tmp_path / "paths-0of1-00000.npy").write_bytes(b"\x93NUMPY damaged")
    (tmp_path / ABOUT).write_bytes((recorded.folder / "paths" / ABOUT).read_bytes())
    with pytest.raises(IntegrityError, match=r"paths-0of1-00000.npy: unreadable"):
        DecodingPaths(tmp_path, recorded.processor, SLOTS)


def test_paths_of_another_model_are_not_mixed_with_these(recorded):
    about = recorded.folder / "paths" / ABOUT
    before = about.read_text()
    about.write_text(before.replace('"None"', '"another"'))
    try:
        with pytest.raises(ConfigError, match="has the paths of another model"):
            record_paths.record_paths(recorded.config)
    finally:
        about.write_text(before)


def test_paths_from_left_to_right_are_another_order_and_not_mixed(recorded, tmp_path):
    folder = {"paths": str(tmp_path / "paths"), "order": "left-to-right"}
    changed = recorded.config.distillation.model_copy(update=folder)
    config = recorded.config.model_copy(update={"distillation": changed})
    assert record_paths.record_paths(config).regions == recorded.done.regions
    ours = DecodingPaths(tmp_path / "paths", recorded.processor, SLOTS)
    subset, _, rest = recorded.batches[0].keys[0].partition("/")
    key, _, numbers = rest.partition("#")
    path = ours.find(subset, key, int(numbers.split(",")[0]))
    assert path.step_S.tolist() == sorted(path.step_S.tolist())
    back = config.model_copy(update={"distillation": changed.model_copy(update={"order": "confidence"})})
    with pytest.raises(ConfigError, match="has the paths of another order"):
        record_paths.record_paths(back)


@pytest.mark.parametrize("level", ["example", "region"])
@pytest.mark.parametrize("window", [1, 4, SLOTS])
def test_a_state_is_one_of_the_teachers_decoding(recorded, level, window):
    noise, batch = NoiseOptions(level=level, stratified=True), recorded.batches[0]
    seen = set()
    for seed in range(20):
        state = draw_path_state(batch, noise, window, torch.Generator().manual_seed(seed))
        assert not (state.masked_BL & ~batch.label_BL).any()
        assert not (state.learned_BL & ~state.masked_BL).any()
        for group_BL in groups_of(batch, level):
            slots = (batch.path_step_BL >= 0) & group_BL
            step_K, masked_K = batch.path_step_BL[slots], state.masked_BL[slots]
            if masked_K.all() or not masked_K.any():
                first = 0 if masked_K.all() else int(step_K.max()) + 1
            else:
                first = int(step_K[masked_K].min())
                assert int(step_K[~masked_K].max()) < first, "what was decoded earlier is there"
            assert torch.equal(state.learned_BL[slots], masked_K & (step_K < first + window))
            seen.add(first)
    assert len(seen) > SLOTS // 2


@pytest.mark.parametrize("level", ["example", "region"])
def test_a_short_caption_is_learned_as_often_beside_a_long_one_as_alone(recorded, level):
    """A state is one of the example's own decoding, or of the region's: something is always to be learned."""
    batch, short = recorded.batches[0], 4
    step_BL = batch.path_step_BL.clone()
    own_BL = (batch.tokens.roles.sample_BL == 0) & (batch.tokens.roles.region_BL == 1)
    if level == "example":
        own_BL = batch.tokens.roles.sample_BL == 0
    step_BL[own_BL & (step_BL >= 0)] %= short
    batch = batch._replace(path_step_BL=step_BL)
    assert int(step_BL.max()) >= 2 * short - 1
    found = set()
    for seed in range(40):
        state = draw_path_state(batch, NoiseOptions(level=level), SLOTS, torch.Generator().manual_seed(seed))
        for group_BL in groups_of(batch, level):
            assert state.learned_BL[group_BL].any()
        masked_BL = state.masked_BL & own_BL
        first = int(step_BL[masked_BL].min())
        assert torch.equal(
            state.share_BL[masked_BL], torch.tensor(1 - first / short).expand(int(masked_BL.sum()))
        )
        found.add(first)
    assert found == set(range(short))


def groups_of(batch, level):
    sample_BL, region_BL = batch.tokens.roles.sample_BL, batch.tokens.roles.region_BL
    for example in range(len(batch.weight_E)):
        for region in range(1, int(region_BL.max()) + 1) if level == "region" else [None]:
            group_BL = (sample_BL == example) & (True if region is None else region_BL == region)
            if (group_BL & batch.label_BL).any():
                yield group_BL


def test_the_loss_is_cross_entropy_and_the_entropy_of_what_is_right(recorded):
    model, batch = recorded.model, recorded.batches[0]
    state = draw_path_state(batch, NoiseOptions(level="region"), 4, torch.Generator().manual_seed(1))
    options = Distillation(paths="paths", certainty_weight=0.7, certainty_temperature=0.5)
    found = path_loss(model, batch, state, options)
    ids_BL = batch.tokens.ids_BL.masked_fill(state.masked_BL, model.config.mask_token_id)
    with torch.no_grad():
        logits_BLV = model(batch.tokens._replace(ids_BL=ids_BL), batch.images)
    expected, right = 0.0, 0
    for example in range(len(batch.weight_E)):
        here = state.learned_BL & (batch.tokens.roles.sample_BL == example)
        losses = []
        for logits_V, target in zip(logits_BLV[here], batch.tokens.ids_BL[here], strict=True):
            loss = functional.cross_entropy(logits_V, target)
            if logits_V.argmax() == target:
                right += 1
                loss = loss + 0.7 * torch.distributions.Categorical(logits=logits_V / 0.5).entropy()
            losses.append(loss)
        expected += float(torch.stack(losses).mean())
    assert right, "some predictions of a teacher are its own"
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(found.weight) == len(batch.weight_E)


def test_nothing_learned_is_a_loss_of_zero(recorded):
    batch = recorded.batches[0]
    nothing = torch.zeros_like(batch.label_BL)
    state = PathState(nothing, nothing, torch.ones(nothing.shape))
    found = path_loss(recorded.model, batch, state, Distillation(paths="paths"))
    assert float(found.total.detach()) == 0


@pytest.mark.parametrize(("done", "window"), [(0.0, 8), (0.25, 20), (0.5, 32), (1.0, 32)])
def test_the_window_grows_over_the_curriculum(done, window):
    assert window_of(Distillation(paths="paths", curriculum_ratio=0.5), done) == window
    assert window_of(Distillation(paths="paths", curriculum_ratio=0), done) == 32


@pytest.mark.soak
def test_a_student_keeps_more_tokens_a_step_than_its_teacher(recorded):
    batch, student = recorded.batches[0], copy.deepcopy(recorded.model)
    masked = record_paths.masked_batch(batch, SLOTS, student.config.mask_token_id)
    options = DecodeOptions(strategy="threshold", threshold=0.7, max_new_tokens=SLOTS, steps=SLOTS)
    before = decode_batch(student.eval(), masked, options)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    draws = torch.Generator().manual_seed(0)
    for _ in range(60):
        state = draw_path_state(batch, NoiseOptions(level="region"), SLOTS, draws)
        path_loss(student, batch, state, recorded.config.distillation).mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = decode_batch(student.eval(), masked, options)
    assert after.forwards_B.sum() < before.forwards_B.sum() / 2, "an untrained model is sure of nothing"
    same = (after.tokens_BNS == before.tokens_BNS)[after.exists_BN].double().mean()
    assert same > 0.9, "and it writes what its teacher wrote"


@pytest.mark.soak
def test_a_run_learns_paths_and_goes_on_after_a_stop(recorded, tmp_path):
    run = recorded.config.model_copy(update={"out": str(tmp_path / "run"), "steps": 3})
    assert trainer.fit(run).steps == 3
    outcome = trainer.fit(run.model_copy(update={"steps": 5}))
    losses = [record["loss"] for record in metrics.read_metrics(tmp_path / "run")]
    assert outcome.steps == len(losses) == 5
    assert all(loss > 0 for loss in losses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"caption_length": "natural", "labels": "captions"}}, "set data.caption_length to fixed"),
        ({"data": {"caption_length": "fixed", "labels": "answer"}}, "data.labels to captions"),
        ({"conversations": [{"path": "x.json"}]}, "conversations have no decoding paths"),
        (
            {"distillation": {"paths": "p", "window_start": 9, "window_end": 8}},
            "window_end has to be at least",
        ),
    ],
)
def test_what_cannot_be_distilled_is_said_before_the_run(recorded, changes, message):
    with pytest.raises(ValueError, match=message):
        distilling(recorded.folder, recorded.folder / "toy/corpus", **changes)


def test_a_run_without_distillation_has_no_paths_to_record(recorded):
    plain = recorded.config.model_copy(update={"distillation": None})
    with pytest.raises(ConfigError, match="distillation: the run has none"):
        record_paths.record_paths(plain)


def test_steps_are_the_numbers_of_forwards_before_a_slot_was_closed():
    opens = [[[[True, True, True]]], [[[True, False, True]]], [[[False, False, True]]], [[[False] * 3]]]
    states = [SimpleNamespace(open_BNS=torch.tensor(each)) for each in opens]
    assert record_paths._closed_in(states).tolist() == [[[1, 0, 2]]]
    assert np.issubdtype(record_paths._closed_in(states).dtype, np.integer)


def test_the_command_records_what_is_not_there_yet(recorded):
    path = recorded.folder / "train.yaml"
    path.write_text(yaml.safe_dump(recorded.config.model_dump(mode="json")))
    done = CliRunner().invoke(app, ["models", "paths", str(path), "--part", "1/1"])
    assert done.output == f"0 regions decoded: {recorded.folder / 'paths'}\n"
    refused = CliRunner().invoke(app, ["models", "paths", str(path), "--part", "3/2"])
    assert isinstance(refused.exception, ConfigError)
    assert "give I/N, from 1/N to N/N" in str(refused.exception)


def test_the_lines_of_the_recipe_that_are_commented_out_are_a_configuration(tmp_path):
    text = (Path(__file__).parents[3] / "configs/train/regions.yaml").read_text()
    recipe, option = text.split("#distillation:")
    assert yaml.safe_load(text).get("distillation") is None
    config = yaml.safe_load(recipe + re.sub("(?m)^#", "", f"#distillation:{option}"))
    config["data"] |= {"caption_length": "fixed", "labels": "captions"}
    assert TrainConfig.model_validate(config).distillation == Distillation(paths="../../runs/paths")
