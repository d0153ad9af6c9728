"""Values of a configuration as strangers may see them: no secrets, and no folders of the machine."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from .secrets import HIDDEN, is_secret_name, shorten


def published(value: Any) -> Any:
    """A value of the configuration for strangers: of a path only its name, of a URL no password."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if isinstance(each, str) and each and is_secret_name(name) else published(each)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [published(each) for each in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "file:")):
        return f".../{PurePosixPath(value).name}"
    if "://" in value:
        address = urlsplit(value)
        value = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2], query=""))
    return shorten(value, environment=False)
