"""Conversions lose nothing, take nothing unsound, and leave nothing half done."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.convert import published as convert
from paracaption.model_training.model import processor as processing
from paracaption.model_training.model import tokenizer
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.pipeline.io import tensor_files, weights
from paracaption.schemas.errors import ConfigError
from tests.shared_data import recorded
from tests.tiny import perceptiondlm as tiny


@pytest.fixture(scope="module")
def published() -> Path:
    return recorded("perceptiondlm/checkpoint")


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("ours") / "model"
    convert.convert(published, target, shard_bytes=300_000)
    return target


@pytest.fixture(scope="module")
def llada(tmp_path_factory) -> Path:
    return tiny.write_llada(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    return tiny.write_siglip(tmp_path_factory.mktemp("siglip"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: entry.load() for name, entry in tensor_files.list_tensors(folder).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )


def copied(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copyfile(file, to / file.name)
    return to


def changed(folder: Path, to: Path, tensor=lambda t: t, config=lambda c: c) -> Path:
    """A copy of a published folder with other tensors or another config."""
    copied(folder, to)
    stored = tensor(load_file(to / "model.safetensors"))
    save_file(stored, to / "model.safetensors", metadata={"format": "pt"})
    settings = config(json.loads((to / "config.json").read_text()))
    (to / "config.json").write_text(json.dumps(settings))
    return to


def test_there_and_back_every_tensor_and_every_file_is_what_was_published(published, ours, tmp_path):
    report = convert.convert(ours, tmp_path / "back", shard_bytes=400_000)
    assert same(tensors(tmp_path / "back"), load_file(published / "model.safetensors"))
    for file in published.glob("*.json"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert report.verbatim and report.tensors == 114 and not report.drawn


def test_the_converted_folder_loads_without_code_of_its_own_and_saves_the_same(ours, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("asked for leave to run code")

    monkeypatch.setattr("builtins.input", never)
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", never)
    for file in ours.glob("*.json"):
        assert "auto_map" not in file.read_text() and "pdmllm" not in file.read_text().lower()
        assert "/tmp" not in file.read_text()
    model, info = PerceptionDLM.from_pretrained(ours, output_loading_info=True)
    assert not any(info.values())
    assert model.config.layout == "reference" and model.dtype == torch.float32
    assert isinstance(AutoModel.from_pretrained(ours), PerceptionDLM)
    assert isinstance(AutoProcessor.from_pretrained(ours), processing.PerceptionDLMProcessor)
    assert AutoTokenizer.from_pretrained(ours).convert_tokens_to_ids("<IMG_CONTEXT>") == 278
    model.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(ours))


def test_a_model_that_was_trained_and_saved_goes_back_with_the_unused_folder(published, ours, tmp_path):
    model = PerceptionDLM.from_pretrained(ours)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(ours).save_pretrained(tmp_path / "trained")
    shutil.copytree(ours / "unused", tmp_path / "trained" / "unused")
    convert.convert(tmp_path / "trained", tmp_path / "back")
    expected = load_file(published / "model.safetensors")
    expected["language_model.lm_head.weight"] += 1
    assert same(tensors(tmp_path / "back"), expected)


def test_code_in_a_published_folder_is_carried_and_never_run(published, tmp_path):
    folder = copied(published, tmp_path / "source")
    trap = tmp_path / "trap"
    code = f"open({str(trap)!r}, 'w')\nclass PDMLLM: pass\nclass PDMLLMConfig: pass\n"
    for name in ("modeling_pdmllm.py", "configuration_pdmllm.py"):
        (folder / name).write_text(code)
    convert.convert(folder, tmp_path / "ours")
    assert not list((tmp_path / "ours").glob("*.py"))
    convert.convert(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "modeling_pdmllm.py").read_text() == code
    assert not trap.exists()


def test_the_last_layer_brings_its_norm_and_is_no_longer_unused(published, tmp_path):
    folder = changed(published, tmp_path / "source", config=lambda c: {**c, "vision_select_layer": -1})
    report = convert.convert(folder, tmp_path / "ours")
    assert report.unused == 53 - 16 - 2
    norm = "vision_model.vision_model.post_layernorm.weight"
    found = tensors(tmp_path / "ours")
    assert torch.equal(found["vision_tower.norm.weight"], load_file(folder / "model.safetensors")[norm])
    convert.convert(tmp_path / "ours", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), load_file(folder / "model.safetensors"))


def base(published: Path, to: Path) -> Path:
    """PerceptionDLM-Base: no region prompts, no regions' settings, no regions' tokens."""
    regional = ("prompt_numbers", "roi_output_size", "kernel_size", "image_token_id")
    folder = changed(
        published,
        to,
        lambda t: {name: value for name, value in t.items() if name != "mask_id_embedding.weight"},
        lambda c: {k: v for k, v in c.items() if k not in regional} | {"model_type": "dmllm"},
    )
    (folder / "special_tokens_map.json").unlink()
    tiny.write_tokenizer(folder, tokenizer.SPECIAL_TOKENS[:3])
    return folder


def test_the_base_gets_region_prompts_and_tokens_and_goes_back_as_the_originals_region_stage(
    published, tmp_path
):
    folder = base(published, tmp_path / "base")
    report = convert.convert(folder, tmp_path / "ours", seed=3)
    assert report.drawn == ["region_prompts.weight from N(0, 1)"] and "16 tokens added" in report.notes[0]
    found = tensors(tmp_path / "ours")
    assert found["region_prompts.weight"].shape == (6, 48)
    assert 0.8 < found["region_prompts.weight"].std() < 1.2
    model = PerceptionDLM.from_pretrained(tmp_path / "ours")
    assert model.config.num_prompts == 6 and model.config.replay_size == 4
    assert found["lm_head.weight"].shape[0] == 400
    known = AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab()
    first = known["<IMG_CONTEXT>"]
    assert [known[token] for token in tokenizer.SPECIAL_TOKENS] == list(range(first, first + 19))

    convert.convert(tmp_path / "ours", tmp_path / "back")
    back = tensors(tmp_path / "back")
    assert torch.equal(back.pop("mask_id_embedding.weight"), found["region_prompts.weight"])
    assert same(back, load_file(folder / "model.safetensors"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["prompt_numbers"], config["roi_output_size"]) == ("pdmllm", 6, 4)
    assert config["image_token_id"] == first
    convert.convert(tmp_path / "back", tmp_path / "again")
    assert same(tensors(tmp_path / "again"), found)


def test_the_seed_alone_decides_what_is_drawn(published, tmp_path):
    folder = base(published, tmp_path / "base")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        convert.convert(folder, tmp_path / name, seed=seed)
    prompts = [tensors(tmp_path / name)["region_prompts.weight"] for name in "abc"]
    assert torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[0], prompts[2])


def test_files_are_no_larger_than_asked_and_sharded_sources_are_read(ours, published, tmp_path):
    files = sorted(ours.glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        with safe_open(file, "pt") as opened:
            num_bytes = sum(opened.get_tensor(name).nbytes for name in opened.keys())
        assert num_bytes <= 300_000
    convert.convert(ours, tmp_path / "sharded", shard_bytes=100_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 8
    convert.convert(tmp_path / "sharded", tmp_path / "whole")
    assert same(tensors(tmp_path / "whole"), tensors(ours))


def without(name):
    return lambda t: {key: value for key, value in t.items() if key != name}


EMBEDDING = "language_model.model.embed_tokens.weight"
GATE = "language_model.model.layers.1.mlp.gate_proj.weight"
WRONG = {
    "missing": (without(GATE), lambda c: c, f"missing: {GATE}"),
    "no embedding": (without(EMBEDDING), lambda c: c, f"missing: {EMBEDDING}"),
    "unexpected": (lambda t: t | {"extra": torch.ones(2)}, lambda c: c, "unexpected: extra"),
    "extra layer": (
        lambda t: t | {GATE.replace("layers.1", "layers.2"): torch.ones(2)},
        lambda c: c,
        "unexpected: .*layers.2",
    ),
    "wrong shape": (lambda t: t | {GATE: torch.ones(128, 63)}, lambda c: c, "gate.* is 128x63, not 128x64"),
    "unused in a wrong shape": (
        lambda t: t | {"vision_model.logit_scale": torch.ones(2)},
        lambda c: c,
        "logit_scale is 2, not 1",
    ),
    "no number": (lambda t: t | {GATE: t[GATE].to(torch.int8)}, lambda c: c, "is I8, not a floating"),
    "prompts": (lambda t: t, lambda c: c | {"prompt_numbers": 5}, "mask_id_embedding.* is 6x48, not 5x48"),
    "whole maps": (lambda t: t, lambda c: c | {"roi_output_size": None}, "replays whole maps"),
    "another projector": (
        lambda t: t,
        lambda c: c | {"vision_abstractor_config": {"projection_type": "linear"}},
        "projection_type 'linear'",
    ),
    "another type": (lambda t: t, lambda c: c | {"model_type": "llava"}, "of type 'llava', neither"),
    "no sizes": (lambda t: t, lambda c: c | {"language_model_config": {}}, "num_attention_heads is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_or_partial_checkpoint_is_an_error_before_anything_is_written(published, tmp_path, case):
    tensor, config, message = WRONG[case]
    folder = changed(published, tmp_path / "source", tensor, config)
    with pytest.raises(ConfigError, match=message) as error:
        convert.convert(folder, tmp_path / "to" / "model")
    assert str(folder) in str(error.value)
    assert not (tmp_path / "to").exists()


def test_of_many_problems_the_first_are_named_and_the_rest_counted(published, tmp_path):
    folder = changed(
        published, tmp_path / "source", lambda t: {n: v for n, v in t.items() if "layers.1.self" not in n}
    )
    with pytest.raises(ConfigError, match=r"missing: [^,]+, [^,]+, \S+ and 9 more;"):
        convert.convert(folder, tmp_path / "to")


def test_broken_files_are_errors_that_name_them(published, ours, tmp_path):
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            convert.convert(folder, tmp_path / "to")
        assert not (tmp_path / "to").exists()

    parts = [shutil.copytree(ours, tmp_path / name) for name in ("shard", "promise", "twice")]
    (parts[0] / "model-00002-of-00004.safetensors").unlink()
    refused(parts[0], "model-00002-of-00004.safetensors: not there")
    index = json.loads((parts[1] / weights.INDEX).read_text())
    index["weight_map"]["lost.weight"] = "model-00001-of-00004.safetensors"
    (parts[1] / weights.INDEX).write_text(json.dumps(index))
    refused(parts[1], "names lost.weight, which no file holds")
    (parts[2] / weights.INDEX).unlink()
    shutil.copyfile(parts[2] / "model-00001-of-00004.safetensors", parts[2] / "model.safetensors")
    refused(parts[2], "is in another file of the folder too")

    cut = copied(published, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    refused(cut, "model.safetensors: not a sound safetensors file")
    pickled = copied(published, tmp_path / "pickled")
    (pickled / "training_args.bin").write_bytes(b"x")
    refused(pickled, "training_args.bin: this is a pickle")
    garbled = copied(published, tmp_path / "garbled")
    (garbled / "config.json").write_text("{")
    refused(garbled, "config.json: cannot be read as JSON")


def test_a_target_that_is_there_is_left_alone_unless_it_is_empty(published, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    convert.convert(published, target)
    before = sorted(target.iterdir())
    for source in (published, target):
        with pytest.raises(ConfigError, match="already exists"):
            convert.convert(source, target)
    assert sorted(target.iterdir()) == before and [target] == list(tmp_path.iterdir())


def test_a_disk_without_room_is_an_error_before_anything_is_written(published, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match="1,157,768 bytes to write, but only 1 are free"):
        convert.convert(published, tmp_path / "to")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_a_conversion_that_dies_leaves_no_target(published, tmp_path, monkeypatch, end):
    read = tensor_files._load
    done = []

    def dies(path, name):
        done.append(name)
        if len(done) == 60:
            if end == "failed":
                raise OSError("the disk is gone")
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, name)

    monkeypatch.setattr(tensor_files, "_load", dies)
    target = tmp_path / "target"
    if end == "failed":
        with pytest.raises(ConfigError, match="the disk is gone"):
            convert.convert(published, target)
        assert not list(tmp_path.iterdir())
        return
    child = os.fork()
    if not child:
        convert.convert(published, target)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.endswith(".partial") and (left[0] / "unused").is_dir()
    monkeypatch.undo()
    convert.convert(published, target)
    assert AutoModel.from_pretrained(target)


def test_without_the_unused_folder_the_error_names_the_mend_and_the_mend_works(published, ours, tmp_path):
    bare = shutil.copytree(ours, tmp_path / "bare", ignore=shutil.ignore_patterns("unused"))
    with pytest.raises(ConfigError, match="--vision SIGLIP2_DIR"):
        convert.convert(bare, tmp_path / "back")
    stored = load_file(published / "model.safetensors")
    vision = tmp_path / "siglip"
    vision.mkdir()
    prefix = "vision_model."
    parts = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    save_file(parts, vision / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((published / "config.json").read_text())
    (vision / "config.json").write_text(json.dumps(config["vision_model_config"]))

    convert.convert(bare, tmp_path / "back", vision=vision)
    assert same(tensors(tmp_path / "back"), stored)
    convert.convert(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (ours / "config.json").read_text()

    del parts["text_model.head.bias"]
    save_file(parts, vision / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing: text_model\.head\.bias"):
        convert.convert(bare, tmp_path / "partial", vision=vision)


def test_the_unused_folder_of_another_model_is_refused(ours, siglip, tmp_path):
    model = shutil.copytree(ours, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"the sizes are .* those of the model's tower"):
        convert.convert(model, tmp_path / "back", vision=siglip)
    config = json.loads((model / "unused" / "config.json").read_text())
    config["language_model_config"]["rope_theta"] = 10000.0
    (model / "unused" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="own checkpoint"):
        convert.convert(model, tmp_path / "back")
    (model / "unused" / weights.INDEX).unlink()
    with pytest.raises(ConfigError, match="missing or incomplete"):
        convert.convert(model, tmp_path / "back")


@pytest.mark.parametrize("naming", ["llada", "llama"])
def test_llada_in_either_naming_and_siglip_make_a_model(llada, siglip, tmp_path, naming):
    language = tiny.write_llada(tmp_path / "language", naming)
    report = convert.from_parts(language, siglip, tmp_path / "ours")
    found, text, tower = (tensors(folder) for folder in (tmp_path / "ours", llada, siglip))
    for ours_name, name in {
        "lm_head.weight": "ff_out",
        "language_model.embed_tokens.weight": "wte",
        "language_model.layers.1.self_attn.o_proj.weight": "blocks.1.attn_out",
        "language_model.layers.1.mlp.gate_proj.weight": "blocks.1.ff_proj",
        "language_model.layers.0.mlp.up_proj.weight": "blocks.0.up_proj",
        "language_model.layers.0.mlp.down_proj.weight": "blocks.0.ff_out",
        "language_model.layers.1.post_attention_layernorm.weight": "blocks.1.ff_norm",
    }.items():
        assert torch.equal(found[ours_name], text[f"model.transformer.{name}.weight"])
    fc1 = "layers.1.mlp.fc1.weight"
    assert torch.equal(found[f"vision_tower.{fc1}"], tower[f"vision_model.encoder.{fc1}"])
    assert found["projector.0.bias"].count_nonzero() == 0
    assert 0.015 < found["projector.0.weight"].float().std() < 0.025
    assert 0.8 < found["region_prompts.weight"].float().std() < 1.2
    assert report.drawn == ["projector from N(0, 0.02^2)", "region_prompts.weight from N(0, 1)"]

    assert not any("auto_map" in file.read_text() for file in (tmp_path / "ours").glob("*.json"))
    model, info = PerceptionDLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16
    assert model.config.layout == "corrected" and model.config.mask_token_id == tiny.MASK_ID
    assert model.config.text_config.vocab_size == 320
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in tokenizer.SPECIAL_TOKENS]
    assert ids == list(range(tiny.WORDS + len(tiny.SPECIALS), tiny.WORDS + len(tiny.SPECIALS) + 19))
    assert processor.tokenize("<|Mask_Cap_1|>a\n") == [
        ids[4],
        *processor.tokenize("a"),
        model.config.newline_token_id,
    ]
    assert processor.tokenizer.decode([ids[3], 70], skip_special_tokens=True) == (
        processor.tokenizer.decode([70])
    )


def test_a_model_of_parts_goes_to_the_published_layout_and_back(llada, siglip, tmp_path):
    convert.from_parts(llada, siglip, tmp_path / "ours", layout="reference", seed=7)
    report = convert.convert(tmp_path / "ours", tmp_path / "published", vision=siglip)
    assert report.unused > 0 and not report.verbatim
    convert.convert(tmp_path / "published", tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again")]
    assert configs[0] == configs[1]


def test_the_embedding_grows_only_if_the_tokenizer_does_not_fit(siglip, tmp_path):
    rows = tiny.WORDS + len(tiny.SPECIALS) + 5
    language = tiny.write_llada(tmp_path / "language", rows=rows)
    report = convert.from_parts(language, siglip, tmp_path / "ours")
    assert f"{320 - rows} rows of embedding and head" in report.drawn[2]
    model = PerceptionDLM.from_pretrained(tmp_path / "ours")
    old = tensors(language)["model.transformer.wte.weight"]
    assert model.language_model.embed_tokens.weight.shape == model.lm_head.weight.shape == (320, 32)
    assert torch.equal(model.language_model.embed_tokens.weight[:rows], old)
    assert 0.01 < model.lm_head.weight[rows:].float().std() < 0.03
    assert tokenizer.num_rows(AutoTokenizer.from_pretrained(tmp_path / "ours")) <= 320


def test_a_vision_model_alone_is_enough_to_start_and_not_to_publish(llada, siglip, tmp_path):
    alone = tiny.write_siglip(tmp_path / "alone", whole=False)
    convert.from_parts(llada, alone, tmp_path / "ours")
    with pytest.raises(ConfigError, match="has no text model"):
        convert.convert(tmp_path / "ours", tmp_path / "published", vision=alone)


@pytest.mark.parametrize(
    ("which", "key", "value", "message"),
    [
        ("siglip", "model_type", "siglip2", "a vision model of type 'siglip2'; name a SigLIP 2 of fixed"),
        ("llada", "weight_tying", True, "weight_tying is True; only False"),
        ("llada", "layer_norm_type", "default", "layer_norm_type is 'default'; only 'rms'"),
        ("llada", "mask_token_id", 5, "config.json says mask_token_id 5"),
        ("llada", "n_layers", 3, "missing: model.transformer.blocks.2.attn_norm.weight"),
        ("llada", "rope_theta", None, "rope_theta is missing"),
        ("llada", "mlp_hidden_size", 40, "is 32x48, not 32x40"),
    ],
)
def test_parts_that_do_not_fit_are_refused(llada, siglip, tmp_path, which, key, value, message):
    parts = {"llada": llada, "siglip": siglip}
    parts[which] = changed(parts[which], tmp_path / which, config=lambda c: c | {key: value})
    with pytest.raises(ConfigError, match=message):
        convert.from_parts(parts["llada"], parts["siglip"], tmp_path / "to" / "ours")
    assert not (tmp_path / "to").exists()


def test_another_tokenizer_and_another_layout_are_refused(published, llada, siglip, tmp_path):
    with pytest.raises(ConfigError, match="layout: unknown layout 'sideways'"):
        convert.from_parts(llada, siglip, tmp_path / "ours", layout="sideways")
    folder = copied(published, tmp_path / "source")
    (folder / "special_tokens_map.json").unlink()
    tiny.write_tokenizer(folder)
    with pytest.raises(ConfigError, match=r"its tokenizer lacks 9 tokens, among them <IMG_CONTEXT>"):
        convert.convert(folder, tmp_path / "ours")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        convert.convert(folder, tmp_path / "ours")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_a_checkpoint_is_never_whole_in_memory(siglip, tmp_path):
    language = tiny.write_llada(tmp_path / "language", width=1024, layers=12, inner=1536)
    assert (language / "model.safetensors").stat().st_size > 200e6
    ctypes.CDLL(None).malloc_trim(0)  # else what making the source has freed hides what converting it takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = peak_bytes()
    convert.from_parts(language, siglip, tmp_path / "ours")
    assert peak_bytes() - before < 60e6
    assert same(
        {"x": tensors(tmp_path / "ours")["language_model.layers.11.mlp.up_proj.weight"]},
        {"x": tensors(language)["model.transformer.blocks.11.up_proj.weight"]},
    )


def test_the_command_converts_both_ways_and_says_what_it_did(published, llada, siglip, tmp_path):
    def command(*words: object):
        return CliRunner().invoke(app, ["models", "convert", *map(str, words)], catch_exceptions=True)

    there = command(published, "--to", tmp_path / "ours")
    assert there.exit_code == 0 and "unused   53 with 245,192 bytes" in there.output
    back = command(tmp_path / "ours", "--to", tmp_path / "back")
    assert back.exit_code == 0 and "tensors  114 with 1,157,768 bytes" in back.output
    assert same(tensors(tmp_path / "back"), load_file(published / "model.safetensors"))
    new = command("--language", llada, "--vision", siglip, "--to", tmp_path / "new", "--seed", 5)
    assert new.exit_code == 0
    assert "(corrected layout)" in new.output and "region_prompts.weight from N(0, 1), seed 5" in new.output

    for words, message in [
        ((), "name a PerceptionDLM's folder"),
        ((published, "--language", llada), "name a PerceptionDLM's folder"),
        (("--language", llada), "--language needs a SigLIP 2 too"),
        ((published, "--vision", siglip), "leave out --vision"),
        ((tmp_path / "ours", "--layout", "reference"), "leave out --layout"),
        ((llada,), "of type 'llada'"),
        ((tmp_path,), "is not a checkpoint folder"),
    ]:
        refused = command(*words, "--to", tmp_path / "not")
        assert isinstance(refused.exception, ConfigError) and message in str(refused.exception)
    assert not (tmp_path / "not").exists()


def test_the_commands_help_imports_nothing_heavy():
    script = """
import sys
from typer.testing import CliRunner
from paracaption.flows.cli.app import app
assert CliRunner().invoke(app, ["models", "convert", "--help"]).exit_code == 0
print(*sorted({"torch", "ray", "prefect", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
