"""A folder of somebody else's is never taken for a corpus, and a corpus never loses what is not its own."""

import hashlib
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import adopt, verify
from paracaption.pipeline.corpus.owner import own
from paracaption.pipeline.corpus.sweep import sweep
from paracaption.schemas.errors import ConfigError
from tests.building import build, config_of
from tests.synthetic import write_coconut, write_sa1b


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


@pytest.mark.parametrize(
    "name",
    [
        "sa1b/shards/sa_000000.tar",
        "sa1b/shards/sa1b-000001.tar",
        "sa1b/ledger/sa1b-000000.parquet",
        "sa1b/manifests/notes.txt",
        "sa1b/evidence/mine.parquet",
        "sa1b/plan/plan.txt",
    ],
)
def test_files_where_a_corpus_has_its_own_are_refused_before_the_first_build_and_stay(tmp_path, name):
    """Also if they are called as ours are: nothing says that the folder is a corpus."""
    theirs = tmp_path / "data" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"mine")
    config = config_of(tmp_path / "data", sa1b=write_sa1b(tmp_path / "src", 2))
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="is not a corpus; choose another `out`") as told:
        build(config)
    assert str(theirs) in str(told.value) and "\n" not in str(told.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "stats.json", "sa1b/journal/of-mine/x.txt"])
def test_files_that_a_build_would_replace_are_refused_in_a_folder_that_is_no_corpus(tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_bytes(b"mine")
    config = config_of(tmp_path / "out", sa1b=write_sa1b(tmp_path / "src", 2))
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="is not a corpus; choose another `out`"):
        build(config)
    assert tree(tmp_path) == before


@pytest.mark.soak
def test_files_beside_the_subsets_are_nobodys_business(tmp_path):
    (tmp_path / "out/other/shards").mkdir(parents=True)
    (tmp_path / "out/other/shards/other-000000.tar").write_bytes(b"mine")
    (tmp_path / "out/other/shards/.tmp-mine").write_bytes(b"mine")
    (tmp_path / "out/notes.txt").write_bytes(b"mine")
    before = tree(tmp_path / "out")
    config = config_of(tmp_path / "out", sa1b=write_sa1b(tmp_path / "src", 2))
    build(config)
    build(config.model_copy(update={"text": config.text.model_copy(update={"min_words": 4})}))
    assert before.items() <= tree(tmp_path / "out").items()


@pytest.mark.parametrize("name", ["sa1b/shards/sa1b-000001.tar", "sa1b/manifests/sa1b-000000.json"])
def test_a_new_subset_of_a_corpus_takes_no_files_of_others_over(tmp_path, name):
    coconut = write_coconut(tmp_path / "coconut", 2)
    build(config_of(tmp_path / "out", coconut=coconut))
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"mine")
    build(config_of(tmp_path / "out", coconut=coconut, text={"min_words": 4}))
    before = tree(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not a corpus; choose another `out`"):
        build(config_of(tmp_path / "out", coconut=coconut, sa1b=write_sa1b(tmp_path / "src", 2)))
    assert tree(tmp_path / "out") == before


def test_files_of_others_in_a_corpus_are_never_deleted(tmp_path):
    config = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "src", 4))
    build(config)
    names = [
        *(
            "shards/sa_000000.tar",
            "shards/other-000001.tar",
            "shards/coconut-1.tar",
            "shards/coconut-000001.TAR",
        ),
        *("shards/coconut-000001.tar.bak", "ledger/coconut-000001.csv", "manifests/coconut-000001.json~"),
        *(
            "evidence/notes.txt",
            "evidence/mine/coconut-000009.parquet",
            "mine/coconut-000001.tar",
            "plan/old.json",
        ),
    ]
    for name in names:
        path = tmp_path / "out/coconut" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    with own(str(tmp_path / "out"), "build", 60) as owner:
        sweep(owner, keep_replaced_s=0)
    build(config.model_copy(update={"text": config.text.model_copy(update={"min_words": 4})}))
    assert all((tmp_path / "out/coconut" / name).read_bytes() == b"mine" for name in names)


def test_a_corpus_whose_manifests_are_gone_loses_no_shard(tmp_path):
    config = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "src", 4))
    build(config)
    before = tree(tmp_path / "out/coconut/shards")
    for path in (tmp_path / "out/coconut/manifests").iterdir():
        path.unlink()
    with own(str(tmp_path / "out"), "build", 60) as owner:
        sweep(owner, keep_replaced_s=0)
    assert tree(tmp_path / "out/coconut/shards") == before
    build(config)
    assert tree(tmp_path / "out/coconut/shards") == before


def test_a_corpus_without_its_marker_is_still_known_by_its_plan(tmp_path):
    config = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "src", 4))
    build(config)
    (tmp_path / "out" / adopt.MARKER).unlink()
    before = tree(tmp_path / "out/coconut/shards")
    build(config.model_copy(update={"text": config.text.model_copy(update={"min_words": 4})}))
    assert tree(tmp_path / "out/coconut/shards").keys() == before.keys()
    assert not [each for each in verify.verify(tmp_path / "out").problems if "shard" in str(each)]
