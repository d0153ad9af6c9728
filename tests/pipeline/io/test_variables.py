"""Environment variables in paths of a configuration: stored as written, put in when a file is opened."""

import json
import os
import subprocess
import sys

import msgspec
import pytest
import yaml

from paracaption.flows.served import refuse
from paracaption.pipeline.config_file import load_config, load_training
from paracaption.pipeline.io import files, variables
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob
from tests.building import build, config_of
from tests.synthetic import write_coconut


@pytest.fixture(autouse=True)
def none_taken(monkeypatch):
    monkeypatch.setattr(variables, "_taken", {})


def written(tmp_path, **values):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_a_file_that_names_a_variable_is_read_where_the_variable_points(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("hello")
    monkeypatch.setenv("DATA_OF_TEST", str(tmp_path))
    folder = variables.take("${DATA_OF_TEST}/a")
    url = f"{folder}/b/x.txt"
    assert files.read(Blob(url)) == b"hello"
    assert files.expand("${DATA_OF_TEST}/*/b/*.txt") == [url]
    assert files.expand(url) == [url]
    assert list(files.walk(folder)) == [(url, "b/x.txt")]
    assert files.list_names(folder) == ["b"]
    assert files.exists(url) and files.is_folder(folder) and files.size_of(Blob(url)) == 5
    with files.open_url(url) as file:
        assert file.read() == b"hello"
    assert bytes(files.read_mapped(url)) == b"hello"
    assert files.is_gone(f"{folder}/b/other.txt") and not files.is_gone(url)


def test_a_bucket_may_be_in_a_variable(monkeypatch):
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/x/y.txt", b"hello")
    monkeypatch.setenv("BUCKET_OF_TEST", "memory:///bucket")
    folder = variables.take("${BUCKET_OF_TEST}/x")
    assert files.is_url(folder)
    assert files.expand(f"{folder}/*.txt") == [f"{folder}/y.txt"]
    assert files.read(Blob(f"{folder}/y.txt")) == b"hello"


def test_nothing_is_put_in_that_no_configuration_names(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_TEST", str(tmp_path))
    assert variables.expand("${SECRET_OF_TEST}/x") == "${SECRET_OF_TEST}/x"
    assert not files.exists("${SECRET_OF_TEST}")
    variables.take_folders("https://example.com/${SECRET_OF_TEST}")
    assert variables.expand("${SECRET_OF_TEST}") == str(tmp_path)  # a path, of which the reader has said so
    monkeypatch.setenv("SECRET_OF_TEST_TOO", "key")
    variables.take_folders("https://example.com/${SECRET_OF_TEST_TOO}")
    assert variables.expand("${SECRET_OF_TEST_TOO}") == "${SECRET_OF_TEST_TOO}"


@pytest.mark.soak
def test_a_corpus_stores_the_variables_and_not_their_values(tmp_path, monkeypatch):
    sources, out = tmp_path / "hidden-name", tmp_path / "out"
    source = write_coconut(sources, 3)
    text = json.dumps(source).replace(str(sources), "${DATA_OF_TEST}")
    monkeypatch.setenv("DATA_OF_TEST", str(sources))
    file = written(tmp_path, out="${OUT_OF_TEST}/out", coconut=[json.loads(text)], masks={"min_area_px": 16})
    monkeypatch.setenv("OUT_OF_TEST", str(tmp_path))
    config = load_config(file)
    assert config.out == str(out)
    build(config)
    stored = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"DATA_OF_TEST" in stored and b"hidden-name" not in stored
    done = subprocess.run(
        [sys.executable, "-m", "paracaption.flows.cli", "build", str(file), "--local", "--set",
         "text.min_words=4"],
        capture_output=True, text=True, env={**os.environ, "DATA_OF_TEST": str(sources)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_build_that_has_read_no_file_knows_its_variables(tmp_path, monkeypatch):
    source = write_coconut(tmp_path / "source", 3)
    monkeypatch.setenv("DATA_OF_TEST", str(tmp_path))
    named = json.loads(json.dumps(source).replace(str(tmp_path), "${DATA_OF_TEST}"))
    build(config_of(tmp_path / "out", coconut=named))
    assert list((tmp_path / "out" / "coconut" / "shards").iterdir())


def test_home_is_a_variable_and_relative_paths_start_at_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PART_OF_TEST", "coconut")
    source = {"paths": ["~/a.tar", "data/${PART_OF_TEST}"]}
    found = load_config(written(tmp_path, out="~/out", sa1b=[source])).subsets["sa1b"].sources[0]
    assert found["paths"] == ["${HOME}/a.tar", f"{tmp_path}/data/${{PART_OF_TEST}}"]


@pytest.mark.parametrize("key", ["out", "photos"])
def test_a_variable_that_is_not_set_is_named(tmp_path, key):
    source = {"annotations": ["a.json"], "photos": ["${NOT_SET_OF_TEST}/x" if key == "photos" else "photos"]}
    out = "${NOT_SET_OF_TEST}/x" if key == "out" else "out"
    with pytest.raises(ConfigError, match=f"{key}.*variable NOT_SET_OF_TEST is not set; export it"):
        load_config(written(tmp_path, out=out, coconut=[source]))


def test_training_reads_them_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT_OF_TEST", str(tmp_path / "model"))
    values = {
        "out": "${OUT_OF_TEST}/x",
        "model": {"tokenizer": "toy"},
        "corpora": [{"corpus": "~/corpus"}],
        "steps": 1,
    }
    config = load_training(written(tmp_path, **values))
    assert config.out == f"{tmp_path}/model/x"
    assert config.corpora[0].corpus == os.path.expanduser("~/corpus")


def test_options_of_backends_get_the_values(tmp_path, monkeypatch):
    from paracaption.pipeline.models import registry

    monkeypatch.setenv("MODELS_OF_TEST", "/models")
    options = {"model": "${MODELS_OF_TEST}/gar", "prompt": "Say ${this}.", "engine": {"x": ["~/y"]}}
    backend = load_config(
        written(
            tmp_path,
            out="out",
            sa1b=[{"paths": ["a.tar"]}],
            captioner={"name": "gar", "options": options},
        )
    ).captioner
    assert backend.options["model"] == "${MODELS_OF_TEST}/gar"
    assert registry.options_of(backend) == {
        "model": "/models/gar",
        "prompt": "Say ${this}.",
        "engine": {"x": [os.path.expanduser("~/y")]},
    }


def test_a_signed_url_whose_signature_is_in_a_variable_is_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SIG_OF_TEST", "0123456789abcdef")
    source = {"paths": ["https://example.com/a.tar?sig=${SIG_OF_TEST}"]}
    config = load_config(written(tmp_path, out="out", sa1b=[source]))
    assert "0123456789abcdef" not in msgspec.json.encode(config.model_dump(mode="json")).decode()
    source["paths"] = ["https://example.com/a.tar?sig=0123456789abcdef"]
    with pytest.raises(ConfigError, match="signature"):
        load_config(written(tmp_path, out="out", sa1b=[source]))


def test_a_served_run_names_no_variable_that_was_not_allowed():
    source = {"source": "sa1b", "paths": ["https://example.com/${AWS_SECRET_ACCESS_KEY}"]}
    config = BuildConfig.model_validate({"out": "out", "subsets": {"sa1b": {"sources": [source]}}})
    with pytest.raises(ConfigError, match=r"AWS_SECRET_ACCESS_KEY.* is not allowed in a served flow"):
        refuse(config, None, [])
    refuse(config, None, ["${AWS_SECRET_ACCESS_KEY}"])
