"""Benchmarks of whole images: how lmms-eval's command is run, what counts as its result, and the table."""

import json
import re
from pathlib import Path

import pytest
import yaml

from paracaption.flows.cli import harness_table
from paracaption.model_training.evaluation import contained, harness
from paracaption.pipeline.config_file import load_evaluation
from paracaption.schemas.errors import ConfigError, StageFailed
from paracaption.schemas.evaluation import EvaluateConfig, Judge
from tests.chat_server import Reply, serving
from tests.model_training.benchmark_files import judge_of, served
from tests.model_training.evaluation.lmms_stand_in import write_package
from tests.model_training.tiny_models import lively

ROOT = Path(__file__).resolve().parents[3]
PAPER = {
    **{
        "MMStar": 63.7,
        "SeedBench": 78.9,
        "MMBench": 85.0,
        "MMMU": 47.2,
        "MathVista": 65.5,
        "MathVerse": 25.3,
    },
    **{"AI2D": 85.0, "ChartQA": 91.6, "DocVQA": 89.9, "InfoVQA": 74.6, "MMVP": 82.0, "BLINK": 60.3},
    **{"RealWorldQA": 73.7, "CV-Bench-2D": 79.8, "HallusionBench": 58.4, "V*": 73.3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in lively():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    package = write_package(tmp_path / "package")
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("PYTHONPATH", str(package))


def column(task, **more):
    return {"task": task, "metric": "right", **more}


def config(tmp_path, model, *tasks, **more):
    rows = [
        {"name": name, "paper": 60.0, "columns": {"released": column(name), "lmms-eval": column(name)}}
        for name in tasks
    ]
    given = {"batch_size": 4, "tasks": rows, **more.pop("harness", {})}
    options = {"model": str(model), "device": "cpu", "dtype": "float32"}
    captioner = {"name": "perceptiondlm", "options": options}
    return EvaluateConfig(out=str(tmp_path / "out"), label="tiny", captioner=captioner, harness=given, **more)


def run(given):
    return harness.run_harness(given, lambda *_: None)


def calls(tmp_path, name="released", task="good"):
    return (tmp_path / "out/tiny/harness" / name / task / "calls.txt").read_text().splitlines()


def test_a_task_that_cannot_be_run_ends_no_other_and_a_failure_is_one_though_the_command_exits_with_0(
    tmp_path, model, stand_in, capsys
):
    counted = []
    given = config(tmp_path, model, "gated", "broken", "killed", "empty", "good")
    rows = harness.run_harness(given, lambda *counts: counted.append(counts))
    found = {row["name"]: row["columns"]["released"] for row in rows}
    assert {name: each["status"] for name, each in found.items()} == {
        **{"gated": "no data", "broken": "failed", "killed": "failed", "empty": "failed", "good": "scored"}
    }
    assert (found["good"]["score"], found["good"]["questions"]) == (62.5, 8)
    assert "it is gated: accept its terms" in found["gated"]["reason"]
    assert found["broken"]["reason"] == "lmms-eval left no results (exit code 0): 'answer'"
    assert "(exit code -9)" in found["killed"]["reason"]
    assert "no number 'right'" in found["empty"]["reason"]
    assert counted[0] == ("benchmarks", 0, 10) and counted[-1] == ("benchmarks", 10, 10)

    harness_table.show_rows({"harness": rows})
    shown = capsys.readouterr().out
    assert re.search(r"good +60\.0 +62\.5 +\+2\.5 +62\.5 +\+2\.5", shown)
    assert re.search(r"gated +60\.0 +no data +no data", shown)
    assert f"broken, released: failed: lmms-eval left no results (exit code 0): 'answer' ({tmp_path}" in shown
    with pytest.raises(StageFailed, match=r"^6 runs .* failed: broken \(released\), broken \(lmms-eval\)"):
        harness_table.check_rows({"harness": rows})


def test_rows_without_data_are_no_failure(tmp_path, model, stand_in):
    harness_table.check_rows({"harness": run(config(tmp_path, model, "gated", "good"))})


def test_the_command_is_told_settings_task_batch_and_folder(tmp_path, model, stand_in):
    (tmp_path / "own").mkdir()
    given = config(tmp_path, model, harness={"limit": 3, "tasks": [
        {"name": "good", "include": str(tmp_path / "own"), "columns": {
            "released": column("good", asking={"prompt": "{{ text }}!", "options": {"max_new_tokens": 2}}),
            "lmms-eval": column("good"),
        }},
    ]})  # fmt: skip
    run(given)
    [released] = calls(tmp_path)
    [own] = calls(tmp_path, "lmms-eval")
    expected = r"--model paracaption --model_args settings=(settings-\w+\.json) --tasks good --batch_size 4 "
    expected += rf"--output_path results --log_samples --include_path {tmp_path}/own --limit 3"
    assert re.fullmatch(expected, own)
    assert released.endswith("--limit 3 --force_simple")
    name = re.search(r"settings=(\S+)", released)[1]
    settings = json.loads((tmp_path / "out/tiny/harness/released/good" / name).read_text())
    assert (settings["model"], settings["device"]) == (str(model), "cpu")
    assert settings["asking"]["prompt"] == "{{ text }}!"
    assert settings["asking"]["options"] == {"max_new_tokens": 2}


def test_what_has_a_score_is_not_run_again_unless_model_settings_or_tasks_change(tmp_path, model, stand_in):
    own = tmp_path / "own"
    own.mkdir()
    (own / "good.yaml").write_text("task: good")

    def rows(**asking):
        columns = {"released": column("good", asking=asking)}
        return {"columns": ["released"], "tasks": [{"name": "good", "include": str(own), "columns": columns}]}

    copied = tmp_path / "copied"
    copied.mkdir()
    for path in model.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    first = run(config(tmp_path, copied, harness=rows()))
    assert run(config(tmp_path, copied, harness=rows() | {"batch_size": 8})) == first
    assert len(calls(tmp_path)) == 1
    run(config(tmp_path, copied, harness=rows(short_answer=True)))
    assert len(calls(tmp_path)) == 2
    (own / "good.yaml").write_text("task: good\nmetadata: 2")
    run(config(tmp_path, copied, harness=rows(short_answer=True)))
    assert len(calls(tmp_path)) == 3
    weights = next(copied.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    run(config(tmp_path, copied, harness=rows(short_answer=True)))
    assert len(calls(tmp_path)) == 4


def test_what_failed_runs_again(tmp_path, model, stand_in):
    for _ in range(2):
        run(config(tmp_path, model, "broken", harness={"columns": ["released"]}))
    assert len(calls(tmp_path, task="broken")) == 2


def test_only_some_rows_and_columns_run(tmp_path, model, stand_in):
    rows = run(
        config(tmp_path, model, "good", "broken", harness={"only": ["good"], "columns": ["lmms-eval"]})
    )
    assert [(row["name"], list(row["columns"])) for row in rows] == [("good", ["lmms-eval"])]
    assert not (tmp_path / "out/tiny/harness/released").exists()


def judged(tmp_path, model, judge):
    rows = [{"name": "good", "columns": {"released": column("good", judge="contains")}}]
    return run(config(tmp_path, model, judge=judge, harness={"tasks": rows}))[0]["columns"]["released"]


def test_a_judge_that_cannot_be_asked_is_a_row_that_says_so(tmp_path, model, stand_in, monkeypatch):
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    found = judged(tmp_path, model, None)
    assert found["status"] == "no judge" and "set `judge`" in found["reason"]
    rows = [{"name": "good", "columns": {"released": column("good", judge="lmms-eval")}}]
    [row] = run(config(tmp_path, model, harness={"tasks": rows}))
    assert "OPENAI_API_KEY" in row["columns"]["released"]["reason"]
    assert not (tmp_path / "out").exists()


def test_a_judge_says_whether_an_answer_contains_the_right_one_and_is_asked_once(tmp_path, model, stand_in):
    said = {
        "0 a cat": "CORRECT",
        "1 a cat": "<think>It is not CORRECT?</think>\nINCORRECT",
        "2 a cat": "correct.",
    }

    def answer(prompt):
        assert "any one counts: ['a cat', 'cats']\n" in prompt
        return said.get(re.search("Prediction: (.*)", prompt)[1], "Incorrect.")

    with served(answer) as server:
        found = judged(tmp_path, model, judge_of(server))
        assert found["score"] == 25.0
        assert judged(tmp_path, model, judge_of(server))["score"] == 25.0
        assert len(server.requests) == 8
    assert len(calls(tmp_path)) == 1


def test_answers_that_were_not_judged_are_asked_again_and_never_a_score(tmp_path, model, stand_in):
    down = [True]

    def answer(body, _):
        return Reply("no", status=400) if down[0] and "0 a cat" in str(body) else Reply("CORRECT")

    with serving(answer) as server:
        found = judged(tmp_path, model, judge_of(server))
        assert found["status"] == "failed" and "1 of 8 answers are not judged" in found["reason"]
        down[0] = False
        asked = len(server.requests)
        assert judged(tmp_path, model, judge_of(server))["score"] == 100.0
        assert len(server.requests) == asked + 1


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_then_wrong_and_counted(
    tmp_path, model, stand_in, capsys
):
    """A greedy judge that is cut off while it thinks says the same again, however often the command runs."""
    cut = "<think>It might be CORRECT, or"

    def answer(body, _):
        asked = body["messages"][-1]["content"]
        if "0 a cat" in asked:
            return Reply(cut)
        return Reply(cut if "1 a cat" in asked and body["temperature"] == 0 else "CORRECT")

    with serving(answer) as server:
        judge = judge_of(server, max_retries=3)
        found = judged(tmp_path, model, judge)
        assert (found["status"], found["score"], found["unreadable"]) == ("scored", 87.5, 1)
        assert len(server.requests) == 8 + 1 + 2, "again, less greedily: once, and twice"
        assert judged(tmp_path, model, judge)["unreadable"] == 1 and len(server.requests) == 11
    harness_table.show_rows(
        {"harness": [{"name": "good", "paper": 1.0, "note": "", "columns": {"a": found}}]}
    )
    assert "good, a: 1 of 8 questions count as wrong" in capsys.readouterr().out


def test_a_judge_of_which_no_reply_can_be_read_is_no_score_and_another_one_is_asked(
    tmp_path, model, stand_in
):
    with served(lambda _: "<think>It might be CORRECT, or") as server:
        found = judged(tmp_path, model, judge_of(server))
    assert found["status"] == "failed" and "choose another one, or let it think less" in found["reason"]
    with served(lambda _: "INCORRECT") as server:
        assert judged(tmp_path, model, judge_of(server, model="another"))["score"] == 0


def test_no_answers_are_no_score(tmp_path):
    judge = Judge(name="openai", options={"model": "tiny", "base_url": "http://127.0.0.1:1/v1"})
    with pytest.raises(StageFailed, match="no answers to judge"):
        contained.share_contained(judge, tmp_path, tmp_path / "results")


def test_the_papers_16_are_configured_with_its_numbers_and_two_columns():
    given = load_evaluation(ROOT / "configs/evaluate/base.yaml").harness
    assert {task.name: task.paper for task in given.tasks} == PAPER
    assert {tuple(task.columns) for task in given.tasks} == {("released", "lmms-eval")}
    settings = {task.name: task.columns["released"].asking.options for task in given.tasks}
    assert {tuple(each.values()) for each in settings.values()} == {(2, 2, 2), (128, 128, 128), (256, 256, 1)}
    assert [name for name, each in settings.items() if each["block_length"] == 1] == [
        "MathVista",
        "MathVerse",
    ]


@pytest.mark.skipif(not (ROOT / "requirements.lock").exists(), reason="no clone, but an installed wheel")
def test_the_environment_of_lmms_eval_has_our_versions_but_for_protobuf():
    found = []
    for name in ("requirements.lock", "requirements-lmms.lock"):
        lines = [line.partition(" ;")[0].split("==") for line in (ROOT / name).read_text().splitlines()]
        found.append({package: {each[1] for each in lines if each[0] == package} for package, _ in lines})
    ours, theirs = found
    assert [name for name in theirs if name in ours and theirs[name] != ours[name]] == ["protobuf"]
    assert theirs["lmms-eval"] == {"0.7.3"} and theirs["torch"] == {"2.13.0"}


def test_mistakes_of_a_configuration_are_named(tmp_path):
    text = yaml.safe_load((ROOT / "configs/evaluate/base.yaml").read_text())
    path = tmp_path / "base.yaml"
    text["harness"]["only"] = ["MMStr"]
    path.write_text(yaml.safe_dump(text))
    with pytest.raises(ConfigError, match=r"harness: only: no task is called 'MMStr'"):
        load_evaluation(path)
    with pytest.raises(ConfigError, match=r"harness.tasks.0.columns.released.asking.options"):
        load_evaluation(path, ["harness.only=null", f"harness.tasks={wrong_options()}"])
    with pytest.raises(ConfigError, match="toy, profile and harness measure a perceptiondlm"):
        load_evaluation(path, ["harness.only=null", "captioner={name: predictions, options: {path: a}}"])


def wrong_options():
    asking = {"options": {"max_new_tokens": 4, "block_length": 2, "steps": 3}}
    return json.dumps(
        [{"name": "a", "columns": {"released": {"task": "a", "metric": "b", "asking": asking}}}]
    )
