"""What an error of a source means, and how long it is worth asking again.

| kind | what | then |
| --- | --- | --- |
| transient | timeouts, resets, 408, 429, 5xx, short bodies, EIO, ESTALE, no memory | asked again, and again |
| setup | 401, expired or missing credentials, a missing package | the build stops at once |
| refused | 403, EACCES: of the set-up if it meets everything, else of the record | one of both |
| record | 410, EISDIR, ELOOP, ENAMETOOLONG; 404, ENOENT if a fresh listing agrees | a drop with its reason |
| content | the bytes are there and are not what they should be | a drop with its reason |

Errors are told apart by their attributes: nothing here imports the package that raised one.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, TypeVar

from ...schemas.errors import BadRecord, ConfigError, ParaCaptionError, Retryable, one_line
from ...schemas.reasons import Reason
from ...schemas.secrets import shorten
from .activity import NOW
from .packages import how_to_install

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Kind(StrEnum):
    """Whose fault an error of a source is."""

    TRANSIENT = "transient"
    SETUP = "setup"
    REFUSED = "refused"
    RECORD = "record"
    CONTENT = "content"


_STATUSES = {
    401: Kind.SETUP,
    402: Kind.SETUP,
    404: Kind.RECORD,
    407: Kind.SETUP,
    408: Kind.TRANSIENT,
    409: Kind.TRANSIENT,
    410: Kind.RECORD,
    414: Kind.RECORD,
    421: Kind.TRANSIENT,
    423: Kind.TRANSIENT,
    425: Kind.TRANSIENT,
    429: Kind.TRANSIENT,
    451: Kind.RECORD,
}
"""HTTP statuses; what is not here goes by its hundred."""

_HUNDREDS = {3: Kind.SETUP, 4: Kind.REFUSED, 5: Kind.TRANSIENT}
"""3: a redirect that leads nowhere, or to another region. 4: what a server does not want, such as 403."""

_CODES = {
    "AllAccessDisabled": Kind.SETUP,
    "AuthorizationHeaderMalformed": Kind.SETUP,
    "ContainerNotFound": Kind.SETUP,
    "ExpiredToken": Kind.SETUP,
    "IncompleteBody": Kind.TRANSIENT,
    "InvalidAccessKeyId": Kind.SETUP,
    "InvalidBucketName": Kind.SETUP,
    "InvalidToken": Kind.SETUP,
    "NoSuchBucket": Kind.SETUP,
    "NotImplemented": Kind.SETUP,
    "NotSignedUp": Kind.SETUP,
    "PermanentRedirect": Kind.SETUP,
    "RequestTimeTooSkewed": Kind.SETUP,
    "RequestTimeout": Kind.TRANSIENT,
    "SignatureDoesNotMatch": Kind.SETUP,
    "TokenRefreshRequired": Kind.SETUP,
}
"""Codes of S3 and Azure that say more than their status (400, 403, 404)."""

_NAMES = {
    "CredentialRetrievalError": Kind.SETUP,
    "DefaultCredentialsError": Kind.SETUP,
    "InvalidURL": Kind.RECORD,
    "NoCredentialsError": Kind.SETUP,
    "NoRegionError": Kind.SETUP,
    "PartialCredentialsError": Kind.SETUP,
    "PermissionDeniedError": Kind.REFUSED,
    "ProfileNotFound": Kind.SETUP,
    "RefreshError": Kind.SETUP,
    "SSOTokenLoadError": Kind.SETUP,
    "TokenRetrievalError": Kind.SETUP,
    "TooManyRedirects": Kind.SETUP,
    "UnauthenticatedError": Kind.SETUP,
    "UnauthorizedSSOTokenError": Kind.SETUP,
    "UnknownConfigurationKeyError": Kind.SETUP,
    "UnsupportedProtocol": Kind.SETUP,
}
"""Errors of clients that have no status, by the names of their types."""

_ERRNOS = {
    errno.EACCES: Kind.REFUSED,
    errno.EPERM: Kind.REFUSED,
    errno.EISDIR: Kind.RECORD,
    errno.EILSEQ: Kind.RECORD,
    errno.ELOOP: Kind.RECORD,
    errno.ENAMETOOLONG: Kind.RECORD,
    errno.ENOENT: Kind.RECORD,
    errno.ENOTDIR: Kind.RECORD,
    errno.ESPIPE: Kind.RECORD,
    **{
        getattr(errno, name): Kind.SETUP
        for name in ("EKEYEXPIRED", "EKEYREJECTED", "EKEYREVOKED", "ENOKEY")
        if hasattr(errno, name)
    },
}
"""What is not here is transient, as EIO, ESTALE, ENOTCONN, ETIMEDOUT, EMFILE and ENOMEM are."""

_TYPES: dict[type[BaseException], Kind] = {
    FileNotFoundError: Kind.RECORD,
    NotADirectoryError: Kind.RECORD,
    IsADirectoryError: Kind.RECORD,
    PermissionError: Kind.REFUSED,
    ImportError: Kind.SETUP,
    ssl.SSLCertVerificationError: Kind.SETUP,
    ConnectionError: Kind.TRANSIENT,
    TimeoutError: Kind.TRANSIENT,
    MemoryError: Kind.TRANSIENT,
}
"""For errors without a number."""

_OWN_NUMBERS = (ssl.SSLError, socket.gaierror, socket.herror)
"""OSErrors whose numbers are none of `errno`."""

_CLIENTS = (
    "aiohttp",
    "botocore",
    "aiobotocore",
    "gcsfs",
    "google",
    "httpcore",
    "httpx",
    "obstore",
    "requests",
    "urllib3",
)
"""Packages whose errors come from asking for bytes."""

_DEEPEST = 6
"""How far the causes of an error are followed."""


def classify(error: BaseException, otherwise: Kind = Kind.TRANSIENT) -> Kind:
    """Whose fault an error is that came from reading a source.

    Args:
        error: of a file system, of httpx, aiohttp, botocore, s3fs, gcsfs, or of an fsspec backend.
        otherwise: for an error that is known to be none of these. What a read raises is transient unless it
            is known to be something else; what a decoder raises is of the content.
    """
    if isinstance(error, ReadError | SourceFailure):
        return error.kind
    causes = list(_causes(error))
    for cause in causes:  # the code behind a PermissionError says whether it is the key or the object
        found = _CODES.get(_code(cause)) or _NAMES.get(type(cause).__name__)
        if found is None and isinstance(cause, ssl.SSLCertVerificationError):
            found = Kind.SETUP
        if found is not None:
            return found
    for cause in causes:
        status = status_of(cause)
        if status is not None and status >= 300:
            return _STATUSES.get(status) or _HUNDREDS.get(status // 100, Kind.TRANSIENT)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _OWN_NUMBERS):
        return _ERRNOS.get(error.errno, Kind.TRANSIENT)
    for kind, meaning in _TYPES.items():
        if isinstance(error, kind):
            return meaning
    return Kind.TRANSIENT if is_of_a_client(error) else otherwise


def is_missing(error: BaseException) -> bool:
    """Whether it says that there is nothing under this name."""
    if isinstance(error, ReadError):
        return error.missing
    if _code(error) == "NoSuchBucket" or any(_code(cause) == "NoSuchBucket" for cause in _causes(error)):
        return False
    return isinstance(error, FileNotFoundError | NotADirectoryError) or status_of(error) == 404


def is_of_a_client(error: BaseException) -> bool:
    """Whether an error is one of a package that fetches bytes."""
    return type(error).__module__.partition(".")[0] in _CLIENTS


def is_of_reading(error: BaseException) -> bool:
    """Whether an error, wherever it was raised, says that bytes could not be had, and nothing of them.

    Pillow's and Arrow's own OSErrors have no number: they are about bytes that were read.
    """
    if isinstance(error, ReadError | SourceFailure | MemoryError) or is_of_a_client(error):
        return True
    numbered = isinstance(error, OSError) and error.errno is not None
    return numbered or isinstance(error, tuple(kind for kind in _TYPES if kind is not ImportError))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries, wherever its client keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for holder, name in (
        (error, "status"),
        (error, "status_code"),
        (response, "status_code"),
        (response, "status"),
        (error, "code"),
    ):
        found = getattr(holder, name, None)
        if isinstance(found, str) and found.isdigit():
            found = int(found)
        if isinstance(found, int) and 100 <= found < 600:
            return found
    return None


def retry_after_of(error: BaseException) -> float | None:
    """Seconds that the server asks to wait; None if it does not say."""
    for cause in _causes(error):
        given = getattr(cause, "retry_after", None)
        if isinstance(given, int | float):
            return max(0.0, float(given))
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        else:
            headers = getattr(cause, "headers", None) or getattr(response, "headers", None)
        if headers is None or not hasattr(headers, "get"):
            continue
        value = headers.get("retry-after") or headers.get("Retry-After")
        if value is not None and (seconds := parse_retry_after(str(value))) is not None:
            return seconds
    return None


def parse_retry_after(value: str, now: Callable[[], float] = time.time) -> float | None:
    """Seconds of a Retry-After header: a number or a date; None if it is neither."""
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except (TypeError, ValueError):
        return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    for _ in range(_DEEPEST):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code if isinstance(code, str) else ""


class ReadError(OSError):
    """Bytes of a source could not be had.

    Attributes:
        url: of the file or folder.
        kind: whose fault it is.
        missing: whether it says that there is nothing under this name.
        why: what happened, in a line.
    """

    def __init__(self, url: str, why: str, kind: Kind, missing: bool = False):
        url = shorten(url)
        super().__init__(f"{url}: {why}")
        self.url, self.why, self.kind, self.missing = url, why, kind, missing

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadError, (self.url, self.why, self.kind, self.missing)


class ShortRead(OSError):
    """Fewer bytes came than there are."""


class SourceFailure(BadRecord):
    """A record could not be read, which is no verdict on it; `kind` says whose fault it is."""

    def __init__(self, reason: Reason, detail: str, kind: Kind = Kind.TRANSIENT):
        super().__init__(reason, detail)
        self.kind = kind


class SourceUnavailable(Retryable):
    """A source does not answer now; the same command may work later."""


def kind_of(error: BadRecord) -> str:
    """For `ImageRecord.failed`: the kind of a failure; "" for a verdict on the content."""
    return error.kind.value if isinstance(error, SourceFailure) else ""


def describe(error: BaseException) -> str:
    """What happened, in a line without secrets, and without the file's name if the error keeps it apart."""
    if isinstance(error, ReadError):
        return error.why
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    told = " ".join(str(error).split()) if isinstance(error, OSError) and str(error) else one_line(error)
    return shorten(told)


def to_failure(
    error: BaseException, missing: Reason, unreadable: Reason, fix: str = "", where: str = ""
) -> SourceFailure | ConfigError:
    """What to raise for a record that could not be read.

    Args:
        error: that reading raised.
        missing: the reason if there is nothing under this name.
        unreadable: the reason for another failure of the record itself.
        fix: what to do about a failure of the record.
        where: names the file and the record, if the error's own URL does not.

    Returns:
        A `ConfigError` if the set-up is wrong: nothing else would be read either.
    """
    kind, what = classify(error), where or getattr(error, "url", "")
    detail = f"{shorten(what)}: {describe(error)}" if what else describe(error)
    if kind is Kind.SETUP:
        return ConfigError(f"{detail}; {_mend(detail)}")
    if kind is Kind.TRANSIENT:
        return SourceFailure(Reason.SOURCE_UNAVAILABLE, detail, kind)
    reason = missing if is_missing(error) else unreadable
    return SourceFailure(reason, f"{detail}; {fix}" if fix else detail, kind)


def _mend(problem: str) -> str:
    """What to do about a set-up with which nothing can be read."""
    if package := re.search(
        r"(?:Import|ModuleNotFound)Error: .*?(?:nstall |requires \"|No module named ')([\w-]+)", problem
    ):
        return f"{how_to_install(package[1])}, on every node"
    if "Protocol not known" in problem:
        return "correct the address: no package reads this kind"
    if "gs://" in problem and re.search("Credentials|HTTP 40[13]|nonymous|401|403", problem):
        return 'set GOOGLE_APPLICATION_CREDENTIALS, or for a public bucket FSSPEC_GS=\'{"token": "anon"}\''
    if "NoCredentials" in problem:
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node, or for a public bucket "
            "FSSPEC_S3='{\"anon\": true}'"
        )
    return "check the address first, then the credentials and their permissions (docs/sources.md)"


def to_stop(error: Exception, where: str) -> ParaCaptionError | None:
    """The one line with which planning ends for an error of a source; None for a bug of ours."""
    if isinstance(error, ParaCaptionError):
        return error
    url = getattr(error, "url", None) or getattr(error, "filename", None)
    what = (
        f"{where}: {shorten(url)}: {describe(error)}"
        if isinstance(url, str)
        else f"{where}: {describe(error)}"
    )
    if is_of_reading(error) or isinstance(error, ImportError):
        match classify(error):
            case Kind.TRANSIENT:
                return SourceUnavailable(f"{what}; run the same command again when the source answers")
            case Kind.SETUP | Kind.REFUSED:
                return ConfigError(f"{what}; {_mend(what)}")
        return ConfigError(f"{what}; correct the path")
    if isinstance(error, OSError | ValueError | EOFError | RecursionError):
        return ConfigError(f"{what}; the file may be damaged: fetch it again")
    return None


class Retrying:
    """Asks again for what fails for a while, in this process.

    Each read has a budget of seconds. What is left of it after an outage is remembered as patience, so that
    an outage costs about twice the budget, and not the budget for each of a million records: a read that has
    failed through all of it halves the patience, one that was healed by waiting restores it, and any other
    success gives a thousandth back.

    Args:
        budget_s: seconds from the first failure of a read to its last attempt; 0 asks once.
        clock, sleep, chance: replaced by tests.
    """

    def __init__(
        self,
        budget_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ):
        self._clock, self._sleep, self._chance = clock, sleep, chance
        self.set_budget(budget_s)

    def set_budget(self, budget_s: float) -> None:
        """Give every read this many seconds; patience is whole again if the budget is another one."""
        if getattr(self, "budget_s", None) != budget_s:
            self.budget_s = self.patience_s = budget_s

    def call(self, read: Callable[[], Result], url: str, is_gone: Callable[[], bool] | None = None) -> Result:
        """What `read` returns, asked again while its error is transient.

        Args:
            read: may be called many times.
            url: for messages.
            is_gone: asked when something is missing: whether a fresh listing agrees. Without it, a missing
                file is believed to be missing.

        Raises:
            ReadError: from the last error.
        """
        started, wait = self._clock(), _FIRST_WAIT_S
        patience, failed = self.patience_s, False
        while True:
            try:
                with NOW.touching(url):
                    result = read()
            except ParaCaptionError:
                raise
            except Exception as error:
                failure = _read_error(error, url, is_gone)
                if failure.kind is not Kind.TRANSIENT:
                    raise failure from error
                asked = retry_after_of(error)
                pause = wait * (0.5 + self._chance() / 2) if asked is None else asked
                if self._clock() - started + pause > patience:
                    self.patience_s = min(self.patience_s, patience / 2)
                    raise failure from error
            else:
                gained = self.budget_s if failed else self.patience_s + self.budget_s / 1000
                self.patience_s = min(self.budget_s, gained)
                return result
            if not failed:
                log.warning("%s; trying again for up to %.0f s", failure, patience)
            failed = True
            with NOW.touching(url):
                self._sleep(pause)
            wait = min(_LONGEST_WAIT_S, wait * 2)


_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0

RETRYING = Retrying()
"""How the reads of this process are tried again. A build, an audit and their workers set the budget."""


def _read_error(error: Exception, url: str, is_gone: Callable[[], bool] | None) -> ReadError:
    if isinstance(error, ReadError):
        return error
    unnamed = isinstance(error, ValueError) and not is_of_a_client(error)  # a NUL in a path, for one
    kind, missing = classify(error, Kind.RECORD if unnamed else Kind.TRANSIENT), is_missing(error)
    why = describe(error)
    if missing and is_gone is not None and not is_gone():
        return ReadError(
            url, f"{why}, although the listing of its folder has this file", Kind.TRANSIENT, missing
        )
    return ReadError(url, why, kind, missing)
