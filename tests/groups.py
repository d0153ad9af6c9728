"""Which tests share a process, in which order, which are for the soak, and the seconds a group may take.

`@pytest.mark.soak(keep=N)` leaves all but the first N cases of a test to `make soak`.

A test's group is its kind (one of `KINDS`), else its file: what one group starts, it starts once.
Groups follow one another, the longest by `budget.yaml` first, so that two workers end at about the same time.
At the end the run reports what each group took against its budget; that is never a failure.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from _pytest.nodeid import NodeId

KINDS = ("ray", "vllm", "browser", "servers")
_ONE_PROCESS = {"ray": "engines", "vllm": "engines"}
"""Groups that one process runs one after the other: Ray may fail to start beside a vLLM engine that does."""
_TESTS = Path(__file__).resolve().parent
_FEW_S = 2.0
"""Groups without a budget of their own that take less are one line of the report."""


def budget() -> dict[str, float]:
    """Seconds by group; `each other file` is what a file that is not listed may take."""
    return yaml.safe_load((_TESTS / "budget.yaml").read_text())


def group_of(item: pytest.Item) -> str:
    """The first of the kinds that marks the test, else its file below `tests/`."""
    kind = next((kind for kind in KINDS if item.get_closest_marker(kind)), None)
    return kind or item.nodeid.partition("::")[0].removeprefix("tests/")


def keep_first_cases(items: list[pytest.Item]) -> None:
    """Take the mark `soak(keep=N)` from the first N cases of each test that has it."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = next((each for each in item.own_markers if each.name == "soak" and each.kwargs), None)
        if mark is None:
            continue
        test = item.nodeid.partition("[")[0]
        seen[test] += 1
        if seen[test] <= mark.kwargs["keep"]:
            item.own_markers.remove(mark)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name the groups for `--dist loadgroup`, and put the long ones first."""
    keep_first_cases(items)
    seconds = budget()
    groups = {item: group_of(item) for item in items}
    order = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    items.sort(key=lambda item: (-seconds.get(groups[item], 0.0), order[groups[item]]))
    for item in items:
        item.user_properties.append(("group", groups[item]))
        if config.getoption("loadgroup", False):
            # What xdist 3.8 does for its own mark; pytest 9.2 does not read the attribute that it sets.
            process = _ONE_PROCESS.get(groups[item], groups[item])
            item._id = NodeId.parse(f"{item.nodeid}@{process}")


_taken: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test's set-up, call and teardown to its group."""
    group = dict(report.user_properties).get("group")
    if isinstance(group, str):
        _taken[group] += report.duration  # pyright: ignore[reportArgumentType]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of each group beside its budget, as a table that documents can take over."""
    if not _taken:
        return
    allowed = budget()
    usual = allowed.pop("each other file")
    listed = [group for group, _ in _taken.most_common() if group in allowed or _taken[group] > _FEW_S]
    rest = [group for group in _taken if group not in listed]
    terminalreporter.section("seconds per group")
    lines = [(group, allowed.get(group, usual), _taken[group]) for group in listed]
    if rest:
        lines.append((f"{len(rest)} other files", usual * len(rest), sum(_taken[group] for group in rest)))
    lines.append(("all", sum(line[1] for line in lines), _taken.total()))
    terminalreporter.write_line("| group | budget | measured |")
    terminalreporter.write_line("| --- | ---: | ---: |")
    for group, most, measured in lines:
        over = " over" if measured > most else ""
        terminalreporter.write_line(f"| {group} | {most:g} | {measured:.0f}{over} |")
