"""A note in the folder of a run: its subset has failed, and its workers leave the units that are not begun.

Only where subsets are built side by side: the others go on, in the same actors.
"""

from __future__ import annotations

import logging

from ...schemas.errors import ConfigError
from ..io.location import Location
from ..io.store import store_of

log = logging.getLogger(__name__)

_NOTE = "given-up"


def give_up(run: Location) -> None:
    """Leave the note. One that cannot be written costs the time of the units that are run in vain."""
    try:
        store_of(run).create(str(run / _NOTE), b"")
    except (OSError, ConfigError) as error:
        log.debug("no note that the subset is given up: %s", error)


def is_given_up(run: Location) -> bool:
    """Whether the subset of a run is given up."""
    try:
        return store_of(run).size(str(run / _NOTE)) is not None
    except (OSError, ConfigError):
        return False
