"""What a run says of itself when it is done, and the flow from shards to that."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from PIL import Image

from paracaption.filters.held_out import is_held_out
from paracaption.model_training.data.corpus import unfinished
from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.decoding.region_captioner import RegionCaptioner, RegionCaptions
from paracaption.model_training.evaluation import held_out
from paracaption.model_training.toy import scores
from paracaption.model_training.train import metrics
from paracaption.model_training.train.trainer import fit
from paracaption.pipeline.corpus import reader
from paracaption.pipeline.io import draw
from paracaption.schemas.config import dump_config
from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.errors import ConfigError, IntegrityError
from paracaption.schemas.training import CorpusSource, Evaluation
from tests.model_training.toy_corpus import config_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    return fit(config_of(tmp_path_factory.mktemp("run") / "run", world, steps=2)).model


def test_scenes_are_the_corpus(world):
    scenes = list(iter_photo_regions(world))
    truth = json.loads((world.parent / "captions.json").read_text())
    assert len(scenes) == len(truth) == 12
    for scene in scenes:
        assert [region.caption for region in scene.regions] == list(
            truth[scene.name.rpartition("#")[2]].values()
        )
        assert all(region.dense().shape == scene.pixels.shape[:2] for region in scene.regions)


@pytest.mark.parametrize("together", [None, 1])
@pytest.mark.soak(keep=1)
def test_records_pictures_and_numbers_are_those_of_the_captions(world, trained, tmp_path, together):
    asked = Evaluation(
        corpus=str(world),
        images=9,
        pictures=2,
        max_new_tokens=8,
        steps=4,
        batch_size=1,
        regions_per_call=together,
    )
    summary = held_out.evaluate_held_out(trained, asked, tmp_path, "cpu")
    folder = tmp_path / "evaluation"
    records = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(records) == summary.images == 9
    captioner = RegionCaptioner.load(trained, "cpu")
    for scene, record in zip(iter_photo_regions(world), records, strict=False):
        masks = scene.masks()
        captions = captioner.caption(
            scene.pixels, masks, regions_per_call=together, max_new_tokens=8, steps=4
        )
        assert [region["caption"] for region in record["regions"]] == captions
        assert [region["corpus_caption"] for region in record["regions"]] == [
            r.caption for r in scene.regions
        ]
    assert summary.regions == sum(len(record["regions"]) for record in records)
    assert summary.forwards == sum(record["forwards"] for record in records) / 9
    assert json.loads((folder / "summary.json").read_text()) == summary._asdict()
    assert len([Image.open(path).load() for path in (folder / "pictures").iterdir()]) == 2
    assert str(world.parent) not in (folder / "captions.jsonl").read_text()


def test_pictures_table_and_corpus_number_a_region_alike(world, trained, tmp_path, monkeypatch):
    from paracaption.pipeline.explorer import training

    drawn = []
    real = draw.draw_image
    monkeypatch.setattr(draw, "draw_image", lambda *a, **k: drawn.append(a[1]) or real(*a, **k))
    asked = Evaluation(corpus=str(world), images=2, pictures=2, max_new_tokens=8, steps=4)
    held_out.evaluate_held_out(trained, asked, tmp_path, "cpu")
    (tmp_path / "metrics.jsonl").touch()
    shown = training.read_run(tmp_path).samples
    samples = [sample for sample, _ in reader.open_corpus(world).samples()][:2]
    assert [each.image for each in shown] == [f"{world.name}#{sample.key}" for sample in samples]
    for overlays, row, sample in zip(drawn, shown, samples, strict=True):
        wanted = [region.id for region in sample.regions]
        assert [draw.number_of(overlay, place) for place, overlay in enumerate(overlays)] == wanted
        assert [draw.color_of(overlay, place) for place, overlay in enumerate(overlays)] == [
            draw.color_of_region(number) for number in wanted
        ]
        assert [number for number, *_ in row.regions] == [str(number) for number in wanted]


def test_exact_counts_captions_that_are_the_corpus_s(world, trained, tmp_path, monkeypatch):
    asked = Evaluation(corpus=str(world), images=3, pictures=0, max_new_tokens=8, steps=4)
    said = iter([True, False] * 50)

    def captions(_, inputs, *args, **kwargs):
        for scene in list(iter_photo_regions(world))[: len([*inputs])]:
            yield RegionCaptions([r.caption if next(said) else "a cat" for r in scene.regions], 4, 16, 1.0)

    monkeypatch.setattr(RegionCaptioner, "iter_captions", captions)
    summary = held_out.evaluate_held_out(trained, asked, tmp_path, "cpu")
    assert summary.exact == pytest.approx((summary.regions + 1) // 2 / summary.regions)
    assert summary.tokens_per_forward == 4 and summary.empty == 0


def test_of_a_corpus_that_holds_images_out_these_alone_are_captioned(world, trained, tmp_path):
    out = tmp_path / "corpus"
    shutil.copytree(world, out)
    keys = [sample.key for sample, _ in reader.open_corpus(out).samples()]
    config = reader.open_corpus(out).config.model_copy(update={"held_out_share": 0.4})
    (out / "config.yaml").write_text(dump_config(config))
    asked = Evaluation(corpus=str(out), images=None, pictures=0, max_new_tokens=4, steps=1)
    held_out.evaluate_held_out(trained, asked, tmp_path, "cpu")
    lines = (tmp_path / "evaluation" / "captions.jsonl").read_text().splitlines()
    found = [json.loads(line)["image"].rpartition("#")[2] for line in lines]
    assert found == [key for key in keys if is_held_out(key, 0.4)] and 0 < len(found) < len(keys)
    (out / "config.yaml").write_text(dump_config(config.model_copy(update={"held_out_share": 1e-6})))
    with pytest.raises(ConfigError, match=r"corpus: no image to caption; .* raise the held_out_share"):
        held_out.evaluate_held_out(trained, asked, tmp_path, "cpu")


def test_memory_that_runs_out_halves_the_batch_and_changes_no_caption(world, trained, tmp_path, end_memory):
    asked = Evaluation(corpus=str(world), images=6, pictures=1, max_new_tokens=4, steps=2, batch_size=4)
    summary = held_out.evaluate_held_out(trained, asked, tmp_path, "cpu")
    lines = [json.loads(line) for line in (tmp_path / "evaluation/captions.jsonl").read_text().splitlines()]
    sizes = end_memory()
    assert held_out.evaluate_held_out(trained, asked, tmp_path, "cpu").exact == summary.exact
    again = [json.loads(line) for line in (tmp_path / "evaluation/captions.jsonl").read_text().splitlines()]
    assert [line["regions"] for line in again] == [line["regions"] for line in lines] and len(lines) == 6
    assert max(sizes) > 1 and sizes[-1] == 1


def test_scores_count_attributes_and_leaks(world, trained, monkeypatch):
    scenes = [scene for scene in iter_photo_regions(world) if len(scene.regions) > 1][:4]
    captioner = RegionCaptioner.load(trained, "cpu")

    def swapped(*_, **__):
        """Every region is called what the next one of its image is."""
        for scene in scenes:
            truths = [region.caption for region in scene.regions]
            yield RegionCaptions(truths[1:] + truths[:1], 1, 1, 0.0)

    monkeypatch.setattr(RegionCaptioner, "caption_photos", lambda *a, **k: list(swapped(*a, **k)))
    found = scores.score_captioner(captioner, scenes, DecodeOptions())
    assert found.exact == 0 and set(found.wrong) == {"size", "texture", "colour", "shape"}
    assert found.leaked == pytest.approx(sum(found.wrong.values()) / 4)  # all that is wrong is a neighbour's
    assert 0 < found.leaked_by_chance < found.leaked


def test_what_a_build_has_still_to_do_is_said(world, tmp_path):
    source = CorpusSource(corpus=str(world))
    assert unfinished(source) == ""
    [manifest] = (world / "coconut" / "manifests").glob("*.json")
    whole = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(IntegrityError, match=r"coconut-000000\.json: gone, though its unit is committed"):
        unfinished(source)
    (world / "log").rename(tmp_path / "log")  # as in a corpus of an early release, manifests count
    assert "coconut" in unfinished(source)
    (tmp_path / "log").rename(world / "log")
    manifest.write_bytes(whole.replace(b'"kept": ', b'"kept":  '))
    assert "index" in unfinished(source)
    manifest.write_bytes(whole)
    assert unfinished(source) == ""
    assert "not there yet" in unfinished(CorpusSource(corpus=str(tmp_path / "later")))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("outt: x")
    with pytest.raises(IntegrityError, match=r"config\.yaml"):
        unfinished(CorpusSource(corpus=str(tmp_path / "broken")))


@pytest.mark.ray
@pytest.mark.soak
def test_the_flow_waits_trains_and_evaluates(world, tmp_path, monkeypatch, prefect_server):
    from paracaption.flows import callbacks, train

    late, shown = tmp_path / "late", []
    asked = Evaluation(corpus=str(late), images=3, pictures=1, max_new_tokens=8, steps=4)
    config = config_of(tmp_path / "run", world, steps=3, evaluation=asked.model_dump())
    monkeypatch.setattr(train, "_CHECK_EVERY_S", 0.2)
    callbacks.on_training_step.set(shown.append)
    arrival = threading.Timer(3.0, late.symlink_to, [world])
    arrival.start()
    done = train.train_captioner(config, wait=True)
    again = train.train_captioner(config)
    found = {key: artifact(key) for key in ("training-loss", "training-last-step", "sample-captions")}
    assert done["steps"] == again["steps"] == 3
    assert [record["step"] for record in shown] == [1, 2, 3]
    assert len(metrics.read_metrics(tmp_path / "run")) == 3
    assert done["evaluation"]["images"] == 3
    assert done["evaluation"]["regions"] == again["evaluation"]["regions"]
    assert "data:image/png;base64" in found["training-loss"]
    assert "data:image/jpeg;base64" in found["sample-captions"]
    assert json.loads(found["training-last-step"])[0]["step"] == 3
    assert Image.open(tmp_path / "run" / "loss.png").width > 600


def artifact(key: str) -> str:
    """The latest one's content."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        return max(client.read_artifacts(artifact_filter=wanted), key=lambda each: each.created).data
