"""The flow that evaluates a captioner: benchmarks with a judge, a toy world with known truth, cost.

    OUT/
        LABEL/BENCHMARK/     what model_training/evaluation/run_benchmark.py writes, and page.html
        LABEL/toy.json       exact captions and leakage on a toy world
        LABEL/profile/       rows, table and plot of what captioning costs
        LABEL/harness/       what model_training/evaluation/harness.py writes
        history.jsonl        a line for each evaluation of each label

Annotations are evaluated, as in `build`.
"""

import datetime
import importlib.metadata
from pathlib import Path
from typing import Any

from prefect import flow

from ..schemas.evaluation import Bench, EvaluateConfig
from . import artifacts, callbacks, served
from .steps import run_name, step

HISTORY = "history.jsonl"


@flow(name="evaluate-captioner", flow_run_name=run_name, log_prints=False)
def evaluate_captioner(config: EvaluateConfig) -> dict[str, Any]:
    """A captioner in, its scores out.

    Args:
        config: the captioner, the judge, and the benchmarks.

    Returns:
        The record that was appended to history.jsonl.
    """
    served.check_run(config)
    found: dict[str, Any] = {"benchmarks": []}
    for bench in config.benchmarks:
        write_captions(config, bench)
        if config.judge_of(bench):
            ask_judge(config, bench)
        found["benchmarks"].append(score(config, bench))
    if config.toy:
        found["toy"] = compare_with_truth(config)
    if config.profile:
        found["profile"] = measure_cost(config)
    if config.harness:
        found["harness"] = ask_harness(config)
    record = append_history(config, found)
    artifacts.PUBLISHER.wait()
    return record


@step
def write_captions(config: EvaluateConfig, bench: Bench) -> None:
    """Caption the benchmark's images that have no captions yet."""
    from ..model_training.evaluation import run_benchmark

    run_benchmark.caption_images(
        bench, config.backend(bench), _folder(config, bench), callbacks.on_evaluation_progress.get()
    )


@step
def ask_judge(config: EvaluateConfig, bench: Bench) -> None:
    """Ask the judge the questions that have no answer yet."""
    from ..model_training.evaluation import run_benchmark

    judge = config.judge_of(bench)
    assert judge
    run_benchmark.judge_captions(bench, judge, _folder(config, bench), callbacks.on_evaluation_progress.get())


@step
def score(config: EvaluateConfig, bench: Bench) -> dict[str, Any]:
    """Score the answers, and write details, summary and page into the benchmark's folder."""
    from ..model_training.evaluation import results_page, run_benchmark

    folder = _folder(config, bench)
    result = run_benchmark.score_answers(bench, config.judge_of(bench), folder).to_json()
    results_page.write_page(bench, config.label, folder)
    rows = [{"number": name, "value": value} for name, value in _flat(result).items()]
    artifacts.publish_table(artifacts.artifact_key("scores", config.label, bench.name), rows)
    return result


@step
def compare_with_truth(config: EvaluateConfig) -> dict[str, Any]:
    """Compare captions of a toy world's held-out scenes with the truth."""
    from ..model_training.decoding.read_regions import iter_photo_regions
    from ..model_training.evaluation import captioners
    from ..model_training.toy import scores
    from ..pipeline.io import files

    assert config.toy
    given = captioners.model_options(config.backend())
    photos = list(iter_photo_regions(config.toy))
    by_mode = scores.compare_decoding(given.load_model(), photos, given.decoding())
    found = {name: each._replace(predicted=[])._asdict() for name, each in by_mode.items()}
    out = Path(config.out) / config.label
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "toy.json", found)
    return found


@step
def measure_cost(config: EvaluateConfig) -> dict[str, Any]:
    """Measure latency and tokens per forward pass, as in the paper's figures."""
    from ..model_training.evaluation import captioners, profile

    assert config.profile
    given = captioners.model_options(config.backend())
    folder = Path(config.out) / config.label / "profile"
    rows = profile.measure_costs(given.model, config.profile, folder, given.device, given.dtype)
    picture = artifacts.embedded(folder / profile.PLOT)
    markdown = f"# {config.label}\n\n{picture}\n\n{profile.markdown_table(rows)}"
    artifacts.publish_markdown(artifacts.artifact_key("profile", config.label), markdown)
    seconds = {f"{row.mode} {row.regions}": row.seconds for row in rows if row.study == "regions"}
    return {"seconds": seconds, "device": rows[0].device}


@step
def ask_harness(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Run the benchmarks of whole images by lmms-eval."""
    from ..model_training.evaluation import harness

    rows = harness.run_harness(config, callbacks.on_evaluation_progress.get())
    cells = [
        {"benchmark": row["name"], "column": name, "paper": row["paper"], **outcome}
        for row in rows
        for name, outcome in row["columns"].items()
    ]
    artifacts.publish_table(artifacts.artifact_key("harness", config.label), cells)
    return rows


@step
def append_history(config: EvaluateConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Append the scores to the history, with the model, the judge and the release that made them."""
    from ..model_training.evaluation import judges
    from ..pipeline.io.json_lines import LineWriter

    judge = config.judge and judges.identity(config.judge)
    record = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "label": config.label,
        "release": importlib.metadata.version("paracaption"),
        "captioner": _captioner_identity(config),
        "judge": judge,
        "judges": {each.name: judges.identity(each.judge) for each in config.benchmarks if each.judge},
        **found,
    }
    with LineWriter(Path(config.out) / HISTORY) as lines:
        lines.append(record)
    return record


def _captioner_identity(config: EvaluateConfig) -> dict[str, Any]:
    """What the captions depend on; by benchmark if each has a file of its own."""
    from ..model_training.evaluation import captioners

    found = {bench.name: captioners.identity(config.backend(bench)) for bench in config.benchmarks}
    if not found:
        return captioners.identity(config.backend())
    first, *others = found.values()
    return found if any(each != first for each in others) else first


def _folder(config: EvaluateConfig, bench: Bench) -> Path:
    return Path(config.out) / config.label / bench.name


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "quality"} | result["quality"]
