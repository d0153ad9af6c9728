"""The training loop: what a step is, what moves, what is skipped, what is written."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.data import left_out
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.train import build, loss, metrics, trainer
from paracaption.model_training.train.distributed import DistributedGroup
from paracaption.model_training.train.loss import Noise
from paracaption.model_training.train.trainer import fit, lr_factor, reason_to_skip
from paracaption.pipeline.config_file import describe, load_training
from paracaption.schemas.errors import ConfigError, Diverged
from paracaption.schemas.training import NoiseOptions, Spike, TrainConfig
from tests.model_training.toy_corpus import config_of

CONFIGS = Path(__file__).resolve().parents[3] / "configs/train"
FROZEN = {"vision": 0.0, "projector": 1e-3, "language": 0.0, "prompts": 0.0}


def first_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return build.open_model(config)[0].state_dict()


def last_weights(config: TrainConfig, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / folder / "model.safetensors")


def moved(config: TrainConfig) -> set[str]:
    before, after = first_weights(config), last_weights(config)
    return {build.part_of(name) for name in before if not torch.equal(before[name], after[name])}


# A step.


@pytest.mark.soak
def test_the_loss_falls(corpus, tmp_path):
    config = config_of(tmp_path, corpus, steps=60, noise={"loss_weighting": "none", "stratified": True})
    fit(config)
    losses = [record["loss"] for record in metrics.read_metrics(tmp_path)]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


def DATA(corpus: Path) -> dict:
    return {"max_tokens": 256, "workers": 0, "cache": str(corpus.parent / "cache")}


def gradients(run: trainer.Run, batches: list, monkeypatch, draws: dict[str, Noise]) -> torch.Tensor:
    monkeypatch.setattr(trainer.loss, "draw_noise", lambda batch, *_: draws[batch.keys[0], len(batch.keys)])
    weight = float(sum(batch.weight_E.sum() for batch in batches))
    for number, batch in enumerate(batches):
        trainer._backward(run, batch, number, weight)
    found = torch.cat([each.grad.flatten() for each in run.trained.values()])
    run.optimizer.zero_grad()
    return found


def test_two_batches_accumulated_are_one_batch_of_both(corpus, tmp_path, monkeypatch):
    config = config_of(tmp_path, corpus)
    run = trainer.Run(config, DistributedGroup(config, 0, 1))
    plan = run.loader._plan_of(0)
    picks = plan.batch(0), plan.batch(1)
    first, second, both = (run.loader.make(each) for each in (*picks, picks[0] + picks[1]))
    drawn = loss.draw_noise(both, NoiseOptions(), torch.Generator().manual_seed(0))
    cut = first.label_BL.shape[1]
    draws = {
        (both.keys[0], len(both.keys)): drawn,
        (first.keys[0], len(first.keys)): Noise(*(part[:, :cut] for part in drawn)),
        (second.keys[0], len(second.keys)): Noise(*(part[:, cut:] for part in drawn)),
    }
    apart = gradients(run, [first, second], monkeypatch, draws)
    together = gradients(run, [both], monkeypatch, draws)
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-5)
    run.close()


def test_an_epoch_has_every_example_once_and_its_last_step_what_is_left(corpus, tmp_path):
    config = config_of(tmp_path, corpus, steps=None, epochs=1, gradient_accumulation_steps=3)
    outcome = fit(config)
    loader = trainer.Run(config, DistributedGroup(config, 0, 1)).loader
    records = metrics.read_metrics(tmp_path)
    assert outcome.steps == len(records) == math.ceil(loader.num_steps(0) / 3)
    counts = Counter(name for record in records for name in record["samples"])
    assert len(counts) <= loader.mixture.sizes(0)[0] and set(counts.values()) == {1}
    regions = Counter(region for name in counts for region in regions_of(name))
    assert set(regions.values()) == {1} and len(regions) == loader.mixture.sources[0].table.about["regions"]
    assert sum(record["regions"] for record in records) == len(regions)


def regions_of(name: str) -> list[str]:
    key, _, numbers = name.partition("#")
    return [f"{key}#{number}" for number in numbers.split(",")]


# Parts and rates.


def test_photos_of_benchmarks_are_left_out_and_log_outcome_and_folder_say_how_many(
    corpus, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(left_out, "list_digest", lambda: "another list")
    monkeypatch.setattr(left_out, "is_benchmark", lambda name, *_: name < "train-0-000057")
    config = config_of(tmp_path / "run", corpus, steps=None, epochs=1, log={"samples": True})
    outcome = fit(config)
    assert outcome.left_out == {"benchmark_photos": 57}
    assert json.loads((tmp_path / "run/left_out.json").read_text()) == outcome.left_out
    assert f"{corpus}: left out of training: 57 photos of ParaDLC-Bench or DLC-Bench" in caplog.text
    names = [name for record in metrics.read_metrics(tmp_path / "run") for name in record["samples"]]
    assert {name.partition("#")[0] for name in names} == {f"coconut/train-0-{n:06d}" for n in (57, 58, 59)}


def test_frozen_parts_do_not_move(corpus, tmp_path):
    config = config_of(tmp_path, corpus, steps=3, learning_rate=FROZEN)
    fit(config)
    assert moved(config) == {"projector"}
    every = config_of(tmp_path / "all", corpus, steps=3)
    fit(every)
    assert moved(every) == {"vision", "projector", "language", "prompts"}


def test_each_part_has_its_rate_and_vectors_do_not_decay(corpus, tmp_path):
    rates = {"vision": 1e-4, "projector": 2e-4, "language": 3e-4, "prompts": 4e-4}
    config = config_of(tmp_path, corpus, learning_rate=rates, weight_decay=0.1)
    optimizer = build.make_optimizer(build.open_model(config)[0], config)
    assert {(group["part"], group["lr"]) for group in optimizer.param_groups} == set(rates.items())
    for group in optimizer.param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}
    fit(config)
    record = metrics.read_metrics(tmp_path)[0]
    assert {record[f"lr_{part}"] for part in rates} == set(rates.values())  # warm-up is one step here


def test_the_rate_rises_and_falls_along_a_cosine():
    rates = [lr_factor(step, 100, 0.03, 0.1) for step in range(100)]
    assert rates[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert rates[3] == 1.0 and rates == rates[:3] + sorted(rates[3:], reverse=True)
    assert rates[51] == pytest.approx(0.55, abs=0.01) and rates[99] == pytest.approx(0.1, abs=0.001)


def test_the_average_follows_the_weights(corpus, tmp_path):
    config = config_of(tmp_path, corpus, steps=1, ema_decay=0.9)
    fit(config)
    before, after, average = (
        first_weights(config),
        last_weights(config),
        last_weights(config, "model-average"),
    )
    for name in before:  # of the first step it keeps a tenth of what was
        torch.testing.assert_close(average[name], before[name].lerp(after[name], 0.9))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.soak(keep=1)
def test_the_model_is_saved_as_transformers_saves_it_and_its_config_says_the_type(corpus, tmp_path, dtype):
    fit(config_of(tmp_path / "first", corpus, steps=1, export_dtype="bfloat16"))
    start = {"path": str(tmp_path / "first" / "model")}
    fit(config_of(tmp_path / "run", corpus, steps=1, export_dtype=dtype, model=start))
    saved = tmp_path / "run" / "model"
    assert json.loads((saved / "config.json").read_text())["dtype"] == dtype
    again = PerceptionDLM.from_pretrained(saved)
    assert again.dtype == getattr(torch, dtype)
    again.save_pretrained(tmp_path / "again")
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (saved, tmp_path / "again"))
    assert first == second


@pytest.mark.soak
def test_only_additions_are_trained_and_they_are_merged_into_the_file(corpus, tmp_path):
    rates = {"vision": 0, "projector": 0, "language": 1e-2, "prompts": 0}
    config = config_of(
        tmp_path, corpus, steps=4, lora={"rank": 2, "targets": ["q_proj"]}, learning_rate=rates
    )
    fit(config)
    run = trainer.Run(config, DistributedGroup(config, 0, 1))  # as it is after the last step
    assert {name.split(".")[-3] for name in run.trained} == {"lora_A", "lora_B"}
    changed = {
        name
        for name, each in first_weights(config_of(tmp_path, corpus)).items()
        if not torch.equal(each, last_weights(config)[name])
    }
    assert changed and all(name.endswith("q_proj.weight") for name in changed)
    batch = next(iter(run.loader))
    merged = PerceptionDLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(
            merged(batch.tokens, batch.images), run.model(batch.tokens, batch.images), rtol=1e-4, atol=1e-5
        )
    run.close()


# Steps that are not taken.


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of some batches is NaN, counted from 0."""
    bad, real, count = set(), loss.diffusion_loss, iter(range(10_000))

    def sometimes_nan(*given, **options):
        found = real(*given, **options)
        return found._replace(total=found.total * math.nan) if next(count) in bad else found

    monkeypatch.setattr(trainer.loss, "diffusion_loss", sometimes_nan)
    return bad


def test_a_step_whose_loss_is_nan_is_skipped_counted_and_shown(corpus, tmp_path, poisoned):
    poisoned.add(3)
    shown = []
    outcome = fit(config_of(tmp_path, corpus, log={"peak_tflops": 0.05}), report=shown.append)
    assert (outcome.steps, outcome.skipped) == (8, 1)
    assert shown[3]["why"] == "loss nan" and shown[3]["samples"] and shown[3]["skipped"] == 1
    assert [record["skipped"] for record in shown] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert all(math.isfinite(record["loss"]) for record in shown if "why" not in record)
    assert metrics.read_metrics(tmp_path)[3]["loss"] == "nan"
    assert all(
        torch.isfinite(each).all() for each in load_file(tmp_path / "model/model.safetensors").values()
    )


def test_a_skipped_step_leaves_the_weights(corpus, tmp_path, poisoned):
    poisoned.add(0)
    config = config_of(tmp_path, corpus, steps=1)
    fit(config)
    assert moved(config) == set()


def test_skipped_steps_in_a_row_stop_the_run_and_name_their_examples(corpus, tmp_path, poisoned):
    poisoned |= {2, 3, 4}
    with pytest.raises(Diverged, match=r"3 steps in a row were skipped:") as raised:
        fit(config_of(tmp_path, corpus))
    for record in metrics.read_metrics(tmp_path)[2:5]:
        assert f"step {record['step']}, loss nan: {', '.join(record['samples'])}" in str(raised.value)


def test_a_spike_is_a_norm_far_above_the_median_of_many():
    spike = Spike(factor=10, window=4)
    usual = [1.0, 2.0, 3.0, 4.0]
    assert reason_to_skip(1.0, 24.0, usual, spike) is None
    assert reason_to_skip(1.0, 26.0, usual, spike) == "gradient 26, 10 times the median"
    assert reason_to_skip(1.0, 1e6, usual[:3], spike) is None
    assert reason_to_skip(1.0, 1e6, usual, Spike(factor=None)) is None
    assert reason_to_skip(math.inf, 1.0, [], spike) == "loss inf"
    assert reason_to_skip(1.0, math.nan, [], spike) == "gradient nan"


# What is written.


def test_records_have_what_a_run_is_judged_by(corpus, tmp_path):
    fit(config_of(tmp_path, corpus))
    records = metrics.read_metrics(tmp_path)
    for name in ("tokens_per_s", "regions_per_s", "mfu", "memory_gb", "seconds"):
        assert all(record[name] > 0 for record in records), name
    assert all(0 <= record["data_wait"] <= 1 for record in records)
    levels = {name for record in records for name in record if name.startswith("ce_")}
    assert levels == {f"ce_{level}" for level in (0.2, 0.4, 0.6, 0.8, "1.0")}
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert load_training(tmp_path / "config.yaml").steps == 8


def test_the_number_of_operations_is_six_a_weight_and_token_and_less_for_frozen_parts(corpus, tmp_path):
    model, _ = build.open_model(config_of(tmp_path, corpus))
    language = sum(each.numel() for each in model.language_model.layers.parameters() if each.ndim > 1)
    assert build.step_flops(model, 100, 0, 0, 0) == 6 * language * 100
    assert build.step_flops(model, 0, 0, 0, 10) == 6 * model.lm_head.weight.numel() * 10
    frozen, _ = build.open_model(config_of(tmp_path, corpus, learning_rate=FROZEN))
    assert build.step_flops(frozen, 100, 0, 0, 0) == 4 * language * 100
    assert build.step_flops(frozen, 0, 0, 5, 0) < build.step_flops(model, 0, 0, 5, 0) / 1.5


def test_the_model_is_a_folder_that_captions(corpus, tmp_path):
    outcome = fit(config_of(tmp_path, corpus, steps=2))
    captioner = RegionCaptioner.load(outcome.model, "cpu")
    mask = np.zeros((48, 64), bool)
    mask[10:30, 10:30] = True
    captions = captioner.caption(np.zeros((48, 64, 3), np.uint8), [mask, ~mask], max_new_tokens=4, steps=2)
    assert len(captions) == 2
    again = config_of(tmp_path / "again", corpus, steps=1, model={"path": str(outcome.model)})
    for name, each in first_weights(again).items():
        assert torch.equal(each, load_file(outcome.model / "model.safetensors")[name])
    fit(again)


def test_a_saved_model_can_be_given_other_tiles(corpus, tmp_path):
    outcome = fit(config_of(tmp_path, corpus, steps=1))
    chosen = {"path": str(outcome.model), "config": {"max_tiles": 4}}
    model, processor = build.open_model(config_of(tmp_path, corpus, model=chosen))
    assert (model.config.max_tiles, processor.config.max_tiles) == (4, 4)


@pytest.mark.soak
def test_low_precision_and_recomputing_train_too(corpus, tmp_path):
    fit(config_of(tmp_path / "plain", corpus, steps=3))
    fit(config_of(tmp_path / "both", corpus, steps=3, precision="bfloat16", activation_checkpointing=True))
    plain, both = metrics.read_metrics(tmp_path / "plain"), metrics.read_metrics(tmp_path / "both")
    for one, other in zip(plain, both, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.03)
    assert load_file(tmp_path / "both/model/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.soak
def test_compiled_layers_that_are_recomputed_learn_the_same(corpus, tmp_path):
    fit(config_of(tmp_path / "plain", corpus, steps=3))
    fit(config_of(tmp_path / "compiled", corpus, steps=3, compile="always", activation_checkpointing=True))
    plain, compiled = metrics.read_metrics(tmp_path / "plain"), metrics.read_metrics(tmp_path / "compiled")
    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


# The configuration.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"learning_rates": {}},
            r"learning_rates: unknown key; did you mean `learning_rate`\? see `paracaption config",
        ),
        ({"data": {"max_token": 5}}, "data.max_token: unknown key"),
        ({"epochs": 1}, "give either `steps` or `epochs`"),
        ({"corpora": []}, "under `corpora` or `conversations`"),
        ({"model": {}}, "model: .*give `path`, or for a new model `tokenizer`"),
        ({"learning_rate": dict.fromkeys(FROZEN, 0)}, "learning_rate: .*every part is frozen"),
        ({"max_grad_norm": 0}, "max_grad_norm: .*greater than 0"),
        ({"lora": {}, "learning_rate": FROZEN}, "learning_rate.language has to be above 0"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_its_key(corpus, tmp_path, changes, said):
    values = config_of(tmp_path, corpus).model_dump(mode="json") | changes
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=said):
        load_training(tmp_path / "train.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"path": "/nowhere"}}, r"model\.path: /nowhere: not a saved model"),
        ({"model": {"tokenizer": "toy", "config": {"tiles": 1}}}, r"model\.config\.tiles: .*no such field"),
        (
            {"model": {"tokenizer": "toy", "config": {"max_tiles": "x"}}},
            r"config\.max_tiles: 'x'; it takes int",
        ),
        (
            {"model": {"tokenizer": "toy", "config": {"text_config": {"hidden": 8}}}},
            r"config\.text_config\.hidden: .*no such field",
        ),
        ({"lora": {"targets": ["qproj"]}}, r"lora\.targets: unknown layer 'qproj'; choose from .*q_proj"),
        ({"corpora": [{"corpus": "/nowhere"}]}, "/nowhere: no corpus here"),
        ({"attention": "flex_attention"}, "attention: flex_attention has no gradients on CPUs"),
        ({"log": {"wandb": "project", "peak_tflops": 1}}, r"log\.wandb: wandb is not installed"),
    ],
)
def test_what_cannot_be_is_named_by_its_key_before_a_step(corpus, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        fit(config_of(tmp_path, corpus, **changes))
    assert not metrics.read_metrics(tmp_path)


def test_a_gpu_that_is_not_there_is_an_error(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: cuda, but torch sees no GPU"):
        DistributedGroup(config_of(tmp_path, corpus, device="cuda"), 0, 1)


def test_every_key_is_described():
    text = describe(TrainConfig)
    described = yaml.safe_load(text)
    assert list(described) == list(TrainConfig.model_fields)
    assert described["data"]["max_tokens"] == 4096 and described["lora"] is None
    assert "\n#  rank: 16  # " in text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.soak(keep=4)
def test_each_recipe_takes_a_step_with_a_tiny_model_and_data(path, corpus, conversations, tmp_path):
    recipe = load_training(path).model_dump(mode="json")
    tiny = config_of(tmp_path, corpus, epochs=None, steps=1).model_dump(mode="json")
    taken = {name: tiny[name] for name in ("out", "model", "steps", "epochs", "device", "ray", "log")}
    sources = {
        "corpora": tiny["corpora"] if recipe["corpora"] else [],
        "conversations": [conversations] if recipe["conversations"] else [],
    }
    local = {"workers": 0, "cache": DATA(corpus)["cache"]}
    fit(TrainConfig.model_validate(recipe | taken | sources | {"data": recipe["data"] | local}))
    assert metrics.read_metrics(tmp_path)[0]["norm"] > 0


@pytest.fixture(scope="module")
def conversations(corpus) -> dict:
    photos = sorted((corpus.parent / "photos").iterdir())[:8]
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a small red ring"}]
    records = [{"id": path.stem, "image": path.name, "conversations": turns} for path in photos]
    (corpus.parent / "conversations.json").write_text(json.dumps(records))
    return {"path": str(corpus.parent / "conversations.json"), "images": str(photos[0].parent)}


def test_the_stages_have_the_originals_numbers():
    stages = [load_training(CONFIGS / f"base-{number}.yaml") for number in (1, 2, 3, 4)]
    assert stages[0].learning_rate.model_dump() == FROZEN
    assert stages[0].model.config["max_tiles"] == 1
    for stage in [*stages[1:], load_training(CONFIGS / "regions.yaml")]:
        assert set(stage.learning_rate.model_dump().values()) == {4e-5}
        assert stage.model.config["max_tiles"] == 6
    regions = load_training(CONFIGS / "regions.yaml")
    assert (regions.warmup_ratio, regions.gradient_accumulation_steps, regions.data.max_tokens) == (
        0.03,
        4,
        4096,
    )


@pytest.mark.ray
def test_the_command_trains_and_says_where_the_model_is(corpus, tmp_path, prefect_server):
    values = config_of(tmp_path / "run", corpus).model_dump(mode="json")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values | {"log": {"every": 4, "peak_tflops": 1}}))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "train.yaml")])
    assert done.exit_code == 0, done.output
    assert f"8 steps, 0 of them skipped: {tmp_path / 'run/model'}" in done.output
    assert [line.split("  ")[0] for line in done.stderr.splitlines() if line.startswith("step")] == [
        "step 4 of 8",
        "step 8 of 8",
    ]
    with pytest.raises(ConfigError, match=r"set ray\.workers"):
        CliRunner().invoke(
            app, ["train", str(tmp_path / "train.yaml"), "--ray-address", "auto"], catch_exceptions=False
        )


def test_a_configuration_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig(out="x", model={"path": "y"}, corpora=[{"corpus": "z"}], steps=1).steps = 2
