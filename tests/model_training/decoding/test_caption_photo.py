"""`paracaption caption` with a tiny random model: order of captions, the record, and errors before a load."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.decoding import caption_photo, loop, read_regions
from paracaption.model_training.decoding.region_captioner import RegionCaptioner, RegionCaptions
from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.errors import ConfigError, OutOfMemory
from paracaption.schemas.renames import RenamedWarning
from tests import committed
from tests.tiny.perceptiondlm_model import write_model

BOXES = [(4, 4, 20, 16), (40, 8, 40, 50), (10, 40, 12, 12)]
QUICK = ["--max-new-tokens", "6", "--steps", "3"]
runner = CliRunner()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a photo and three masks."""
    folder = tmp_path_factory.mktemp("caption")
    write_model(folder / "model")
    noise = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC).save(folder / "photo.png")
    for number, (x, y, width, height) in enumerate(BOXES):
        mask = np.zeros((64, 96), bool)
        mask[y : y + height, x : x + width] = True
        Image.fromarray(mask).save(folder / f"mask{number}.png")
    return folder


@pytest.fixture(scope="module")
def captioner(home):
    return RegionCaptioner.load(home / "model", device="cpu")


def masks_of(home, *numbers):
    return [home / f"mask{number}.png" for number in numbers]


def caption(home, *args, model="model"):
    """The command's result; errors of ours are raised."""
    command = ["caption", "--model", home / model, "--image", home / "photo.png", "--device", "cpu", *args]
    result = runner.invoke(app, list(map(str, command)), env={"COLUMNS": "200"})
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return result


@pytest.mark.parametrize(("batch_size", "rows"), [(1, [1, 1, 1]), (2, [2, 1]), (8, [3])])
def test_groups_of_regions_are_decoded_as_many_at_once_as_asked(home, monkeypatch, batch_size, rows):
    admit, admitted = loop.Loop.admit, []

    def counted(loop, places, *rest):
        admitted.append(len(list(places)))
        admit(loop, places, *rest)

    monkeypatch.setattr(loop.Loop, "admit", counted)
    more = ["--regions-per-call", 1, "--batch-size", batch_size, *QUICK]
    caption(home, "--masks", *masks_of(home, 0, 1, 2), *more)
    assert admitted == rows


def trace_of(home, path, *args):
    """A trace of three groups."""
    more = ["--regions-per-call", 1, *QUICK, "--trace", path]
    result = caption(home, "--masks", *masks_of(home, 0, 1, 2), *more, *args)
    assert result.exception is None, result.exception
    return path.read_bytes()


def short_of_memory(most, admit):
    """`Loop.admit` where so many rows fit, and the numbers of rows that it was asked for."""
    sizes = []

    def admitted(loop, places, *rest):
        sizes.append(len(list(places)))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        admit(loop, places, *rest)

    return admitted, sizes


def test_memory_that_runs_out_halves_the_batch_of_one_photo_and_of_its_trace(home, tmp_path, monkeypatch):
    expected = trace_of(home, tmp_path / "all.html")
    alone, sizes = short_of_memory(3, loop.Loop.admit)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "admit", alone)
        assert trace_of(home, tmp_path / "one.html", "--batch-size", 1) == expected
    assert sizes == [1] * 6, "three captions, and three rows of the trace"
    halved, sizes = short_of_memory(1, loop.Loop.admit)
    monkeypatch.setattr(loop.Loop, "admit", halved)
    assert trace_of(home, tmp_path / "halved.html", "--batch-size", 2) == expected
    assert sizes == [2, 1, 1, 1] * 2


def test_one_photo_that_does_not_fit_is_an_error_that_says_what_to_do(home, captioner, monkeypatch):
    monkeypatch.setattr(loop.Loop, "admit", short_of_memory(0, None)[0])
    result = caption(home, "--masks", *masks_of(home, 0), *QUICK)
    assert isinstance(result.exception, OutOfMemory) and "use a larger GPU" in str(result.exception)
    photo = read_regions.read_photo_regions(home / "photo.png", masks_of(home, 0))
    with pytest.raises(OutOfMemory, match=r"1 sequences of regions: out of memory .*caption fewer regions"):
        list(captioner.caption_steps(photo.pixels, photo.masks()))


def record(home, *args):
    return json.loads(caption(home, *QUICK, "--json", "-", *args).stdout)


def test_captions_come_in_the_callers_order(home, captioner):
    one = record(home, "--masks", *masks_of(home, 0, 1, 2))["regions"]
    other = record(home, "--masks", *masks_of(home, 2, 0, 1))["regions"]
    captions = [region["caption"] for region in one]
    assert len(set(captions)) == 3
    assert [region["caption"] for region in other] == [captions[2], captions[0], captions[1]]
    assert [region["bbox"] for region in one] == [list(box) for box in BOXES]
    scene = read_regions.read_photo_regions(home / "photo.png", masks_of(home, 0, 1, 2))
    assert captions == captioner.caption(scene.pixels, scene.masks(), max_new_tokens=6, steps=3)


def test_the_command_asks_all_regions_or_each_what_prompt_says(home, captioner):
    masks = ["--masks", *masks_of(home, 0, 1)]
    one = record(home, *masks, "--prompt", "What is it?")["regions"]
    assert [region["prompt"] for region in one] == ["What is it?"] * 2
    scene = read_regions.read_photo_regions(home / "photo.png", masks_of(home, 0, 1))
    options = {"max_new_tokens": 6, "steps": 3}
    expected = captioner.caption(scene.pixels, scene.masks(), prompt="What is it?", **options)
    assert [region["caption"] for region in one] == expected
    each = record(home, *masks, "--prompt", "Its color?", "--prompt", "Its shape?")["regions"]
    assert [region["prompt"] for region in each] == ["Its color?", "Its shape?"]
    with pytest.raises(ConfigError, match="prompt: 3 texts for the 2 regions"):
        record(home, *masks, *["--prompt", "a"] * 3)


def test_any_number_of_masks_follows_the_option_wherever_and_however_it_stands(home):
    first, second, third = masks_of(home, 0, 1, 2)
    ways = [
        ["--masks", first, second, third],
        ["--masks", first, "--masks", second, "--masks", third],
        [f"--masks={first}", second, "--seed", 0, "--masks", third],
    ]
    sources = [[region["source"] for region in record(home, *way)["regions"]] for way in ways]
    assert sources == [[str(first), str(second), str(third)]] * 3
    assert "unexpected extra argument" in caption(home, "--seed", 0, first, "--masks", second).output


def test_the_record_tells_areas_tokens_time_options_and_model(home, tmp_path):
    path = tmp_path / "record.json"
    given = ["--strategy", "per-region", "--cache", "none", "--json", path]
    output = caption(home, *QUICK, *given, "--masks", *masks_of(home, 0, 1)).stdout
    found = json.loads(path.read_text())
    assert [region["area"] for region in found["regions"]] == [20 * 16, 40 * 50]
    assert found["photo"] == str(home / "photo.png") and (found["width"], found["height"]) == (96, 64)
    assert found["options"]["strategy"] == "per-region" and found["options"]["cache"] == "none"
    assert found["options"]["length"] == 6, "the name that records have had from the start"
    newer = {
        "position_thresholds",
        "factor",
        "redo_below",
        "settled",
        "end_of_text_last",
    }  # left out at defaults
    assert set(found["options"]) - {"length"} == set(DecodeOptions.model_fields) - {"max_new_tokens"} - newer
    assert found["model"] | {"folder": ""} == {
        "folder": "",
        "layout": "corrected",
        "device": "cpu",
        "dtype": "float32",
    }
    assert found["tokens"] == 2 * 6 and found["forwards"] == 3 and found["tokens_per_forward"] == 4
    assert found["seconds"] > 0
    for region in found["regions"]:
        assert f" {region['number']} {region['caption']}" in output
    assert "2 regions, 3 forwards, 4.0 tokens a forward" in output and str(path) in output


def test_more_regions_than_the_model_has_prompts_are_captioned_in_groups(home):
    found = record(home, "--masks", *masks_of(home, 0, 1, 2) * 3)
    captions = [region["caption"] for region in found["regions"]]
    assert len(captions) == 9 and all(captions)
    alone = record(home, "--regions-per-call", 1, "--masks", *masks_of(home, 0, 1))
    assert alone["forwards"] == 2 * 3 and found["forwards"] == 2 * 3


@pytest.mark.soak
def test_picture_and_traces_are_written(home, tmp_path):
    outputs = ["--picture", tmp_path / "p.png", "--trace", tmp_path / "t.gif"]
    caption(home, *QUICK, *outputs, "--masks", *masks_of(home, 0, 1))
    assert Image.open(tmp_path / "p.png").width > 900
    assert Image.open(tmp_path / "t.gif").n_frames == 1 + 3
    found = record(home, "--trace", tmp_path / "t.html", "--masks", *masks_of(home, 0, 1))
    page = (tmp_path / "t.html").read_text()
    assert 'max="3"' in page and page.count('class="caption"') == 2
    for region in found["regions"]:
        assert region["caption"].split()[0] in page


def test_a_corpus_and_a_key_need_no_photo(home, tmp_path):
    corpus = tmp_path / "out"
    committed.write(corpus, num_coconut=1, num_sa1b=0)
    command = ["caption", "--model", str(home / "model"), "--masks", f"{corpus}#000000000000", *QUICK]
    result = runner.invoke(app, [*command, "--json", "-", "--device", "cpu"])
    found = json.loads(result.stdout)
    assert found["photo"] == f"{corpus}#000000000000"
    assert all(region["corpus_caption"] and region["label"] for region in found["regions"])


def test_the_commands_defaults_are_the_decoders():
    parameters = {each.name: each.default for each in get_command(app).commands["caption"].params}
    for name, field in DecodeOptions.model_fields.items():
        assert parameters[name] == field.default, name


def test_the_old_name_of_an_option_still_works_and_a_warning_says_the_new_one(home):
    new = record(home, "--masks", *masks_of(home, 0))
    for old in (["--length", "6"], ["--length=6"]):
        with pytest.warns(RenamedWarning, match="`caption --length` is now `caption --max-new-tokens`"):
            result = caption(home, *old, "--steps", 3, "--json", "-", "--masks", *masks_of(home, 0))
        assert json.loads(result.stdout)["regions"] == new["regions"]


def test_a_caption_that_looks_like_markup_is_printed_as_it_is():
    mask = np.zeros((4, 4), bool)
    mask[1, 1] = True
    scene = read_regions.PhotoRegions(
        "photo",
        np.zeros((4, 4, 3), np.uint8),
        [read_regions.Region("m", read_regions.rle.from_mask(mask), "[b]")],
        [],
    )
    answer = caption_photo.CaptionedPhoto(
        scene,
        RegionCaptions(["[bold]a[/bold] <cup>"], 2, 8, 0.5),
        [3],
        DecodeOptions(),
        {"device": "cpu"},
    )
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(caption_photo.render_captions(answer))
    text = console.export_text()
    assert "[b]: [bold]a[/bold] <cup>" in text
    assert "1 region, 2 forwards, 4.0 tokens a forward, 0.50 s on cpu" in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--picture", "x.pdf"], "x.pdf: a picture's name ends in"),
        (["--trace", "x.mp4"], "x.mp4: a trace's name ends in"),
        (["--json", "no/such/x.json"], "no/such: no such folder"),
        (["--json", "TMP"], "is a folder; name a file in it"),
        (["--picture", "TMP/folder.png"], "folder.png: is a folder"),
        (["--trace", "TMP/folder.gif"], "folder.gif: is a folder"),
        (["--masks", "nowhere.png"], "nowhere.png: no such file"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(args, says, home, tmp_path):
    for name in ("folder.png", "folder.gif"):
        (tmp_path / name).mkdir()
    args = [str(arg).replace("TMP", str(tmp_path)) for arg in args]
    with pytest.raises(ConfigError, match=says):
        caption(home, "--masks", *masks_of(home, 0), *args, model="no-such-model")


def test_a_folder_that_holds_no_model_of_ours_is_an_error(home, tmp_path):
    with pytest.raises(ConfigError, match=r"config.json: no such file; give a folder that"):
        RegionCaptioner.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "pdmllm"}')
    with pytest.raises(ConfigError, match="a model of type 'pdmllm', not 'perceptiondlm'; convert"):
        RegionCaptioner.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: cannot be read as JSON"):
        RegionCaptioner.load(tmp_path)
    (tmp_path / "config.json").write_bytes((home / "model" / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"safetensors: not there"):
        RegionCaptioner.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model.safetensors: the file is empty; fetch it again"):
        RegionCaptioner.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((home / "model" / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"tokenizer.json: no such file; save the model again"):
        RegionCaptioner.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json: not a tokenizer .*; download it again"):
        RegionCaptioner.load(tmp_path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device", "gpu9"], "device: 'gpu9' cannot be used"),
        (["--dtype", "int8"], "dtype: unknown type 'int8'; choose one of"),
        (["--top-p", "0"], "top_p: has to be greater than 0"),
        (["--regions-per-call", "0"], "regions_per_call: 0"),
    ],
)
def test_options_that_suit_nothing_are_errors(args, says, home):
    with pytest.raises(ConfigError, match=says):
        caption(home, "--masks", *masks_of(home, 0), *args)


def test_a_strategy_that_is_none_is_answered_with_those_that_are(home):
    result = caption(home, "--masks", *masks_of(home, 0), "--strategy", "best")
    assert result.exit_code == 2
    assert "'best' is not one of" in result.output and "left-to-right" in result.output


def test_the_commands_help_needs_no_torch():
    script = """
import sys
from typer.testing import CliRunner
from paracaption.flows.cli.app import app
result = CliRunner().invoke(app, ["caption", "--help"])
assert result.exit_code == 0 and "--masks" in result.output
print(*sorted({"torch", "transformers", "ray", "prefect", "cv2"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
