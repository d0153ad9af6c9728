"""The examples at the end of each command's help, and what the commands print for programs and editors."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner, Result

import paracaption
from paracaption.flows.cli.app import app
from paracaption.flows.cli.examples import EXAMPLES
from paracaption.flows.cli.init import commented_config
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.sources.registry import SOURCES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "samples").exists(), reason="no clone, but an installed wheel")
runner = CliRunner()

RUN = (
    *(
        "init",
        "config",
        "audit",
        "doctor",
        "build",
        "merge",
        "verify",
        "inspect",
        "show",
        "estimate",
        "report",
    ),
    *("export", "status", "versions", "diff", "undo"),
)
"""In this order. The others need Ray, a server that does not end, a model, a judge or a world to train on."""


def commands() -> dict[str, Any]:
    """Every command by its name, also those of a group."""
    found = {}
    for name, command in getattr(get_command(app), "commands", {}).items():
        inner = getattr(command, "commands", {})
        found |= {f"{name} {each}": other for each, other in inner.items()} if inner else {name: command}
    return found


def run(*arguments: object) -> Result:
    return runner.invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the samples, in which the corpus of the samples is built with its defaults."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "samples", folder / "samples")
    assert run("build", folder / "samples" / "build.yaml", "--local").exit_code == 0
    return folder


@pytest.mark.soak
def test_each_command_has_an_example_that_its_help_ends_with():
    assert set(EXAMPLES) == set(commands())
    for name, example in EXAMPLES.items():
        text = run(*name.split(), "--help").output
        assert text.strip().splitlines()[-1] == f"  Example: {example}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_is_understood(name):
    """Arguments and options are those of the command."""
    words = [word for word in shlex.split(EXAMPLES[name]) if "=" not in word or word.startswith("-")]
    given = shlex.split(EXAMPLES[name].partition(f"paracaption {name}")[2])
    assert words[: 1 + len(name.split())] == ["paracaption", *name.split()]
    commands()[name].make_context(name, given)  # raises UsageError


@pytest.mark.soak
def test_the_examples_run_one_after_the_other(clone, monkeypatch):
    monkeypatch.chdir(clone)
    for name in RUN:
        example = EXAMPLES[name].removeprefix("paracaption ")
        if name == "diff":
            numbers = re.findall(r"^ *(\d+)  .*  commit", run("versions", "out/demo").output, re.MULTILINE)
            example = f"diff out/demo {numbers[0]} {numbers[-1]}"
        done = run(*shlex.split(example))
        assert done.exit_code == 0, (example, done.output, done.exception)


@pytest.mark.slow
def test_the_samples_are_published_and_loaded_again_record_by_record(clone, tmp_path):
    from datasets import load_dataset

    to = tmp_path / "repository"
    done = run("export", clone / "out" / "demo", "--format", "hub", "--to", to)
    assert done.exit_code == 0, (done.output, done.exception)
    wanted = {(sample.subset, sample.key): sample for sample, _ in corpus_samples(clone)}
    for streaming in (False, True):
        cache = {} if streaming else {"cache_dir": str(tmp_path / "cache")}
        rows = load_dataset(str(to), split="train", streaming=streaming, **cache)
        found = {(row["json"]["subset"], row["json"]["key"]): row for row in rows}
        assert found.keys() == wanted.keys()
        for key, sample in wanted.items():
            assert found[key]["jpg"].size == (sample.width, sample.height)
            assert [each["caption"] for each in found[key]["json"]["regions"]] == [
                region.caption for region in sample.regions
            ]
    regions = sum(len(sample.regions) for sample in wanted.values())
    assert regions == paracaption.open_corpus(clone / "out" / "demo").summary.kept > 0


def corpus_samples(clone: Path) -> list[Any]:
    return list(paracaption.open_corpus(clone / "out" / "demo").samples())


def test_a_value_of_the_configuration_is_set_on_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("out: out\nsa1b: [{paths: [a.tar]}]\n")
    changes = [
        *("min_iou=0.7", "text.min_words=2", "judge={name: lexical, num_cpus: 2}"),
        *("sa1b.0.license=CC0", "held_out_share=0.1"),
    ]
    found = load_config(path, changes)
    assert (found.min_iou, found.text.min_words, found.judge.num_cpus) == (0.7, 2, 2)
    assert found.subsets["sa1b"].sources[0]["license"] == "CC0"
    assert found.text.max_words == load_config(path).text.max_words
    assert load_config(path).min_iou == 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("min_iou", "--set min_iou: it has no `=`; give a key"),
        ("min_iuo=1", "min_iuo: unknown key; did you mean `min_iou`?"),
        ("text.min_word=1", "text.min_word: unknown key; did you mean `min_words`?"),
        ("min_iou.a=1", "--set min_iou.a=1"),
        ("sa1b.3.license=x", "--set sa1b.3.license=x"),
        ("min_iou=[", "--set min_iou=["),
        ("min_iou=2", "min_iou: has to be less than or equal to 1"),
    ],
)
def test_a_value_that_cannot_be_set_is_one_line(tmp_path, change, says):
    path = tmp_path / "c.yaml"
    path.write_text("out: out\nmin_iou: 0.5\nsa1b: [{paths: [a.tar]}]\n")
    with pytest.raises(paracaption.ConfigError) as raised:
        load_config(path, [change])
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_the_version_is_printed():
    assert run("--version").output == f"paracaption {paracaption.__version__}\n"


@pytest.mark.parametrize("kind", SOURCES)
def test_the_written_configuration_has_every_key_with_its_default(tmp_path, kind):
    path = tmp_path / "corpus.yaml"
    assert run("init", path, "--source", kind).exit_code == 0
    plain = load_config(path)
    uncommented = re.sub(r"^( *)#(?=[a-z ]+[a-z_0-9]*:)(?! )", r"\1", path.read_text(), flags=re.MULTILINE)
    uncommented = re.sub(r"^#(?=  [a-z_0-9]+:)", "", uncommented, flags=re.MULTILINE)
    path.write_text(uncommented)
    values = yaml.safe_load(uncommented)
    assert load_config(path) == plain
    assert {"min_iou", "masks", "text", "captioner", "failures", "audit_images"} <= set(values)
    assert "license" in values["subsets"][kind]["sources"][0]


def test_a_configuration_that_is_there_is_not_written_over(tmp_path):
    path = tmp_path / "corpus.yaml"
    path.write_text("mine")
    done = run("init", path)
    assert "exists; name another file" in str(done.exception) and path.read_text() == "mine"


def test_the_schema_takes_our_configurations_and_finds_mistakes():
    schema = json.loads(run("config", "--schema").output)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    for path in ("samples/build.yaml", *(f"configs/{name}.yaml" for name in ("gpu", "coco", "masks"))):
        assert check(yaml.safe_load((ROOT / path).read_text())), path
    for kind in SOURCES:
        assert check(yaml.safe_load(commented_config(kind)))
    good = {"out": "out", "sa1b": [{"paths": ["a.tar"]}]}
    assert check(good) and check(good | {"min_iou": 0.6})
    for wrong in (
        *({"min_iuo": 0.6}, {"min_iou": 2}, {"out": 3}, {"captioner": {}}),
        {"subsets": {"a": {"sources": {"source": "sa1b", "path": "a.tar"}}}},
    ):
        assert not check(good | wrong), wrong


@pytest.mark.parametrize(("option", "folder"), [("--training", "train"), ("--evaluation", "evaluate")])
def test_the_schemas_of_training_and_evaluation_take_our_configurations(option, folder):
    check = jsonschema.Draft202012Validator(json.loads(run("config", option, "--schema").output)).is_valid
    paths = list((ROOT / "configs" / folder).glob("*.yaml"))
    assert paths and all(check(yaml.safe_load(path.read_text())) for path in paths)


@pytest.mark.soak
def test_commands_print_json(clone, monkeypatch):
    monkeypatch.chdir(clone)

    def values(*arguments: str) -> Any:
        return json.loads(run(*arguments, "--json").stdout)

    audit = values("audit", "samples/build.yaml")
    assert audit["subsets"]["coconut"]["images"] == audit["subsets"]["coconut"]["images_usable"] > 0
    assert (clone / audit["full_list"]).exists()
    funnel = values("inspect", "out/demo")["sa1b"]
    assert funnel["counts"]["kept"] > 0 and funnel["kept"][0]["caption"]
    assert values("verify", "out/demo") == {
        "ok": True,
        "problems": [],
        "notes": [],
        "units": 4,
        "regions": funnel["counts"]["regions"] + 6,
    }
    found = values("doctor", "samples/build.yaml")
    assert {each["state"] for each in found} <= {"ok", "warn"}
    estimate = values("estimate", "samples/build.yaml", "--images", "coconut=1000", "--images", "sa1b=1000")
    assert estimate["balanced"]["subsets"][0]["wall_s"] > 0


def test_an_audit_that_finds_nothing_usable_exits_with_1(tmp_path):
    from tests.synthetic import write_coconut

    source = write_coconut(tmp_path / "source", num_images=2)
    for photo in (tmp_path / "source").rglob("*.jpg"):
        photo.unlink()
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"out": "out", "coconut": [source]}))
    done = run("audit", path)
    assert done.exit_code == 1 and "no region is usable: a build would be empty" in done.output


def test_an_audit_of_photos_without_masks_exits_with_0_if_an_image_is_usable(tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "cup.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    path = tmp_path / "c.yaml"
    subsets = {"mine": {"sources": {"source": "automatic", "photos": ["photos"]}}}
    path.write_text(yaml.safe_dump({"out": "out", "subsets": subsets}))
    done = run("audit", path)
    assert done.exit_code == 0 and "1 of 1 images are usable" in done.output
    photo.write_bytes(b"no photo")
    done = run("audit", path)
    assert done.exit_code == 1 and "a build would be empty" in done.output
