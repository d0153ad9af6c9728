"""A corpus as a dataset repository: what lies where, and that it opens in what people load it with."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import tarfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from paracaption.filters.held_out import is_held_out
from paracaption.flows.cli.app import app
from paracaption.pipeline.corpus import hub, hub_card, hub_plan, ledger, mds, merge, reader
from paracaption.pipeline.corpus.hub_unfinished import NOTES
from paracaption.pipeline.corpus.ledger import Place
from paracaption.pipeline.corpus.shard import iter_stored
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests import committed
from tests.building import build, config_of
from tests.hub_server import Hub
from tests.synthetic import write_coconut, write_sa1b

SHARE = 0.4
SHARD_MB = 0.03
TURNED = (7, 8)
"""Photos with an EXIF orientation, whose JSONs have a field that those of earlier ones do not have."""


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Two subsets with held-out images; only one of them states licenses, and some photos were rotated."""
    root = tmp_path_factory.mktemp("hub")
    source = write_coconut(root / "source", 12)
    listed = Path(source["annotations"][0])
    document = json.loads(listed.read_text())
    for image in document["images"]:
        image |= {"license": 4, "author": f"Author {image['id']}"}
    by = {"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}
    listed.write_text(json.dumps({"licenses": [by], **document}))
    for number in TURNED:
        path = root / "source" / "photos" / f"{number:012d}.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(path) as photo:
            photo.load()
        photo.save(path, "JPEG", exif=exif, quality=85)
    sa1b = write_sa1b(root / "sa1b-source", 5)
    config = config_of(root / "out", coconut=source, sa1b=sa1b, images_per_shard=5, held_out_share=SHARE)
    build(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge.plots, "draw_plots", lambda _: dict.fromkeys(merge.plots.NAMES, b""))
        merge.merge(root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def repo(out, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("repo") / "repo"
    hub.write_repository(hub.plan_repository(out, shard_mb=SHARD_MB, energon=True), to)
    return to


def series(out: Path) -> dict[tuple[str, str], dict[str, tuple[bytes, bytes]]]:
    """Photo and JSON of each image by subset and split, in the order of the corpus."""
    found: dict[tuple[str, str], dict[str, tuple[bytes, bytes]]] = defaultdict(dict)
    for unit in reader.open_corpus(out).units():
        for sample, photo, record in iter_stored(unit.shard):
            split = "validation" if is_held_out(sample.key, SHARE) else "train"
            found[unit.subset, split][sample.key] = photo, record
    assert len(found) == 4, "each subset has both splits"
    return found


def shards_of(repo: Path, subset: str, split: str) -> list[Path]:
    return sorted((repo / "data" / subset).glob(f"{split}-*.tar"))


@pytest.mark.soak
def test_samples_keep_their_bytes_and_order_in_a_series_of_shards_per_split(out, repo):
    for (subset, split), wanted in series(out).items():
        shards = shards_of(repo, subset, split)
        total = len(shards)
        assert [each.name for each in shards] == [f"{split}-{n:05d}-of-{total:05d}.tar" for n in range(total)]
        found = [each for path in shards for each in iter_stored(path)]
        assert {each.sample.key: (each.photo, each.record) for each in found} == wanted
        assert [each.sample.key for each in found] == list(wanted)
    assert len(shards_of(repo, "coconut", "train")) > 1
    assert all(path.stat().st_size <= SHARD_MB * 1e6 for path in repo.rglob("*.tar"))


@pytest.mark.soak
def test_a_sample_that_is_larger_than_a_shard_has_one_of_its_own(out, tmp_path):
    plan = hub_plan.plan_hub(out, shard_mb=0.001)
    assert {shard.images for shard in plan.shards} == {1}
    hub.write_repository(hub.plan_repository(out, shard_mb=0.001), tmp_path / "repo")
    assert len(list((tmp_path / "repo").rglob("*.tar"))) == plan.images


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.soak
def test_datasets_loads_every_record_of_each_configuration_streaming_and_not(out, repo, tmp_path):
    from datasets import DownloadMode, get_dataset_config_names, load_dataset

    wanted = series(out)
    assert get_dataset_config_names(str(repo)) == ["all", "coconut", "sa1b"]
    cached = {"cache_dir": str(tmp_path / "cache"), "download_mode": DownloadMode.FORCE_REDOWNLOAD}
    for name in (None, "coconut", "sa1b"):
        subsets = ["coconut", "sa1b"] if name is None else [name]
        loaded = load_dataset(str(repo), name, **cached)
        streamed = load_dataset(str(repo), name, streaming=True)
        assert set(loaded) == set(streamed) == {"train", "validation"}
        for split in loaded:
            expected = {key: each for subset in subsets for key, each in wanted[subset, split].items()}
            for rows in (loaded[split], streamed[split]):
                assert list(rows.features) == ["jpg", "json", "__key__", "__url__"]
                found = {row["__key__"]: row for row in rows}
                assert list(found) == list(expected)
                for key, (_, record) in expected.items():
                    row = found[key]
                    assert without_nulls(row["json"]) == json.loads(record)
                    assert row["jpg"].size == (row["json"]["width"], row["json"]["height"])
    turned = [row["json"]["exif_orientation"] for row in loaded_all(repo, cached)]
    assert sorted(filter(None, turned)) == [6] * len(TURNED)


def loaded_all(repo: Path, cached: dict[str, Any]) -> list[dict[str, Any]]:
    from datasets import load_dataset

    loaded = load_dataset(str(repo), "coconut", **cached)
    return [row for split in loaded.values() for row in split]


@pytest.mark.slow
def test_datasets_notices_a_shard_that_is_missing(out, tmp_path):
    from datasets import load_dataset
    from datasets.exceptions import NonMatchingSplitsSizesError

    hub.write_repository(hub.plan_repository(out, shard_mb=SHARD_MB), tmp_path / "repo")
    shards_of(tmp_path / "repo", "coconut", "train")[-1].unlink()
    with pytest.raises(NonMatchingSplitsSizesError):
        load_dataset(str(tmp_path / "repo"), "coconut", cache_dir=str(tmp_path / "cache"))


def test_webdataset_reads_the_shards(out, repo):
    import webdataset as wds

    shards = [str(path) for path in shards_of(repo, "coconut", "train")]
    found = {
        each["__key__"]: (each["jpg"], each["json"]) for each in wds.WebDataset(shards, shardshuffle=False)
    }
    assert found == series(out)["coconut", "train"]


def test_the_index_has_every_kept_region_with_its_place_in_the_repository(out, repo):
    moved = ("shard", *Place._fields)
    corpus = pq.read_table(out / "index.parquet").to_pylist()
    found = []
    for split in ("train", "validation"):
        rows = pq.read_table(repo / "index" / f"{split}.parquet").to_pylist()
        assert {row["split"] for row in rows} == {split}
        found += rows
        for row in rows:
            data = (repo / row["shard"]).read_bytes()
            record = data[row["json_offset"] : row["json_offset"] + row["json_length"]]
            sample = json.loads(record)
            assert (sample["subset"], sample["key"]) == (row["subset"], row["key"])
            assert row["caption"] in {each["caption"] for each in sample["regions"]}
            assert data[row["photo_offset"] :].startswith(b"\xff\xd8")
            assert is_held_out(row["key"], SHARE) == (split == "validation")
    place = ("subset", "unit", "key", "region")

    def plain(rows: list[dict]) -> list[dict]:
        left_out = {*moved, ledger.SPLIT}
        rows = [{name: each for name, each in row.items() if name not in left_out} for row in rows]
        return sorted(rows, key=lambda row: [row[name] for name in place])

    assert plain(found) == plain(corpus)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.mark.soak
def test_a_dry_run_prints_files_sizes_and_front_matter_and_writes_nothing(out, repo, tmp_path):
    given = ("export", out, "--format", "hub", "--to", tmp_path / "to", "--shard-mb", SHARD_MB, "--energon")
    done = run(*given, "--dry-run")
    assert done.exit_code == 0 and list(tmp_path.iterdir()) == []
    listed, _, head = done.stdout.partition("\n---\n")
    sizes = {line.split()[1]: line.split()[0].replace(",", "") for line in listed.splitlines()}
    written = {str(path.relative_to(repo)): path.stat().st_size for path in repo.rglob("*") if path.is_file()}
    assert sizes.keys() == written.keys()
    assert {name: int(size) for name, size in sizes.items() if size != "?"}.items() <= written.items()
    assert yaml.safe_load(head.removesuffix("---\n")) == hub_card_values(repo)
    assert run(*given).exit_code == 0
    assert (tmp_path / "to" / "README.md").read_bytes() == (repo / "README.md").read_bytes()


def hub_card_values(repo: Path) -> dict[str, Any]:
    return yaml.safe_load((repo / "README.md").read_text().split("---\n")[1])


def test_the_same_corpus_gives_the_same_bytes(out, repo, tmp_path):
    hub.write_repository(hub.plan_repository(out, shard_mb=SHARD_MB, energon=True), tmp_path / "again")
    first, second = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (repo, tmp_path / "again")
    )
    assert first == second


@pytest.mark.soak
def test_a_corpus_behind_a_url_gives_the_same_bytes(out, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(out), "/corpus-to-publish", recursive=True)
    try:
        for name, corpus in (("far", "memory://corpus-to-publish"), ("near", str(out))):
            hub.write_repository(hub.plan_repository(corpus, shard_mb=SHARD_MB), tmp_path / name)
    finally:
        memory.rm("/corpus-to-publish", recursive=True)
    near = {str(path.relative_to(tmp_path / "near")): path for path in (tmp_path / "near").rglob("*.*")}
    for name, path in near.items():
        assert path.is_dir() or (tmp_path / "far" / name).read_bytes() == path.read_bytes(), name


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("held_out", "validation")])
@pytest.mark.soak(keep=1)
def test_one_split_alone_is_a_repository_too(out, tmp_path, split, name):
    hub.write_repository(hub.plan_repository(out, split), tmp_path / "repo")
    keys = {row["key"] for row in pq.read_table(tmp_path / "repo" / "index" / f"{name}.parquet").to_pylist()}
    assert keys == {key for (_, each), found in series(out).items() if each == name for key in found}
    assert [path.name for path in (tmp_path / "repo" / "index").iterdir()] == [f"{name}.parquet"]
    [whole, *_] = hub_card_values(tmp_path / "repo")["configs"]
    assert whole["data_files"] == [{"split": name, "path": f"data/*/{name}-*.tar"}]


@pytest.mark.soak
def test_a_corpus_without_held_out_images_has_one_split_and_one_subset_is_the_default(tmp_path):
    plain = committed.merged(tmp_path / "out")
    repository = hub.plan_repository(plain)
    assert repository.plan.splits == ["train"]
    values = yaml.safe_load(repository.front_matter)
    assert [each["config_name"] for each in values["configs"]] == ["all", "coconut", "sa1b"]
    with pytest.raises(ConfigError, match="no image with a kept region in the split held_out"):
        hub.plan_repository(plain, "held_out")
    alone = [shard for shard in repository.plan.shards if shard.subset == "sa1b"]
    plan = repository.plan._replace(shards=alone)
    values = hub_card.front_matter(plan, plan.corpus.summary, plan.corpus.config)
    [config] = values["configs"]
    assert (config["config_name"], config["default"]) == ("sa1b", True)
    assert config["data_files"] == [{"split": "train", "path": "data/sa1b/train-*.tar"}]


def test_a_damaged_shard_leaves_nothing_behind(tmp_path):
    out = committed.merged(tmp_path / "out")
    repository = hub.plan_repository(out)
    shard = out / "sa1b" / "shards" / "sa1b-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(IntegrityError, match=r"sa1b-000000\.tar"):
        hub.write_repository(repository, tmp_path / "repo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


class _Stopped(BaseException):
    pass


def interrupt(out: Path, to: Path, after: int, energon: bool = True) -> hub.Repository:
    """Stop an export when so many shards are whole."""
    repository, done = hub.plan_repository(out, shard_mb=SHARD_MB, energon=energon), list[int]()

    def stop(size: int) -> None:
        done.append(size)
        if len(done) == after:
            raise _Stopped

    with pytest.raises(_Stopped):
        hub.write_repository(repository, to, stop)
    return repository


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def count_shards_read(monkeypatch) -> list[str]:
    read, iterate = list[str](), hub.iter_stored

    def counted(shard):
        read.append(str(shard))
        return iterate(shard)

    monkeypatch.setattr(hub, "iter_stored", counted)
    return read


@pytest.mark.parametrize("after", [1, 3, 6])
@pytest.mark.soak(keep=1)
def test_an_export_that_was_interrupted_keeps_its_whole_shards_and_goes_on(
    out, repo, tmp_path, monkeypatch, after
):
    to = tmp_path / "repo"
    repository = interrupt(out, to, after)
    assert not to.exists() and 6 < len(repository.plan.shards)
    [left] = tmp_path.iterdir()
    kept = {path: path.stat().st_mtime_ns for path in left.rglob("*.tar")}
    assert len(kept) == after
    assert {path.name for path in left.rglob("*") if path.is_file()} == {*(p.name for p in kept), NOTES}
    read, written = count_shards_read(monkeypatch), list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "unfinished", seen := Seen(hub.unfinished))
        hub.write_repository(repository, to, written.append)
    assert seen.kept == after and sum(written) == repository.plan.bytes
    assert content(to) == content(repo)
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]
    if after == 6:
        assert len(read) < len(list(reader.open_corpus(out).units())), "units of kept shards are not read"


class Seen:
    """Notes how many shards an export keeps."""

    def __init__(self, begin):
        self.begin, self.kept = begin, -1

    @contextmanager
    def __call__(self, *arguments):
        with self.begin(*arguments) as begun:
            self.kept = len(begun.kept)
            yield begun


def test_a_kept_shard_that_is_not_as_it_was_written_is_written_again(out, repo, tmp_path):
    to = tmp_path / "repo"
    repository = interrupt(out, to, 4)
    shards = sorted((tmp_path / ".repo.exporting").rglob("*.tar"))
    shards[0].write_bytes(b"x" * shards[0].stat().st_size)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].unlink()
    with open(tmp_path / ".repo.exporting" / NOTES, "ab") as file:
        file.write(b'["data/coconut/tr')  # cut short
    hub.write_repository(repository, to)
    assert content(to) == content(repo)


@pytest.mark.parametrize("other", ["options", "corpus"])
@pytest.mark.soak(keep=1)
def test_what_is_left_of_an_export_of_something_else_is_removed(out, repo, tmp_path, other):
    to, corpus = tmp_path / "repo", out
    interrupt(out, to, 4, energon=other == "corpus")
    if other == "corpus":
        corpus = committed.merged(tmp_path / "other")
    plan = hub.plan_repository(corpus, shard_mb=SHARD_MB, energon=True)
    hub.write_repository(plan, to)
    again = tmp_path / "again"
    hub.write_repository(plan, again)
    assert content(to) == content(again) and not (tmp_path / ".repo.exporting").exists()


def test_two_exports_to_the_same_place_do_not_mix(out, tmp_path):
    repository = hub.plan_repository(out, shard_mb=SHARD_MB)

    def begin_another(_: int) -> None:
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is writing this export"):
            hub.write_repository(repository, tmp_path / "repo")

    hub.write_repository(repository, tmp_path / "repo", begin_another)
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_a_region_that_is_missing_from_a_shard_is_named(tmp_path):
    out = committed.merged(tmp_path / "out")
    shard = out / "sa1b" / "shards" / "sa1b-000000.tar"
    samples = list(iter_stored(shard))
    key, regions = samples[0].sample.key, samples[0].sample.regions
    samples[0].sample.regions = regions[:-1]
    write_shard(shard, samples)
    with pytest.raises(IntegrityError, match=f"{key}. has {len(regions) - 1} regions, its manifest says "):
        hub.write_repository(hub.plan_repository(out), tmp_path / "repo")


def test_an_image_that_is_missing_from_a_shard_is_named(tmp_path):
    out = committed.merged(tmp_path / "out")
    shard = out / "sa1b" / "shards" / "sa1b-000000.tar"
    samples = list(iter_stored(shard))
    write_shard(shard, samples[:-1])
    with pytest.raises(IntegrityError, match=f"{samples[-1].sample.key}. is missing, its manifest has it"):
        hub.write_repository(hub.plan_repository(out), tmp_path / "repo")


def write_shard(path: Path, samples: list) -> None:
    from paracaption.pipeline.corpus.tar import TarWriter

    with open(path, "wb") as file:
        tar = TarWriter(file)
        for each in samples:
            tar.member(f"{each.sample.key}.jpg", each.photo)
            tar.member(f"{each.sample.key}.json", msgspec.json.encode(each.sample))
        tar.close_archive()


def test_a_ledger_with_fewer_kept_regions_than_its_manifest_is_named(tmp_path):
    out = committed.merged(tmp_path / "out")
    path = out / "coconut" / "ledger" / "coconut-000000.parquet"
    table = pq.read_table(path)
    kept = [number for number, each in enumerate(table["kept"].to_pylist()) if each]
    pq.write_table(table.take([n for n in range(len(table)) if n != kept[0]]), path)
    with pytest.raises(
        IntegrityError, match=r"the ledgers have \d+ images with \d+ kept regions in the split"
    ):
        hub.plan_repository(out)


def test_a_corpus_that_changes_after_the_plan_is_not_written_half(tmp_path):
    out = committed.merged(tmp_path / "out")
    repository = hub.plan_repository(out)
    fewer = [repository.plan.shards[0]._replace(images=repository.plan.shards[0].images - 1)]
    plan = repository.plan._replace(shards=[*fewer, *repository.plan.shards[1:]])
    with pytest.raises(IntegrityError):
        hub.write_repository(repository._replace(plan=plan), tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_a_corpus_that_was_not_merged_since_a_commit_is_refused(tmp_path):
    committed.write(tmp_path / "out")
    with pytest.raises(ConfigError, match="run `paracaption merge CONFIG`"):
        hub.plan_repository(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--format", "coco", "--dry-run"), "--dry-run: not for the format coco, only for hub"),
        (("--format", "mds", "--energon"), "--energon: not for the format mds, only for hub"),
        (("--format", "parquet", "--shard-mb", "5"), "--shard-mb: not for the format parquet"),
        (("--format", "hub", "--prefix", "/data"), "--prefix: not for the format hub"),
        (("--format", "hub", "--shard-mb", "0"), "--shard-mb 0: has to be more than 0"),
        (("--format", "hub", "--split", "test"), "no such split; there are train, held_out, all"),
        (("--format", "yolo"), "there are perceptiondlm-json, coco, parquet, hub, mds"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(out, tmp_path, arguments, says):
    done = run("export", out, "--to", tmp_path / "to", *arguments)
    assert says in str(done.exception) and not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("CC BY 4.0", "cc-by-4.0"),
        ("cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("http://creativecommons.org/licenses/by/2.0/", "cc-by-2.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "cc0-1.0"),
        ("CC0 1.0", "cc0-1.0"),
        ("Apache-2.0", "apache-2.0"),
        ("CC BY-SA 1.0", ""),
        ("CC BY 4.0 | test", ""),
        ("none: synthetic", ""),
        ("SA-1B Dataset Research License", ""),
    ],
)
def test_a_license_has_the_hubs_identifier_only_if_the_hub_has_one(text, identifier):
    assert hub_card._identifier(text) == identifier


@pytest.mark.parametrize(
    ("licenses", "fields"),
    [
        ({"cc-by-4.0"}, {"license": "cc-by-4.0"}),
        (
            {"SA-1B Dataset Research License"},
            {
                "license": "other",
                "license_name": "sa-1b-dataset-research-license",
                "license_link": "LICENSE.md",
            },
        ),
        (
            {"cc-by-4.0", "unknown"},
            {"license": "other", "license_name": "per-source", "license_link": "LICENSE.md"},
        ),
    ],
)
def test_several_licenses_are_other_and_listed_in_a_file(licenses, fields):
    assert hub_card.license_fields(licenses) == fields


def test_licenses_that_the_images_state_count_instead_of_the_sources(out, repo):
    plan = hub_plan.plan_hub(out)
    summary, config = plan.corpus.summary, plan.corpus.config
    assert hub_card.find_licenses(plan, summary, config) == {"cc-by-2.0", "unknown"}
    text = (repo / "LICENSE.md").read_text()
    assert "| COCONut | Attribution License | <http://creativecommons.org/licenses/by/2.0/> |" in text
    assert hub_card_values(repo)["license"] == "other"
    alone = plan._replace(shards=[each for each in plan.shards if each.subset == "coconut"])
    assert hub_card.front_matter(alone, summary, config)["license"] == "cc-by-2.0"


def test_huggingface_hub_uploads_the_folder_as_it_is(repo):
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(repo / "README.md")
    assert card.data.to_dict()["pretty_name"] == "Region captions"
    with Hub() as server:
        server.upload(repo, "dataset")
    written = {str(path.relative_to(repo)): path.read_bytes() for path in repo.rglob("*") if path.is_file()}
    assert server.committed == written and "data/coconut/.nv-meta/.info.json" in written
    assert server.cards[0]["content"] == (repo / "README.md").read_text()


def test_energons_index_has_the_place_of_every_sample(repo):
    for folder in (repo / "data").iterdir():
        info = json.loads((folder / ".nv-meta" / ".info.json").read_text())["shard_counts"]
        parts = yaml.safe_load((folder / ".nv-meta" / "split.yaml").read_text())["split_parts"]
        assert (
            list(info) == parts["train"] + parts["val"] == sorted(each.name for each in folder.glob("*.tar"))
        )
        with sqlite3.connect(folder / ".nv-meta" / "index.sqlite") as database:
            samples = sorted(database.execute("SELECT * FROM samples"))
            places = sorted(database.execute("SELECT * FROM sample_parts"))
        wanted, wanted_places = [], []
        for number, name in enumerate(info):
            with tarfile.open(folder / name) as tar:
                members = tar.getmembers()
            starts = [member.offset for member in members[::2]]
            last = members[-1]
            starts.append(last.offset_data + last.size + -last.size % 512)
            assert (folder / f"{name}.idx").read_bytes() == struct.pack(f"<{len(starts)}Q", *starts)
            keys = [photo.name.removesuffix(".jpg") for photo in members[::2]]
            for index, key in enumerate(keys):
                size = starts[index + 1] - starts[index]
                wanted += [(number, key, index, starts[index], size)]
                wanted_places += [
                    (number, index, member.name.removeprefix(f"{key}."), member.offset_data, member.size)
                    for member in members[2 * index : 2 * index + 2]
                ]
            assert info[name] == len(members) // 2
        assert samples == sorted(wanted) and places == sorted(wanted_places)


def test_a_name_that_is_too_long_for_a_header_is_planned_with_its_size(tmp_path):
    from paracaption.pipeline.corpus.tar import TarWriter, archive_size, header_size, member_size

    names = ["a.jpg", f"{'b' * 99}.json", f"{'c' * 600}.jpg"]
    with open(tmp_path / "x.tar", "wb") as file:
        tar = TarWriter(file)
        starts = [tar.member(name, b"x" * 700) for name in names]
        tar.close_archive()
    assert (tmp_path / "x.tar").stat().st_size == archive_size(sum(member_size(name, 700) for name in names))
    with tarfile.open(tmp_path / "x.tar") as opened:
        members = opened.getmembers()
    assert [member.name for member in members] == names
    for member, start in zip(members, starts, strict=True):
        assert member.offset_data == start and start - header_size(member.name) == member.offset


def test_mds_without_its_package_says_what_to_install(out, tmp_path):
    with pytest.raises(ConfigError, match="mosaicml-streaming, which cannot be imported"):
        mds.export_mds(out, tmp_path / "to")
    assert list(tmp_path.iterdir()) == []
