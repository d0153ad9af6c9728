"""`paracaption ask` with a tiny random model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.decoding.answered import about_regions
from paracaption.model_training.decoding.block_rows import BlockRows
from paracaption.model_training.decoding.chat import Chat
from paracaption.model_training.decoding.read_regions import read_photo_regions
from paracaption.schemas.errors import ConfigError, OutOfMemory
from tests.tiny.perceptiondlm_model import SMALLEST, write_model

QUICK = ["--max-new-tokens", "6", "--block-length", "3"]
FIELDS = {"max_new_tokens": 6, "block_length": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a photo and a mask."""
    folder = tmp_path_factory.mktemp("ask")
    write_model(folder / "model", **SMALLEST)
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    mask = np.zeros((64, 96), bool)
    mask[10:30, 20:50] = True
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def chat(home):
    return Chat.load(home / "model", "cpu")


def ask(home, *args):
    """What the command prints; errors of ours are raised."""
    command = ["ask", "--model", home / "model", "--device", "cpu", *QUICK, *args]
    result = CliRunner().invoke(app, list(map(str, command)))
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_each_of_several_questions_stands_above_its_answer(home, chat):
    photo, texts = home / "photo.png", ("what is it?", "where?")
    expected = [line for text in texts for line in (text, f"  {chat.ask(text, photo, **FIELDS)}")]
    assert ask(home, "--image", photo, *texts).splitlines() == expected
    box = (20, 10, 50, 30)
    expected = [
        line for text in texts for line in (text, f"  1  {chat.ask(text, photo, region=box, **FIELDS)}")
    ]
    assert ask(home, "--image", photo, "--box", "20,10,50,30", *texts).splitlines() == expected
    long = "say something " * 20 + "else"  # longer than a file's name may be
    assert ask(home, long).strip() == chat.ask(long, **FIELDS)
    assert ask(home, "say something").strip() == chat.ask("say something", **FIELDS)


def test_several_images_are_asked_about_together(home, chat):
    photo = home / "photo.png"
    expected = chat.ask("<image> or <image>?", [photo, photo], **FIELDS)
    assert ask(home, "--image", photo, "--image", photo, "<image> or <image>?").strip() == expected


def test_a_conversation_knows_the_answers_before(home, chat):
    photo = home / "photo.png"
    first = chat.ask("what is it?", photo, **FIELDS)
    second = chat.ask("why?", photo, turns=[("what is it?", first)], **FIELDS)
    out = ask(home, "--conversation", "--image", photo, "--json", "-", "what is it?", "why?")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["answer"] for record in records] == [first, second]
    assert records[1]["turns"] == [["what is it?", first]] and "turns" not in records[0]
    assert records[0]["options"]["block_length"] == 3 and records[0]["model"]["layout"] == "corrected"


def test_answers_before_one_that_fails_are_printed_and_written(home, chat, tmp_path):
    out, asked = tmp_path / "answers.jsonl", ["what?", "why <|eot_id|>?"]
    command = ["ask", "--model", home / "model", "--device", "cpu", *QUICK, "--conversation", *asked]
    expected = chat.ask("what?", **FIELDS)
    written = CliRunner().invoke(app, list(map(str, [*command, "--json", out])))
    assert isinstance(written.exception, ConfigError)
    assert written.stdout.splitlines() == ["what?", f"  {expected}", str(out)]
    printed = CliRunner().invoke(app, list(map(str, [*command, "--json", "-"])))
    assert isinstance(printed.exception, ConfigError)
    assert json.loads(printed.stdout)["answer"] == expected
    [line] = out.read_text().splitlines()
    assert json.loads(line)["question"] == "what?"


def test_regions_are_asked_about_one_by_one(home, chat):
    photo, mask = home / "photo.png", home / "mask.png"
    boxes = [(20, 10, 50, 30), (0, 0, 9, 9)]
    expected = [chat.ask("name it", photo, region=box, **FIELDS) for box in boxes]
    given = [part for box in boxes for part in ("--box", ",".join(map(str, box)))]
    assert ask(home, "--image", photo, *given, "name it").splitlines() == [
        f"{number}  {answer}" for number, answer in enumerate(expected, 1)
    ]
    [record] = ask(home, "--image", photo, "--json", "-", "name it", "--masks", mask).splitlines()
    assert json.loads(record)["answer"] == expected[0]
    assert json.loads(record)["region"] == {"number": 1, "label": "", "bbox": [20, 10, 30, 20]}


def test_regions_that_are_asked_about_keep_no_dense_masks(home):
    photo = read_photo_regions(home / "photo.png", [home / "mask.png"])
    asked = about_regions(["what?", "where?"], photo)
    assert [each.question.region for each in asked] == [photo.regions[0].mask.rle] * 2


def test_a_stream_ends_as_the_answer(home, chat):
    photo = home / "photo.png"
    assert ask(home, "--stream", "--image", photo, "what?").strip() == chat.ask("what?", photo, **FIELDS)


def test_a_streamed_question_that_does_not_fit_is_an_error_that_says_what_to_do(home, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BlockRows, "step", short)
    with pytest.raises(OutOfMemory, match=r"one question: out of memory .*shorten the question"):
        ask(home, "--stream", "what?")


def test_json_lines_are_written_whole(home, tmp_path):
    printed = ask(home, "--json", tmp_path / "answers.jsonl", "one", "two").splitlines()
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [f"  {record['answer']}" for record in records] == printed[1:4:2]
    assert [record["question"] for record in records] == ["one", "two"]
    assert all(record["tokens"] <= 6 and record["ended"] in ("end", "length") for record in records)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image", "PHOTO", "--box", "1,2,3", "what"], "four numbers x1,y1,x2,y2"),
        (["--box", "1,2,3,4", "what"], "--box needs the photo"),
        (["--conversation", "--image", "PHOTO", "--box", "1,2,3,4", "what"], "is about whole images"),
        (["--stream", "one", "two"], "--stream prints one answer"),
        (["--key", "3", "what"], "--key names an image"),
        (["--image", "PHOTO", "--key", "3", "--box", "1,2,3,4", "what"], "--key names an image"),
        (["--image", "PHOTO", "--masks", "PHOTO", "what"], "'what' after --masks counts as masks; give the"),
        (
            ["--image", "PHOTO", "PHOTO", "what"],
            "photo.png' counts as a question, and is a file; .* repeat --image",
        ),
        (["--image", "PHOTO"], "no question; give the question first"),
        (["--steps", "5", "what"], "5 for 2 blocks of 3 tokens"),
        (["--json", "nowhere/a.jsonl", "what"], "nowhere: no such folder"),
        (["--json", "FOLDER", "what"], "model: is a folder; name a file in it"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(home, monkeypatch, args, message):
    monkeypatch.setattr(Chat, "load", lambda *_: pytest.fail("loaded a model"))
    paths = {"PHOTO": home / "photo.png", "FOLDER": home / "model"}
    given = [paths.get(part, part) for part in args]
    with pytest.raises(ConfigError, match=message):
        ask(home, *given)
