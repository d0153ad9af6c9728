"""What is looked at before a corpus is written to a bucket: its URL, and what the store can do."""

from __future__ import annotations

from ...schemas.errors import ConfigError
from . import files, variables
from .bucket_clients import CREDENTIALS, SCHEMES

_OTHER_NAMES = {
    "s3a": "s3",
    "s3n": "s3",
    "gcs": "gs",
    "abfs": "az",
    "abfss": "az",
    "azure": "az",
    "adl": "az",
}
"""What other programs call a scheme."""


def refuse_secrets(url: str) -> None:
    """Refuse a URL as `out` that holds a secret, or that no store writes to. A path of a folder passes.

    Raises:
        ConfigError: it does; the message has no secret.
    """
    if not files.is_url(url):
        return
    scheme, _, rest = variables.expand(url).partition("://")
    shown = _without_secrets(scheme, rest)
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        other = _OTHER_NAMES.get(scheme)
        fix = f"write {other}://" if other else f"give a folder, or a URL of {known}"
        raise ConfigError(f"out: {shown}: a corpus cannot be written to {scheme}://; {fix}")
    bucket, _, key = rest.partition("/")
    credentials = CREDENTIALS.get(scheme)
    if "@" in bucket or "?" in rest or "#" in rest:
        what = "a user or a password" if "@" in bucket else "a query or a signature"
        fix = f"; set {credentials} in the environment of every node" if credentials else ""
        raise ConfigError(f"out: {shown}: holds {what}, which would be published with the corpus{fix}")
    if not bucket:
        raise ConfigError(f"out: {shown}: names no bucket; write {scheme}://BUCKET/CORPUS")
    if any(part in ("", ".", "..") for part in key.rstrip("/").split("/")) and key:
        raise ConfigError(f"out: {shown}: has an empty part, `.` or `..`; write the address out")


def _without_secrets(scheme: str, rest: str) -> str:
    """A URL without what stands before its bucket and after its key."""
    bucket, slash, key = rest.partition("/")
    return f"{scheme}://{bucket.rpartition('@')[2]}{slash}{key}".partition("?")[0].partition("#")[0]
