"""Finds the published data that some tests read; it is no part of the repository."""

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
