"""Finds the published data and the recorded numbers that some tests read; no part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]


def shared_data(name: str) -> Path:
    """A folder or file of the shared data; skips the test, and says so, where it is absent.

    Looked for in $PARACAPTION_SHARED_DATA, else in `../shared/data` beside the repository.
    """
    home = Path(os.environ.get("PARACAPTION_SHARED_DATA") or _ROOT.parent / "shared" / "data")
    if not (home / name).exists():
        pytest.skip(f"no {home / name}; set PARACAPTION_SHARED_DATA to the folder of the published data")
    return home / name


def recorded(name: str) -> Path:
    """A folder or file of the numbers recorded from the original models; skips the test where it is absent.

    Looked for in $PARACAPTION_GOLDEN, else in `../shared/golden` beside the repository.
    """
    home = Path(os.environ.get("PARACAPTION_GOLDEN") or _ROOT.parent / "shared" / "golden")
    if not (home / name).exists():
        pytest.skip(f"no {home / name}; set PARACAPTION_GOLDEN to the folder of the recorded numbers")
    return home / name
