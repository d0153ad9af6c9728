"""Every command that reads a corpus says of one in a bucket what it says of the same one in a folder."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import paracaption
from paracaption.pipeline.corpus import contact_sheet, log, verify
from paracaption.pipeline.corpus.shard_urls import pipe_of
from paracaption.pipeline.io import files
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob

COMMANDS = [
    ["verify", "CORPUS"],
    ["verify", "CORPUS", "--json"],
    ["inspect", "CORPUS"],
    ["inspect", "CORPUS", "--json"],
    ["inspect", "CORPUS", "--shards"],
    ["show", "CORPUS", "coconut/000000000001", "--out", "OUT.png"],
    ["show", "CORPUS", "nobody", "--out", "OUT.png"],
    ["report", "CORPUS", "--to", "OUT.html"],
    ["report", "CORPUS"],
    ["export", "CORPUS", "--format", "coco", "--to", "OUT/coco"],
    ["export", "CORPUS", "--format", "perceptiondlm-json", "--to", "OUT/json"],
    ["export", "CORPUS", "--format", "parquet", "--to", "OUT/parquet"],
    ["status", "CORPUS"],
    ["versions", "CORPUS"],
    ["versions", "CORPUS", "--all"],
    ["versions", "CORPUS", "--config", "1"],
    ["diff", "CORPUS", "0", "12"],
    ["diff", "CORPUS", "9", "17"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_says_the_same(pair, command):
    code, text = pair.run(*command)
    assert code == (1 if "nobody" in command or "--config" in command else 0), text
    assert text.strip()


def test_what_the_commands_write_is_the_same(pair):
    for name in (".png", "/coco", "/json", "/parquet"):
        first, second = (Path(f"{pair.beside}/out-{number}{name}") for number in (0, 1))
        if not first.exists():
            pytest.skip("needs the tests above")
        assert _content(first) == _content(second)


def _content(path: Path) -> dict[str, bytes]:
    found = [each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()]
    return {str(each.relative_to(path)): each.read_bytes() for each in found}
