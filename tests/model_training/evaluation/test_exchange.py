"""Benchmarks in the forms that other projects read, their captions, and the table of all captioners."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from paracaption.flows import preflight
from paracaption.flows.cli.app import app
from paracaption.flows.evaluate import evaluate_captioner
from paracaption.model_training.evaluation import exchange, run_benchmark
from paracaption.model_training.evaluation.annotations import read_benchmark
from paracaption.model_training.evaluation.predictions import PredictionOptions, read_predictions
from paracaption.model_training.evaluation.results_table import read_rows
from paracaption.pipeline.config_file import load_evaluation
from paracaption.pipeline.executor.findings import refuse_failures
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.evaluation import Bench, EvaluateConfig
from tests.model_training.benchmark_files import judge_of, served, write_bench

REGIONS = sorted((Path(__file__).resolve().parents[3] / "configs/evaluate/regions").glob("*.yaml"))


def _written(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def _lines(*values: object) -> str:
    return "".join(f"{json.dumps(value)}\n" for value in values)


# Masks out.


@pytest.mark.parametrize("kind", ["paradlc", "dlc"])
def test_coco_has_the_masks_the_photos_and_no_class_name(tmp_path, kind):
    benchmark = read_benchmark(write_bench(tmp_path / "bench", kind, images=3), kind)
    assert exchange.write_coco(benchmark, tmp_path / "coco") == 6
    found, keys = (
        COCO(str(tmp_path / "coco/annotations.json")),
        json.loads((tmp_path / "coco/keys.json").read_text()),
    )
    chosen = {
        number: found.loadAnns([number])[0]
        for image in found.imgs
        for number in found.getAnnIds(imgIds=[image], catIds=found.getCatIds(), iscrowd=None)
    }
    assert sorted(keys) == sorted(map(str, chosen))
    masks = {region.key: (image, region) for image in benchmark.images for region in image.regions}
    for number, annotation in chosen.items():
        image, region = masks[keys[str(number)]]
        assert np.array_equal(found.annToMask(annotation), region.dense())
        assert annotation["area"] == region.mask.area
        photo = tmp_path / "coco/images" / found.imgs[annotation["image_id"]]["file_name"]
        assert np.array_equal(np.asarray(Image.open(photo)), image.pixels())
    text = (tmp_path / "coco/annotations.json").read_text()
    assert "cat" not in text.replace("categor", "") and "dogs" not in text


def test_a_photo_that_is_missing_or_has_a_namesake_is_refused(tmp_path):
    benchmark = read_benchmark(write_bench(tmp_path / "bench"), "paradlc")
    twins = [image._replace(name=f"{number}/a.png") for number, image in enumerate(benchmark.images)]
    with pytest.raises(ConfigError, match=r"two photos of the benchmark are called a\.png"):
        exchange.write_coco(benchmark._replace(images=twins), tmp_path / "coco")
    (tmp_path / "bench/images/1.png").unlink()
    with pytest.raises(ConfigError, match=r"1\.png: no such photo"):
        exchange.write_coco(benchmark, tmp_path / "coco")


def test_requests_are_those_that_a_server_gets(tmp_path):
    folder = write_bench(tmp_path / "bench")
    benchmark = read_benchmark(folder, "paradlc")
    path = tmp_path / "requests.jsonl"
    with served(lambda _: "A cat.") as server:
        captioner = Backend(**judge_of(server, max_concurrency=1, extra_body={"seed": 7}))
        assert exchange.write_requests(benchmark, captioner, path) == 4 and not server.requests
        bench = Bench(name="b", kind="paradlc", folder=str(folder))
        run_benchmark.caption_images(bench, captioner, tmp_path / "out")
        sent = server.requests
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["0_0", "0_1", "1_0", "1_1"]
    assert [line["body"] for line in lines] == sent
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    picture = lines[0]["body"]["messages"][-1]["content"][0]["image_url"]["url"]
    assert base64.b64decode(picture.partition(",")[2])[:2] == b"\xff\xd8" and lines[0]["body"]["seed"] == 7


def test_only_a_captioner_that_asks_a_server_has_requests(tmp_path):
    benchmark = read_benchmark(write_bench(tmp_path / "bench"), "paradlc")
    with pytest.raises(ConfigError, match="'classical' asks no server; name `openai`"):
        exchange.write_requests(benchmark, Backend(name="classical"), tmp_path / "requests.jsonl")


# Captions in.


def test_captions_of_three_projects_are_read(tmp_path):
    plain = _written(tmp_path / "dam.json", {"1": "A cat.", "2": "Dogs.", "query": "<image>\nDescribe."})
    keys = _written(tmp_path / "keys.json", {"1": "0_0", "2": "0_1", "3": "1_0"})
    expected = {"0_0": "A cat.", "0_1": "Dogs."}
    assert read_predictions(PredictionOptions(plain, keys)) == expected
    parts = [
        _written(tmp_path / "p_0.json", _lines({"id": "0_0", "image": "0.png", "pred": " A cat."})),
        _written(tmp_path / "p_1.json", _lines({"id": "0_1", "image": "0.png", "pred": "Dogs."})),
    ]
    assert read_predictions(PredictionOptions(parts)) == expected

    def answer(key: str, text: str) -> dict:
        body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        return {"custom_id": key, "response": {"status_code": 200, "body": body}, "error": None}

    refused = {"custom_id": "1_0", "response": None, "error": {"message": "too long"}}
    batch = _lines(answer("0_0", "A cat."), refused, answer("0_1", "Dogs."))
    assert read_predictions(PredictionOptions(_written(tmp_path / "batch.jsonl", batch))) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_lines({"id": "1", "pred": "a"}, {"id": "1", "pred": "b"}), "two different captions for 1"),
        (_lines({"id": "1", "pred": "a"}, {"id": "2"}), "line 2: not a JSON object {key: caption}, or"),
        (_lines({"id": "1", "pred": "a"}, [1]), "line 2: not a JSON object"),
        (_lines({"id": "1", "pred": 3}), "line 1: .*the caption of 1 is not a text"),
        ('{"1": "a"', "not a JSON object"),
        ("[]", "not a JSON object"),
        (_lines({"id": "1", "pred": "a"}) + '{"id": "2", "pr', "line 2: not a JSON object"),
    ],
)
def test_a_file_that_is_not_understood_says_where(tmp_path, content, said):
    with pytest.raises(ConfigError, match=f"captions.json: {said}"):
        read_predictions(PredictionOptions(_written(tmp_path / "captions.json", content)))


def test_captions_of_something_else_are_refused_and_not_taken_for_missing(tmp_path):
    bench = Bench(name="b", kind="paradlc", folder=str(write_bench(tmp_path / "bench")))
    path = _written(tmp_path / "said.json", {"1": "A cat."})
    with pytest.raises(ConfigError, match="keys there are like '1', and the benchmark's like '0_0'"):
        captioner = Backend(name="predictions", options={"path": path})
        run_benchmark.caption_images(bench, captioner, tmp_path / "out")
    keys = _written(tmp_path / "keys.json", {"2": "0_1"})
    with pytest.raises(ConfigError, match=r"keys\.json: has no key for 1"):
        captioner = Backend(name="predictions", options={"path": path, "keys": keys})
        run_benchmark.caption_images(bench, captioner, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"captioner\.options\.keys: .*no such file"):
        read_predictions(PredictionOptions(path, str(tmp_path / "none.json")))


# Two benchmarks, two judges, one table.


def _two_benchmarks(tmp_path: Path, servers: list, label: str = "dam-3b", **paper: float) -> EvaluateConfig:
    """A configuration of two benchmarks with a judge each, and captions by the numbers of `write_coco`."""
    benches = []
    for kind, server in zip(("paradlc", "dlc"), servers, strict=True):
        folder = tmp_path / kind
        if not folder.exists():
            write_bench(folder, kind)
            exchange.write_coco(read_benchmark(folder, kind), tmp_path / "coco" / kind)
            said = {str(number): "A red cat." for number in range(1, 5)}
            _written(tmp_path / f"{kind}.json", said)
        benches.append({"name": kind, "kind": kind, "folder": str(folder), "judge": judge_of(server)})
    benches[0]["paper"] = paper
    options = {"path": "{benchmark}.json", "keys": "coco/{benchmark}/keys.json"}
    values = {"out": "out", "label": label, "captioner": {"name": "predictions", "options": options}}
    path = _written(tmp_path / "evaluate.yaml", {**values, "benchmarks": benches})
    return load_evaluation(path)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.soak
def test_each_benchmark_has_its_captions_and_its_judge(tmp_path, prefect_server, capsys):
    with served(lambda _: "A") as first, served(lambda _: "B") as second:
        config = _two_benchmarks(tmp_path, [first, second], average=62.4, seconds=276)
        refuse_failures(preflight.check_evaluation(config))
        found = evaluate_captioner(config)
        assert len(first.requests) == len(second.requests) == 12
    assert found["judges"].keys() == found["captioner"].keys() == {"paradlc", "dlc"}
    dlc, paradlc = read_rows(config.out)
    assert (paradlc.benchmark, paradlc.paper, paradlc.paper_seconds) == ("paradlc", 62.4, 276)
    assert paradlc.average is not None and dlc.average is not None and paradlc.average != dlc.average
    assert paradlc.difference == pytest.approx(paradlc.average - 62.4)
    app(["benchmark", "table", str(config.out)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "dam-3b" in printed and "62.4" in printed and max(map(len, printed.splitlines())) <= 80


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no results here"):
        read_rows(tmp_path)


def test_the_commands_write_what_a_configuration_names(tmp_path, capsys):
    with served(lambda _: "A") as server:
        config = _two_benchmarks(tmp_path, [server, server])
    path, to = str(tmp_path / "evaluate.yaml"), str(tmp_path / "to")
    app(["benchmark", "coco", path, "--to", to], standalone_mode=False)
    assert "paradlc: 4 regions of 2 photos" in capsys.readouterr().out
    assert (tmp_path / "to/dlc/keys.json").exists() and config.benchmarks[1].name == "dlc"
    values = json.loads((tmp_path / "evaluate.yaml").read_text())
    values["captioner"] = judge_of(server)
    path = _written(tmp_path / "vlm.yaml", values)
    app(["benchmark", "requests", path, "--to", to], standalone_mode=False)
    assert "dlc: 4 requests" in capsys.readouterr().out
    assert len((tmp_path / "to/paradlc.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("path", REGIONS, ids=[path.stem for path in REGIONS])
def test_every_row_of_the_table_has_a_configuration(path):
    config = load_evaluation(path)
    first = load_evaluation(REGIONS[0])
    assert [bench.kind for bench in config.benchmarks] == ["paradlc", "dlc"]
    assert [config.judge_of(bench) for bench in config.benchmarks] == [
        first.judge_of(bench) for bench in first.benchmarks
    ]
    assert config.out == first.out


def test_the_table_has_the_paper_s_captioners():
    labels = {load_evaluation(path).label for path in REGIONS}
    assert labels == {"perceptiondlm-8b", "gar-8b", "dam-3b", "pixelrefer-7b", "qwen2.5-vl-7b", "llada-v-8b"}
