"""The real lmms-eval with our plugin, in its own environment: `.venv/lmms`, which `make soak` makes.

Its models and documents are made here, and nothing is downloaded.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from paracaption.model_training.decoding.chat import Chat, Question
from paracaption.schemas.answering import AnswerOptions
from tests.model_training.evaluation import lmms_tasks
from tests.model_training.evaluation.test_harness import model  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[3]
PYTHON = Path(os.environ.get("PARACAPTION_LMMS", ROOT / ".venv/lmms")) / "bin/python"
WRONG = (1, 4)
"""Documents whose right answer is not the model's, of six."""
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}; `make .venv/lmms/done` makes it"),
]


def run(*arguments, expect=0):
    """A program of that environment, without the hub."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    command = [str(PYTHON), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def answers(model):  # noqa: F811
    """What Chat answers here, by task."""
    chat = Chat.load(model, "cpu", "float32")
    found = {}
    for name in lmms_tasks.NAMES:
        kwargs = lmms_tasks.KWARGS[name]
        given = {key: kwargs[key] for key in ("max_new_tokens", "steps", "block_length") if key in kwargs}
        questions = [
            Question(lmms_tasks.prompt(name, doc), [doc[key] for key in ("image_1", "image_2") if doc[key]])
            for doc in lmms_tasks.documents(name, 6)
        ]
        found[name] = [each.text.strip() for each in chat.ask_all(questions, AnswerOptions(**given))]
    return found


@pytest.fixture(scope="module")
def tasks(answers, tmp_path_factory):
    """Tasks for which four of the model's six answers are right."""
    right = {
        name: [f"{text}, no" if number in WRONG else text for number, text in enumerate(texts)]
        for name, texts in answers.items()
    }
    return lmms_tasks.write_tasks(tmp_path_factory.mktemp("tasks"), right)


def test_five_kinds_of_tasks_have_chats_answers_and_their_score(model, tasks, answers, tmp_path):  # noqa: F811
    names = ",".join(f"toy_{name}" for name in answers)
    run("-m", "paracaption.model_training.evaluation.lmms_run", "--model", model, "--include", tasks,
        "--tasks", names, "--batch-size", 4, "--to", tmp_path / "found.json", "--samples",
        "--set", "device=cpu", "--set", "dtype=float32")  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["scores"] == {f"toy_{name}": {"right": pytest.approx(4 / 6)} for name in answers}
    said = {name: [each["answer"] for each in found["answers"][f"toy_{name}"]] for name in answers}
    assert said == answers
    assert len({text for texts in answers.values() for text in texts}) > 15  # no constant


def test_a_task_that_is_not_there_is_an_error(model, tasks, tmp_path):  # noqa: F811
    done = run("-m", "paracaption.model_training.evaluation.lmms_run", "--model", model, "--include", tasks,
               "--tasks", "toy_shrt", "--to", tmp_path / "found.json", expect=1)  # fmt: skip
    assert "error: " in done.stderr and "no task 'toy_shrt'; some of its tasks are toy_choices" in done.stderr


def test_evaluate_runs_lmms_evals_own_command_and_goes_on_where_it_was(model, tasks, answers, tmp_path):  # noqa: F811
    own = tmp_path / "tasks"
    shutil.copytree(tasks, own)
    (own / "toy_gone.yaml").write_text((own / "toy_short.yaml").read_text().replace("toy_short", "toy_gone")
                                       .replace("utils.results", "utils.text"))  # fmt: skip
    row = {"include": str(own), "paper": 60.0}
    config = {
        "out": str(tmp_path / "out"),
        "label": "tiny",
        "captioner": {"name": "perceptiondlm", "options": {"device": "cpu", "dtype": "float32"}},
        "harness": {
            "batch_size": 4,
            "tasks": [
                {**row, "name": "Short", "columns": {"released": asked("toy_short", prompt="{{ text }}")}},
                {**row, "name": "Broken", "columns": {"lmms-eval": asked("toy_gone")}},
                {"name": "MMStar", "paper": 63.7, "columns": {"lmms-eval": asked("mmstar")}},
            ],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["-m", "paracaption.flows.cli", "evaluate", tmp_path / "config.yaml", "--model", model]
    done = run(*command, expect=2)
    assert re.search(r"Short +60\.0 +66\.7 +\+6\.7", done.stdout), done.stdout
    assert "Broken, lmms-eval: failed: lmms-eval left no results (exit code 0)" in done.stdout
    assert "MMStar, lmms-eval: no data: the data of mmstar: it is not in the cache" in done.stdout
    assert "1 runs of lmms-eval failed: Broken (lmms-eval)" in done.stderr
    table, _, _ = done.stdout.partition("Broken, lmms-eval")
    assert max(map(len, table.splitlines())) <= 80

    log = tmp_path / "out/tiny/harness/released/Short/log.txt"
    before = log.stat().st_mtime_ns
    again = run(*command, "--set", "harness.only=[Short]", "--json")
    [found] = json.loads(again.stdout)["harness"]
    assert found["columns"]["released"]["score"] == pytest.approx(100 * 4 / 6)
    assert log.stat().st_mtime_ns == before


def test_a_trial_says_what_the_whole_evaluation_takes(model, tasks, tmp_path):  # noqa: F811
    columns = {"released": asked("toy_reasoning", prompt="{{ text }}")}
    config = {
        "out": str(tmp_path / "out"),
        "label": "whole",
        "captioner": {
            "name": "perceptiondlm",
            "options": {"model": str(model), "device": "cpu", "dtype": "float32"},
        },
        "harness": {
            "batch_size": 1,
            "tasks": [{"name": "Reasoning", "include": str(tasks), "columns": columns}],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = ["-m", "paracaption.flows.cli"]
    run(*command, "evaluate", path)
    run(*command, "evaluate", path, "--set", "label=trial", "--set", "harness.limit=3")
    found = json.loads(run(*command, "estimate", path, "--evaluation", "--json").stdout)
    [cost] = found["costs"]
    whole = json.loads((tmp_path / "out/whole/harness/released/Reasoning/result.json").read_text())
    assert (cost["count"], cost["measured"], cost["missing"]) == (6, 3, "")
    assert (whole["questions"], whole["available"]) == (6, 6)
    assert 0 < whole["answering_s"] < whole["seconds"] - whole["startup_s"] < whole["seconds"]
    assert whole["answering_s"] / 5 < 6 * cost["each_s"] < 5 * whole["answering_s"]
    assert whole["seconds"] / 5 < found["seconds"] < 5 * whole["seconds"]


def asked(task, **asking):
    return {"task": task, "metric": "right", "asking": asking}


def test_the_papers_16_are_tasks_of_lmms_eval_with_these_numbers_and_prompts(tmp_path):
    run(Path(__file__).with_name("lmms_prompts.py"), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    harness = yaml.safe_load((ROOT / "configs/evaluate/base.yaml").read_text())["harness"]
    assert len(found) == len(harness["tasks"]) == 16
    for task in harness["tasks"]:
        for name, column in task["columns"].items():
            known = found[task["name"]][name]
            assert column["metric"] in known["numbers"], (task["name"], name)
            assert known["output"] == "generate_until"
            assert known["decoding"].get("max_new_tokens", 128) <= 256
    assert found["BLINK"]["released"]["members"] == 14
    letter = "Answer with the option's letter from the given choices directly."
    options = f"What is it?\nA. a cat\nB. a dog\n{letter}"
    for name in ("AI2D", "MMVP", "BLINK", "CV-Bench-2D", "RealWorldQA", "V*"):
        assert found[name]["released"]["prompt"] == options, name
    assert found["MMBench"]["released"]["prompt"] == f"Look.\n{options}"
    assert found["MMStar"]["released"]["prompt"] == f"What is it?\nOptions: A: a cat, B: a dog\n{letter}"
    assert found["MMMU"]["released"]["prompt"] == options.replace("is it", "is <image 1>")
    for name in ("ChartQA", "DocVQA", "InfoVQA"):
        assert found[name]["released"]["prompt"].startswith("What is it?\n\nPlease reason step by step"), name
