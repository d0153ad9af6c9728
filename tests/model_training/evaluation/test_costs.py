"""What an evaluation takes, as `paracaption estimate --evaluation` says from a trial of it."""

import io
import json
import re
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from paracaption.flows.cli import evaluation_costs
from paracaption.model_training.evaluation import costs, harness, run_benchmark
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.evaluation import Bench, EvaluateConfig
from tests.flows.in_process import run as command
from tests.model_training.benchmark_files import judge_of, predictions, served, write_bench
from tests.model_training.evaluation.test_harness import column, config, model, stand_in  # noqa: F401 - fixtures
from tests.tiny.perceptiondlm_model import write_model

SHORT = {"options": {"max_new_tokens": 4, "steps": 2, "block_length": 2}}


def test_costs_are_of_the_images_that_are_scored_and_not_of_others_under_the_label(tmp_path):
    folder = write_bench(tmp_path / "bench", images=3)
    said = {f"{image}_{index}": "A cat." for image in range(3) for index in range(2)}
    backend = Backend(**predictions(tmp_path, said))
    bench = Bench(name="some", kind="paradlc", folder=str(folder))
    run_benchmark.caption_images(bench, backend, tmp_path / "out")
    path = tmp_path / "out" / run_benchmark.CAPTIONS
    header, *lines = map(json.loads, path.read_text().splitlines())
    lines = [
        each | {"seconds": 4.0**number, "forwards": 2, "tokens": 10 * number}
        for number, each in enumerate(lines)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in (header, *lines)))
    fewer = bench.model_copy(update={"images": 2})
    found = run_benchmark.score_answers(fewer, None, tmp_path / "out")
    assert (found.regions, found.seconds, found.forwards, found.tokens_per_forward) == (4, 5.0, 4, 2.5)
    times = run_benchmark.read_times(fewer, backend, None, tmp_path / "out")
    assert (times.regions, times.captions_s) == (4, 5.0)
    assert run_benchmark.score_answers(bench, None, tmp_path / "out").seconds == 21.0


def rows(*judges, **more):
    """A benchmark of whole images for each judge, which all run the stand-in's task `good`."""
    tasks = [
        {
            "name": f"row {number}",
            "columns": {"released": column("good", judge=judge, asking=SHORT)},
            **more,
        }
        for number, judge in enumerate(judges)
    ]
    return {"tasks": tasks, "columns": ["released"]}


def try_out(given, limit=4):
    """Run the trial of an evaluation, and return its folder."""
    limited = given.harness.model_copy(update={"limit": limit})
    harness.run_harness(given.model_copy(update={"label": "trial", "harness": limited}), lambda *_: None)
    return Path(given.out) / "trial"


def change_result(trial, **changes):
    path = trial / "harness/released/row_0/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_questions_are_multiplied_and_what_is_done_once_is_not(tmp_path, model, stand_in):  # noqa: F811
    given = config(tmp_path, model, harness=rows("none", questions=7))
    trial = try_out(given)
    change_result(trial, seconds=4.5)
    [cost] = costs.estimate_costs(given, trial)
    assert (cost.count, cost.measured, cost.judged) == (9, 4, 0)  # 9 are in the data, whatever YAML says
    assert cost.forwards == 9 * 2
    assert (cost.each_s, cost.judge_s, cost.startup_s) == (0.25, None, 4.5 - 4 * 0.25)
    assert cost.seconds == pytest.approx(9 * 0.25 + 3.5) and not cost.missing


def test_the_judge_of_lmms_eval_is_what_its_command_takes_besides(
    tmp_path,
    model,  # noqa: F811
    stand_in,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    given = config(tmp_path, model, harness=rows("lmms-eval"))
    trial = try_out(given)
    change_result(trial, seconds=9.5)
    [cost] = costs.estimate_costs(given, trial)
    assert (cost.judged, cost.judge_s, cost.startup_s) == (9, 2.0, 0.5)
    assert cost.seconds == pytest.approx(9 * (0.25 + 2.0) + 0.5)


def test_a_judge_that_answers_is_timed_and_another_one_is_not_known(tmp_path, model, stand_in):  # noqa: F811
    def answer(_):
        time.sleep(0.1)
        return "CORRECT"

    with served(answer) as server:
        given = config(tmp_path, model, harness=rows("contains"), judge=judge_of(server, max_concurrency=1))
        trial = try_out(given)
        [cost] = costs.estimate_costs(given, trial)
        assert (cost.judged, cost.missing) == (9, "") and 0.1 <= cost.judge_s < 1
        assert cost.seconds == pytest.approx(9 * (0.25 + cost.judge_s) + cost.startup_s)
        other = given.model_copy(update={"judge": given.judge.model_copy(update={"options": {
            **given.judge.options, "model": "another"}})})  # fmt: skip
        [cost] = costs.estimate_costs(other, trial)
    assert cost.judge_s is None and cost.missing.startswith("judge: no answers")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"asking": {"options": {"max_new_tokens": 8}}}, "asking"),
        ({"task": "better"}, "task"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"batch_size": 2}, "batch_size"),
    ],
)
def test_a_trial_of_another_configuration_is_refused(tmp_path, model, stand_in, changes, named):  # noqa: F811
    given = config(tmp_path, model, harness=rows("none"))
    trial = try_out(given)
    values = given.model_dump(mode="json", exclude_none=True)
    place = values["harness"]["tasks"][0]["columns"]["released"]
    if named == "dtype":
        place = values["captioner"]["options"]
    elif named == "batch_size":
        place = values["harness"]
    place |= changes
    with pytest.raises(
        ConfigError, match=f"released/row_0: the trial ran with another {named}; run it again"
    ):
        costs.estimate_costs(EvaluateConfig(**values), trial)


def test_what_a_trial_lacks_is_said_and_not_counted_as_nothing(tmp_path, model, stand_in):  # noqa: F811
    given = config(tmp_path, model, harness=rows("none", "none", questions=3))
    trial = try_out(given)
    (trial / "harness/released/row_1/result.json").unlink()
    change_result(trial, seconds=1.5)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given.model_dump(mode="json", exclude_none=True)))
    done = command("estimate", path, "--evaluation")
    assert done.code == 0 and re.search(r"row 1 +released +3 +0 .*\\?", done.out), done.out
    assert "at least 3 s on 1 GPU\nnot in it:\n- row 1, released: no result with seconds in" in done.out
    found = json.loads(command("estimate", path, "--evaluation", "--json").out)
    assert [each["seconds"] for each in found["costs"]] == [pytest.approx(9 * 0.25 + 0.5), None]
    assert len(found["missing"]) == 1


def test_without_a_trial_it_counts_and_says_how_to_make_one(tmp_path, model):  # noqa: F811
    bench = {"name": "b", "kind": "paradlc", "folder": str(write_bench(tmp_path / "bench", images=3))}
    harness = rows("none", "lmms-eval", questions=3)
    harness["tasks"].append({"name": "unknown", "columns": {"released": column("good")}})
    given = config(tmp_path, model, harness=harness, benchmarks=[bench])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given.model_dump(mode="json", exclude_none=True)))
    done = command("estimate", path, "--evaluation")
    assert done.code == 0, done.err
    known = "6 regions, 6 questions (not known of 1 of 3 rows), 3 questions to a judge, 12 forward"
    assert f"together: {known}" in done.out
    assert "forward passes of one question at most (not known of 1 of 3 rows)" in done.out
    assert "- unknown, released: number of questions: set `questions`" in done.out
    assert f"hours are not known: no trial in {tmp_path}/out/trial; make one" in done.out
    made = (
        f"evaluate {path} --set label={given.label}-trial --set harness.limit=20 --set benchmarks.0.images=5"
    )
    assert made in done.err
    few = ("--set", "benchmarks.0.images=1", "--set", "label=x", "--set", "captioner.options.batch_size=2")
    again = command("estimate", path, "--evaluation", *few, "--gpus", "4").err
    kept = "--evaluation --set captioner.options.batch_size=2"
    assert again.endswith(f"estimate {path} {kept} --run {tmp_path}/out/x-trial --gpus 4\n")
    assert made.replace(f"{given.label}-", "x-").split(" --set ", 1)[1] in again and "images=1" not in again
    gone = command("estimate", path, "--evaluation", "--run", tmp_path / "gone")
    assert gone.code == 2 and "--run takes the folder of a trial's results" in gone.err
    assert command("estimate", path, "--evaluation", "--sources").code == 2
    assert command("estimate", path, "--evaluation", "--gpus", "1.5").code == 2


def test_a_configuration_of_the_other_command_is_told_from_a_wrong_one(tmp_path):
    configs = Path(__file__).resolve().parents[3]
    done = command("estimate", configs / "configs/evaluate/base.yaml")
    assert done.code == 2 and "base.yaml: this is a configuration of `evaluate`; add --evaluation" in done.err
    done = command("estimate", configs / "samples/build.yaml", "--evaluation")
    assert done.code == 2 and "build.yaml: this is a configuration of `build`; leave out --eval" in done.err
    (tmp_path / "x.yaml").write_text("nothing: 1\n")
    for more in ((), ("--evaluation",)):
        done = command("estimate", tmp_path / "x.yaml", *more)
        assert done.code == 2 and "x.yaml" in done.err and "this is a configuration" not in done.err


def test_a_trial_of_a_few_photos_says_what_all_of_them_take(tmp_path):
    write_model(tmp_path / "model")
    folder = write_bench(tmp_path / "bench", images=6)

    def answer(_):
        time.sleep(0.03)
        return "A"

    with served(answer) as server:
        values = {
            "out": str(tmp_path / "out"),
            "label": "whole",
            "captioner": {
                "name": "perceptiondlm",
                "options": {
                    **{"model": str(tmp_path / "model"), "device": "cpu", "batch_size": 1},
                    "decode": {"max_new_tokens": 8, "steps": 4},
                },
            },
            "judge": judge_of(server, max_concurrency=1),
            "benchmarks": [{"name": "b", "kind": "paradlc", "folder": str(folder)}],
        }
        whole = EvaluateConfig(**values)
        [bench] = whole.benchmarks
        few = bench.model_copy(update={"images": 2})
        for each, label in ((few, "trial"), (bench, "whole")):
            run_benchmark.caption_images(each, whole.backend(), tmp_path / "out" / label / "b")
            run_benchmark.judge_captions(each, whole.judge, tmp_path / "out" / label / "b")
        [cost] = costs.estimate_costs(whole, tmp_path / "out/trial")
        took = run_benchmark.read_times(bench, whole.backend(), whole.judge, tmp_path / "out/whole/b")
    assert (cost.count, cost.judged, cost.measured, cost.missing) == (12, 36, 4, "")
    assert (took.regions, took.answers) == (12, 36)
    assert took.answers_s > 36 * 0.03 and cost.judge_s > 0.03
    seconds = took.captions_s + took.answers_s + took.load_s
    assert 0.4 * seconds < cost.seconds < 2.5 * seconds
    assert cost.startup_s > 0 and took.load_s > 0

    values["captioner"]["options"]["decode"] = {"max_new_tokens": 4}
    with pytest.raises(ConfigError, match="made with another captioner"):
        costs.estimate_costs(EvaluateConfig(**values), tmp_path / "out/trial")
    cost, *_ = costs.estimate_costs(whole.model_copy(update={"judge": None}), tmp_path / "out/trial")
    assert (cost.judged, cost.judge_s, cost.missing) == (0, None, "")
    [cost] = costs.estimate_costs(whole, tmp_path / "out/nothing")
    assert (cost.count, cost.seconds) == (12, None) and "no captions" in cost.missing


def test_captions_of_other_programs_have_no_seconds_and_it_says_so(tmp_path):
    folder = write_bench(tmp_path / "bench")
    said = predictions(tmp_path, {"0_0": "a cat", "0_1": "dogs"})
    bench = {"name": "b", "kind": "paradlc", "folder": str(folder)}
    given = EvaluateConfig(out=str(tmp_path), label="whole", captioner=said, benchmarks=[bench])
    run_benchmark.caption_images(given.benchmarks[0], given.backend(), tmp_path / "trial/b")
    [cost] = costs.estimate_costs(given, tmp_path / "trial")
    assert cost.missing.startswith("captions: they come from another program")


@pytest.mark.parametrize("measured", [True, False])
def test_the_table_of_the_papers_benchmarks_fits_into_80_columns(measured):
    numbers = (17_990, 17_990, 4_605_440, 1_000, 12.34, 1.23, 59 * 60.0)
    cost = costs.Cost("HallusionBench", "lmms-eval", *numbers)
    unknown = costs.Cost("SeedBench", "lmms-eval", missing="a reason")
    shown = io.StringIO()
    Console(file=shown, width=80).print(evaluation_costs.costs_table([cost, unknown], measured))
    assert "\u2026" not in shown.getvalue() and "17,990" in shown.getvalue()
    assert ("68.8 h" if measured else "4,605,440") in shown.getvalue()


def test_several_gpus_take_the_longest_first():
    every = [costs.Cost(str(count), "released", count, 0, each_s=1.0) for count in (2, 3, 5, 4)]
    assert [costs.seconds_on(every, gpus) for gpus in (1, 2, 3, 9)] == [14, 7, 5, 5]
