"""Commands that read a shard of a bucket, for programs that know no stores."""

from __future__ import annotations

import shlex

from ...schemas.errors import ConfigError
from ..io import bucket_clients
from ..io.location import is_bucket

PIPES = {
    "s3": "aws s3 cp {url} -",
    "gs": "gcloud storage cat {url}",
    "az": "az storage blob download -c {bucket} -n {key} -f /dev/stdout --no-progress -o none",
}
"""Scheme -> the command of the store's own client that writes an object to its output."""


def pipe_of(shard: str) -> str:
    """A shard as `webdataset` reads it: a path as it is; of a URL, a command of the store's own client.

    Raises:
        ConfigError: nobody else can read it.
    """
    if not is_bucket(shard):
        return shard
    scheme, bucket, key = bucket_clients.place_of(shard)
    if scheme not in PIPES:
        raise ConfigError(f"{shard}: no command reads {scheme}:// from another process; leave out --pipe")
    named = {"url": shard, "bucket": bucket, "key": key}
    return "pipe:" + PIPES[scheme].format(**{name: shlex.quote(text) for name, text in named.items()})
