"""The command line: every command on real files, and errors as one line with exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.schemas.config import Backend, BuildConfig
from paracaption.schemas.errors import ConfigError, ParaCaptionError
from paracaption.schemas.evaluation import EvaluateConfig
from paracaption.schemas.training import TrainConfig
from tests.machinery import alone
from tests.synthetic import shadow_modules, write_coconut

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "build audit verify inspect show explore report doctor estimate models train caption ask evaluate "
    "profile benchmark export merge demo config deploy versions diff status undo remove"
).split()
runner = CliRunner()


def paracaption(home: Path, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """The command in a process of its own, with Prefect's files under `home`."""
    env = {**os.environ, "PREFECT_HOME": str(home / "prefect"), "COLUMNS": "200"}
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "paracaption.flows.cli", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def release(tmp_path):
    """A tiny release and the values of a configuration for it."""
    return {"out": "out", "coconut": [write_coconut(tmp_path / "source", num_images=2)]}


def written(folder: Path, values: object) -> Path:
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_help_names_every_command_with_its_purpose():
    text = runner.invoke(app, ["--help"], env={"COLUMNS": "160"}).output
    for command in COMMANDS:
        assert f" {command} " in text
        own = runner.invoke(app, [command, "--help"])
        assert own.exit_code == 0 and "Usage" in own.output and "Pydantic" not in own.output


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("--out", ["show", "out/demo", "key", "--out", "s3://bucket/a.png"]),
        ("--out", ["demo", "--out", "s3://bucket/demo"]),
        ("--to", ["models", "publish", "run", "--to", "hf://models/one"]),
        ("--to", ["models", "convert", "model", "--to", "s3://bucket/model"]),
        ("config", ["init", "s3://bucket/corpus.yaml"]),
        ("config", ["build", "s3://bucket/build.yaml"]),
        (
            "--model",
            ["caption", "--masks", "gs://bucket/b.png", "--image", "a.jpg", "--model", "s3://bucket/model"],
        ),
    ],
)
def test_a_url_where_a_path_is_meant_is_refused_by_its_name_and_makes_no_folder(
    name, args, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    error = runner.invoke(app, args).exception
    assert isinstance(error, ConfigError), error
    assert str(error).startswith(f"{name}: {args[-1]}: has to be a path of this machine")
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_with_a_wrong_address_is_an_error_without_a_box():
    error = runner.invoke(app, ["verify", "s3:/bucket/corpus"]).exception
    assert isinstance(error, ParaCaptionError) and "write s3://bucket/corpus" in str(error)


def test_what_is_suggested_next_has_the_same_changes(tmp_path):
    config = written(tmp_path, {"out": "out", "coconut": [write_coconut(tmp_path / "source", num_images=1)]})
    text = runner.invoke(app, ["audit", str(config), "--set", f"out={tmp_path}/other"]).output
    for command in ("doctor", "build"):
        assert f"paracaption {command} {config} --set out={tmp_path}/other" in text


@pytest.mark.soak
def test_every_option_is_named_in_full_on_a_narrow_terminal_and_a_flag_takes_no_value():
    commands = get_command(app).commands
    for group in ("models", "benchmark"):
        commands |= {f"{group} {name}": each for name, each in commands[group].commands.items()}
    for name, command in commands.items():
        text = runner.invoke(app, [*name.split(), "--help"], env={"COLUMNS": "80"}).output
        for option in (option for each in command.params for option in each.opts if option.startswith("-")):
            assert re.search(rf"^  {option}( |$)", text, re.MULTILINE), (name, option)
        assert "bool" not in text.casefold(), name


@pytest.mark.parametrize(
    ("command", "kind"), [("build", BuildConfig), ("train", TrainConfig), ("evaluate", EvaluateConfig)]
)
def test_the_example_of_set_names_keys_of_the_commands_configuration(command, kind):
    words = runner.invoke(app, [command, "--help"]).output.split()
    sets = [words[at + 1].partition("=")[0] for at, word in enumerate(words) if word == "--set"]
    keys = [key for key in sets if key != "KEY"]
    assert len(keys) >= 2 and {key.partition(".")[0] for key in keys} <= set(kind.model_fields), keys


def test_no_part_of_a_help_text_is_lost_as_markup():
    """The help was drawn by rich once, which swallows `[words]`."""
    commands = [get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for text in (command.help, *(getattr(each, "help", None) for each in command.params)):
            assert "[" not in (text or ""), (command.name, text)
    assert len(commands) > len(COMMANDS)


def test_the_printed_configuration_is_yaml_with_every_key():
    text = runner.invoke(app, ["config"]).output
    values = yaml.safe_load(text)
    assert list(values) == list(BuildConfig.model_fields)
    for name in ("limits", "masks", "text", "io", "failures"):
        assert list(values[name]) == list(BuildConfig.model_fields[name].default.model_fields_set) or set(
            values[name]
        ) == set(type(BuildConfig.model_fields[name].default).model_fields)
    for key in Backend.model_fields:
        assert f"#   {key}:" in text


@pytest.mark.parametrize("of", [[], ["--training"], ["--evaluation"]])
def test_every_key_of_the_printed_configuration_has_a_reason(of):
    lines = runner.invoke(app, ["config", *of]).output.splitlines()
    plain = [line for line in lines if line.strip() and not line.startswith("#") and "  # " not in line]
    assert plain == []


def test_audit_prints_a_summary_and_writes_every_problem_as_parquet(tmp_path):
    target = tmp_path / "audit.parquet"
    done = runner.invoke(app, ["audit", str(ROOT / "samples" / "build.yaml"), "--parquet", str(target)])
    assert done.exit_code == 0, done.output
    assert "coconut: 6 of 6 images" in done.output
    assert "sa1b: " in done.output and "regions are usable" in done.output
    assert "reason" in pq.read_schema(target).names


def test_audit_writes_its_list_into_the_output_by_default(tmp_path, release):
    done = runner.invoke(app, ["audit", str(written(tmp_path, release))])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "audit.parquet").exists()


@pytest.mark.parametrize("own", [False, True])
def test_audit_refuses_a_backend_that_there_is_not_also_that_of_a_stages_own(tmp_path, release, own):
    captioner = {"name": "nobody"}
    recipe = [
        "usable_masks",
        {"stage": "caption", "captioner": captioner} if own else "caption",
        "clean_text",
    ]
    subsets = {"mine": {"sources": {"source": "coconut", **release["coconut"][0]}, "recipe": recipe}}
    values = {"out": str(tmp_path / "out"), "subsets": subsets} | ({} if own else {"captioner": captioner})
    done = runner.invoke(app, ["audit", str(written(tmp_path, values))])
    assert isinstance(done.exception, ConfigError), done.output
    place = "subsets.mine.recipe.caption.captioner" if own else "captioner"
    assert str(done.exception).startswith(
        f"{place}.name: no backend 'nobody'; choose from ['classical', 'gar'"
    )


def test_audit_of_two_subsets_into_one_file_keeps_both(tmp_path, release):
    here = str(tmp_path)
    (tmp_path / "empty").mkdir()
    broken = {**release["coconut"][0], "labels": here, "photos": [f"{here}/empty"]}
    (tmp_path / "sa_1.json").write_text("not json")
    values = {**release, "coconut": [broken], "sa1b": [{"paths": [str(tmp_path)]}]}
    target = tmp_path / "audit.parquet"
    done = runner.invoke(app, ["audit", str(written(tmp_path, values)), "--parquet", str(target)])
    assert done.exit_code == 1, done.output
    assert done.stderr == "no region is usable: a build would be empty\n"
    assert set(pq.read_table(target)["subset"].to_pylist()) == {"coconut", "sa1b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_iuo": 0.5}, "min_iuo: unknown key"),
        ({"min_iou": "half"}, "min_iou: has to be a number"),
        ({"text": {"min_wrods": 5}}, "text.min_wrods: unknown key"),
        ({"captioner": {"name": "classical", "concurrency": [2, 1]}}, "captioner: "),
        ({"coconut": []}, "name at least one source"),
    ],
)
@pytest.mark.soak(keep=2)
def test_a_wrong_configuration_is_one_line_with_file_and_key(tmp_path, release, change, message):
    path = written(tmp_path, {**release, **change})
    done = paracaption(tmp_path, "build", path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}: ") and message in line


def test_a_missing_configuration_is_one_line_with_its_name(tmp_path):
    done = paracaption(tmp_path, "build", tmp_path / "none.yaml")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: {tmp_path}/none.yaml: no such file; ")


def test_a_folder_that_is_no_corpus_is_one_line(tmp_path):
    done = paracaption(tmp_path, "verify", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}: no corpus here")


def test_deploy_without_a_server_says_how_to_start_one(tmp_path):
    done = runner.invoke(app, ["deploy"], env={"PREFECT_API_URL": ""})
    assert "prefect server start" in str(done.exception)


@pytest.mark.slow
def test_annotations_that_are_no_json_are_one_line_and_start_no_cluster(tmp_path, release):
    path = Path(release["coconut"][0]["annotations"][0])
    path.write_text('{"images": [')
    done = paracaption(tmp_path, "build", written(tmp_path, release))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "docket" not in line and line.startswith("error")]
    assert line.startswith(f"error: {path}: not JSON: ")
    assert "Traceback" not in done.stderr.partition("error: ")[2]
    assert "ConfigError" not in done.stderr
    assert not (tmp_path / "out" / "events").exists()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The corpus of the bundled sample, built where the user's own modules are called as our folders are.

    Ray's workers look into that folder before they look at what is installed.
    """
    home = tmp_path_factory.mktemp("demo")
    with alone():
        done = paracaption(home, "demo", "--out", home / "out", cwd=shadow_modules(home))
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "out", done


@pytest.mark.slow
def test_the_demo_draws_a_contact_sheet_and_says_what_next(demo):
    out, done = demo
    assert Image.open(out / "contact-sheet.png").width > 500
    assert f"paracaption explore {out}" in done.stderr
    assert "Traceback" not in done.stderr
    for subset in ("coconut", "sa1b"):
        assert f"{subset}: " in done.stderr


@pytest.mark.slow
def test_the_demo_verifies(demo):
    done = runner.invoke(app, ["verify", str(demo[0])])
    assert done.exit_code == 0, done.output
    assert "complete and undamaged" in done.output


@pytest.mark.slow
def test_inspect_shows_the_funnel(demo):
    done = runner.invoke(app, ["inspect", str(demo[0])])
    assert done.exit_code == 0
    assert "COCONut  2 units, 6 images" in done.output and "SA-1B  2 units" in done.output


@pytest.mark.slow
def test_show_draws_an_image_and_an_unknown_key_is_an_error_with_its_name(demo, tmp_path):
    out, _ = demo
    key = pq.read_table(out / "index.parquet", columns=["subset", "key"]).to_pylist()[0]
    name = f"{key['subset']}/{key['key']}"
    done = runner.invoke(app, ["show", str(out), name, "--out", str(tmp_path / "one.png")])
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "one.png").height > 100
    none = paracaption(tmp_path, "show", out, "nothing", "--out", tmp_path / "two.png")
    assert none.returncode == 2 and "no image nothing is committed" in none.stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", ["perceptiondlm-json", "coco", "parquet"])
def test_every_export_lists_its_files_and_an_unknown_one_is_an_error(demo, tmp_path, form):
    out, _ = demo
    done = runner.invoke(app, ["export", str(out), "--format", form, "--to", str(tmp_path / "export")])
    assert done.exit_code == 0, (done.output, done.exception)
    listed = [Path(line) for line in done.stdout.split()]
    assert listed and all(path.exists() for path in listed)
    if form == "perceptiondlm-json":
        rows = [row for path in listed if path.suffix == ".json" for row in json.loads(path.read_text())]
        assert sum(len(row["captions"]) for row in rows) == pq.read_metadata(out / "index.parquet").num_rows
    assert runner.invoke(app, ["export", str(out), "--format", "yaml", "--to", str(tmp_path)]).exit_code != 0


@pytest.mark.slow
def test_verify_of_a_damaged_corpus_exits_with_1_and_names_the_file(demo, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(demo[0], copy)
    shard = next((copy / "coconut" / "shards").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(data)
    done = runner.invoke(app, ["verify", str(copy)])
    assert done.exit_code == 1
    assert f"coconut/shards/{shard.name}" in done.output


@pytest.mark.slow
@pytest.mark.soak
def test_merge_renews_what_was_lost_and_a_second_build_commits_nothing(demo, tmp_path):
    out, _ = demo
    before = (out / "index.parquet").read_bytes()
    (out / "index.parquet").unlink()
    done = runner.invoke(app, ["merge", str(out / "config.yaml")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert (out / "index.parquet").read_bytes() == before


def test_a_merge_of_a_folder_that_is_no_corpus_changes_nothing(tmp_path):
    config = tmp_path / "build.yaml"
    config.write_text("out: out\nsa1b: [{paths: [sa1b/*.tar]}]\n")
    done = runner.invoke(app, ["merge", str(config)])
    assert done.exit_code != 0 and "no corpus here" in f"{done.output}{done.exception}"
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "config.yaml"
    mine.write_text("mine")
    done = runner.invoke(app, ["merge", str(config)])
    assert done.exit_code != 0 and "no corpus here" in f"{done.output}{done.exception}"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]
    assert mine.read_text() == "mine"


@pytest.mark.slow
def test_a_merge_alone_starts_no_engine_and_looks_at_no_model(demo, tmp_path, monkeypatch):
    from paracaption.flows import launch
    from paracaption.pipeline.executor import preflight

    def never(*_: object, **__: object) -> None:
        raise AssertionError("started, or looked at")

    monkeypatch.setattr(launch, "build", never)
    monkeypatch.setattr(preflight, "check_build", never)
    out = tmp_path / "out"
    shutil.copytree(demo[0], out)
    values = yaml.safe_load((out / "config.yaml").read_text())
    values["out"] = str(out)
    values["subsets"]["coconut"]["sources"][0]["license"] = "another one"
    (out / "index.parquet").unlink()
    done = runner.invoke(app, ["build", str(written(tmp_path, values))])
    assert done.exit_code == 0, (done.output, done.exception)
    assert (out / "index.parquet").exists() and "another one" in (out / "README.md").read_text()
    assert "nothing to do" in runner.invoke(app, ["build", str(tmp_path / "build.yaml")]).stderr


@pytest.mark.slow
def test_a_build_is_estimated_from_the_demo_and_again_from_its_written_rates(demo, tmp_path):
    out, _ = demo
    config = tmp_path / "build.yaml"
    config.write_text((out / "config.yaml").read_text())
    env = {"COLUMNS": "160"}
    done = runner.invoke(app, ["estimate", str(config)], env=env)
    assert done.exit_code == 0, done.output
    assert "334,000 images, 3,400,000 regions" in done.output and "83,000 images" in done.output
    assert "bottleneck: " in done.output and "the rates come from only" in done.output
    rates = tmp_path / "rates.yaml"
    rates.write_text(runner.invoke(app, ["estimate", str(config), "--write-rates"]).output)
    again = runner.invoke(
        app, ["estimate", str(config), "--rates", str(rates), "--images", "coconut=600"], env=env
    )
    assert again.exit_code == 0, again.output
    assert "coconut: 600 images" in again.output
    own = runner.invoke(app, ["estimate", str(config), "--sources"], env=env)
    assert "coconut: 6 images" in own.output


@pytest.mark.slow
def test_inspect_shows_how_busy_the_models_were(demo):
    text = runner.invoke(app, ["inspect", str(demo[0])], env={"COLUMNS": "160"}).output
    assert "start-up s" in text and "agree with segmenter" in text
