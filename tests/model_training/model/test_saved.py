"""A model's folder may be broken in many ways: each is one line that names the file, and takes no memory."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.pipeline.io import weights
from paracaption.schemas.errors import ConfigError
from tests.flows import damages
from tests.tiny.perceptiondlm_model import write_model

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
SIZED = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("good") / "model")


def refused(folder: Path) -> str:
    """What is said of a folder."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as told:
        RegionCaptioner.load(folder, device="cpu")
    message = str(told.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 1_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20, "more than 2 GB"
    return message


def of_config(change: Callable[[dict[str, Any]], Any]) -> damages.Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def of_weights(change: Callable[[dict[str, Any]], Any]) -> damages.Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def of_header(change: Callable[[dict[str, Any]], Any]) -> damages.Damage:
    """A header that lies about the tensors."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        changed = change(header) or header
        text = json.dumps(changed).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def of_index(names: Callable[[str], Any]) -> damages.Damage:
    """An index that says where each tensor is."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        content = {"metadata": {}, "weight_map": {name: names(name) for name in tensors}}
        (folder / weights.INDEX).write_text(json.dumps(content))

    return damage


def first(tensors: dict[str, Any]) -> str:
    return min(name for name in tensors if name != "__metadata__")


FOLDERS: dict[str, tuple[damages.Damage, str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "safetensors"),
    "a missing tensor": (of_weights(lambda each: each.pop(first(each))), "missing"),
    "another shape": (
        of_weights(lambda each: each.update({first(each): each[first(each)][:1].clone()})),
        "shape",
    ),
    "one tensor more": (of_weights(lambda each: each.update(more=each[first(each)].clone())), "unknown"),
    "offsets behind the end": (
        of_header(lambda each: each[first(each)].update(data_offsets=[0, 1 << 40])),
        WEIGHTS,
    ),
    "a shape of 2^60": (of_header(lambda each: each[first(each)].update(shape=[1 << 60])), WEIGHTS),
    "an unknown type": (of_header(lambda each: each[first(each)].update(dtype="F1")), WEIGHTS),
    "a header that is a list": (of_header(lambda _: [1]), WEIGHTS),
    "an empty header": (of_header(lambda _: {"__metadata__": {}}), WEIGHTS),
    "a header of 2^63 bytes": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", (1 << 63) - 1) + b"{}"),
        WEIGHTS,
    ),
    "an index of a missing file": (of_index(lambda _: "model-00001.safetensors"), "model-00001.safetensors"),
    "an index that leads out": (of_index(lambda _: "../model.safetensors"), weights.INDEX),
    "an index of an absolute path": (of_index(lambda _: "/elsewhere/model.safetensors"), weights.INDEX),
    "an index of numbers": (of_index(lambda _: 1), weights.INDEX),
    "an index of a pickle": (of_index(lambda _: "pytorch_model.bin"), weights.INDEX),
    "an index without a map": (lambda folder: (folder / weights.INDEX).write_text("{}"), weights.INDEX),
    "an index that is a list": (lambda folder: (folder / weights.INDEX).write_text("[]"), weights.INDEX),
    "a config of another model": (of_config(lambda each: each.update(model_type="llama")), CONFIG),
    "no region tokens": (of_config(lambda each: each.update(region_token_ids=None)), CONFIG),
    "too few caption tokens": (of_config(lambda each: each.update(caption_token_ids=[1])), CONFIG),
    "a token behind the vocabulary": (of_config(lambda each: each.update(eot_token_id=1 << 20)), CONFIG),
    "an unknown layout": (of_config(lambda each: each.update(layout="x")), "layout"),
    "a vision config that is a list": (of_config(lambda each: each.update(vision_config=[1])), "model"),
    "a text config that is a text": (of_config(lambda each: each.update(text_config="x")), "model"),
    "patches of no pixels": (of_config(lambda each: each["vision_config"].update(patch_size=0)), "model"),
    "no heads": (of_config(lambda each: each["text_config"].update(num_attention_heads=0)), "model"),
    "a width that is a text": (of_config(lambda each: each["text_config"].update(hidden_size="x")), "model"),
    "infinity": (of_config(lambda each: each.update(num_prompts=float("inf"))), CONFIG),
    "not a number": (of_config(lambda each: each.update(initializer_range=float("nan"))), CONFIG),
    **{
        f"{name} of {size}": (
            of_config(lambda each, name=name, size=size: each["text_config"].update({name: size})),
            "model",
        )
        for name in SIZED
        for size in (1 << 20, 10**400)
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_broken_model_is_one_line(good, tmp_path, name):
    folder = shutil.copytree(good, tmp_path / "model")
    damage, named = FOLDERS[name]
    damage(folder)
    assert named in refused(folder)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, TOKENIZER])
@pytest.mark.parametrize("name", [*damages.FILES, *damages.JSONS])
def test_a_file_of_a_model_that_is_something_else_is_one_line_with_its_name(good, tmp_path, file, name):
    if file == WEIGHTS and (name in damages.JSONS or name == "flipped"):
        pytest.skip("a flipped weight is a weight")
    folder = shutil.copytree(good, tmp_path / "model")
    {**damages.FILES, **damages.JSONS}[name](folder / file)
    try:
        RegionCaptioner.load(folder, device="cpu")
    except ConfigError:
        message = refused(folder)
        assert file in message or (file == WEIGHTS and "safetensors" in message) or str(folder) in message
        return
    assert (file, name) in {(CONFIG, "a BOM"), (TOKENIZER, "a BOM"), (TOKENIZER, "flipped")}


def test_weights_that_are_a_git_lfs_pointer_say_so(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "model")
    (folder / WEIGHTS).write_bytes(damages.LFS)
    assert f"{folder / WEIGHTS}: a Git LFS pointer; run `git lfs pull`" in refused(folder)


def test_no_report_of_transformers_comes_before_the_line(good, tmp_path, caplog, capfd):
    folder = shutil.copytree(good, tmp_path / "model")
    of_weights(lambda each: each.pop(first(each)))(folder)
    with caplog.at_level(logging.DEBUG):
        refused(folder)
    captured = capfd.readouterr()
    assert "REPORT" not in captured.out + captured.err + caplog.text
