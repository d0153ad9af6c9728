"""A source in the output and an output in a source are refused before anything is written."""

import os
from pathlib import Path

import pytest

from paracaption.pipeline.executor import driver, findings, preflight
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.places import refuse_overlap
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.strict import locations
from tests.building import build, config_of
from tests.synthetic import write_coconut, write_sa1b


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def refused(config, *told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        driver.build(config, LocalEngine())
    text = str(raised.value)
    assert "\n" not in text and "; " in text and config.out in text
    for each in told:
        assert each in text


def coconut_at(root: Path, **changes) -> dict:
    return {
        "annotations": [str(root / "panoptic.json")],
        "labels": str(root / "labels"),
        "photos": [str(root / "photos")],
        **changes,
    }


def test_tars_where_a_build_has_its_shards_are_refused_and_stay(tmp_path):
    write_sa1b(tmp_path / "data/sa1b/shards", 2)
    before = tree(tmp_path)
    config = config_of(tmp_path / "data", sa1b={"paths": [str(tmp_path / "data/sa1b/shards/sa_*.tar")]})
    refused(config, "subsets.sa1b.sources.0.paths: ", "sa_*.tar is inside `out`", "move the source")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["annotations", "labels", "photos", "categories"])
def test_each_path_of_a_source_inside_the_output_is_refused(tmp_path, option):
    write_coconut(tmp_path / "src", 2)
    inside = {
        "annotations": ["panoptic.json"],
        "labels": "labels",
        "photos": ["photos"],
        "categories": "categories.json",
    }[option]
    (tmp_path / "out").mkdir()
    name = inside if isinstance(inside, str) else inside[0]
    if option != "categories":
        os.rename(tmp_path / "src" / name, tmp_path / "out" / name)
    path = str(tmp_path / "out" / name)
    before = tree(tmp_path)
    source = coconut_at(tmp_path / "src", **{option: path if isinstance(inside, str) else [path]})
    refused(config_of(tmp_path / "out", coconut=source), f".sources.0.{option}: {path} is inside `out`")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["labels", "photos"])
@pytest.mark.parametrize("out", ["{0}", "{0}/corpus", "{0}/a/b"])
def test_an_output_inside_a_folder_that_is_read_as_a_whole_is_refused(tmp_path, option, out):
    write_coconut(tmp_path / "src", 2)
    before = tree(tmp_path)
    config = config_of(tmp_path / "src" / out.format(option), coconut=coconut_at(tmp_path / "src"))
    refused(config, f".sources.0.{option}: ", "choose an")
    assert tree(tmp_path) == before


def test_a_link_does_not_hide_where_a_source_lies(tmp_path):
    write_coconut(tmp_path / "data/src", 2)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    refused(config_of(tmp_path / "data", coconut=coconut_at(tmp_path / "link/src")), "is inside `out`")
    link = tmp_path / "link/src/photos/corpus"
    refused(config_of(link, coconut=coconut_at(tmp_path / "data/src")), "is inside it")
    plain = coconut_at(tmp_path / "data/src", photos=[f"file://{tmp_path}/data/src/photos"])
    refused(config_of(tmp_path / "data/src/photos/corpus", coconut=plain), "is inside it")


@pytest.mark.parametrize("pattern", ["*/*/*/*.tar", "*", "o*/sa1b", "**/sa1b/shards/*"])
def test_a_pattern_that_would_match_the_corpus_itself_is_refused(tmp_path, pattern):
    write_sa1b(tmp_path / "a/b/c", 1)
    config = config_of(tmp_path / "out", sa1b={"paths": [f"{tmp_path}/{pattern}"]})
    refused(config, "matches what a build writes", "narrow the pattern")
    assert not (tmp_path / "out").exists()


def test_sources_beside_and_above_the_output_are_taken(tmp_path):
    write_coconut(tmp_path, 2)
    write_sa1b(tmp_path, 2)
    paths = [f"{tmp_path}/sa_*.tar", f"{tmp_path}/out/../sa_00000?.tar", f"{tmp_path}/*/sa_*.tar"]
    for path in paths:
        refuse_overlap(config_of(tmp_path / "out", sa1b={"paths": [path]}))
    config = config_of(tmp_path / "photos-out", coconut=coconut_at(tmp_path), sa1b={"paths": paths[:1]})
    build(config)
    build(config)
    refuse_overlap(config_of(tmp_path / "out", sa1b={"paths": ["s3://bucket/out/sa_*.tar"]}))


def test_a_folder_whose_name_is_a_pattern_is_a_folder(tmp_path):
    write_coconut(tmp_path / "src[1]", 2)
    build(
        config_of(
            tmp_path / "src[1]/out",
            coconut=coconut_at(tmp_path / "src[1]", annotations=[f"{tmp_path}/src[[]1]/*.json"]),
        )
    )
    refused(
        config_of(tmp_path / "src[1]/photos/out", coconut=coconut_at(tmp_path / "src[1]")), "is inside it"
    )


def test_the_check_before_a_build_names_it_too(tmp_path):
    write_coconut(tmp_path / "src", 2)
    config = config_of(tmp_path / "src/photos/out", coconut=coconut_at(tmp_path / "src"))
    (found,) = [each for each in preflight.check_build(config) if each.state == findings.FAIL]
    assert "is inside it" in found.found and "choose an `out` outside of it" in found.fix


def test_every_path_of_a_configuration_is_found_by_its_type(tmp_path):
    config = config_of(tmp_path / "out", coconut=coconut_at(tmp_path))
    assert ("out", str(tmp_path / "out")) in list(locations(config))
    from paracaption.pipeline.sources.coconut import CoconutOptions

    options = CoconutOptions.model_validate(coconut_at(tmp_path, license="a/b"))
    assert [key for key, _ in locations(options)] == ["annotations", "labels", "photos"]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("s3://bucket/out/sa_000000.tar", "is inside `out`"),
        ("s3a://bucket/out/sa1b/shards/*.tar", "is inside `out`"),
        ("s3://bucket/*/sa1b/shards/*.tar", "matches what a build writes"),
        ("s3://bucket/*/*/*/*.tar", "matches what a build writes"),
    ],
)
def test_a_source_in_the_bucket_of_the_output_is_refused_as_in_a_folder(tmp_path, path, told):
    with pytest.raises(ConfigError, match=told):
        refuse_overlap(config_of("s3://bucket/out/", beside=tmp_path, sa1b={"paths": [path]}))


@pytest.mark.parametrize("photos", ["s3://bucket", "s3://bucket/data/", "s3://bucket/data/out/more"])
def test_an_output_inside_a_prefix_that_is_read_as_a_whole_is_refused(tmp_path, photos):
    coconut = coconut_at(tmp_path, photos=[photos])
    with pytest.raises(ConfigError, match="is inside"):
        refuse_overlap(config_of("s3://bucket/data/out", beside=tmp_path, coconut=coconut))


def test_sources_beside_the_output_in_its_bucket_are_taken(tmp_path):
    for path in ("s3://bucket/out-2/*.tar", "s3://bucket/*.tar", "s3://other/out/*.tar", "out/*.tar"):
        refuse_overlap(config_of("s3://bucket/out", beside=tmp_path, sa1b={"paths": [path]}))
    same = "abfs://box@account.dfs.core.windows.net/out/a.tar"
    with pytest.raises(ConfigError, match="is inside `out`"):
        refuse_overlap(config_of("az://box/out", beside=tmp_path, sa1b={"paths": [same]}))
