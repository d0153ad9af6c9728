"""A note in the folder of a run: its subset has failed, and its workers leave the units that are not begun.

Only where subsets are built side by side: the others go on, in the same actors.
"""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

_NOTE = "given-up"


def give_up(run: Path) -> None:
    """Leave the note. One that cannot be written costs the time of the units that are run in vain."""
    try:
        (run / _NOTE).touch()
    except OSError as error:
        log.debug("no note that the subset is given up: %s", error)


def is_given_up(run: Path) -> bool:
    """Whether the subset of a run is given up."""
    try:
        return (run / _NOTE).exists()
    except OSError:
        return False
