"""Buckets over obstore: one client for each bucket and process, and what its errors mean.

A client is built from the environment alone (`AWS_*`, `AZURE_*`, `GOOGLE_*`), in the process that uses it. It
is never pickled, since the pickle would hold the secret, and never used after a fork, since it would hang.

`memory://` is the memory of this process, for tests and trials.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ...schemas.errors import ConfigError
from ...schemas.secrets import shorten
from . import variables
from .failures import RETRYING, Kind, ReadError, classify
from .packages import how_to_install_extra

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Result = TypeVar("Result")

SCHEMES = ("s3", "az", "gs", "memory")
"""Of the URLs that a corpus can lie at."""

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_REGION; AWS_ENDPOINT_URL for a service of "
    "your own)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}
"""Scheme -> the environment variables that let in who writes there."""

_BEGIN = {"s3": ("AWS_",), "az": ("AZURE_", "AZURITE_"), "gs": ("GOOGLE_",)}
"""How the environment variables begin that a client is built from."""

_TOLD_APART = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_REGION"),
    *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
    *("AZURE_STORAGE_USE_EMULATOR", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"),
)
"""Variables of which a change, as between two tests, needs another client."""

_ADDRESSES = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"),
    *("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
)
"""Variables that hold the address of a server."""

_RETRIES = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}
"""obstore's own, for a single request; `failures.RETRYING` asks again within its budget."""

_TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "600s"}
"""The last one is of a request with its whole body, which may be a shard."""

_Key = tuple[str, str, tuple[str | None, ...]]

_lock = threading.Lock()
_clients: dict[_Key, ObjectStore] = {}
_corpora: set[tuple[str, str]] = set()
_answered: set[int] = set()
"""The clients, which stay for ever, that have had an answer, so that their credentials are right; by `id`."""

_first_used_in: int | None = None


class Place(NamedTuple):
    """An object or a folder in a bucket; `key` is "" for the bucket itself."""

    scheme: str
    bucket: str
    key: str

    def url(self, key: str) -> str:
        """The URL of another key of the bucket."""
        return f"{self.scheme}://{self.bucket}/{key}"


def place_of(url: str) -> Place:
    """What a URL names."""
    scheme, _, rest = variables.expand(url).partition("://")
    bucket, _, key = rest.partition("/")
    return Place(scheme, bucket, key.strip("/"))


def key_of(url: str) -> str:
    """The key of an object.

    Raises:
        IsADirectoryError: the URL names a whole bucket.
    """
    if not (key := place_of(url).key):
        raise IsADirectoryError(errno.EISDIR, "a bucket, and no object", url)
    return key


def use_as_corpus(url: str) -> None:
    """Read what is in this bucket over obstore from now on, in this process.

    Of `memory://` it does nothing: a bucket that this process has written to is read so, others are fsspec's.
    """
    scheme, bucket, _ = place_of(url)
    if scheme in SCHEMES and scheme != "memory" and bucket:
        add_corpus(scheme, bucket)


def is_of_corpus(url: str) -> bool:
    """Whether a URL is in a bucket that a corpus lies in."""
    return bool(_corpora) and "://" in url and place_of(url)[:2] in _corpora


def add_corpus(scheme: str, bucket: str) -> None:
    """The same for a bucket that this process writes to."""
    _corpora.add((scheme, bucket))


def client_of(place: Place) -> ObjectStore:
    """The client of a bucket.

    Raises:
        ConfigError: obstore is not installed, the environment lacks what the client needs, the URL holds a
            secret, or this process was forked from one that had used a bucket.
    """
    global _first_used_in
    if "@" in place.bucket:
        raise ConfigError(
            f"{shorten(place.url(place.key))}: names a user or a password; leave it out, and set "
            f"{CREDENTIALS.get(place.scheme, 'them')} in the environment"
        )
    key = _key_of(place)
    if _first_used_in not in (None, os.getpid()):
        raise ConfigError(
            f"{place.scheme}://{place.bucket}: this process was forked from one that had used a bucket, and "
            "would wait for ever; start processes by `spawn` instead of `fork`"
        )
    with _lock:
        if key not in _clients:
            _clients[key] = _connect(place)
            _first_used_in = os.getpid()
        return _clients[key]


def _key_of(place: Place) -> _Key:
    told_apart = () if place.scheme == "memory" else tuple(os.environ.get(name) for name in _TOLD_APART)
    return place.scheme, place.bucket, told_apart


def variables_set(scheme: str) -> list[str]:
    """Names of the environment variables of this process that a client may be built from."""
    return sorted(
        name for name, value in os.environ.items() if value and name.startswith(_BEGIN.get(scheme, ()))
    )


def was_used() -> bool:
    """Whether this process has used a bucket: one that is forked from it would wait for ever."""
    return _first_used_in is not None


def _connect(place: Place) -> ObjectStore:
    try:
        from obstore import store as kinds
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise ConfigError(
            f"{place.scheme}://{place.bucket}: obstore reads and writes a corpus in a bucket, and is not "
            f"installed; {how_to_install_extra('remote')}, on every node"
        ) from error
    if place.scheme == "memory":
        return kinds.MemoryStore()
    _check_variables(place)
    options: dict[str, Any] = {"client_options": _client_options(place.scheme), "retry_config": _RETRIES}
    kind = {"s3": kinds.S3Store, "az": kinds.AzureStore, "gs": kinds.GCSStore}[place.scheme]
    try:
        return kind(place.bucket, **options)
    except (BaseError, ValueError, OSError) as error:
        raise ConfigError(
            f"{place.scheme}://{place.bucket}: {_first_line(str(error))}; {_fix(place.scheme)}"
        ) from None


def _check_variables(place: Place) -> None:
    """Refuse what obstore would not survive: it ends the process for an address without `http://`.

    Raises:
        ConfigError: names the variable, and not its value, which may be a secret.
    """
    for name in variables_set(place.scheme):
        value, problem = os.environ[name], ""
        if value != value.strip() or not value.isprintable():
            problem = "begins or ends with a space, or has a line break in it; set it again without"
        elif name in _ADDRESSES and not re.match("https?://[^/]", value):
            problem = "is no address; begin it with http:// or https://, as in https://minio.example.org"
        if problem:
            raise ConfigError(f"{place.scheme}://{place.bucket}: the environment variable {name} {problem}")


def _client_options(scheme: str) -> dict[str, Any]:
    """Plain HTTP is allowed where the environment names an address of that kind."""
    names = {"s3": "AWS_ENDPOINT", "az": "AZUR", "gs": "GOOGLE_"}[scheme]
    addresses = [value for name, value in os.environ.items() if name.startswith(names)]
    is_emulator = os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true", "yes", "on")
    plain = any(value.startswith("http://") for value in addresses) or (scheme == "az" and is_emulator)
    return {**_TIMEOUTS, **({"allow_http": True} if plain else {})}


class BucketError(OSError):
    """What a bucket answered; status and code stand where `failures` looks for those of botocore."""

    def __init__(self, why: str, status: int | None = None, code: str = ""):
        super().__init__(why)
        self.status, self.code = status, code
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketError, (str(self), self.status, self.code)


def ask(question: Callable[[Any, ObjectStore], Result], url: str) -> Result:
    """What a call of obstore returns, with its errors as errors of the system, for `failures` to tell apart.

    Args:
        question: is given the module obstore and the client of the URL's bucket.
        url: of the object or folder.

    Raises:
        FileNotFoundError: there is no such object.
        ConfigError: as `client_of`, and where nothing in this bucket can be had: no bucket, no credentials.
        BucketError: anything else.
    """
    client = client_of(place_of(url))
    import obstore

    try:
        answer = question(obstore, client)
    except Exception as error:
        if not _is_of_obstore(error):
            raise
        raise _translated(error, url) from None
    _answered.add(id(client))
    return answer


def insist(question: Callable[[Any, ObjectStore], Result], url: str) -> Result:
    """`ask` again and again within the budget of `failures.RETRYING`; a refusal is of the set-up.

    Raises:
        FileNotFoundError: as `ask`.
        ConfigError: as `ask`, and for a refusal.
        ReadError: it did not work.
    """
    try:
        return RETRYING.call(lambda: ask(question, url), url)
    except ReadError as failure:
        if isinstance(failure.__cause__, FileNotFoundError | IsADirectoryError):
            raise failure.__cause__ from None
        if failure.kind in (Kind.REFUSED, Kind.SETUP):
            answer = failure.__cause__
            known = (answer.status, answer.code) if isinstance(answer, BucketError) else (None, "")
            raise ConfigError(f"{failure}; {_fix(place_of(url).scheme, *known)}") from None
        raise


def names_in(calls: Any, client: ObjectStore, key: str) -> list[str]:
    """Names of the objects and folders directly below a key, as they are now; no such folder, no names."""
    found = calls.list_with_delimiter(client, key or None)
    keys = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
    return sorted({name for each in keys if (name := each[len(key) :].strip("/"))})


_STATUS = re.compile(r"status code: (\d{3}) ?([^:\n]*)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_ASKED = re.compile(r"Error performing \w+ (\w+://[^/\s]+)")
_CAUSE = re.compile(
    r"\n\nDebug source.*?(?:message: \"([^\"]+)\"|error: \"([^\"]+)\"|TimedOut|kind: Timeout)", re.DOTALL
)
"""Why there was no answer, in what obstore prints for people who debug it."""
_METADATA = ("//169.254.", "//metadata.google.internal", "//[fd00:ec2::254]")
"""Addresses that tell a machine in a cloud its credentials: only who has none is asked for them there."""


def _is_of_obstore(error: Exception) -> bool:
    """Whether obstore has raised it; what it does not find is Python's own error, without a number."""
    is_missing = isinstance(error, FileNotFoundError) and error.errno is None
    return is_missing or type(error).__module__.partition(".")[0] == "obstore"


def _translated(error: Exception, url: str) -> Exception:
    text, url = str(error), shorten(url)
    scheme = place_of(url).scheme
    status, code = _STATUS.search(text), _CODE.search(text)
    number = int(status[1]) if status else None
    if "Received redirect without LOCATION" in text:
        number = 301
    is_of_metadata = any(address in text for address in _METADATA)
    if is_of_metadata and id(_clients.get(_key_of(place_of(url)))) in _answered:  # they are to be renewed
        return BucketError(_why(text, status, code))
    if is_of_metadata and number not in (429, 500, 502, 503, 504):
        return ConfigError(f"{url}: no credentials; set {CREDENTIALS.get(scheme)} on every node")
    why = _why(text, status, code)
    if code and code[1] == "NoSuchUpload":  # finished before: the answer was lost, and obstore asked again
        return BucketError(why, code=code[1])
    answer = BucketError(why, number, code[1] if code else "")
    kind = classify(answer) if number or code else classify(error)
    if kind is Kind.SETUP or number == 501:
        return ConfigError(f"{url}: {why}; {_fix(scheme, number, code[1] if code else '')}")
    if isinstance(error, FileNotFoundError) or number == 404:
        return FileNotFoundError(errno.ENOENT, "no such object", url)
    return answer


def _why(text: str, status: re.Match[str] | None, code: re.Match[str] | None) -> str:
    if status:
        return f"HTTP {status[1]} {status[2].strip()}".rstrip() + (f" ({code[1]})" if code else "")
    line = _first_line(text)
    if not (asked := _ASKED.search(text)):
        return line
    cause = _CAUSE.search(text)
    why = (
        cause[1] or cause[2] or "it took too long"
        if cause
        else line.rpartition(" - ")[2].removeprefix("HTTP error: ")
    )
    return f"no answer from {shorten(asked[1])} ({why})"


def _first_line(text: str) -> str:
    return shorten(" ".join(text.partition("\n\nDebug source")[0].split()))


def _fix(scheme: str, status: int | None = None, code: str = "") -> str:
    """What to do about an answer with which nothing in a bucket can be had."""
    named = CREDENTIALS.get(scheme)
    if code in ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName"):
        return f"correct the bucket's name, or make the bucket{_at_address(scheme)}"
    if code in ("ExpiredToken", "TokenRefreshRequired"):
        return "these credentials are no longer valid; set new ones on every node"
    if code == "RequestTimeTooSkewed":
        return "set the clock of this machine"
    if scheme == "s3" and (status in (301, 307) or code == "AuthorizationHeaderMalformed"):
        return "set AWS_REGION to the region of the bucket, on every node"
    if status == 401 or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"):
        return f"correct {named} on every node"
    also = f", and set {named} on every node" if named else ""
    return f"check that the bucket is there and may be read and written{also}"


def _at_address(scheme: str) -> str:
    """Which server was asked, if it is not the one that everybody means."""
    for name in _ADDRESSES:
        if name.startswith(_BEGIN.get(scheme, ())) and (value := os.environ.get(name)):
            return f" ({name} is {shorten(value)})"
    return ""
