"""The file of `paracaption caption --out`: whose it is, and what is refused before it is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from paracaption.flows import stopping
from paracaption.flows.cli.app import app
from paracaption.model_training.decoding import caption_folder, caption_lines
from paracaption.schemas.errors import ConfigError
from tests.committed import merged

runner = CliRunner()
MODEL = Path(__file__).resolve().parents[3] / "samples/model"
QUICK = ["--strategy", "threshold", "--max-new-tokens", "4", "--steps", "2", "--device", "cpu"]


def run(out, photos, masks, *more, model=MODEL):
    """The command's result; errors of ours are raised."""
    given = ["--image", photos] if photos else []
    words = ["caption", "--model", model, *given, "--masks", masks, "--out", out, *QUICK, *more]
    result = runner.invoke(app, list(map(str, words)))
    if isinstance(result.exception, ConfigError | OSError):
        raise result.exception
    return result


def lines(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def square(left=4):
    return [[left, 4, left + 20, 4, left + 20, 24, left, 24]]


def write_photos(home, names=("a.png", "b.png"), annotated=("a.png", "b.png")):
    """Photos in `photos`, and `wipe.json` that knows all of them and has a square for some."""
    (home / "photos").mkdir()
    for name in names:
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(home / "photos" / name)
    images = [
        {"id": number, "file_name": name, "width": 64, "height": 64} for number, name in enumerate(names)
    ]
    boxes = [
        {"id": each["id"], "image_id": each["id"], "category_id": 1, "iscrowd": 0, "segmentation": square()}
        for each in images
        if each["file_name"] in annotated
    ]
    masks = home / "wipe.json"
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "box"}]}
    masks.write_text(json.dumps(content))
    return home / "photos", masks


def contents(home):
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_what_is_read_is_never_written(tmp_path):
    photos, masks = write_photos(tmp_path)
    (tmp_path / "link.json").symlink_to(masks)
    os.link(masks, tmp_path / "hard.json")
    shutil.copy(masks, tmp_path / "lines.jsonl.run.json")
    shutil.copytree(MODEL, tmp_path / "model")
    corpus = merged(tmp_path / "corpus")
    before = contents(tmp_path)
    for out in (
        masks,
        tmp_path / "photos" / ".." / "wipe.json",
        tmp_path / "link.json",
        tmp_path / "hard.json",
    ):
        with pytest.raises(ConfigError, match=r"--out .*json: would overwrite .*wipe\.json"):
            run(out, photos, masks)
    with pytest.raises(ConfigError, match=r"would overwrite .*lines\.jsonl\.run\.json"):
        run(tmp_path / "lines.jsonl", photos, tmp_path / "lines.jsonl.run.json")
    for given, inside, model in [
        ((photos, masks), photos / "out.jsonl", MODEL),
        ((None, corpus), corpus / "coconut" / "out.jsonl", MODEL),
        ((photos, masks), tmp_path / "model" / "out.jsonl", tmp_path / "model"),
    ]:
        with pytest.raises(ConfigError, match=r"lies in .*, which is read; name a file in another folder"):
            run(inside, *given, model=model)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", ["notes without an end of line", "notes\n", '{"photo": "a.png"}\n'])
def test_a_file_of_somebody_else_stays_as_it_is(tmp_path, content):
    photos, masks = write_photos(tmp_path)
    (tmp_path / "notes.txt").write_text(content)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"notes\.txt: is there already.*choose another --out, or move"):
        run(tmp_path / "notes.txt", photos, masks)
    assert contents(tmp_path) == before


HOLD = """
import sys, pathlib
from paracaption.model_training.decoding.caption_lines import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_say", str)
    photos, masks = write_photos(tmp_path)
    out = tmp_path / "captions.jsonl"
    words = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stdout.readline() == "held\n"
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match=r"captions\.jsonl: another process is writing it; wait"):
            run(out, photos, masks)
        assert contents(tmp_path) == before
        first.kill()
    assert run(out, photos, masks).exit_code == 0
    assert stopping._sentence() == ": 2 of 2 photos have a line; run the same command to continue"
    number = caption_lines.run_file(out).stat().st_ino
    found = lines(out)
    out.write_text(json.dumps(found[0]) + "\n" + json.dumps({"photo": "b.png", "error": "gone"}) + "\n")
    assert run(out, photos, masks).exit_code == 0 and lines(out) == found
    assert caption_lines.run_file(out).stat().st_ino == number, "the file that is locked is never replaced"


def test_a_place_that_cannot_be_written_is_named_by_its_own_name():
    with pytest.raises(OSError) as caught, caption_lines.only_writer(Path("/proc/captions.jsonl")):
        pass
    assert caught.value.filename == "/proc/captions.jsonl"


def test_a_photo_without_annotations_or_with_crowds_alone_is_done(tmp_path):
    photos, masks = write_photos(tmp_path, ("a.png", "b.png", "c.png"), annotated=("a.png", "c.png"))
    content = json.loads(masks.read_text())
    content["annotations"][1]["iscrowd"] = 1
    masks.write_text(json.dumps(content))
    out = tmp_path / "captions.jsonl"
    result = run(out, photos, masks)
    assert result.exit_code == 0, result.output
    assert "3 photos with 1 region captioned, 0 done before" in result.stdout
    assert "1 record of masks left out: see `left_out` in the lines" in result.stdout
    assert [(line["photo"], len(line["regions"])) for line in lines(out)] == [
        ("a.png", 1), ("b.png", 0), ("c.png", 0),
    ]  # fmt: skip
    assert lines(out)[2]["left_out"][0].startswith("crowd: ")
    assert "0 photos with 0 regions captioned, 3 done before" in run(out, photos, masks).stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: masks.write_text("{"), r"wipe\.json: not a JSON file of COCO"),
        (
            lambda masks: masks.write_text(masks.read_text().replace("segmentation", "caption")),
            r"wipe\.json: no annotation has a mask",
        ),
        (
            lambda masks: masks.write_text(masks.read_text().replace("b.png", "x.png")),
            r"no image is called b\.png; the file has a\.png, x\.png; give the photos that it describes",
        ),
        (
            lambda masks: masks.write_text(
                masks.read_text().replace('"images": [', '"images": [{"id": 9, "file_name": "b.png"}, ')
            ),
            r"several images are called b\.png; the file has b\.png, a\.png, b\.png; give",
        ),
    ],
)
def test_a_json_that_does_not_suit_all_photos_is_an_error_at_once(tmp_path, change, message):
    photos, masks = write_photos(tmp_path)
    change(masks)
    with pytest.raises(ConfigError, match=message) as caught:
        caption_folder.find_photos(str(photos), str(masks))
    assert "--key" not in str(caught.value)
