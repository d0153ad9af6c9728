"""ParaDLC-Bench and DLC-Bench: the published protocol, and one captioner after another through it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from paracaption.flows.evaluate import evaluate_captioner
from paracaption.model_training.evaluation import (
    annotations,
    judges,
    quality,
    results_page,
    run_benchmark,
    scoring,
)
from paracaption.model_training.evaluation.scoring import Choice, Question
from paracaption.pipeline.config_file import load_evaluation
from paracaption.schemas.errors import ConfigError, StageFailed
from paracaption.schemas.evaluation import Bench, EvaluateConfig, Judge
from tests.model_training.benchmark_files import judge_of, predictions, served, write_bench
from tests.shared_data import recorded, shared_data

RECOGNITION = Question("Is it?", (Choice("Yes", "correct"), Choice("No", "incorrect")), "recognition")


def ask(kind: str, *scores: float) -> Question:
    return Question("?", tuple(Choice(f"choice {number}", s) for number, s in enumerate(scores)), kind)


# Protocol.


@pytest.mark.parametrize("kind", ["dlc", "paradlc"])
def test_answers_are_read_and_scored_as_the_published_scorers_do(kind):
    known = json.loads((recorded("benchmarks") / f"{kind}_scores.json").read_text())
    scores = []
    for case in known["cases"]:
        choices = [case["recognition_choices"], *(each["choices"] for each in case["questions"])]
        read = [
            scoring.parse_answer(answer, [text for text, _ in some])
            for answer, some in zip(case["responses"], choices, strict=True)
        ]
        assert read == case["parsed_index"]
        questions = [Question("", tuple(Choice(*pair) for pair in choices[0]), "recognition")]
        questions += [
            Question("", tuple(Choice(*pair) for pair in each["choices"]), each["type"])
            for each in case["questions"]
        ]
        found = scoring.score_region(questions, read)
        assert (found.score, found.positive or 0, found.negative) == (
            case["score"],
            case["score_pos"],
            case["score_neg"],
        )
        assert found.recognised == case["recognition"]
        scores.append(found)
    averages = scoring.average_scores(scores)
    assert averages == (known["avg_pos"], known["avg_neg"], known["avg"])


def test_what_the_published_scorers_stop_at_is_no_choice():
    assert scoring.parse_answer("", ["Yes", "No"]) is None
    assert scoring.parse_answer("  \n", ["Yes", "No"]) is None
    assert scoring.parse_answer("E.", ["Yes", "No"]) is None
    assert scoring.parse_answer("b", ["Yes", "No"]) == 1
    unclear = scoring.score_region([RECOGNITION, ask("positive", 1, -1)], [None, 0])
    assert (unclear.recognised, unclear.positive) == (None, 1)


@given(answer=st.text(max_size=12), choices=st.lists(st.text(max_size=6), min_size=2, max_size=5))
def test_any_answer_is_read(answer: str, choices: list[str]):
    found = scoring.parse_answer(answer, choices)
    assert found is None or 0 <= found < len(choices)


def test_a_wrong_recognition_caps_the_others_at_zero():
    questions = [RECOGNITION, ask("positive", 1, 0.5, -1), ask("negative", -1, 1), ask("negative", 1, -1)]
    right, wrong = (scoring.score_region(questions, [first, 0, 1, 1]) for first in (0, 1))
    assert (right.positive, right.negative, right.score) == (1, 0, 1 / 3)
    assert (wrong.positive, wrong.negative, wrong.score) == (0, -0.5, -1 / 3)
    assert wrong.worth == (0, 0, 0, -1)


def test_a_region_without_negative_questions_is_in_no_negative_mean():
    both = scoring.score_region([RECOGNITION, ask("positive", 1), ask("negative", -1)], [0, 0, 0])
    one = scoring.score_region([RECOGNITION, ask("positive", 0.5)], [0, 0])
    assert scoring.average_scores([both, one]) == (0.75, -1, -0.125)


def test_the_recognition_is_asked_as_published():
    assert "that the object in the description is an umbrella or an object" in (
        scoring.recognition_question("dlc", "umbrella").text
    )
    assert (
        "the objects in the description are shoes or objects"
        in scoring.recognition_question("dlc", "shoes").text
    )
    assert "the object in the description is a bus or" in scoring.recognition_question("dlc", "bus").text
    assert scoring.recognition_question("paradlc", "cat").text.startswith(
        "The object in the image is cat. Based on"
    )


# Files.


@pytest.mark.parametrize(
    ("kind", "images", "regions", "questions"), [("paradlc", 100, 299, 2345), ("dlc", 77, 100, 892)]
)
def test_the_published_files_are_read(kind, images, regions, questions):
    found = annotations.read_benchmark(shared_data("benchmarks") / kind, kind, "photos")
    every = list(found.regions())
    assert (len(found.images), len(every)) == (images, regions)
    assert sum(len(region.questions) - 1 for region in every) == questions
    assert all(
        region.mask.area and region.mask.rle.size == i.size for i in found.images for region in i.regions
    )
    assert len(found.missing_photos()) == images and found.unverified == 0


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("qa", lambda raw: raw | {"9_9": raw["0_0"]}, "annotations.json: no region 9_9"),
        ("class_names", lambda raw: {"0_0": "cat"}, "class_names.json: no class name for 0_1"),
        ("class_names", lambda raw: raw | {"0_0": " "}, "class_names.json: the class name of 0_0 is no word"),
        ("annotations", lambda raw: {"images": raw}, "annotations.json: not a list of images"),
        ("annotations", lambda raw: [{**raw[0], "height": 41}], "region 0_0: .*40"),
        (
            "annotations",
            lambda raw: [{"annotations": raw[0]["annotations"]}],
            "image 0: not in the published",
        ),
        ("qa", lambda raw: raw | {"0_0": [{"question": "?"}]}, "0_0, question 0: not in the published form"),
        ("qa", lambda raw: {}, "no questions"),
    ],
)
def test_a_benchmark_that_is_damaged_says_where(tmp_path, file, change, said):
    folder = write_bench(tmp_path / "bench", images=1)
    path = folder / f"{file}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=said):
        annotations.read_benchmark(folder, "paradlc")


# Captions, answers, scores.


def config_of(tmp_path: Path, captioner: dict, judge: dict | None, kind: str = "paradlc") -> EvaluateConfig:
    folder = tmp_path / "bench"
    if not folder.exists():
        write_bench(folder, kind)
    bench = {"name": "ours", "kind": kind, "folder": str(folder)}
    return EvaluateConfig(
        out=str(tmp_path / "out"), label="it", captioner=captioner, judge=judge, benchmarks=[bench]
    )


def run(config: EvaluateConfig) -> run_benchmark.Result:
    bench, folder = config.benchmarks[0], Path(config.out) / config.label / "ours"
    run_benchmark.caption_images(bench, config.backend(), folder)
    if config.judge:
        run_benchmark.judge_captions(bench, config.judge, folder)
    return run_benchmark.score_answers(bench, config.judge, folder)


SAID = {"0_0": "A red cat.", "0_1": "Two dogs by a tree.", "1_0": "A tree.", "1_1": "Dogs."}


def honest(prompt: str) -> str:
    """Answers from the caption's words."""
    caption = prompt.split("The description is:\n")[1].split("\n")[0].lower()
    if "Is it likely" in prompt or "is it likely" in prompt:
        name = "cat" if "cat" in prompt.split("following question")[1] else "dogs"
        return "A. Yes" if name in caption else "B. No"
    if "tree is mentioned" in prompt:
        return "A" if "tree" in caption else "B"
    return "A." if "red" in caption else "C."


def test_a_file_of_predictions_is_judged_and_marked(tmp_path):
    with served(honest) as server:
        config = config_of(tmp_path, predictions(tmp_path, SAID), judge_of(server))
        found = run(config)
        assert len(server.requests) == 12
        prompts = {request["messages"][0]["content"] for request in server.requests}
    assert all("text based on" not in prompt and "one of the choices:\n" in prompt for prompt in prompts)
    # positive: 1 0 0 0; negative: 1 -1 (min(0, -1)) -1 1; recognised: all but 1_0
    assert (found.positive, found.negative, found.average) == (0.25, 0.0, 0.125)
    assert (found.recognised, found.regions, found.questions, found.unanswered) == (0.75, 4, 12, 0)
    folder = Path(config.out) / "it" / "ours"
    assert json.loads((folder / "predictions.json").read_text()) == SAID
    details = json.loads((folder / "details.json").read_text())
    assert [details["1_0"][name] for name in ("recognised", "positive", "negative")] == [False, 0, -1]
    assert found.quality.captions == 4 and found.quality.names_it == 0.75


def test_to_score_again_asks_nothing(tmp_path):
    with served(honest) as server:
        config = config_of(tmp_path, predictions(tmp_path, SAID), judge_of(server))
        first = run(config)
        assert run_benchmark.caption_images(config.benchmarks[0], config.backend(), _folder(config)) == 0
        assert run(config) == first and len(server.requests) == 12
    assert run(config) == first  # the server is gone


def _folder(config: EvaluateConfig) -> Path:
    return Path(config.out) / "it" / "ours"


def test_a_judge_that_goes_away_is_asked_for_the_rest_only(tmp_path, monkeypatch):
    monkeypatch.setattr(run_benchmark, "_QUESTIONS_AT_ONCE", 4)
    asked: Counter[str] = Counter()

    def answer(prompt: str) -> str:
        asked[prompt] += 1
        return honest(prompt)

    with served(answer) as server:
        config = config_of(tmp_path, predictions(tmp_path, SAID), judge_of(server))
        real = judges.ServedChat.answer
        calls = iter(range(9))

        def failing(self, some):
            if next(calls) == 2:
                raise StageFailed("the server is down")
            return real(self, some)

        monkeypatch.setattr(judges.ServedChat, "answer", failing)
        with pytest.raises(StageFailed):
            run(config)
        part = run_benchmark.score_answers(config.benchmarks[0], config.judge, _folder(config))
        assert (part.questions, part.unanswered) == (12, 4)
        with open(_folder(config) / "answers.jsonl", "ab") as file:
            file.write(b'{"digest": "cut off')
        whole = run(config)
    assert set(asked.values()) == {1} and len(asked) == 12
    assert whole.unanswered == 0 and whole.average == 0.125


def test_a_question_without_an_answer_is_counted_and_asked_again(tmp_path):
    down = True

    def answer(prompt: str) -> str | None:
        return None if down and "tree is mentioned" in prompt else honest(prompt)

    with served(answer) as server:
        config = config_of(tmp_path, predictions(tmp_path, SAID), judge_of(server))
        assert run(config).unanswered == 4
        down = False
        found = run(config)
    assert (found.unanswered, found.average) == (0, 0.125)


def test_other_captions_need_another_label(tmp_path):
    config = config_of(tmp_path, predictions(tmp_path, SAID), None)
    run(config)
    changed = config_of(tmp_path, predictions(tmp_path, SAID | {"0_0": "A dog."}), None)
    with pytest.raises(ConfigError, match="made with another captioner; choose another `label`"):
        run(changed)


def test_captions_that_do_not_say_how_they_were_asked_count_as_asked_the_early_way(tmp_path, monkeypatch):
    monkeypatch.setattr(run_benchmark.captioners, "how_asked", lambda _, __: {})
    config = config_of(tmp_path, predictions(tmp_path, SAID), None)
    run(config)
    written = (_folder(config) / "captions.jsonl").read_bytes()
    asked = {"prompt": "Describe each masked region in detail.", "grouping": "even"}
    monkeypatch.setattr(run_benchmark.captioners, "how_asked", lambda _, __: asked)
    assert run(config).regions == 4
    assert (_folder(config) / "captions.jsonl").read_bytes() == written
    for other in ({"prompt": "Describe the masked region in detail."}, {"grouping": "published"}):
        monkeypatch.setattr(run_benchmark.captioners, "how_asked", lambda _, __, other=other: asked | other)
        with pytest.raises(ConfigError, match="`grouping: even`; to continue, set `prompt` and `grouping`"):
            run(config)


def test_a_region_without_a_caption_is_in_no_mean_and_counted(tmp_path):
    with served(honest) as server:
        some = {key: text for key, text in SAID.items() if key != "1_0"}
        config = config_of(tmp_path, predictions(tmp_path, some), judge_of(server))
        found = run(config)
    assert (found.regions, found.without_caption) == (3, 1)
    assert (found.positive, found.negative) == (1 / 3, 1 / 3)


def test_without_a_judge_only_the_captions_are_looked_at(tmp_path):
    found = run(config_of(tmp_path, predictions(tmp_path, SAID), None))
    assert (found.average, found.questions, found.quality.words) == (None, 0, 11 / 4)


def test_a_pipeline_captioner_sees_the_photos_and_not_the_names(tmp_path):
    config = config_of(tmp_path, {"name": "classical"}, None, kind="dlc")
    found = run(config)
    said = json.loads((_folder(config) / "predictions.json").read_text())
    assert set(said) == {"0", "1", "10", "11"} and all(said.values())
    assert not any("cat" in text or "dog" in text for text in said.values())
    assert found.seconds > 0 and found.forwards == 0


@pytest.mark.parametrize(
    "odd", ["half an emoji", "number", "millions of words", "endless", "letters", "generator"]
)
def test_an_odd_answer_of_an_own_captioner_is_no_caption_or_what_it_can_mean(tmp_path, odd):
    own = {"name": "tests.odd_answers:OddCaptioner", "options": {"odd": [odd, "good"]}}
    run(config := config_of(tmp_path, own, None, kind="dlc"))
    said = json.loads((_folder(config) / "predictions.json").read_text())
    whole = odd in ("half an emoji", "generator")
    assert len(said) == (4 if whole else 2)


def test_missing_photos_are_an_error_or_left_out(tmp_path):
    config = config_of(tmp_path, {"name": "classical"}, None)
    (tmp_path / "bench" / "images" / "1.png").unlink()
    with pytest.raises(ConfigError, match=r"1\.png: no such photo"):
        run(config)
    bench = config.benchmarks[0].model_copy(update={"on_missing_photo": "skip"})
    found = run(config.model_copy(update={"benchmarks": [bench]}))
    assert (found.regions, found.without_caption) == (2, 2)


def test_a_photo_of_another_size_is_refused(tmp_path):
    config = config_of(tmp_path, {"name": "classical"}, None)
    Image.new("RGB", (61, 40)).save(tmp_path / "bench" / "images" / "0.png")
    with pytest.raises(ConfigError, match="61x40, its annotation 60x40"):
        run(config)


def test_a_judge_that_cannot_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="judge"):
        judges.load_judge(Judge(name="vllm", options={"model": str(tmp_path)}))
    with pytest.raises(ValidationError, match="'vllm' or 'openai'"):
        Judge(name="lexical")  # pyright: ignore - a judge of the pipeline that answers no choices
    with pytest.raises(ConfigError, match="no_such_option"):
        judges.load_judge(Judge(name="openai", options={"no_such_option": 1}))


# Pictures.


def test_a_judge_that_sees_gets_the_crop_and_its_mask(tmp_path):
    with served(lambda _: "A") as server:
        run(config_of(tmp_path, predictions(tmp_path, SAID), judge_of(server, images=True)))
        contents = [request["messages"][0]["content"] for request in server.requests]
    assert len(contents) == 12
    for content in contents:
        kinds = [part["type"] for part in content]
        assert kinds == ["text", "image_url", "text", "image_url", "text"]
        assert content[4]["text"].startswith("\nAnswer the multiple-choice question")
        photo, mask = (_decoded(part) for part in content if part["type"] == "image_url")
        assert photo.shape[:2] == mask.shape and mask.any()


def _decoded(part: dict) -> np.ndarray:
    data = part["image_url"]["url"].partition("base64,")[2]
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


@settings(deadline=None)
@given(
    box=st.tuples(st.integers(0, 199), st.integers(0, 149), st.integers(1, 120), st.integers(1, 120)),
)
def test_the_crop_is_three_boxes_around_the_region(box):
    x, y, w, h = box
    pixels = np.random.default_rng(0).integers(0, 255, (150, 200, 3), np.uint8)
    mask = np.zeros((150, 200), bool)
    mask[y : y + h, x : x + w] = True
    photo, shown = (np.array(Image.open(io.BytesIO(data))) for data in judges.crop_and_mask(pixels, mask))
    w, h = min(w, 200 - x), min(h, 150 - y)
    center_x, center_y = x + w / 2, y + h / 2
    w, h = max(w, 56), max(h, 56)
    left, top = int(center_x - w / 2), int(center_y - h / 2)
    rows, columns = (
        slice(max(top - h, 0), min(top + 2 * h, 150)),
        slice(max(left - w, 0), min(left + 2 * w, 200)),
    )
    assert np.array_equal(photo, pixels[rows, columns])
    assert np.array_equal(shown == 255, mask[rows, columns])


# What is left behind.


def test_the_page_shows_all_and_runs_nothing_of_it(tmp_path):
    nasty = "<script>alert(1)</script>"
    with served(lambda prompt: nasty if "tree is" in prompt else honest(prompt)) as server:
        config = config_of(tmp_path, predictions(tmp_path, SAID | {"0_0": nasty}), judge_of(server))
        run(config)
    text = results_page.write_page(config.benchmarks[0], "<b>it</b>", _folder(config)).read_text()
    assert nasty not in text and "<b>it</b>" not in text
    assert text.count("&lt;script&gt;") >= 5 and text.count("data:image/jpeg") == 2
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.soak
def test_the_flow_runs_all_and_keeps_the_history(tmp_path, monkeypatch, prefect_server):
    with served(honest) as server:
        config = config_of(tmp_path, predictions(tmp_path, SAID), judge_of(server))
        path = tmp_path / "evaluate.yaml"
        path.write_text(json.dumps(config.model_dump(mode="json")))
        loaded = load_evaluation(path)
        assert loaded == config
        evaluate_captioner(loaded)
        found = evaluate_captioner(loaded)
        assert len(server.requests) == 12
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert len(history) == 2 and history[1] == json.loads(json.dumps(found))
    assert history[0]["benchmarks"][0]["average"] == 0.125 and history[0]["judge"]["model"] == "tiny"
    assert (_folder(config) / "page.html").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"benchmarks": []}, "nothing to do"),
        ({"label": "../up"}, "label"),
        ({"toy": "corpus"}, "toy, profile and harness measure a perceptiondlm"),
        ({"judge": {"name": "lexical"}}, "judge.name"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(tmp_path, change, said):
    config = config_of(tmp_path, predictions(tmp_path, SAID), None).model_dump(mode="json") | change
    path = tmp_path / "evaluate.yaml"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=said):
        load_evaluation(path)


# Quality.


def test_quality_is_counted():
    described = [
        quality.ImageCaptions(["a red dog", "a red dog", ""], ["dog", "cat", ""]),
        quality.ImageCaptions(["the tall man of the tall man of the tall man of"], ["person"]),
    ]
    found = quality.measure_quality(described)
    assert (found.captions, found.empty, found.words) == (4, 0.25, 18 / 3)
    assert found.distinct_1 == 7 / 18 and found.same == 0.5
    assert found.repetitive == 1 / 3 and found.names_it == 2 / 3
    assert quality.measure_quality([]).names_it is None


def test_bench_takes_some_of_its_images(tmp_path):
    folder = write_bench(tmp_path / "bench", images=3)
    bench = Bench(name="some", kind="paradlc", folder=str(folder), images=2)
    assert [image.name for image in run_benchmark.open_benchmark(bench).images] == ["0.png", "1.png"]


def test_a_judge_without_captions_says_so(tmp_path):
    bench = Bench(name="some", kind="paradlc", folder=str(write_bench(tmp_path / "bench")))
    judge = Judge(name="openai", options={"model": "m", "base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(ConfigError, match="no captions yet"):
        run_benchmark.judge_captions(bench, judge, tmp_path)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<html>404</html>", "a web page"),
        (b'{"cut": ', "truncated"),
    ],
)
def test_a_benchmarks_file_that_is_no_json_is_called_what_it_is(tmp_path, data, told):
    (tmp_path / "annotations.json").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"annotations\.json: not JSON \(.*{told}.*\); download it again"):
        annotations.read_json(tmp_path / "annotations.json")
    (tmp_path / "annotations.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert annotations.read_json(tmp_path / "annotations.json") == {"a": 1}


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"digest": 1}', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", [run_benchmark.CAPTIONS, run_benchmark.ANSWERS])
def test_a_line_of_results_that_no_evaluation_wrote_is_named(tmp_path, name, line):
    config = config_of(tmp_path, predictions(tmp_path, SAID), None)
    run(config)
    path = _folder(config) / name
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(before + line + b"\n")
    judge = Judge(name="openai", options={"model": "m", "base_url": "http://127.0.0.1:9/v1"})
    number = len(before.splitlines()) + 1
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: line {number} is not what an evaluation"):
        run_benchmark.score_answers(config.benchmarks[0], judge, _folder(config))
