"""A benchmark of one's own images, and what a captioner costs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.flows.evaluate import evaluate_captioner
from paracaption.model_training.decoding.read_regions import iter_photo_regions
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.evaluation import annotations, make_benchmark, profile, select_images
from paracaption.model_training.toy import scores
from paracaption.model_training.train.trainer import fit
from paracaption.pipeline.corpus import reader
from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.errors import ConfigError, StageFailed
from paracaption.schemas.evaluation import EvaluateConfig, Judge, ProfileConfig
from tests.model_training.benchmark_files import judge_of, served
from tests.model_training.toy_corpus import config_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


DRAFT = {
    "positive": [{"aspect": "color", "value": "red"}],
    "elsewhere": ["blue ring"],
    "absent": ["handle"],
}


def made(world: Path, to: Path, answer: Callable[[str], str], images: int = 5, **options):
    with served(answer) as server:
        judge = Judge(**judge_of(server, **options))
        return make_benchmark.make_benchmark(world, to, judge, images), server.requests


def test_a_benchmark_is_made_of_a_corpus(world, tmp_path):
    found, requests = made(world, tmp_path / "bench", lambda _: json.dumps(DRAFT))
    bench = annotations.read_benchmark(tmp_path / "bench", "paradlc")
    every = list(bench.regions())
    assert (found.images, found.regions, found.questions, found.without) == (
        5,
        len(every),
        3 * len(every),
        0,
    )
    assert len(requests) == len(every) and bench.unverified == 3 * len(every)
    schema = requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["positive", "elsewhere", "absent"]
    scenes = {scene.name.rpartition("#")[2]: scene for scene in iter_photo_regions(world)}
    for image in bench.images:
        scene = scenes[Path(image.name).stem.removeprefix("coconut-")]
        assert (image.pixels() == scene.pixels).all()
        masks = {region.mask.rle.counts for region in scene.regions}
        assert {region.mask.rle.counts for region in image.regions} <= masks
    kinds = [[question.type for question in region.questions] for region in every]
    assert kinds[0] == ["recognition", "positive", "negative", "negative"]
    assert [len(question.choices) for question in every[0].questions] == [2, 4, 2, 3]


def test_the_files_are_as_the_published_scripts_read_them(world, tmp_path):
    made(world, tmp_path / "bench", lambda _: json.dumps(DRAFT))
    images, qa, names = (
        json.loads((tmp_path / "bench" / f"{name}.json").read_text())
        for name in ("annotations", "qa", "class_names")
    )
    lookup = {
        (str(image["image_id"]), str(each["index"])): (image, each)
        for image in images
        for each in image["annotations"]
    }
    assert qa.keys() == names.keys() and len(lookup) == len(qa)
    for key, questions in qa.items():
        image, each = lookup[tuple(key.rsplit("_", 1))]
        assert each["mask_rle"]["size"] == [image["height"], image["width"]]
        x1, y1, x2, y2 = each["bbox"]
        assert 0 <= x1 < x2 <= image["width"] and 0 <= y1 < y2 <= image["height"]
        assert (tmp_path / "bench" / "images" / image["file_name"]).exists()
        for question in questions:
            assert question["verified"] is False and len(question["choices"]) <= 5


@pytest.mark.soak
def test_what_is_drafted_is_not_drafted_again_and_nonsense_is_left_out(world, tmp_path):
    turns = iter(range(1000))

    def answer(_: str) -> str:
        return "no JSON" if next(turns) % 2 else json.dumps(DRAFT)

    first, requests = made(world, tmp_path / "bench", answer)
    assert first.without == len(requests) // 2 and first.regions == len(requests) - first.without
    second, again = made(world, tmp_path / "bench", lambda _: json.dumps(DRAFT))
    assert len(again) == first.without and second.without == 0
    other, asked = made(
        world, tmp_path / "bench", lambda _: json.dumps(DRAFT | {"absent": []}), model="other"
    )
    assert len(asked) == len(requests) and other.questions == 2 * other.regions
    with pytest.raises(StageFailed, match="no region got a question"):
        made(world, tmp_path / "other", lambda _: "{}")


def test_the_review_page_has_every_question_and_runs_nothing_of_it(world, tmp_path):
    nasty = DRAFT | {"elsewhere": ["</script><script>alert(1)</script>"]}
    found, _ = made(world, tmp_path / "bench", lambda _: json.dumps(nasty))
    text = (tmp_path / "bench" / "review.html").read_text()
    assert text.count("<fieldset") == found.questions and "alert(1)</script>" not in text
    assert text.count("data:image/jpeg") == found.images


def test_reviews_are_of_questions_and_not_of_their_places(world, tmp_path):
    pages = []
    for value in ("red", "blue"):
        draft = DRAFT | {"positive": [{"aspect": "color", "value": value}]}
        made(world, tmp_path / "bench", lambda _, draft=draft: json.dumps(draft), images=1, model=value)
        text = (tmp_path / "bench" / "review.html").read_text()
        pages.append(re.findall(r'data-key="(.*?)" data-review="(\w+)"', text))
    assert len(set(pages[0])) == len(pages[0]) == len(pages[1])
    assert [one == other for one, other in zip(*pages, strict=True)] == [False, True, True] * (
        len(pages[0]) // 3
    )


@pytest.mark.parametrize("early", [False, True])
def test_reviewed_questions_are_not_written_over(world, tmp_path, early):
    for _ in range(2):  # what is drafted may be
        made(world, tmp_path / "bench", lambda _: json.dumps(DRAFT), images=1)
    path = tmp_path / "bench" / "qa.json"
    if early:
        (tmp_path / "bench" / make_benchmark.DRAFTED).unlink()
        made(world, tmp_path / "bench", lambda _: json.dumps(DRAFT), images=1)
        (tmp_path / "bench" / make_benchmark.DRAFTED).unlink()
    questions = json.loads(path.read_text())
    first = next(iter(questions.values()))
    if early:
        del first[0]["verified"]  # accepted
    else:
        del first[0]  # rejected
    path.write_text(json.dumps(questions, indent=1))
    with pytest.raises(ConfigError, match=r"qa\.json: has reviewed questions, .* move this file away"):
        made(world, tmp_path / "bench", lambda _: json.dumps(DRAFT), images=1)
    assert json.loads(path.read_text()) == questions


def row(key: str, x: int, area: int, category: str, caption: str) -> dict:
    return {
        **dict.fromkeys(select_images._COLUMNS, 0),
        **{"subset": "coconut", "key": key, "category": category, "core_category": None, "caption": caption},
        **{"image_width": 100, "image_height": 100, "bbox_x": x, "bbox_w": 10, "bbox_h": 10, "area": area},
        "shard": "a.tar",
    }


def test_regions_that_are_near_and_alike_are_confused():
    twins = [row("a", 0, 50, "dog", "a red dog"), row("a", 12, 50, "dog", "a red dog")]
    apart = [row("b", 0, 50, "dog", "a red dog"), row("b", 80, 50, "dog", "a red dog")]
    others = [row("c", 0, 50, "dog", "a red dog"), row("c", 80, 5, "sky", "pale clouds")]
    scores = [select_images.confusion(rows).mean() for rows in (twins, apart, others)]
    assert scores[0] > scores[1] > scores[2] and scores[0] > 0.9 and scores[2] < 0.1


def test_images_are_chosen_by_confusion_and_number_of_regions(tmp_path):
    rows = [row("one", 0, 5, "dog", "a dog")]
    rows += [row("far", x, 50, "dog", "a dog") for x in (0, 80)]
    rows += [row("near", x, 50, "dog", "a dog") for x in (0, 12)]
    many = [row("many", 9 * x, 50, "dog", f"a dog {x}") | {"region": x} for x in range(9)]
    rows += [*many, row("many", 90, 1, "sky", "pale clouds") | {"region": 9}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / reader.INDEX, row_group_size=15)
    found = select_images.choose_images(tmp_path, 9)
    assert [each.rows[0]["key"] for each in found] == ["near", "many", "far"]
    assert [each.rows[0]["key"] for each in select_images.choose_images(tmp_path, 1)] == ["near"]
    assert [row["region"] for row in found[1].rows] == list(range(8))
    with pytest.raises(ConfigError, match="no index"):
        select_images.choose_images(tmp_path / "nowhere", 1)


# Cost.


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    return fit(config_of(tmp_path_factory.mktemp("run") / "run", world, steps=2)).model


@pytest.mark.soak
def test_a_profile_has_every_study_with_all_that_it_depends_on(world, trained, tmp_path):
    config = ProfileConfig(
        corpus=str(world),
        images=2,
        regions=(1, 3, 7),
        max_new_tokens=(4, 8),
        steps=(4, 8),
        thresholds=(0.5,),
        repeats=1,
    )
    seen: list[profile.Row] = []
    rows = profile.measure_costs(trained, config, tmp_path, "cpu", report=seen.append)
    assert seen == rows
    assert {row.study for row in rows} == {
        *("regions", "parallelism", "length", "steps", "threshold", "cache", "batch")
    }
    by_regions = {(row.mode, row.regions): row for row in rows if row.study == "regions"}
    most = by_regions["parallel", 7].together
    for count in (1, 3, 7):
        parallel, sequential = by_regions["parallel", count], by_regions["sequential", count]
        assert sequential.together == 1 and parallel.together == min(most, count)
        assert sequential.tokens_per_forward <= 4 and parallel.forwards <= 4 * -(-count // most)
        assert parallel.seconds > 0 and "cpu" in parallel.device and parallel.torch
    assert all(row.same == 1 for row in rows if row.study in ("cache", "batch"))
    text = (tmp_path / "profile.md").read_text()
    assert text.count("\n") == len(rows) + 2 and "tokens per forward" in text
    assert len(json.loads((tmp_path / "profile.json").read_text())) == len(rows)
    assert (tmp_path / "profile.png").stat().st_size > 10_000


@pytest.mark.ray
@pytest.mark.soak
def test_the_flow_examines_a_model_on_a_world_with_known_truth(world, trained, tmp_path, prefect_server):
    options = {"model": str(trained), "device": "cpu", "decode": {"max_new_tokens": 10, "steps": 2}}
    few = {"images": 1, "regions": (1,), "load": 1, "max_new_tokens": (4,), "steps": (4,), "repeats": 1}
    config = EvaluateConfig(
        out=str(tmp_path),
        label="tiny",
        captioner={"name": "perceptiondlm", "options": options},
        toy=str(world),
        profile={"corpus": str(world), "thresholds": (), "batches": (), **few},
    )
    found = evaluate_captioner(config)
    captioner = RegionCaptioner.load(trained, "cpu")
    by_mode = scores.compare_decoding(
        captioner, list(iter_photo_regions(world)), DecodeOptions(max_new_tokens=10, steps=2)
    )
    for name, each in by_mode.items():
        assert found["toy"][name]["wrong"] == each.wrong and found["toy"][name]["forwards"] == each.forwards
    assert json.loads((tmp_path / "tiny" / "toy.json").read_text()).keys() == by_mode.keys()
    assert found["profile"]["seconds"].keys() == {"parallel 1", "sequential 1"}
    assert found["captioner"]["length"] == "10"


@pytest.mark.soak
def test_the_commands(world, trained, tmp_path):
    runner = CliRunner()
    asked = ["profile", "--model", trained, "--corpus", world, "--out", tmp_path / "profile"]
    asked += ["--images", 1, "--regions", 2, "--max-new-tokens", 4, "--steps", 4, "--repeats", 1]
    done = runner.invoke(app, list(map(str, asked)))
    assert done.exit_code == 0, done.output
    assert "profile.png" in done.output
    with served(lambda _: json.dumps(DRAFT)) as server:
        judge = tmp_path / "judge.yaml"
        judge.write_text(json.dumps(judge_of(server)))
        asked = ["benchmark", "make", world, "--to", tmp_path / "bench", "--judge", judge, "--images", 1]
        done = runner.invoke(app, list(map(str, asked)))
    assert done.exit_code == 0, done.output
    assert "unverified" in done.output
