"""Classes in files beside the configuration: found without packaging, and in the place of nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import paracaption
from paracaption.pipeline.config_file import load_config, load_evaluation
from paracaption.pipeline.corpus import reader
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.audit import audit_images
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import own_modules
from paracaption.pipeline.models import registry
from paracaption.pipeline.sources import registry as source_registry
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import Backend, dump_config
from paracaption.schemas.errors import ConfigError
from tests.building import config_of
from tests.synthetic import write_coconut

ROOT = Path(__file__).resolve().parents[3]

CAPTIONER = """
    class MyCap:
        def __init__(self, word="thing"):
            self.word = word

        def caption(self, images):
            return [[f"a {self.word} of the photo" for region in image.live()] for image in images]
"""


@pytest.fixture(autouse=True)
def nothing_taken(tmp_path, monkeypatch):
    """No module of an earlier test, and a temporary folder of this one's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = list(sys.path)
    yield
    for name in list(own_modules._taken):
        own_modules._forget(name)
    own_modules._home.clear()
    source_registry._ALLOWED.clear()
    sys.path[:] = path
    for name in ("mycap", "lab", "helper", "second", "mysource", "myrects"):
        sys.modules.pop(name, None)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a configuration; the current folder is another one."""
    folder = tmp_path / "project"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def configure(folder: Path, name: str = "mycap:MyCap", **options: object) -> Path:
    """A configuration with a captioner of this name, and no other thing of the tests."""
    config = config_of(folder / "out", coconut=write_coconut(folder / "source", 2))
    values = {"captioner": config.captioner.model_copy(update={"name": name, "options": options})}
    (folder / "c.yaml").write_text(dump_config(config.model_copy(update=values)))
    return folder / "c.yaml"


def captions(out: Path) -> set[str]:
    corpus = reader.open_corpus(out)
    tables = [table for subset in corpus.subsets for table in corpus.ledgers(subset, ["caption"])]
    return {row["caption"] for table in tables for row in table.to_pylist() if row["caption"]}


def find(folder: Path, name: str, protocol: str = "captioner"):
    own_modules.look_in(folder)
    return registry.find_backend(protocol, Backend(name=name))


# It works.


def test_a_captioner_beside_the_configuration_captions_though_the_current_folder_is_another(project):
    write(project / "mycap.py", CAPTIONER)
    path = configure(project, word="cup")
    paracaption.build(path)
    assert captions(project / "out") == {"a cup of the photo"}
    assert str(project) not in sys.path


def test_a_package_and_what_its_modules_import_beside_it_are_found(project):
    code = "from helper import word\nfrom ..words import end\n" + textwrap.dedent(CAPTIONER)
    write(project / "lab" / "models" / "cap.py", code)
    write(project / "lab" / "words.py", "end = '.'\n")
    write(project / "lab" / "prompts.txt", "Describe it.")
    write(project / "helper.py", "import json\nfrom second import word\n")
    write(project / "second.py", "word = 'dog'\n")
    write(project / "unnamed.py", "raise SystemExit('nobody imports this')\n")
    assert find(project, "lab.models.cap:MyCap")().word == "thing"
    (taken,) = own_modules.taken()
    assert sorted(taken.files) == [
        "helper.py",
        "lab/models/cap.py",
        "lab/prompts.txt",
        "lab/words.py",
        "second.py",
    ]
    assert not own_modules._is_found("unnamed")


def test_folders_beside_the_configuration_are_no_packages_that_others_find(project):
    write(project / "mycap.py", CAPTIONER)
    for name in ("wandb", "data_of_mine", "photos_of_mine"):
        write(project / name / "large.bin", "x")
    find(project, "mycap:MyCap")
    assert not any(map(own_modules._is_found, ("data_of_mine", "photos_of_mine")))
    assert [sorted(each.files) for each in own_modules.taken()] == [["mycap.py"]]


def test_the_standard_library_and_what_is_installed_come_before_files_beside_the_configuration(project):
    write(project / "mycap.py", "import json, msgspec, yaml\n" + textwrap.dedent(CAPTIONER))
    for name in ("json", "msgspec", "yaml", "paracaption", "numpy"):
        write(project / f"{name}.py", "raise SystemExit('shadowed')\nclass MyCap: ...\n")
    cls = find(project, "mycap:MyCap")
    used = sys.modules[cls.__module__]
    assert used.json is __import__("json") and used.msgspec.__file__ != str(project / "msgspec.py")
    assert [sorted(each.files) for each in own_modules.taken()] == [["mycap.py"]]
    with pytest.raises(ConfigError, match=r"json.py is not looked at, because a module that is"):
        find(project, "json:MyCap")


def test_a_source_beside_the_configuration_is_read_audited_in_other_processes_and_built(project):
    shutil.copy(ROOT / "tests" / "rectangles.py", project / "myrects.py")
    source = write_coconut(project / "source", 3)
    photo = sorted(Path(source["photos"][0]).iterdir())[0].name
    write(project / "table.csv", f"{photo},2,3,30,20,dog\n")
    config = config_of(project / "out", coconut=source).model_dump()
    config["subsets"] = {"mine": {"sources": {"source": "myrects:Rectangles", "table": "table.csv"}}}
    config["subsets"]["mine"]["sources"]["photos"] = source["photos"][0]
    (project / "c.yaml").write_text(__import__("yaml").safe_dump(config))
    loaded = load_config(project / "c.yaml")
    assert loaded.subsets["mine"].sources[0]["table"] == str(project / "table.csv")
    driver.build(loaded, LocalEngine())
    assert reader.open_corpus(project / "out").summary.kept == 1
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    found = open_source(loaded, "mine")
    spawn, taken = get_context("spawn"), own_modules.taken()
    with ProcessPoolExecutor(1, spawn, initializer=own_modules.install, initargs=(taken,)) as pool:
        entries = list(found.catalog())
        assert pool.submit(audit_images, found, entries, loaded.limits).result().images == 1


def test_an_evaluation_finds_a_captioner_beside_its_configuration(project):
    write(project / "mycap.py", CAPTIONER)
    text = (
        "{out: o, label: x, captioner: {name: 'mycap:MyCap'}, benchmarks: [{name: b, kind: dlc, folder: f}]}"
    )
    (project / "e.yaml").write_text(text)
    config = load_evaluation(project / "e.yaml")
    assert registry.find_backend("captioner", config.backend()).__name__ == "MyCap"


def test_a_recipe_digest_does_not_depend_on_where_the_class_lies(project, monkeypatch):
    write(project / "mycap.py", CAPTIONER)
    backend = Backend(name="mycap:MyCap", options={"word": "a"})
    own_modules.look_in(project)
    beside = registry.backend_identity("captioner", backend)
    own_modules._forget("mycap")
    own_modules._home.clear()
    monkeypatch.syspath_prepend(str(project))
    assert registry.backend_identity("captioner", backend) == beside
    assert beside == {"backend": "mycap:MyCap", "options": '{"word":"a"}', "version": "0"}


# Which version.


def test_workers_use_the_drivers_version_of_a_module_that_was_changed_since(project):
    write(project / "mycap.py", CAPTIONER)
    path = configure(project, word="cup")
    config = load_config(path)
    registry.find_backend("captioner", config.captioner)
    taken = own_modules.taken()
    write(project / "mycap.py", "raise RuntimeError('half edited')")
    driver.build(config, LocalEngine())
    assert captions(project / "out") == {"a cup of the photo"}
    own_modules._forget("mycap")  # as in a process that has not seen it
    own_modules.install(taken)
    cls = registry.find_backend("captioner", config.captioner)
    assert own_modules.file_of(cls).startswith(str(own_modules._copies()))


def test_a_machine_without_the_folder_has_a_copy_and_one_with_it_none_in_use(project):
    write(project / "mycap.py", CAPTIONER)
    find(project, "mycap:MyCap")
    taken = own_modules.taken()
    own_modules._forget("mycap")
    own_modules.install(taken)
    assert own_modules.file_of(registry.find_backend("captioner", Backend(name="mycap:MyCap"))) == str(
        project / "mycap.py"
    )
    own_modules._forget("mycap")
    (project / "mycap.py").unlink()
    own_modules.install(taken)
    cls = registry.find_backend("captioner", Backend(name="mycap:MyCap"))
    assert Path(own_modules.file_of(cls)).read_text() == textwrap.dedent(CAPTIONER)
    assert own_modules._copies().stat().st_mode & 0o077 == 0


def test_a_copy_that_somebody_has_changed_is_made_again(project):
    write(project / "mycap.py", CAPTIONER)
    find(project, "mycap:MyCap")
    (taken,) = own_modules.taken()
    copy = own_modules._copy(taken)
    (copy / "mycap.py").write_text("evil = 1")
    assert (own_modules._copy(taken) / "mycap.py").read_text() == textwrap.dedent(CAPTIONER)
    os.chmod(own_modules._copies(), 0o777)
    with pytest.raises(ConfigError, match="another user may write there"):
        own_modules._copy(taken)


def test_a_configuration_that_is_read_again_takes_a_changed_module_anew(project):
    write(project / "mycap.py", CAPTIONER)
    assert find(project, "mycap:MyCap")().word == "thing"
    write(project / "mycap.py", CAPTIONER.replace("thing", "thong"))  # of the same size and time
    assert find(project, "mycap:MyCap")().word == "thong"
    write(project / "two" / "mycap.py", CAPTIONER.replace("thing", "other"))
    assert find(project / "two", "mycap:MyCap")().word == "other"


def test_a_process_that_a_worker_spawns_imports_the_module_as_well(project):
    write(project / "mycap.py", CAPTIONER + "\n    def word():\n        return 'spawned'\n")
    find(project, "mycap:MyCap")
    own_modules.install(own_modules.taken())
    from multiprocessing import get_context

    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(sys.modules["mycap"].word) == "spawned"


# What is refused, in a line.


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        (
            None,
            "mycap:MyCap",
            r"no module 'mycap' is installed, and \S+project has no mycap.py",
        ),
        ("x = 1\n", "mycap:MyCap", r"mycap.py has no 'MyCap'; correct the name"),
        ("class Other: ...\n", "mycap:MyCap", r"mycap.py has no 'MyCap'; it has Other"),
        ("class MyCap: ...\n", "mycap.sub:MyCap", r"mycap has no module mycap.sub; correct the name"),
        ("def MyCap(): ...\n", "mycap:MyCap", r"MyCap in \S+mycap.py is not a class \(it is a function\)"),
        (
            "import not_there\n",
            "mycap:MyCap",
            r"'not_there' \(\S+mycap.py, line 1\); install it on every",
        ),
        ("\n\nclass MyCap(:\n", "mycap:MyCap", r"SyntaxError: .*\(\S+mycap.py, line 3\); correct the file"),
        ("a = 1\nb = c\n", "mycap:MyCap", r"NameError: name 'c' .* \(\S+mycap.py, line 2\)"),
        ("raise SystemExit(3)\n", "mycap:MyCap", r"SystemExit: 3 \(\S+mycap.py, line 1\)"),
        (
            "class MyCap: ...\n",
            "mycap:MyCap",
            r"no method `caption`; a captioner has `caption\(images\)`",
        ),
        ("class MyCap:\n  caption = 1\n", "mycap:MyCap", "has no method `caption`"),
        ("class MyCap:\n  async def caption(self, images): ...\n", "mycap:MyCap", "`caption` is async"),
        (
            "class MyCap:\n  def caption(self): ...\n",
            "mycap:MyCap",
            r"does not take the arguments that it is called with \(too many",
        ),
        ("class MyCap:\n  def caption(self, a, b): ...\n", "mycap:MyCap", r"\(missing a required argument"),
        ("", "my cap:MyCap", "is not the name of a class; write it as 'package.module:Class'"),
        ("", ":MyCap", "is not the name of a class"),
        ("", "mycap:", "is not the name of a class"),
        ("", "../mycap:MyCap", "is not the name of a class"),
        ("", "mycap.py:MyCap", r"mycap has no module mycap.py; correct the name"),
        (None, "os:system", r"system in \S+os.py is not a class"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_in_one_line(project, text, name, told):
    if text is not None:
        write(project / "mycap.py", text)
    with pytest.raises(ConfigError, match=told) as refused:
        find(project, name)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("captioner.name: ")


def test_a_build_with_such_a_class_is_refused_before_anything_is_written(project):
    write(project / "mycap.py", "class MyCap: ...")
    with pytest.raises(ConfigError, match=r"mycap.py has no method `caption`") as refused:
        paracaption.build(configure(project))
    assert "\n" not in str(refused.value)
    assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("protocol", "method"),
    [("judge", r"ask\(questions\)"), ("segmenter", r"segment\(photo, phrases, boxes\)")],
)
def test_each_protocol_names_its_method(project, protocol, method):
    write(project / "mine.py", "class Mine: ...\n")
    with pytest.raises(ConfigError, match=f"^{protocol}.name: .* a {protocol} has `{method}`"):
        find(project, "mine:Mine", protocol)


@pytest.mark.parametrize("kind", ["static", "class", "plain", "any"])
def test_methods_of_any_kind_are_taken(project, kind):
    first = {
        "static": "@staticmethod\n  def caption(images)",
        "class": "@classmethod\n  def caption(cls, images)",
    }
    first |= {"plain": "def caption(self, images, more=1)", "any": "def caption(*all, **more)"}
    write(project / "mycap.py", f"class MyCap:\n  {first[kind]}: ...\n")
    assert find(project, "mycap:MyCap").__name__ == "MyCap"


def test_a_package_that_is_too_large_to_be_sent_is_refused_unless_python_finds_it(project, monkeypatch):
    write(project / "mycap" / "__init__.py", CAPTIONER)
    (project / "mycap" / "weights.bin").write_bytes(bytes(2_000))
    monkeypatch.setattr(own_modules, "MAX_BYTES", 1_000)
    with pytest.raises(ConfigError, match=r"project/mycap holds more than .*; keep data elsewhere"):
        find(project, "mycap:MyCap")
    monkeypatch.syspath_prepend(str(project))
    assert find(project, "mycap:MyCap").__name__ == "MyCap"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("class MySource: ...\n", "is not a Source; derive it from `protocols.Source`"),
        (
            "from paracaption.pipeline.sources.protocols import Source\n"
            "class MySource(Source):\n  title = 'x'\n",
            "has no `options_type`, `recipe`, `catalog`, `fill`, `fingerprint`, `places`",
        ),
    ],
)
def test_a_source_that_is_none_is_refused_where_the_configuration_names_it(project, text, told):
    write(project / "mysource.py", text)
    (project / "c.yaml").write_text("{out: o, subsets: {mine: {sources: {source: 'mysource:MySource'}}}}")
    with pytest.raises(ConfigError, match=told) as refused:
        load_config(project / "c.yaml")
    assert "subsets.mine.sources.0.source" in str(refused.value)


def test_a_corpus_that_somebody_else_has_built_imports_no_source(project):
    write(project / "mysource.py", "raise SystemExit('imported')\n")
    own_modules.look_in(project)
    source = {"source": "mysource:MySource", "license": "x"}
    corpus = {"out": "o", "subsets": {"mine": {"sources": [source]}}}
    (project / "config.yaml").write_text(__import__("yaml").safe_dump(corpus))
    found = reader.read_config(project)
    assert found.subsets["mine"].sources == [source]
    with pytest.raises(ConfigError, match="unknown kind of source 'mysource:MySource'"):
        open_source(found, "mine")


# Served flows, and the page.


def test_a_served_run_finds_what_deploy_allowed_in_the_folder_of_deploy_and_nothing_else(
    project, tmp_path, monkeypatch
):
    from paracaption.flows import served

    write(project / "mycap.py", CAPTIONER)
    write(project / "other.py", CAPTIONER)
    config = load_config(configure(project))
    own_modules._home.clear()
    for name in (served.ALLOWED, served.FOLDER):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(served, "is_served", lambda: True)
    names = [config.judge.name, config.segmenter.name]
    served.allow([*names, "mycap:MyCap"], project)
    served.check_run(config)
    assert registry.find_backend("captioner", config.captioner).__name__ == "MyCap"
    other = config.model_copy(update={"captioner": Backend(name="other:MyCap")})
    with pytest.raises(
        ConfigError, match="not allowed in a served flow; to allow it, start `paracaption deploy` again"
    ):
        served.check_run(other)
    assert "other" not in sys.modules


@pytest.mark.soak
def test_the_example_of_the_page_runs_from_another_folder(project):
    page = (ROOT / "docs" / "backends.md").read_text()
    code = re.search(r"```python\n(# my_captioner.py\n.*?)```", page, re.DOTALL)
    assert code is not None
    (project / "my_captioner.py").write_text(code[1])
    sources = {"mine": {"sources": {"source": "sa1b", "paths": ["samples/sa1b/sa_*.tar"]}}}
    captioner = {"name": "my_captioner:BrightnessCaptioner"}
    config = {"out": "corpus", "subsets": sources, "captioner": captioner}
    (project / "corpus.yaml").write_text(yaml.safe_dump(config))
    (project / "samples").symlink_to(ROOT / "samples")
    command = [
        sys.executable,
        "-m",
        "paracaption.flows.cli",
        "build",
        str(project / "corpus.yaml"),
        "--local",
    ]
    done = subprocess.run([*command, "--limit-images", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(captions(project / "corpus")) > 0


def test_this_package_is_not_the_users_in_a_clone_where_it_lies_beside_the_configuration(project):
    """Else its classes would be made a second time, and a `BadRecord` would not be one."""
    write(
        project / "mycap.py",
        "from paracaption.schemas.errors import BadRecord\n" + textwrap.dedent(CAPTIONER),
    )
    (project / "paracaption").symlink_to(ROOT / "paracaption")
    assert own_modules.is_installed("paracaption", ROOT)
    assert find(project, "mycap:MyCap")().word == "thing"
    assert [sorted(each.files) for each in own_modules.taken()] == [["mycap.py"]]


@pytest.mark.parametrize("code", ["raise KeyError", "raise type('E', (BaseException,), {})('odd')"])
def test_a_module_that_raises_whatever_it_likes_is_one_line(project, code):
    write(project / "mycap.py", f"{code}\n")
    with pytest.raises(ConfigError, match="'mycap:MyCap' cannot be imported"):
        find(project, "mycap:MyCap")
