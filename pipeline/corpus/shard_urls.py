"""Where the committed shards of a corpus lie, for programs that read them without ParaCaption.

In a bucket every attempt to write a shard has a name of its own, and the commit log says which ones count. No
pattern does, so such programs are given a list.
"""

from __future__ import annotations

from ..io.location import Location
from . import log, reader


def list_shards(corpus: str | Location, subset: str | None = None) -> list[str]:
    """Paths or URLs of the committed shards in order, of one subset or of all::

        import json
        import paracaption
        import webdataset

        shards = paracaption.list_shards("s3://bucket/corpus", "coconut")
        pipes = [f"pipe:aws s3 cp {url} -" for url in shards]
        for sample in webdataset.WebDataset(pipes, shardshuffle=False):
            photo, record = sample["jpg"], json.loads(sample["json"])

    Args:
        corpus: the `out` of a build.
        subset: name of a subset; None for all.

    Raises:
        ConfigError: there is no corpus, or no such subset.
        IntegrityError: the commit log is damaged.
    """
    opened = reader.open_corpus(corpus)
    logged = log.read_units(opened.path)
    return [
        unit.shard
        for unit in opened.units(subset)
        if (found := logged.get(f"{unit.subset}/{unit.name}")) is not None and found.shard is not None
    ]
