"""Megatron-Energon and mosaicml-streaming read what is exported for them, each in an environment of its own.

They are no dependencies of ours. A test is skipped where its environment cannot be made within minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paracaption.pipeline.corpus import hub, reader
from paracaption.pipeline.corpus.shard import iter_stored
from tests import committed

pytestmark = pytest.mark.soak
_LIMIT_S = 150
ROOT = Path(__file__).resolve().parents[3]

READ_ENERGON = """
import json, sys
from typing import Any
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, WorkerConfig, basic_sample_keys, edataclass
from megatron.energon import get_loader, get_train_dataset, stateless

@edataclass
class Photo(Sample):
    image: Any
    record: Any

@stateless
def cook(sample):
    return Photo(**basic_sample_keys(sample), image=sample["jpg"], record=sample["json"])

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]
    def batch(self, samples):
        return samples

found = {}
for path in sys.argv[1:]:
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    options = {"batch_size": 1, "shuffle_buffer_size": None, "max_samples_per_sequence": None}
    data = get_train_dataset(path, worker_config=workers, task_encoder=Encoder(), repeat=False, **options)
    found[path] = [sample.record for batch in get_loader(data) for sample in batch]
    assert all(sample.image.shape[0] == 3 for batch in get_loader(data) for sample in batch)
print(json.dumps(found))
"""

WRITE_MDS = """
import sys
sys.path.append(sys.argv[1])
from paracaption.pipeline.corpus import mds
print(mds.export_mds(sys.argv[2], sys.argv[3], shard_mb=0.02))
"""

READ_MDS = """
import json, sys
from streaming import StreamingDataset

data = StreamingDataset(local=sys.argv[1], split="train", shuffle=False, batch_size=1)
rows = [data[number] for number in range(len(data))]
print(json.dumps([[row["key"], row["jpg"].hex(), row["json"]] for row in rows]))
"""


def environment(folder: Path, package: str) -> Path:
    """The interpreter of a new environment that has a package."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("no uv here to make an environment with")
    python = folder / "bin" / "python"
    base = Path(sys.executable).resolve()
    for command in (
        [uv, "venv", "--quiet", "--python", base, folder],
        [uv, "pip", "install", "--quiet", "--python", python, package],
    ):
        try:
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{package} cannot be installed within {_LIMIT_S} s")
        if done.returncode != 0:
            pytest.skip(f"{package} cannot be installed: {done.stderr.strip()[-300:]}")
    return python


def last_line(python: Path | str, code: str, *arguments: object) -> str:
    command = [str(python), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return committed.merged(tmp_path_factory.mktemp("loaders") / "out")


def records(out: Path) -> dict[str, list[Any]]:
    """Key, photo and JSON of each image, by subset."""
    found: dict[str, list[Any]] = {}
    for unit in reader.open_corpus(out).units():
        manifest = reader.read_manifest(unit.manifest)
        for sample, photo, record in iter_stored(unit.shard) if manifest.shard else ():
            found.setdefault(unit.subset, []).append([sample.key, photo.hex(), json.loads(record)])
    return found


def test_energon_reads_each_subset_and_the_blend(out, tmp_path):
    python = environment(tmp_path / "energon", "megatron-energon>=7,<8")
    repo = tmp_path / "repo"
    hub.write_repository(hub.plan_repository(out, shard_mb=0.03, energon=True), repo)
    paths = [repo / "data" / "coconut", repo / "data" / "sa1b", repo / "energon.yaml"]
    coconut, sa1b, blend = json.loads(last_line(python, READ_ENERGON, *paths)).values()
    wanted = {subset: [row[2] for row in rows] for subset, rows in records(out).items()}

    def by_key(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(rows, key=lambda row: row["key"])

    assert by_key(coconut) == wanted["coconut"] and by_key(sa1b) == wanted["sa1b"]
    assert by_key(blend) == by_key([*wanted["coconut"], *wanted["sa1b"]])


def test_streaming_reads_every_record_of_an_mds_export(out, tmp_path):
    python = environment(tmp_path / "mds", "mosaicml-streaming>=0.13,<0.14")
    packages = next((tmp_path / "mds" / "lib").glob("python*/site-packages"))
    last_line(sys.executable, WRITE_MDS, packages, out, tmp_path / "to")
    assert len(list((tmp_path / "to" / "train").glob("*.mds"))) > 1
    found = json.loads(last_line(python, READ_MDS, tmp_path / "to"))
    assert found == [row for rows in records(out).values() for row in rows]
