"""Readers and answers by chance; see `fuzz`. In `make test` 50 inputs, in `make soak` a share of 20,000."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paracaption.filters import rle
from paracaption.pipeline.models import answers
from tests.cases import fuzz, fuzz_files
from tests.seeds import some

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, seeds: range) -> str:
    """What does not hold, from a process of its own with its limits; "" if everything does."""
    stack = folder / f"{seeds.start}.stack"
    command = [sys.executable, "-m", "tests.cases.fuzz", str(seeds.start), str(seeds.stop), str(stack)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    ended = "" if "inputs (" in done.stdout else stack.read_text() + done.stderr
    return f"{done.stdout[-8000:]}{ended[-4000:]}"


@pytest.mark.soak
def test_fifty_odd_inputs_are_read_or_refused_without_a_hang_or_a_traceback(tmp_path):
    assert not run(tmp_path, range(50))


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_many_odd_inputs(tmp_path):
    seeds = some(range(20_000))
    parts = [seeds[start : start + 2_500] for start in range(0, len(seeds), 2_500)]
    with ThreadPoolExecutor(2) as pool:
        found = list(filter(None, pool.map(lambda seeds: run(tmp_path, seeds), parts)))
    assert not found, "\n".join(found)


def test_fifty_seeds_have_inputs_of_every_kind():
    assert {fuzz.kind_of(seed) for seed in range(50)} == set(fuzz.KINDS)


def some_of(kind: str, count: int) -> list[str]:
    seeds = [seed for seed in range(40 * count) if fuzz.kind_of(seed) == kind][:count]
    return list(filter(None, map(fuzz.problem_of_seed, seeds)))


def test_a_tar_that_breaks_between_its_members_is_counted_up_to_there():
    assert fuzz.problem_of_seed(17383) == ""


def test_an_answer_that_is_not_made_clean_is_noticed(monkeypatch):
    monkeypatch.setattr(answers, "_text", lambda value, what: value)
    assert some_of("answer", 30)


def test_a_mask_that_is_not_checked_is_noticed(monkeypatch):
    check = rle.check_all
    wrong = rle.from_mask(fuzz.np.ones(fuzz.SIZE, bool))
    wrong = wrong._replace(area=1)
    monkeypatch.setattr(rle, "check_all", lambda given, *size: [wrong for _ in check(given, *size)])
    assert len(some_of("mask", 5)) == 5


def test_a_reader_that_raises_what_is_no_error_of_ours_is_noticed(monkeypatch):
    def read(path):
        raise KeyError("images")

    path = fuzz_files._home() / "lists" / "categories.json"
    monkeypatch.setattr(fuzz_files, "_cases", lambda: {"categories": fuzz_files.Case([path], read)})
    assert len(some_of("file", 3)) == 3


def test_an_input_that_takes_long_is_noticed(monkeypatch):
    monkeypatch.setattr(fuzz, "SLOW_S", -1.0)
    assert "took" in some_of("mask", 1)[0]
