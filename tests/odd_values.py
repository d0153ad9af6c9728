"""Values by chance, as sources and models may give them: of any type and size, such as no format holds."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any

import numpy as np

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 5, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1,
    10**400, -(10**400), 0.0, -0.0, 0.5, 1e300, -1e300, 5e-324, float("nan"), float("inf"), float("-inf"),
    True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "5", "yes", "no", "none", "a red car", "\ud83d", "\ude00\ud83d", "\ud83d\ude00", "a\0b",
    "\x1b[31m", "\u202eA", "../x", "/etc/passwd", "a\\b.jpg", "x" * 300, "x" * 200_000, "word " * 50_000,
    "\udcff.jpg", "é", "🙂",
    "{", '{"a": 1}', "NaN", "1e999", "9" * 5000,
)  # fmt: skip
_OTHERS: tuple[Callable[[], Any], ...] = (
    lambda: None, list, dict, set, object, lambda: b"abc", lambda: b"\xff", lambda: 1j,
    lambda: Decimal("1.5"),
    lambda: np.float32(0.5), lambda: np.float64("nan"), lambda: np.int64(7), lambda: np.uint64(2**64 - 1),
    lambda: np.str_("a cat"), lambda: np.bool_(True), lambda: np.array(0.5), lambda: np.array([1, 2]),
    lambda: np.array(["a", "b"]), lambda: np.zeros((2, 3)), lambda: int, lambda: len, lambda: (1, "a"),
    lambda: iter("ab"), lambda: range(3), lambda: {"text": "yes"}, lambda: ValueError("no"),
)  # fmt: skip


def json_value(random: Random, depth: int = 3) -> Any:
    """What Python's `json` reads and writes."""
    kind = random.random()
    if depth and kind < 0.12:
        return [json_value(random, depth - 1) for _ in range(random.randint(0, 4))]
    if depth and kind < 0.24:
        names = random.sample(
            ("id", "size", "counts", "name", "url", "\ud800", "x" * 50, ""), random.randint(0, 3)
        )
        return {name: json_value(random, depth - 1) for name in names}
    if kind < 0.3:
        return None
    return random.choice(NUMBERS if kind < 0.65 else TEXTS)


def value(random: Random) -> Any:
    """Anything."""
    return random.choice(_OTHERS)() if random.random() < 0.5 else json_value(random)


def counts(random: Random, good: str) -> Any:
    """The counts of an RLE, or what was them."""
    kind = random.randrange(8)
    at = random.randrange(len(good) + 1)
    if kind == 0:
        return good[:at]
    if kind == 1:
        return good[:at] + random.choice("0123PQo_~\x7f\u00e9 ,'") + good[at:]
    if kind == 2:
        return good + random.choice(("1", "o", "0")) * random.choice((1, 100, 10_000))
    if kind == 3:
        return "".join(chr(random.randrange(48, 112)) for _ in range(random.choice((1, 5, 50, 500))))
    if kind == 4:
        return [random.choice((*NUMBERS, 1, 2, 3, 24)) for _ in range(random.randint(0, 6))]
    if kind == 5:
        return good.encode()
    return good if kind == 6 else value(random)


def size(random: Random, good: tuple[int, int]) -> Any:
    """The size of a mask, or what was it."""
    kind = random.randrange(6)
    if kind < 2:
        return good if kind else list(good)
    if kind == 2:
        return good[::-1]
    if kind == 3:
        return [random.choice(NUMBERS), random.choice(NUMBERS)]
    return np.array(good) if kind == 4 else value(random)
