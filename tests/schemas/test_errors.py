"""An error in one line says what went wrong, however much text stands around it."""

import pytest

from paracaption.schemas.errors import BadRecord, ConfigError, IntegrityError, one_line
from paracaption.schemas.reasons import Reason

TRACEBACK = """ray::worker.run() (pid=7, ip=10.0.0.1)
  File "/site-packages/ray/x.py", line 3, in run
    raise StageStalled("no answer")
"""
SAID = "\nValueError: 3 is no mask\nray.exit: late"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("a.yaml: wrong;\n  correct it"), "a.yaml: wrong; correct it"),
        (BadRecord(Reason.MODEL_ERROR, "photo.jpg"), f"{Reason.MODEL_ERROR}: photo.jpg"),
        (FileNotFoundError(2, "No such file", "x"), "FileNotFoundError: [Errno 2] No such file: 'x'"),
        (RuntimeError(), "RuntimeError: "),
        (OSError("no tokenizer here\n\nSee https://a.page"), "OSError: no tokenizer here"),
        (
            RuntimeError(TRACEBACK + SAID),
            "RuntimeError: ValueError: 3 is no mask",
        ),
        (RuntimeError(f"{TRACEBACK}\nStageStalled: no answer"), "RuntimeError: StageStalled: no answer"),
    ],
)
def test_an_error_is_one_line_that_says_its_cause(error, line):
    assert one_line(error) == line


class _Silent(Exception):
    def __str__(self):
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (_Silent(), "_Silent: a _Silent without a text (SystemExit)"),
        (RuntimeError("half \ud83d"), r"RuntimeError: half \ud83d"),
        (RuntimeError("x" * 10_000_000), None),
        (RuntimeError("a: x\n" * 3_000_000 + "ValueError: this is why"), None),
    ],
    ids=["no text", "half a character", "long", "many lines"],
)
def test_an_error_that_is_hard_to_say_is_one_short_line(error, line):
    found = one_line(error)
    assert line in (found, None) and len(found) <= 1_000 and "\n" not in found
    found.encode()


def test_damage_is_one_line_whatever_a_library_says_of_it():
    assert str(IntegrityError("a.parquet: not readable (Corrupt data\n); rebuild it")) == (
        "a.parquet: not readable (Corrupt data ); rebuild it"
    )
