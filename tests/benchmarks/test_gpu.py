"""The GPU benchmark at tiny size on a CPU: what it counts, never how long it takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import machine as machines
from benchmarks.gpu import parts, report, rows, runner
from benchmarks.gpu.machine import Call, Machine, Peaks
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.rows import Measured, Rows
from benchmarks.gpu.runner import Result, Settings

ROOT = Path(__file__).resolve().parents[2]
MEASURED = Measured("3 of them", {"found": 3}, {"floor_s": 1.0, "bound": "compute", "share": 0.5})
PYTHON_ONLY = ("json",)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    return machines.open_machine(tmp_path_factory.mktemp("machine"), "cpu", tiny=True)


def run_part(name: str, machine: Machine, folder: Path) -> list[dict[str, Any]]:
    """The rows of a part, run in this process."""
    path = folder / f"{name}.jsonl"
    import_module(f"benchmarks.gpu.{name.replace('-', '_')}").run(Rows(path, 600.0), machine)
    found = rows.read(path)
    assert {row["status"] for row in found} == {"done"}, found
    return found


def check_roofline(row: dict[str, Any]) -> None:
    roofline = row["roofline"]
    assert roofline["bound"] in ("compute", "memory")
    assert math.isfinite(roofline["share"]) and roofline["share"] > 0
    assert math.isfinite(roofline["measured_share"]) and roofline["measured_share"] > 0


# Parts.


@pytest.mark.soak
def test_decode_has_a_row_for_each_number_of_regions_and_cache(machine, tmp_path):
    found = run_part("decode", machine, tmp_path)
    assert [row["row"] for row in found] == [
        "6 regions, cache exact, 4 steps",
        "6 regions, cache exact, 2 steps",
        "6 regions, cache approximate, 4 steps, published layout",
        "6 regions, cache approximate, 2 steps, published layout",
        "6 regions, cache none, 4 steps, published layout",
        "6 regions, cache none, 2 steps, published layout",
        "6 regions, cache exact, 4 steps, no graphs",
        "6 regions, cache approximate, 4 steps, published layout, no graphs",
        "1 region, cache exact, 4 steps",
    ]
    for row in found:
        check_roofline(row)
        numbers, steps = row["numbers"], 2 if "2 steps" in row["row"] else 4
        assert numbers["tokens_per_forward"] == 32 * numbers["regions"] / steps  # 32 slots a region
        assert min(numbers[name] for name in ("tokens_per_s", "ms_per_step", "seconds_per_image")) > 0
        assert numbers["waits"] is None, "nobody waits for a CPU"
    floors = [row["roofline"]["floor_s"] for row in found]
    assert floors[4] > floors[0] > floors[1] > 0, "a full pass each step costs most, fewer steps least"


@pytest.mark.soak
def test_batch_has_a_row_for_each_number_of_images(machine, tmp_path):
    found = run_part("batch", machine, tmp_path)
    assert [row["numbers"]["images"] for row in found] == [1, 2]
    for row in found:
        check_roofline(row)
        assert row["numbers"]["regions"] == 6
    assert found[1]["roofline"]["floor_s"] > found[0]["roofline"]["floor_s"]


@pytest.mark.soak
def test_a_training_step_runs_sharded_frozen_and_with_lora(machine, tmp_path):
    found = run_part("train", machine, tmp_path)
    assert [row["numbers"]["fsdp2"] for row in found] == [True, True, True, False]
    for row in found:
        check_roofline(row)
    whole, frozen, lora, alone = (row["numbers"] for row in found)
    assert whole["trained_billions"] == whole["weights_billions"] == alone["trained_billions"]
    assert lora["trained_billions"] < frozen["trained_billions"] < whole["trained_billions"]


@pytest.mark.soak
def test_gar_and_sam_run_without_an_engine(machine, tmp_path):
    tower, prefill = run_part("gar", machine, tmp_path)
    check_roofline(tower)
    check_roofline(prefill)
    assert prefill["numbers"]["regions_per_gpu_hour_at_the_prefill_limit"] > 0
    encoder, segmenter = run_part("sam", machine, tmp_path)
    assert encoder["numbers"]["tflop"] > 0
    assert encoder["roofline"]["floor_s"] == segmenter["roofline"]["floor_s"]


# Rows.


def test_a_row_that_fails_or_does_not_fit_leaves_the_others(tmp_path, capsys):
    found = Rows(tmp_path / "rows.jsonl", 600.0)

    def breaks() -> Measured:
        raise ValueError("no such kernel\nand much more")

    def too_large() -> Measured:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    assert [found.measure(name, work) for name, work in (("a", breaks), ("b", too_large))] == [False, False]
    assert found.measure("c", lambda: MEASURED)
    assert [(row["status"], row["why"]) for row in rows.read(found.path)] == [
        ("failed", "ValueError: no such kernel"),
        ("failed", "out of memory"),
        ("done", ""),
    ]
    assert "no such kernel" in capsys.readouterr().err


def test_a_row_for_which_no_time_is_left_is_skipped_and_says_so(tmp_path):
    found = Rows(tmp_path / "rows.jsonl", 10.0, start=time.monotonic() - 7)
    assert not found.measure("late", lambda: MEASURED, needs_s=5)
    [row] = rows.read(found.path)
    assert (row["status"], row["why"]) == ("skipped", "3 s left, about 5 s needed")


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": "whole"}\n{"row": "cu')
    assert rows.read(path) == [{"row": "whole"}]


# The roofline.


def test_the_floor_adds_up_the_slower_of_arithmetic_and_traffic_of_each_call():
    known = Machine(torch.device("cpu"), True, "known", Peaks(100.0, 10.0), Peaks(50.0, 10.0))
    found = known.roofline([Call(200.0, 10.0), Call(100.0, 50.0)], seconds=14.0)
    assert found == {"floor_s": 7.0, "bound": "memory", "share": 0.5, "measured_share": 9 / 14}


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_datasheet_peaks_are_known_by_the_device_s_whole_name(monkeypatch, tmp_path, name, flops):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    (tmp_path / machines.FILE).write_text(json.dumps({"name": name, "measured": [7e14, 4e12]}))
    found = machines.open_machine(tmp_path, "auto", tiny=False)
    assert (found.published.flops if found.published else None) == flops
    assert found.measured == Peaks(7e14, 4e12)


# Waits and time.


def test_waits_are_what_torch_warns_of_each_time_and_nothing_else(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("a deprecated argument", stacklevel=1)

    assert machines.waits_of(work, torch.device("cuda")) == 3
    assert modes == ["warn", 0]
    assert machines.waits_of(work, torch.device("cpu")) is None


def test_without_a_gpu_the_command_says_what_to_do_instead(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--device", "cuda", "--parts", "peak,decode", "--out", str(tmp_path)]) == 2
    assert "torch sees no GPU here; run it on a machine with one, or dry" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


def test_the_limits_of_all_parts_are_under_eight_minutes():
    assert sum(part.seconds for part in PARTS) <= parts.TOTAL_S < 480 - runner.GRACE_S


def test_a_part_gets_the_time_that_earlier_ones_left():
    waiting = [Part("a", "", 50), Part("b", "", 30)]
    assert parts.limit_s(waiting, elapsed_s=0, total_s=80) == 50
    assert parts.limit_s(waiting[1:], elapsed_s=20, total_s=80) == 60
    assert parts.limit_s(waiting[1:], elapsed_s=70, total_s=80) == 30


HANGS = """
import json, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
row = {"row": "first", "status": "done", "why": "", "headline": "", "numbers": {"pid": child.pid}}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(row | {"roofline": {}}) + "\\n")
print("working on the second", flush=True)
time.sleep(600)
"""


@pytest.mark.soak
def test_a_part_over_its_limit_is_killed_with_its_children_and_its_rows_stay(monkeypatch, tmp_path):
    settings = Settings(tmp_path, "cpu", "tiny")
    path = tmp_path / "hangs.jsonl"
    monkeypatch.setattr(runner, "GRACE_S", 1.0)
    monkeypatch.setattr(runner, "command_of", lambda *_: [sys.executable, "-c", HANGS, str(path)])
    part = Part("hangs", "Never ends", 4, PYTHON_ONLY)
    monkeypatch.setattr(parts, "PARTS", (part,))
    assert command.run([part], settings, total_s=4.0) == 1
    [found] = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert found["status"] == "out of time"
    assert [row["row"] for row in found["rows"]] == ["first"]
    assert "killed after 3 s with 1 rows" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "hangs.log").read_text() == "working on the second\n"
    until = time.monotonic() + 10
    while (
        _runs(found["rows"][0]["numbers"]["pid"]) and time.monotonic() < until
    ):  # a killed process takes its time
        time.sleep(0.05)
    assert not _runs(found["rows"][0]["numbers"]["pid"])


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_dies_is_reported_with_the_end_of_its_log(monkeypatch, tmp_path):
    code = "import sys; print('warming up'); sys.exit('no kernel image is available')"
    monkeypatch.setattr(runner, "command_of", lambda *_: [sys.executable, "-c", code])
    found = runner.run(Part("dies", "", 5), Settings(tmp_path, "cpu", "tiny"), 60.0, dict(os.environ))
    assert found.status == "failed"
    assert found.why == "exit code 1; see dies.log: no kernel image is available"


def test_a_part_without_its_packages_is_skipped_and_they_are_named(tmp_path, capsys):
    part = Part("wishes", "Needs much", 5, ("json", "no_such_package", "nor_this"))
    assert command.run([part], Settings(tmp_path, "cpu", "tiny")) == 0
    [found] = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert (found["status"], found["why"]) == ("skipped", "missing package: no_such_package, nor_this")
    assert "missing package: no_such_package, nor_this" in capsys.readouterr().out


def test_too_old_a_release_is_missing_and_says_what_is_here(monkeypatch):
    monkeypatch.setattr(parts.metadata, "version", lambda _: "4.57.1")
    part = Part("models", "", 5, ("json", "transformers"))
    assert parts.missing(part) == ["transformers 5 or newer (here 4.57.1)"]


# The command and the report.


def test_nothing_is_fetched_and_nothing_reports_home():
    with runner.caches() as environment:
        wanted = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        assert wanted.items() <= environment.items()
        folder = Path(environment["TRITON_CACHE_DIR"]).parent
        assert folder.is_dir()
    assert not folder.exists()


def test_an_unknown_part_is_refused_with_those_that_there_are(capsys):
    assert command.main(["--parts", "decode,brew"]) == 2
    assert "unknown part 'brew'; choose from peak, decode" in capsys.readouterr().err


def test_the_list_names_what_each_part_needs_in_80_columns(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("gar-vllm") for line in lines) == 1
    assert sum("needs torch" in line for line in lines) == len(PARTS)
    assert max(map(len, lines)) <= 80


def test_the_report_has_a_table_for_each_part(tmp_path):
    found = Rows(tmp_path / "x.jsonl", 600.0)
    found.measure("one | two", lambda: MEASURED)
    found.skip("three", "missing package: peft")
    results = [
        Result(
            Part("x", "Something", 5), "done", seconds=2.0, limit_s=5.0, rows=tuple(rows.read(found.path))
        ),
        runner.skipped(Part("y", "Something else", 5), ["vllm"]),
    ]
    report.write(Settings(tmp_path, "cpu", "full"), results, 3.0)
    text = (tmp_path / "report.md").read_text()
    assert "| x | Something | done | 1 | 2 |" in text
    assert "| y | Something else | skipped: missing package: vllm | 0 | 0 |" in text
    assert "| row | found | floor s | bound by | of the roofline |" in text
    assert "| one / two | 3 | 1 | compute | 50.0% |" in text
    assert "- three: skipped, missing package: peft" in text


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", ["peak,decode,batch,train,gar,sam", "gar-vllm,judge", "build"])
def test_a_dry_run_of_the_command(tmp_path, names):
    arguments = ["--device", "cpu", "--size", "tiny", "--seconds", "800", "--parts", names, "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 0, found
    assert [part["name"] for part in found["parts"]] == names.split(",")
    for part in found["parts"]:
        assert part["status"] == "done" and part["rows"], part
        assert all(row["status"] == "done" and row["roofline"]["share"] > 0 for row in part["rows"]), part
    assert max(map(len, done.stdout.splitlines())) <= max(80, len(str(tmp_path)) + 20)


@pytest.mark.soak
def test_parts_for_a_bare_machine_import_nothing_that_they_do_not_name():
    lacking = "msgspec pycocotools cv2 ray prefect pyarrow duckdb numba webdataset vllm".split()
    bare = [part.name.replace("-", "_") for part in PARTS if part.needs == Part("", "", 0).needs]
    program = f"""
import sys
from importlib import import_module
for name in {lacking}:
    sys.modules[name] = None
for name in {bare}:
    import_module(f"benchmarks.gpu.{{name}}")
"""
    assert "decode" in bare
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
