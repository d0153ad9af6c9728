"""GAR's options, checkpoint and export: mistakes are named before it loads, and nothing is half made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from paracaption.pipeline.io import files
from paracaption.pipeline.models.gar import checkpoint, export
from paracaption.pipeline.models.gar.captioner import GarCaptioner, _checked
from paracaption.schemas.errors import ConfigError, StageFailed
from tests.pipeline.models.gar_parts import TILE_PX
from tests.tiny.gar import write_gar


@pytest.fixture(scope="module", params=["1b", "8b"])
def model(request, tmp_path_factory):
    """One file and a tied head; several files and a head of its own."""
    return write_gar(tmp_path_factory.mktemp("gar") / "GAR", request.param, tile_px=TILE_PX)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def refused(told, **options):
    for attempt in (GarCaptioner, GarCaptioner.check):
        with pytest.raises(ConfigError, match=told):
            attempt(**options)


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Options.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"modle": "x", "model": "x"},
            r"captioner\.options: .*unknown field `modle`; the options are model, language_model",
        ),
        ({}, r"captioner\.options: .*missing required field `model`"),
        ({"model": "x", "max_tokens": 0}, r"captioner\.options\.max_tokens: .*>= 1"),
        ({"model": "x", "mask_resample": "linear"}, r"captioner\.options\.mask_resample: .*nearest"),
        ({"model": "x", "dtype": "half"}, r"captioner\.options\.dtype: .*bfloat16"),
        ({"model": "x", "read_ahead": -1}, r"captioner\.options\.read_ahead"),
        (
            {"model": "x", "engine": {"trust_remote_code": True}},
            r"engine: trust_remote_code is not for the config",
        ),
        (
            {"model": "no/such/folder"},
            r"captioner\.options\.model: no/such/folder is not a checkpoint folder",
        ),
    ],
)
def test_wrong_options_are_named(options, told):
    refused(told, **options)
    with pytest.raises(ConfigError, match=told):
        GarCaptioner.identity(**options)


def test_answers_that_the_model_has_no_room_for_are_named_with_what_fits(model):
    refused(
        r"max_tokens: prompts of up to \d+ tokens .* at most \d+ fit", model=str(model), max_tokens=11_500
    )
    refused(
        r"engine\.max_model_len: 100 is too short .* at least \d+",
        model=str(model),
        engine={"max_model_len": 100},
    )


def test_the_identity_is_that_of_the_weights_wherever_they_lie(model, copy):
    name = GarCaptioner.identity(model=str(model))
    assert name == GarCaptioner.identity(model=str(copy))
    assert name == GarCaptioner.identity(
        model=str(copy),
        language_model="elsewhere",
        device="cpu",
        tiles_per_batch=3,
        max_in_flight=2,
        in_flight_gb=0.1,
        read_ahead=5,
        engine={"gpu_memory_utilization": 0.3},
    ), "what changes no answer stays out"


def test_the_identity_changes_with_whatever_changes_answers(model, copy):
    names = [
        GarCaptioner.identity(model=str(model), **options)
        for options in (
            {},
            {"max_tokens": 5},
            {"mask_resample": "bicubic"},
            {"dtype": "float16"},
            {"engine": {"quantization": "fp8"}},
        )
    ]
    path = sorted(copy.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    names.append(GarCaptioner.identity(model=str(copy)))
    assert len({tuple(sorted(name.items())) for name in names}) == 6


# The checkpoint.


def test_check_counts_what_will_be_loaded_without_loading_it(model):
    from safetensors.torch import load_file

    checked = GarCaptioner.check(model=str(model))
    assert checked.what.startswith(
        "GAR: vision 2 x 48, language model 3 x 64, up to 4 tiles, prompts of up to "
    )
    stored = {name: t for file in model.glob("*.safetensors") for name, t in load_file(file).items()}
    embed = stored["mllm.model.language_model.embed_tokens.weight"]  # the encoder has its own
    assert checked.weight_bytes == sum(t.nbytes for t in stored.values()) + embed.nbytes
    assert GarCaptioner.check(model=str(model), dtype="bfloat16").weight_bytes * 2 == checked.weight_bytes
    assert "paracaption models prepare gar" in checked.notes[-1]


def test_check_does_not_announce_an_export_that_is_there(copy):
    export.prepare(copy)
    assert GarCaptioner.check(model=str(copy)).notes == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "gar.pth", "weights.pkl"])
def test_a_checkpoint_with_a_pickle_is_refused_unread(copy, name):
    (copy / name).write_bytes(b"whatever it is")
    refused(f"{name}: this is a pickle, which can run code", model=str(copy))
    with pytest.raises(ConfigError, match="this is a pickle, which can run code"):
        export.prepare(copy)
    assert not export.default_folder(copy).exists()


def test_the_code_beside_the_weights_is_never_run(copy):
    """As published, the config names Python files that lie beside it."""
    trace = copy / "ran"
    for name in ("configuration_gar", "modeling_gar", "processing_gar"):
        (copy / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')\nclass GARConfig: ...\n")
    GarCaptioner.check(model=str(copy))
    assert not trace.exists()


def rewrite(folder, name, change):
    """Change or remove a tensor in the file that has it; that file."""
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            found = change(tensors.pop(name))
            save_file(tensors | ({name: found} if found is not None else {}), path)
            return path
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "mask_patch_embedding.weight",
        "mllm.model.vision_tower.timm_model.blocks.1.gamma_2",
        "mllm.model.multi_modal_projector.linear_2.bias",
        "mllm.model.language_model.layers.2.mlp.down_proj.weight",
    ],
)
def test_a_missing_or_misshapen_tensor_is_named_with_its_file(copy, name):
    path = rewrite(copy, name, lambda tensor: tensor[..., :3].contiguous())
    refused(rf"{copy}: .* wrong: {name} is \S+, not \S+ \({path.name}\)", model=str(copy))
    rewrite(copy, name, lambda tensor: None)
    refused(rf"{copy}.*(missing: {name};|names {name}, which no file holds)", model=str(copy))


def test_a_quantised_or_unknown_tensor_is_named(copy):
    import torch

    name = "mllm.model.vision_tower.timm_model.norm_pre.bias"
    path = rewrite(copy, name, lambda tensor: tensor.to(torch.int8))
    refused(rf"{name} is I8, not a floating point type \({path.name}\)", model=str(copy))
    rewrite(copy, name, lambda tensor: tensor.float())
    from safetensors.torch import load_file, save_file

    save_file(load_file(path) | {"mllm.model.extra": torch.zeros(1)}, path)
    refused(rf"unexpected: mllm\.model\.extra \({path.name}\)", model=str(copy))


def test_a_cut_file_is_named(copy):
    path = sorted(copy.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    refused(f"{path.name}: .*download it again", model=str(copy))


@pytest.mark.parametrize(
    ("file", "fields", "told"),
    [
        ("config.json", {"model_type": "qwen3"}, "model_type is 'qwen3', not 'GAR'"),
        ("config.json", {"kernel_size": [16, 16]}, r"kernel_size is \[16, 16\], the vision .*patch_size 14"),
        ("config.json", {"patch_size_w": 7}, r"patch_size_w is 7, the vision tower's patch_size 14"),
        (
            "config.json",
            {"kernel_size": [14, 7]},
            r"kernel_size is \[14, 7\]; only square sizes are supported",
        ),
        ("config.json", {"mask_path_embedding_out_channels": 64}, "mask_path_embedding_out_channels is 64"),
        ("processor_config.json", {"patch_size": 16}, "patch_size is 16; only 14 is"),
        ("processor_config.json", {"pooling_ratio": 1}, "pooling_ratio is 1; only 2 is"),
        ("preprocessor_config.json", {"do_rescale": False}, "do_rescale is False"),
        ("preprocessor_config.json", {"rescale_factor": 0.5}, "rescale_factor is 0.5"),
        ("config.json", {"crop_tokens_ids": [1, 2]}, "2 crop_tokens_ids, but 5 prompts"),
        (
            "preprocessor_config.json",
            {"image_mean": [0.4, 0.5, 0.5]},
            r"preprocessor_config\.json: image_mean",
        ),
        ("preprocessor_config.json", {"tile_size": 448}, r"img_size is \[112, 112\]"),
        ("preprocessor_config.json", {"max_num_tiles": None}, "no max_num_tiles"),
    ],
)
def test_a_config_that_asks_for_what_is_not_computed_is_refused(copy, file, fields, told):
    edit(copy / file, **fields)
    refused(told, model=str(copy))


def with_arguments(folder, **changes):
    """Change the vision tower's arguments; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    arguments = config["mllm_config"]["vision_config"]["model_args"] | changes
    found = {name: value for name, value in arguments.items() if value is not None}
    config["mllm_config"]["vision_config"]["model_args"] = found
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.bias is 192, not 96"),
        ({"patch_size": 4}, "kernel_size is .14, 14., the vision tower's patch_size 4|ref_feat_shape"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"img_size": None}, r"img_size is .*; only \[112, 112\] is"),
        ({"ref_feat_shape": None}, r"ref_feat_shape is .*only \[8, 8\] is"),
        ({"swiglu_mlp": True}, r"has \['swiglu_mlp'\], which would change what is computed"),
    ],
)
def test_arguments_of_the_tower_are_followed_or_refused(copy, arguments, told):
    with_arguments(copy, **arguments)
    refused(told, model=str(copy))


def test_arguments_that_say_what_the_tensors_are_change_nothing(copy):
    before = GarCaptioner.check(model=str(copy))
    with_arguments(copy, patch_size=14, mlp_ratio=4.0, img_size=TILE_PX)
    assert GarCaptioner.check(model=str(copy)) == before


@pytest.mark.parametrize("kind", ["1b", "8b"])
def test_a_checkpoint_with_other_patches_is_read_as_its_config_says(tmp_path, kind):
    import torch

    from tests.pipeline.models.gar_parts import load_parts

    folder = write_gar(tmp_path / "GAR", kind, tile_px=32, patch_px=4)
    GarCaptioner.check(model=str(folder))
    config, prompts, vision, _ = load_parts(folder)
    assert (config.patch_px, config.grid, config.side, config.mlp_inner) == (4, 8, 4, 192)
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, 4:8, 8:12] = True  # one patch
    plain, marked = vision(tiles), vision(tiles, mask)
    assert plain.shape == (2, config.side**2, config.hidden)
    assert torch.equal(plain[1], marked[1]) and not torch.equal(plain[0], marked[0])
    assert prompts.write(1).ids.count(config.image_token) == config.side**2


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_file_that_is_missing_is_named(copy, name):
    (copy / name).unlink()
    refused(f"{name}: not there; download the whole checkpoint", model=str(copy))


def test_a_tokenizer_of_another_model_is_named(copy):
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("<Prompt1>", "<Promqt1>"))
    refused("no token <Prompt1>; not a GAR tokenizer", model=str(copy))


def test_unknown_fields_of_the_config_are_noted(copy):
    edit(copy / "config.json", something_new=1)
    assert "config.json: something_new is not used" in GarCaptioner.check(model=str(copy)).notes


# The export.


def listing(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def test_the_export_is_a_llama_with_the_same_weights(copy):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export.prepare(copy), dtype="auto", use_safetensors=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    stored = {name: t for file in copy.glob("*.safetensors") for name, t in load_file(file).items()}
    found = model.state_dict()
    for name, tensor in stored.items():
        if name.startswith(checkpoint.LANGUAGE):
            assert torch.equal(found.pop("model." + name.removeprefix(checkpoint.LANGUAGE)), tensor), name
    head = stored.get(checkpoint.HEAD, stored[f"{checkpoint.LANGUAGE}embed_tokens.weight"])
    assert torch.equal(found.pop("lm_head.weight"), head)
    assert not found
    assert model.config.tie_word_embeddings == (checkpoint.HEAD not in stored)


def test_a_second_export_changes_nothing(copy):
    from typer.testing import CliRunner

    from paracaption.flows.cli.app import app

    for _ in range(2):
        done = CliRunner().invoke(app, ["models", "prepare", "gar", str(copy)])
        assert done.exit_code == 0, done.output
        assert done.output.strip().replace("\n", "") == str(export.default_folder(copy))
        first = listing(export.default_folder(copy))
    assert export.prepare(copy) == export.default_folder(copy)
    assert listing(export.default_folder(copy)) == first


def test_other_weights_and_a_damaged_file_are_exported_anew(copy, tmp_path):
    target = export.prepare(copy, tmp_path / "out")
    first = (target / export.RECORD).read_text()
    rewrite(copy, f"{checkpoint.LANGUAGE}norm.weight", lambda tensor: tensor + 1)
    assert export.prepare(copy, target) == target
    assert (target / export.RECORD).read_text() != first
    weights = next(target.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    export.prepare(copy, target)
    assert weights.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "copy", "out"], (
        "nothing is left over"
    )


def test_a_folder_of_someone_else_is_left_alone(copy, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ConfigError, match=r"mine: already exists and is not an export .* move it away"):
        export.prepare(copy, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match=r"cannot be exported there: .* name a folder that can be written"):
        export.prepare(copy, tmp_path / "mine" / "thesis.txt" / "out")


SCRIPT = """
import os, signal, sys
from paracaption.pipeline.io import files
from paracaption.pipeline.models.gar import export
if sys.argv[3] == "kill":
    files._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is named
print(export.prepare(sys.argv[1], sys.argv[2]))
"""


def start(model, target, how="run"):
    command = [sys.executable, "-c", SCRIPT, str(model), str(target), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.soak
def test_an_export_that_is_killed_leaves_no_folder_and_the_next_one_works(copy, tmp_path):
    target = tmp_path / "out"
    assert start(copy, target, "kill").wait(60) == -signal.SIGKILL
    [left] = tmp_path.glob(".out.*.partial")
    assert not target.exists()
    record = export.record_of(checkpoint.read_config(copy))
    assert export.is_done(export.prepare(copy, target), record)
    assert left.exists(), "it may be another node's, at work"
    os.utime(left, (0, 0))
    shutil.rmtree(target)
    export.prepare(copy, target)
    assert not left.exists(), "nobody's for hours"


def test_an_export_that_fails_leaves_nothing(copy, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        export.prepare(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.glob("*out*")] == [".out.lock"]


def test_exports_at_once_agree_on_one(copy, tmp_path):
    target = tmp_path / "out"
    others = [start(copy, target) for _ in range(2)]
    mine = [threading.Thread(target=export.prepare, args=(copy, target)) for _ in range(2)]
    for thread in mine:
        thread.start()
    for thread in mine:
        thread.join()
    first = listing(target)
    for other in others:
        assert other.communicate(timeout=60)[0].strip() == str(target)
        assert other.returncode == 0
    assert listing(target) == first, "one made it, the rest took it"
    assert list(tmp_path.glob(".out.*.partial")) == []


def test_an_export_that_another_node_finished_meanwhile_is_taken(copy, tmp_path):
    """Locks are of one node: another one's folder may appear while ours is being written."""
    config = checkpoint.read_config(copy)
    target = export.prepare(copy, tmp_path / "out")
    first = listing(target)
    export._export(config, target, export.record_of(config))
    assert listing(target) == first
    assert list(tmp_path.glob(".out.*.partial")) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_exported(copy, value):
    name = f"{checkpoint.LANGUAGE}layers.1.mlp.up_proj.weight"

    def spoil(tensor):
        tensor[3, 5] = value
        return tensor

    path = rewrite(copy, name, spoil)
    with pytest.raises(
        ConfigError, match=rf"{path.name}: {name} has 1 values of 10,240 that are NaN or infinite"
    ):
        export.prepare(copy)
    assert not export.default_folder(copy).exists()


def test_a_weight_of_the_tower_that_is_not_finite_is_named(copy):
    from tests.pipeline.models.gar_parts import load_parts

    name = f"{checkpoint.TOWER}norm_pre.bias"
    rewrite(copy, name, lambda tensor: tensor * float("nan"))
    with pytest.raises(ConfigError, match=rf"{name} has 48 values of 48 that are NaN"):
        load_parts(copy)


def test_an_answer_of_token_0_alone_is_an_error_and_no_caption():
    assert _checked([0, 0, 7], "GAR") == [0, 0, 7]
    assert _checked([], "GAR") == []
    with pytest.raises(
        StageFailed, match="token 0 only \\(4 times\\), as happens when the model computes NaN"
    ):
        _checked((0, 0, 0, 0), "GAR")
