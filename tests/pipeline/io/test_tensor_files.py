"""Tensors are written as safetensors writes them, and checked with one error that names what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paracaption.pipeline.io import tensor_files, weights
from paracaption.schemas.errors import ConfigError

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "c": torch.tensor(2.5),
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(3, 2).T,  # not contiguous
    "z": torch.arange(5),
    "flags": torch.tensor([True, False, True]),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items() if tensor.is_floating_point()}


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, tensor_files.LazyTensor]:
    return {name: tensor_files.from_torch(tensor) for name, tensor in tensors.items()}


def saved(tensors: dict[str, torch.Tensor], path: Path) -> bytes:
    """What safetensors itself writes."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_a_file_written_by_name_has_the_bytes_that_safetensors_writes(tmp_path):
    tensor_files.write_file(tmp_path / "ours", lazy(dict(sorted(TENSORS.items()))))
    assert (tmp_path / "ours").read_bytes() == saved(TENSORS, tmp_path / "theirs")


def test_shards_hold_the_tensors_in_order_and_the_index_finds_them(tmp_path):
    total = tensor_files.write_tensors(tmp_path, lazy(TENSORS), shard_bytes=45, by_name=True)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in files] == [["b.weight", "c"], ["a.weight"], ["flags", "z"]]
    assert files[0].name == "model-00001-of-00003.safetensors"
    for file in files:
        assert file.read_bytes() == saved(load_file(file), tmp_path / "theirs")
    index = json.loads((tmp_path / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == total == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"]["z"] == files[2].name


def test_what_was_written_is_listed_and_read_again(tmp_path):
    tensor_files.write_tensors(tmp_path, lazy(TENSORS))
    for name, tensor in tensor_files.list_tensors(tmp_path).items():
        assert torch.equal(tensor.load(), TENSORS[name]) and tensor.load().dtype == TENSORS[name].dtype
        assert tensor.shape == TENSORS[name].shape and tensor.num_bytes == TENSORS[name].nbytes
        assert tensor.file == tmp_path / "model-00001-of-00001.safetensors"


def test_a_tensor_is_converted_when_it_is_written(tmp_path):
    tensor = tensor_files.from_torch(TENSORS["a.weight"], torch.float16)
    assert (tensor.dtype, tensor.num_bytes) == ("F16", 12)
    tensor_files.write_file(tmp_path / "x", {"a": tensor})
    assert torch.equal(load_file(tmp_path / "x")["a"], TENSORS["a.weight"].half())


def test_tensors_that_fit_pass_with_those_that_are_allowed():
    tensor_files.check_tensors(Path("model"), lazy(TENSORS), SHAPES, {"z": (5,), "flags": None, "not": (1,)})


def test_missing_unexpected_and_wrong_tensors_are_one_error_with_their_files(tmp_path):
    tensor_files.write_tensors(tmp_path, lazy(TENSORS), shard_bytes=45)
    found = tensor_files.list_tensors(tmp_path)
    wanted = {**SHAPES, "b.weight": (4, 3), "c": (1,), "new": (2,), "z": (5,)}
    with pytest.raises(ConfigError) as error:
        tensor_files.check_tensors(tmp_path, found, wanted)
    first, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
    assert str(error.value).startswith(f"{tmp_path}: its tensors are not those")
    assert f"missing: new; unexpected: flags ({third}); wrong: b.weight is 3x4, not 4x3 ({first}), " in str(
        error.value
    )
    assert f"c is a scalar, not 1 ({first}), z is I64, not a floating point type ({third});" in str(
        error.value
    )


def test_of_many_problems_three_are_named_and_the_rest_counted():
    wanted = {f"layer.{number}": (1,) for number in range(9)}
    with pytest.raises(ConfigError, match=r"missing: layer.0, layer.1, layer.2 and 6 more; download"):
        tensor_files.check_tensors(Path("model"), {}, wanted)


def test_an_allowed_tensor_of_a_wrong_shape_is_named():
    with pytest.raises(ConfigError, match="wrong: z is 5, not 6;"):
        tensor_files.check_tensors(Path("model"), lazy({"z": TENSORS["z"]}), {}, {"z": (6,)})


def test_a_type_that_is_not_copied_is_named(tmp_path):
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    (tensor,) = tensor_files.list_tensors(tmp_path).values()
    with pytest.raises(ConfigError, match="tensors are F8_E4M3; convert them to bfloat16"):
        tensor_files.write_tensors(tmp_path, {"a": tensor})
