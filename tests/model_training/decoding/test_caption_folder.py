"""`paracaption caption --out`: pairs, lines, errors, and runs that were killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.decoding import buckets, caption_folder, loop, stream
from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.schemas.decoding import AUTO_CACHE, DecodeOptions
from paracaption.schemas.errors import ConfigError
from tests import committed
from tests.model_training.tiny_models import lively, photo

runner = CliRunner()
QUICK = ["--max-new-tokens", "6", "--steps", "3", "--device", "cpu"]
NUM_PHOTOS = 9


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model that no rounding sways, and photos of two sizes; every third has two masks in a folder."""
    home = tmp_path_factory.mktemp("folder")
    model, processor = lively(dtype=torch.float32)
    for each in (model, processor):
        each.save_pretrained(home / "model")
    write_photos(home, NUM_PHOTOS)
    return home


def write_photos(home, count):
    """Noise with one or two boxes each."""
    draw = np.random.default_rng(0)
    (home / "photos").mkdir()
    (home / "masks").mkdir()
    for number in range(count):
        size = (64, 96) if number % 2 else (64, 64)
        noise = draw.integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(noise).save(home / "photos" / f"p{number:03d}.png")
        names = [f"p{number:03d}/{each}" for each in "ab"] if number % 3 == 0 else [f"p{number:03d}"]
        for place, name in enumerate(names):
            mask = np.zeros(size, bool)
            mask[4 + 20 * place : 20 + 20 * place, 4:40] = True
            (home / "masks" / name).parent.mkdir(exist_ok=True)
            Image.fromarray(mask).save(home / "masks" / f"{name}.png")


def command(home, out, *more, photos="photos", masks="masks"):
    given = ["--image", home / photos] if photos else []
    return [
        "caption", "--model", home / "model", *given, "--masks", home / masks, "--out", out, *QUICK, *more,
    ]  # fmt: skip


def run(home, out, *more, **places):
    """The command's result; errors of ours are raised."""
    result = runner.invoke(app, list(map(str, command(home, out, *more, **places))))
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return result


def lines(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(home):
    """The lines of a run that was not stopped."""
    result = run(home, home / "whole.jsonl")
    assert result.exit_code == 0, result.output
    assert "9 photos with 12 regions captioned, 0 done before" in result.stdout and not result.stderr
    return (home / "whole.jsonl").read_bytes()


def test_a_folder_is_captioned_as_its_photos_are_one_by_one(home, whole):
    captioner = RegionCaptioner.load(home / "model", "cpu")
    found = lines(home / "whole.jsonl")
    assert [line["photo"] for line in found] == [f"p{number:03d}.png" for number in range(NUM_PHOTOS)]
    tasks = caption_folder.find_photos(str(home / "photos"), str(home / "masks"))
    for task, line in zip(tasks, found, strict=True):
        photo = task.read()
        expected = captioner.caption(photo.pixels, photo.masks(), max_new_tokens=6, steps=3)
        assert [region["caption"] for region in line["regions"]] == expected
        assert "seconds" not in line and line["width"] == photo.pixels.shape[1]


def test_a_torn_line_is_done_again_and_finished_photos_are_skipped(home, whole, tmp_path, monkeypatch):
    out = tmp_path / "captions.jsonl"
    run(home, out)
    kept = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:4]) + kept[4][:20])
    read = []
    real = caption_folder.read_photo_regions
    monkeypatch.setattr(
        caption_folder,
        "read_photo_regions",
        lambda image, *how, **more: read.append(image) or real(image, *how, **more),
    )
    assert "5 photos with 6 regions captioned, 4 done before" in run(home, out).stdout
    assert len(read) == 5 and out.read_bytes() == whole
    assert "0 photos with 0 regions captioned, 9 done before" in run(home, out).stdout
    assert len(read) == 5


def test_other_options_or_another_file_are_refused(home, whole, tmp_path):
    out = tmp_path / "captions.jsonl"
    out.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"without captions\.jsonl\.run\.json, which says how .* move"):
        run(home, out)
    shutil.copy(home / "whole.jsonl.run.json", tmp_path / "captions.jsonl.run.json")
    with pytest.raises(ConfigError, match=r"made with another prompt, temperature 0\.0"):
        run(home, out, "--temperature", "0.5", "--prompt", "What is it?")
    assert out.read_bytes() == whole
    out.write_bytes(whole[:10])  # no line is whole: it may begin again, with other options too
    assert run(home, out, "--temperature", "0.5").exit_code == 0


def test_the_header_and_lines_say_what_auto_means(home, tmp_path, monkeypatch):
    """For a published model: on the command line, too, where all options are given."""
    for each in lively(dtype=torch.float32, layout="reference"):
        each.save_pretrained(tmp_path / "model")
    write_photos(tmp_path, 1)
    used, real = [], buckets.bucket_of
    monkeypatch.setattr(stream, "bucket_of", lambda *given: used.append(real(*given)) or used[-1])
    out = tmp_path / "captions.jsonl"
    run(tmp_path, out)
    assert {each.refresh_every for each in used} == {8}
    header = json.loads((tmp_path / "captions.jsonl.run.json").read_text())
    assert AUTO_CACHE.items() <= header["options"].items()
    with pytest.raises(ConfigError, match="made with another refresh_every 8; take"):
        run(tmp_path, out, "--refresh-every", "4")
    auto = caption_folder.header_of(home / "model", "float32", DecodeOptions(), None, None, None, "masks")
    assert auto["options"] == DecodeOptions().stored()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda home: (home / "masks/p001.png").unlink(), r"photos: 1 without masks: p001\.png\. Photos"),
        (lambda home: (home / "photos/p001.png").unlink(), r"masks: 1 without a photo: p001\.png\. Photos"),
        (lambda home: (home / "photos/p001.jpg").touch(), "have one stem"),
        (lambda home: (home / "photos/notes.txt").touch(), "notes.txt is not one of the photos"),
        (lambda home: (home / "photos/more").mkdir(), "more is a folder"),
        (lambda home: shutil.rmtree(home / "masks"), "no such folder of masks"),
        (
            lambda home: (shutil.rmtree(home / "photos"), (home / "photos").touch()),
            "photos: a file; give the folder of photos, or leave out --out",
        ),
    ],
)
def test_what_has_no_partner_is_an_error_that_names_it(tmp_path, change, message):
    write_photos(tmp_path, 3)
    change(tmp_path)
    with pytest.raises(ConfigError, match=message):
        caption_folder.find_photos(str(tmp_path / "photos"), str(tmp_path / "masks"))


def test_a_photo_that_cannot_be_read_gets_a_line_and_is_tried_again(home, tmp_path):
    write_photos(tmp_path, 5)
    shutil.copytree(home / "model", tmp_path / "model")
    good = (tmp_path / "photos/p002.png").read_bytes()
    (tmp_path / "photos/p002.png").write_bytes(good[:50])
    out = tmp_path / "captions.jsonl"
    result = run(tmp_path, out)
    assert result.exit_code == 1 and "1 photo cannot be used" in result.stdout
    found = lines(out)
    assert [line["photo"] for line in found] == [f"p{number:03d}.png" for number in range(5)]
    assert ["error" in line for line in found] == [False, False, True, False, False]
    assert "p002.png" in found[2]["error"]
    (tmp_path / "photos/p002.png").write_bytes(good)
    assert run(tmp_path, out).exit_code == 0
    assert sorted(line["photo"] for line in lines(out)) == [f"p{number:03d}.png" for number in range(5)]
    assert not any("error" in line for line in lines(out))


def test_all_images_of_a_corpus_are_captioned(home, tmp_path):
    corpus = committed.merged(tmp_path / "corpus")
    out = tmp_path / "captions.jsonl"
    assert run(home, out, photos=None, masks=corpus).exit_code == 0
    photos = list(iter_photo_regions(corpus))
    keys = [photo.name.rpartition("#")[2] for photo in photos]
    named = [line["photo"].split("/") for line in lines(out)]
    assert [key for _, key in named] == keys
    assert {subset for subset, _ in named} == {"coconut", "sa1b"}, (
        "whatever else is, or will be, in the corpus"
    )
    assert [len(line["regions"]) for line in lines(out)] == [len(photo.regions) for photo in photos]
    all_lines = out.read_bytes()
    out.write_bytes(all_lines.splitlines(keepends=True)[0])
    assert run(home, out, photos=None, masks=corpus).exit_code == 0
    assert out.read_bytes() == all_lines


def test_images_of_a_corpus_are_read_in_any_order_each_by_itself(tmp_path, monkeypatch):
    corpus = committed.merged(tmp_path / "corpus")
    expected = {photo.name.rpartition("#")[2]: photo for photo in iter_photo_regions(corpus)}
    tasks = caption_folder.find_photos(None, str(corpus))
    monkeypatch.delattr("paracaption.pipeline.corpus.reader.Corpus.find_image")
    monkeypatch.delattr("paracaption.pipeline.corpus.reader.Corpus.samples")
    for task in [*reversed(tasks), *tasks]:
        photo = task.read()
        same = expected[task.name.partition("/")[2]]
        assert np.array_equal(photo.pixels, same.pixels)
        assert [each.caption for each in photo.regions] == [each.caption for each in same.regions]


@pytest.mark.parametrize(("photos", "masks"), [("photos/0.tar", "masks"), (None, "photos/0.tar")])
def test_a_shard_is_an_error_that_says_what_to_give(home, tmp_path, photos, masks):
    write_photos(tmp_path, 1)
    (tmp_path / "photos/0.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"0\.tar: a tar; if it is a shard .* give the corpus's folder"):
        caption_folder.find_photos(photos and str(tmp_path / photos), str(tmp_path / masks))


def alive_of(monkeypatch, kind, name, of):
    """The arrays that a function of `kind` made and that are alive, and how many were after each call."""
    alive, counts, made = set(), [], getattr(kind, name)

    def make(*args, **kwargs):
        found = made(*args, **kwargs)
        alive.add(number := len(counts))
        weakref.finalize(of(found), alive.discard, number)
        counts.append(len(alive))
        return found

    monkeypatch.setattr(kind, name, make)
    return alive, counts


def test_photos_that_wait_for_their_turn_have_no_pixels(tmp_path, monkeypatch):
    """The first caption takes as many steps as many others, which are read and decoded in the meantime."""
    write_photos(tmp_path, 40)
    _, pixels = alive_of(monkeypatch, caption_folder, "read_photo_regions", lambda photo: photo.pixels)
    tasks = caption_folder.find_photos(str(tmp_path / "photos"), str(tmp_path / "masks"))
    quick = DecodeOptions(strategy="threshold", threshold=0.0, max_new_tokens=4, steps=2)
    slow = DecodeOptions(strategy="left-to-right", max_new_tokens=4, steps=400)
    real = stream.decode_stream

    def one_is_slow(decoder, examples, num_rows):
        given = ((each, slow if number == 0 else quick) for number, (each, _) in enumerate(examples))
        return real(decoder, given, num_rows)

    monkeypatch.setattr(stream, "decode_stream", one_is_slow)
    captioner = RegionCaptioner(*lively(dtype=torch.float32))
    done = caption_folder.caption_folder(captioner, tasks, tmp_path / "captions.jsonl", quick, batch_size=2)
    assert done.photos == len(pixels) == 40
    assert max(pixels) <= 2 * 2 + 4, pixels


def test_views_are_let_go_when_their_features_are_there(monkeypatch):
    model, processor = lively(dtype=torch.float32)
    alive, _ = alive_of(monkeypatch, type(processor), "make_example", lambda example: example.views)
    launch, counts = loop.Loop.launch, []
    monkeypatch.setattr(loop.Loop, "launch", lambda loop: counts.append(len(alive)) or launch(loop))
    photos = [photo(number, 1) for number in range(4)]
    RegionCaptioner(model, processor).caption_photos(photos, max_new_tokens=4, steps=2, batch_size=4)
    assert counts and max(counts) <= 1, "the last one, which its generator has at hand"


def test_memory_that_runs_out_halves_the_batch_and_changes_no_line(home, whole, tmp_path, monkeypatch):
    real, sizes = RegionCaptioner.iter_captions, []

    def short_of_memory(captioner, photos, *args, batch_size, **how):
        sizes.append(batch_size)
        for number, found in enumerate(real(captioner, photos, *args, batch_size=batch_size, **how)):
            if batch_size > 2 and number == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield found

    monkeypatch.setattr(RegionCaptioner, "iter_captions", short_of_memory)
    out = tmp_path / "captions.jsonl"
    assert run(home, out).exit_code == 0
    assert out.read_bytes() == whole and sizes == [8, 4, 2]


def test_options_for_one_photo_are_refused(home, tmp_path):
    for more in (["--json", "-"], ["--key", "1"], ["--prompt", "a", "--prompt", "b"]):
        with pytest.raises(ConfigError, match="--out"):
            run(home, tmp_path / "captions.jsonl", *more)
    with pytest.raises(ConfigError, match=r"is a folder; name a file in it, such as .*captions\.jsonl"):
        run(home, tmp_path)
    with pytest.raises(ConfigError, match="a folder of this machine that exists"):
        run(home, tmp_path / "none" / "captions.jsonl")


@pytest.mark.soak
def test_a_killed_run_is_continued_to_the_same_file(home, tmp_path):
    write_photos(tmp_path, 40)
    shutil.copytree(home / "model", tmp_path / "model")
    expected = tmp_path / "expected.jsonl"
    assert run(tmp_path, expected, "--batch-size", "4").exit_code == 0
    out = tmp_path / "captions.jsonl"
    words = list(map(str, command(tmp_path, out, "--batch-size", "4")))
    process = subprocess.Popen(
        [sys.executable, "-m", "paracaption.flows.cli", *words], stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = out.read_bytes()
    assert 3 <= before.count(b"\n") < 40 and expected.read_bytes().startswith(before[: before.rfind(b"\n")])
    assert run(tmp_path, out, "--batch-size", "4").exit_code == 0
    assert out.read_bytes() == expected.read_bytes()
