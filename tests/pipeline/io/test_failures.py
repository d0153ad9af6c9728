"""What an error of a source means, and how long it is asked again."""

import errno
import socket
import ssl

import pytest

from paracaption.pipeline.io import failures, packages
from paracaption.pipeline.io.failures import Kind, ReadError, Retrying, ShortRead, SourceFailure
from paracaption.schemas.errors import BadRecord, ConfigError
from paracaption.schemas.reasons import ERRORS, Reason

TRANSIENT_ERRNOS = """
    EIO ESTALE ENOTCONN ETIMEDOUT ECONNRESET ECONNREFUSED ECONNABORTED EPIPE EHOSTUNREACH EHOSTDOWN
    ENETUNREACH ENETDOWN ENETRESET EMFILE ENFILE ENOMEM
    EAGAIN EINTR EBUSY EREMOTEIO ENODEV ENXIO ENOLINK ENOBUFS
"""


def http_error(status: int, **attributes) -> Exception:
    error = RuntimeError(f"HTTP {status}")
    vars(error).update(status=status, **attributes)
    return error


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int, code: str = "", headers=None):
        meta = {"HTTPStatusCode": status, "HTTPHeaders": headers or {}}
        self.response = {"Error": {"Code": code}, "ResponseMetadata": meta}


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def named(name: str) -> Exception:
    return type(name, (Exception,), {})("unable to")


@pytest.mark.parametrize("name", [name for name in TRANSIENT_ERRNOS.split() if hasattr(errno, name)])
@pytest.mark.soak(keep=6)
def test_errors_of_disks_and_networks_pass(name):
    assert failures.classify(OSError(getattr(errno, name), "so it is", "/a")) is Kind.TRANSIENT


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOENT, ""), Kind.RECORD),
        (OSError(errno.ENOTDIR, ""), Kind.RECORD),
        (OSError(errno.EISDIR, ""), Kind.RECORD),
        (OSError(errno.ELOOP, ""), Kind.RECORD),
        (OSError(errno.ENAMETOOLONG, ""), Kind.RECORD),
        (OSError(errno.EACCES, ""), Kind.REFUSED),
        (OSError(errno.EPERM, ""), Kind.REFUSED),
        (FileNotFoundError("bucket/key"), Kind.RECORD),
        (PermissionError("Access Denied"), Kind.REFUSED),
        (TimeoutError("timed out"), Kind.TRANSIENT),
        (ConnectionResetError("reset"), Kind.TRANSIENT),
        (MemoryError(), Kind.TRANSIENT),
        (ShortRead("10 of 20 bytes"), Kind.TRANSIENT),
        (socket.gaierror(-3, "Temporary failure in name resolution"), Kind.TRANSIENT),
        (socket.gaierror(-2, "Name or service not known"), Kind.TRANSIENT),
        (socket.herror(1, "Unknown host"), Kind.TRANSIENT),
        (ssl.SSLError(1, "unexpected eof"), Kind.TRANSIENT),
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), Kind.SETUP),
        (ImportError("Install s3fs to access S3"), Kind.SETUP),
        (named("NoCredentialsError"), Kind.SETUP),
        (named("DefaultCredentialsError"), Kind.SETUP),
        (named("UnsupportedProtocol"), Kind.SETUP),
        (named("WhateverElse"), Kind.TRANSIENT),
    ],
)
@pytest.mark.soak(keep=5)
def test_an_error_has_a_kind(error, kind):
    assert failures.classify(error) is kind


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *(
            (status, Kind.TRANSIENT)
            for status in (408, 409, 421, 425, 429, 500, 502, 503, 504, 507, 520, 599)
        ),
        *((status, Kind.SETUP) for status in (301, 307, 401, 402, 407)),
        *((status, Kind.REFUSED) for status in (400, 403, 405)),
        *((status, Kind.RECORD) for status in (404, 410, 414, 451)),
    ],
)
@pytest.mark.soak(keep=2)
def test_a_status_has_a_kind_wherever_its_client_keeps_it(status, kind):
    holder = type("Response", (), {"status_code": status})
    for error in (
        http_error(status),
        ClientError(status),
        caused_by(OSError("translated"), ClientError(status)),
        type("HTTPStatusError", (Exception,), {"response": holder()})(),
        type("HttpError", (Exception,), {"code": str(status)})(),
    ):
        assert failures.classify(error) is kind


def test_the_code_of_a_store_says_whether_it_is_the_key_or_the_object():
    denied = caused_by(PermissionError("Access Denied"), ClientError(403, "AccessDenied"))
    assert failures.classify(denied) is Kind.REFUSED
    for code in ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"):
        assert failures.classify(caused_by(PermissionError(code), ClientError(403, code))) is Kind.SETUP
    assert (
        failures.classify(caused_by(OSError(errno.EINVAL, ""), ClientError(400, "InvalidToken")))
        is Kind.SETUP
    )
    bucket = caused_by(FileNotFoundError("no bucket"), ClientError(404, "NoSuchBucket"))
    assert failures.classify(bucket) is Kind.SETUP and not failures.is_missing(bucket)


def test_only_what_speaks_of_getting_bytes_is_an_error_of_reading():
    for error in (OSError(errno.EIO, ""), TimeoutError(), MemoryError(), ReadError("a", "b", Kind.TRANSIENT)):
        assert failures.is_of_reading(error)
    for error in (
        OSError("cannot identify image file"),
        ValueError("bad"),
        KeyError("a"),
        ZeroDivisionError(),
    ):
        assert not failures.is_of_reading(error)


class Clock:
    """Time that passes by waiting."""

    def __init__(self):
        self.now_s, self.waits = 0.0, []

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now_s += seconds


def failing(times: int, error: Exception | None = None):
    """A read that fails a number of times."""
    left = [times]

    def read() -> str:
        if left[0]:
            left[0] -= 1
            raise error or OSError(errno.EIO, "Input/output error", "/a")
        return "read"

    return read


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def retrying(clock):
    return Retrying(60, clock, clock.sleep, chance=lambda: 1.0)


def test_waits_grow_and_what_comes_back_is_read(retrying, clock):
    assert retrying.call(failing(5), "/a") == "read"
    assert clock.waits == [0.25, 0.5, 1, 2, 4]


def test_waits_are_jittered_downward_and_have_an_end(clock):
    assert Retrying(600, clock, clock.sleep, chance=lambda: 0.0).call(failing(12), "/a") == "read"
    assert clock.waits[:3] == [0.125, 0.25, 0.5] and max(clock.waits) == 7.5


def test_the_budget_ends_the_waiting_with_an_error_that_says_what_and_where(retrying, clock):
    with pytest.raises(ReadError, match=r"^/a: Input/output error$") as raised:
        retrying.call(failing(1000), "/a")
    assert 45 < clock.now_s <= 60
    assert (raised.value.kind, raised.value.missing) == (Kind.TRANSIENT, False)
    assert isinstance(raised.value.__cause__, OSError)


def test_without_a_budget_there_is_one_try(clock):
    with pytest.raises(ReadError):
        Retrying(0, clock, clock.sleep).call(failing(1), "/a")
    assert clock.waits == []


@pytest.mark.parametrize("status", [401, 403, 410])
def test_what_will_not_change_is_not_asked_again(retrying, clock, status):
    with pytest.raises(ReadError):
        retrying.call(failing(1, http_error(status)), "/a")
    assert clock.waits == []


def test_a_server_that_says_when_to_ask_again_is_asked_then(retrying, clock):
    assert retrying.call(failing(1, http_error(503, retry_after=7)), "/a") == "read"
    assert retrying.call(failing(1, ClientError(503, "SlowDown", {"retry-after": "3"})), "/a") == "read"
    assert retrying.call(failing(1, http_error(429, headers={"Retry-After": "2"})), "/a") == "read"
    assert clock.waits == [7, 3, 2]


def test_a_server_that_asks_for_more_than_the_budget_is_not_waited_for(retrying, clock):
    with pytest.raises(ReadError):
        retrying.call(failing(1, http_error(503, retry_after=3600)), "/a")
    assert clock.waits == []


def test_retry_after_is_a_number_or_a_date():
    assert failures.parse_retry_after("120") == 120
    assert failures.parse_retry_after("Thu, 01 Jan 1970 00:02:00 GMT", now=lambda: 100.0) == 20
    assert failures.parse_retry_after("Thu, 01 Jan 1970 00:00:00 GMT", now=lambda: 100.0) == 0
    assert failures.parse_retry_after("soon") is None and failures.parse_retry_after("") is None


@pytest.mark.soak
def test_an_outage_costs_twice_the_budget_and_not_that_of_each_record(retrying, clock):
    for _ in range(1000):
        with pytest.raises(ReadError):
            retrying.call(failing(1000), "/a")
    assert clock.now_s < 120
    for _ in range(1000):
        retrying.call(failing(0), "/a")
    start = clock.now_s
    assert retrying.call(failing(7), "/a") == "read", "patience came back with the source"
    assert clock.now_s - start > 20


@pytest.mark.soak
def test_a_source_that_often_fails_and_heals_keeps_its_whole_budget(retrying, clock):
    for _ in range(100):
        assert retrying.call(failing(4), "/a") == "read"
    assert retrying.patience_s == 60


@pytest.mark.soak
def test_one_sector_in_a_hundred_does_not_take_days(retrying, clock):
    for _ in range(100):
        with pytest.raises(ReadError):
            retrying.call(failing(1000), "/bad")
        for _ in range(99):
            retrying.call(failing(0), "/good")
    assert clock.now_s < 100 * 15


def test_what_is_missing_is_believed_if_a_listing_agrees(retrying, clock):
    missing = OSError(errno.ENOENT, "No such file or directory", "/a")
    with pytest.raises(ReadError) as raised:
        retrying.call(failing(1, missing), "/a", is_gone=lambda: True)
    assert raised.value.kind is Kind.RECORD and clock.waits == []
    assert retrying.call(failing(3, missing), "/a", is_gone=lambda: False) == "read"
    with pytest.raises(ReadError, match="although the listing of its folder has this file") as raised:
        retrying.call(failing(100, missing), "/a", is_gone=lambda: False)
    assert raised.value.kind is Kind.TRANSIENT


def test_an_error_of_ours_ends_a_read_at_once(retrying, clock):
    with pytest.raises(ConfigError):
        retrying.call(failing(1, ConfigError("no")), "/a")
    assert clock.waits == []


def test_a_record_that_failed_has_a_reason_that_a_retry_heals_or_a_mark():
    of = (Reason.PHOTO_MISSING, Reason.PHOTO_UNREADABLE)
    found = failures.to_failure(ReadError("/a", "gone", Kind.RECORD, missing=True), *of, "put it there")
    assert isinstance(found, SourceFailure)
    assert (found.reason, found.detail, found.kind) == (of[0], "/a: gone; put it there", Kind.RECORD)
    assert failures.to_failure(OSError(errno.ELOOP, "loop"), *of, where="/a").reason is of[1]  # pyright: ignore
    away = failures.to_failure(ReadError("/a", "HTTP 503", Kind.TRANSIENT), *of)
    assert isinstance(away, SourceFailure) and away.reason is Reason.SOURCE_UNAVAILABLE
    assert Reason.SOURCE_UNAVAILABLE in ERRORS
    assert isinstance(failures.to_failure(ReadError("/a", "HTTP 401", Kind.SETUP), *of), ConfigError)
    assert failures.kind_of(BadRecord(of[1], "no image")) == "" and failures.kind_of(away) == "transient"


class NoCredentialsError(Exception):
    """As botocore's."""

    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (
            ImportError("Please install gcsfs to access Google Storage"),
            packages.how_to_install("gcsfs") + ", on every node",
        ),
        (ImportError("Install adlfs to access Azure"), packages.how_to_install("adlfs") + ", on every node"),
        (
            ImportError('SFTPFileSystem requires "paramiko" to be installed'),
            "install it with `uv pip install paramiko` or `python -m pip install paramiko`, on every",
        ),
        (
            ModuleNotFoundError("No module named 'aiohttp'"),
            packages.how_to_install("aiohttp") + ", on every node",
        ),
        (ImportError("Protocol not known: foo"), "correct the address: no package reads this kind"),
        (NoCredentialsError("Unable to locate credentials"), "FSSPEC_S3='{\"anon\": true}'"),
        (ReadError("s3://b/a", "HTTP 401", Kind.SETUP), "check the address first"),
    ],
)
@pytest.mark.soak(keep=2)
def test_a_set_up_that_cannot_read_is_mended_with_what_it_lacks(error, fix):
    of = (Reason.PHOTO_MISSING, Reason.PHOTO_UNREADABLE)
    for told in (failures.to_stop(error, "coconut"), failures.to_failure(error, *of, where="x")):
        assert isinstance(told, ConfigError) and f"; {fix}" in str(told).replace("public bucket ", "; ")


def test_planning_ends_in_one_line_and_a_bug_of_ours_is_none():
    for error in (
        ReadError("s3://b/a.json", "HTTP 503", Kind.TRANSIENT),
        OSError(errno.EACCES, "Permission denied", "/a"),
        ImportError("Install s3fs\nto access S3"),
        ValueError("invalid literal for int()\nwith base 10"),
    ):
        stop = failures.to_stop(error, "coconut")
        assert stop is not None and "\n" not in str(stop) and "; " in str(stop)
    assert failures.to_stop(TypeError("a bug"), "coconut") is None
    assert failures.to_stop(AssertionError(), "coconut") is None
