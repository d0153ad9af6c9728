"""Single bytes of a corpus are changed, and `verify` finds each one that it vouches for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import damage


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return damage.build(damage.small(tmp_path_factory.mktemp("damage")))


@pytest.mark.parametrize("changes", [40, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.soak
def test_a_changed_byte_in_any_file_that_is_vouched_for_is_found(out, changes):
    found = list(damage.change_bytes(out, changes, seed=changes))
    faults = [change for change in found if change.is_fault]
    assert not faults, f"{faults}\n{damage.table(found)}"
    kinds = {change.kind for change in found}
    assert {"log", "plan", "manifests", "ledger", "shards", "evidence", "plots", ".replaced"} <= kinds
    assert {"config.yaml", "corpus.json", "index.parquet", "stats.json", "README.md"} <= kinds
