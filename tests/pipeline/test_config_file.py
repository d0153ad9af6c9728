import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from paracaption.pipeline.config_file import describe, dump_config, load_config
from paracaption.pipeline.models import registry
from paracaption.schemas.config import Backend, BuildConfig, CoconutSource, Sa1bSource
from paracaption.schemas.errors import ConfigError

COCONUT = {"annotations": ["in/*.json"], "labels": "in/labels", "photos": ["in/a", "s3://bucket/b"]}


def write(folder, **values):
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump({"out": "out", "sa1b": [{"paths": ["in/sa_*.tar"]}], **values}))
    return path


def test_what_is_dumped_is_read_back_equal(tmp_path):
    config = load_config(write(tmp_path, coconut=[COCONUT], min_iou=0.25, io={"concurrency": [2, 3]}))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert list(yaml.safe_load(dump_config(config))) == list(BuildConfig.model_fields)


def test_relative_paths_are_seen_from_the_file_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = load_config(write(tmp_path, coconut=[COCONUT]))
    root = tmp_path.resolve()
    assert config.out == f"{root}/out"
    assert config.sa1b[0].paths == [f"{root}/in/sa_*.tar"]
    source = config.coconut[0]
    assert (source.annotations, source.labels) == ([f"{root}/in/*.json"], f"{root}/in/labels")
    assert source.photos == [f"{root}/in/a", "s3://bucket/b"]
    assert source.categories is None


def test_absolute_home_and_file_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(write(tmp_path, out="/data/out", sa1b=[{"paths": ["~/sa", "file:///mnt/sa"]}]))
    assert config.out == "/data/out"
    assert config.sa1b[0].paths == ["/home/someone/sa", "/mnt/sa"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"min_iuo": 0.5}, r"build.yaml: min_iuo: unknown key; see `paracaption config`"),
        ({"masks": {"min_area": 3}}, r"build.yaml: masks.min_area: unknown key"),
        ({"sa1b": [{"paths": ["a"], "licens": "x"}]}, r"sa1b.0.licens: unknown key"),
        ({"min_iou": 2}, r"min_iou: .*less than or equal to 1 \(given: 2\)"),
        ({"sa1b": [{}]}, r"sa1b.0.paths: Field required$"),
        ({"sa1b": []}, r"config: .*name at least one source"),
        ({"captioner": {"name": "x", "concurrency": [3, 2]}}, r"captioner: .*1 <= min <= max, not \(3, 2\)"),
        (
            {"coconut": [{"annotations": ["a"], "photos": ["b"]}]},
            r"needs `labels`, the folder of the label PNGs",
        ),
        ({"out": "s3://bucket/out"}, r"out: s3://bucket/out is a URL; name a folder that every node mounts"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(write(tmp_path, **changes))
    assert len(str(caught.value).splitlines()) == 1


def test_every_mistake_has_its_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, min_iuo=0.5, min_iou=-1))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"out: [", "not a YAML file"),
        (b"\xff\xfe\xfa", "not a YAML file"),
        (b"- out", "expected keys and values, found list"),
        (b"", "expected keys and values, found NoneType"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, content, told):
    (tmp_path / "build.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"build.yaml: {told}") as caught:
        load_config(tmp_path / "build.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_no_file_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml")


def test_the_configuration_cannot_be_changed_after_it_is_read(tmp_path):
    config = load_config(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.min_iou = 0.1


def keys_of(model: type[BaseModel]) -> set[str]:
    found = set(model.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.default, BaseModel):
            found |= keys_of(type(field.default))
    return found


def test_describe_names_every_key_once_a_level_and_parses_as_yaml():
    described = re.findall(r"^[# ]*(\w+):", describe(), flags=re.MULTILINE)
    wanted = (
        keys_of(BuildConfig)
        | keys_of(Backend)
        | set(CoconutSource.model_fields)
        | set(Sa1bSource.model_fields)
    )
    assert wanted <= set(described)
    assert list(yaml.safe_load(describe())) == list(BuildConfig.model_fields)


def test_every_key_with_a_number_says_why():
    for line in describe().splitlines():
        if re.search(r": [\d.]+\b", line.partition("#")[0]):
            assert "# " in line, line


def test_the_recipe_for_gpus_names_backends_and_keys_that_exist():
    config = load_config(Path(__file__).resolve().parents[2] / "configs/gpu.yaml")
    names = {part: getattr(config, part).name for part in registry.BACKENDS}
    assert names == {"captioner": "gar", "judge": "vllm", "segmenter": "sam3"}
    for part in names:
        assert registry.find_backend(part, getattr(config, part))
