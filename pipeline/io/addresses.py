"""What is wrong with the address of a corpus in a bucket, found before anything is asked there."""

from __future__ import annotations

import re

from ...schemas.errors import ConfigError
from . import bucket_clients, variables

OTHER_NAMES = {
    "s3a": "s3",
    "s3n": "s3",
    "gcs": "gs",
    "abfs": "az",
    "abfss": "az",
    "azure": "az",
    "adl": "az",
}
"""What other programs call a scheme."""

_ONE_SLASH = re.compile(rf"({'|'.join((*bucket_clients.SCHEMES, *OTHER_NAMES))}):/?(?!/)", re.IGNORECASE)


def check_path(path: str) -> None:
    """Refuse the path of a folder that was meant to be a URL, such as `s3:/bucket/corpus`.

    `Path` makes this of a URL, and a shell of a slip. No folder is called so.

    Raises:
        ConfigError: it is.
    """
    found = _ONE_SLASH.match(path)
    if found:
        right = f"{_scheme_of(found[1])}://{path[found.end() :]}"
        raise ConfigError(f"{path}: a URL begins with `{_scheme_of(found[1])}://`; write {right}")


def check_bucket(url: str, purpose: str = "") -> None:
    """Refuse the URL of a place in a bucket that holds a secret, names no bucket or means several things.

    Args:
        url: of any scheme. One that is no bucket's, such as https://, passes.
        purpose: is added to the message about a secret.

    Raises:
        ConfigError: the message has no secret.
    """
    scheme, _, rest = variables.expand(url).partition("://")
    if scheme not in bucket_clients.SCHEMES:
        if _scheme_of(scheme) in bucket_clients.SCHEMES:
            raise ConfigError(f"{shown(url)}: no such kind of address; write {_scheme_of(scheme)}://")
        return
    bucket, _, key = rest.partition("/")
    if "@" in bucket or "?" in rest or "#" in rest:
        what = "a user or a password" if "@" in bucket else "a query or a signature"
        credentials = bucket_clients.CREDENTIALS.get(scheme)
        fix = f"; leave it out, and set {credentials} in the environment of every node" if credentials else ""
        raise ConfigError(f"{shown(url)}: holds {what}{purpose}{fix}")
    if not bucket:
        raise ConfigError(f"{shown(url)}: names no bucket; write {scheme}://BUCKET/CORPUS")
    if any(part in ("", ".", "..") for part in key.rstrip("/").split("/")) and key:
        raise ConfigError(f"{shown(url)}: has an empty part, `.` or `..`; write the address out")


def shown(url: str) -> str:
    """A URL without what stands before its bucket and after its key."""
    scheme, _, rest = variables.expand(url).partition("://")
    bucket, slash, key = rest.partition("/")
    return f"{scheme}://{bucket.rpartition('@')[2]}{slash}{key}".partition("?")[0].partition("#")[0]


def _scheme_of(name: str) -> str:
    """What a scheme is called here: `S3`, `s3a` and `s3n` are `s3`."""
    return OTHER_NAMES.get(name.lower(), name.lower())
