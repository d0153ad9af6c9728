"""What can go wrong between a client and `tests/object_server.py`, and the record of it."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.object_requests import Call

FAULTS = {
    "reset": "the connection is reset and nothing is done",
    "stuck": "the connection is reset; the request is done `later_s` later, as one that a network held",
    "lost_answer": "the request is done, then the connection is closed without an answer",
    "done_500": "the request is done, then answered by 500",
    "repeated": "the request is done twice, and the second answer is sent",
    "repeated_late": "the request is done and answered, and done again `later_s` later",
    "slow_body": "the answer, or its body, takes `slow_s` longer",
    "cut_body": "the body ends halfway and the connection is closed; answers without a body are spared",
}
"""By name. A status, such as "500" or "503", is answered without doing anything; "409" hits only requests
with a condition."""


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        shares: of all requests, by fault.
        seed: of these draws.
        keys: a pattern of fnmatch; requests of other keys (`log/1.json`, without the bucket) are spared.
        slow_s: seconds, for `slow_body`.
        later_s: seconds, for `stuck` and `repeated_late`.
        late_listing_s: keys first put less than this many seconds ago are missing from listings.
        late_listing_puts: so are keys that the last so many puts made.
        page_size: most keys on a page of a listing.
        ignores_conditions: as s3rver does: every conditional put succeeds.
        forgets_uploads: a second "complete" of an upload is a 404; else it is answered as the first one was.
    """

    shares: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    keys: str = "*"
    slow_s: float = 0.5
    later_s: float = 0.5
    late_listing_s: float = 0.0
    late_listing_puts: int = 0
    page_size: int = 1000
    ignores_conditions: bool = False
    forgets_uploads: bool = False

    def __post_init__(self) -> None:
        for name in self.shares:
            check_fault(name)
        if sum(self.shares.values()) > 1:
            raise ValueError(f"shares: they add up to {sum(self.shares.values())}, more than all requests")


def check_fault(name: str) -> None:
    """Raise a ValueError if there is no such fault."""
    if name not in FAULTS and not (name.isdigit() and 400 <= int(name) < 600):
        known = ", ".join(FAULTS)
        raise ValueError(f"unknown fault {name!r}; choose a status of 400 to 599 or one of {known}")


class Draws:
    """Which requests meet a fault.

    That depends on the seed, the operation, the first key and how many such requests came before, not on how
    threads take turns.
    """

    def __init__(self) -> None:
        self._asked: defaultdict[tuple[str, str], int] = defaultdict(int)

    def next(self, call: Call, faults: Faults) -> str:
        """The fault of this request, or ""."""
        if not faults.shares or not any(fnmatchcase(key, faults.keys) for key in call.keys):
            return ""
        same = (call.operation, call.keys[0])
        self._asked[same] += 1
        draw = random.Random(repr((faults.seed, self._asked[same], same))).random()
        for name, share in faults.shares.items():
            draw -= share
            if draw < 0:
                return "" if name == "409" and not call.conditions else name
        return ""


@dataclass
class Gate:
    """What befalls the next requests of one kind: they wait, or meet a fault, or both.

    Attributes:
        kind: a method (`PUT`) or an operation of S3 (`PutObject`, `CompleteMultipartUpload`); "" is any.
        keys: a pattern of fnmatch that one of the request's keys matches.
        hold: "before" the request is done, or "after", before its answer is sent; "" lets it pass.
        fault: that it meets then.
        left: so many more requests; None is no limit.
        held: numbers of the requests that wait or waited here, as in the log.
    """

    kind: str
    keys: str
    hold: str
    fault: str
    left: int | None
    held: list[int] = field(default_factory=list)
    opened: threading.Event = field(default_factory=threading.Event)

    def stops(self, call: Call) -> bool:
        wanted = self.left != 0 and self.kind in ("", call.method, call.operation)
        return wanted and any(fnmatchcase(key, self.keys) for key in call.keys)


@dataclass
class Logged:
    """One request; `status` is 0 where no answer was sent, and None while it is not yet decided."""

    number: int
    operation: str
    method: str
    bucket: str
    keys: list[str]
    fault: str = ""
    status: int | None = None
