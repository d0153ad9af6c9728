"""The public Python API: which names there are, that they are imported late, and that `build` builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import paracaption
from paracaption.pipeline.corpus import verify

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
HEAVY = {
    "torch",
    "ray",
    "vllm",
    "transformers",
    "cv2",
    "prefect",
    "pyarrow",
    "matplotlib",
    "numpy",
    "pydantic",
}


def test_the_public_names_are_these():
    """Who removes or renames one breaks the programs that use it."""
    assert set(paracaption.__all__) == {
        "Answer",
        "AnswerOptions",
        "BadRecord",
        "BuildConfig",
        "Chat",
        "ConfigError",
        "Corpus",
        "DecodeOptions",
        "IntegrityError",
        "ParaCaptionError",
        "PerceptionDLM",
        "PerceptionDLMProcessor",
        "Question",
        "RegionCaptioner",
        "StageFailed",
        "__version__",
        "build",
        "list_shards",
        "open_corpus",
    }


@pytest.mark.parametrize("name", paracaption.__all__)
def test_each_public_name_is_found_and_listed(name):
    assert getattr(paracaption, name) is not None
    assert name in dir(paracaption)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        paracaption.biuld  # noqa: B018


def test_importing_the_package_imports_nothing_else():
    script = "import sys; import paracaption; dir(paracaption); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
    assert [name for name in done.stdout.split() if name.startswith("paracaption.")] == []


@pytest.mark.soak
def test_a_corpus_is_built_from_keys_and_values_and_a_second_build_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(SAMPLES)  # from where relative paths are seen
    config = {
        "out": str(tmp_path / "out"),
        "subsets": {"sa1b": {"sources": [{"source": "sa1b", "paths": ["sa1b/*.tar"]}]}},
    }
    seen = []
    corpus = paracaption.build(config, limit_images=2, on_progress=seen.append)
    out = Path(corpus.path)
    assert seen[-1].done == seen[-1].pending == 1
    assert corpus.subsets == ["sa1b"] and corpus.summary.kept > 0
    assert verify.verify(out).ok
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert paracaption.build(config, limit_images=2).path == corpus.path
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_wrong_key_is_a_config_error_that_names_it():
    with pytest.raises(paracaption.ConfigError, match=r"config: min_iuo: unknown key"):
        paracaption.build({"out": "out", "sa1b": [{"paths": ["a.tar"]}], "min_iuo": 0.5})


def test_a_missing_source_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(paracaption.ConfigError, match="nothing found"):
        paracaption.build({"out": str(tmp_path / "out"), "sa1b": [{"paths": [str(tmp_path / "none.tar")]}]})
    assert not (tmp_path / "out").exists()


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    """In one namespace and in order; a tiny model stands in for the one that needs weights."""
    from PIL import Image

    from tests.model_training.tiny_models import lively

    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(SAMPLES)
    for part in lively():
        part.save_pretrained(tmp_path / "model")
    Image.new("RGB", (90, 60), "white").save(tmp_path / "photo.jpg")
    for number, name in enumerate(("cup.png", "dog.png")):
        mask = Image.new("L", (90, 60))
        mask.paste(255, (5 + 30 * number, 10, 30 + 30 * number, 50))
        mask.save(tmp_path / name)
    page = (SAMPLES.parent / "docs" / "api.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    capsys.readouterr()
    for code in examples:
        here = code.replace("/models/PerceptionDLM", str(tmp_path / "model"))
        exec(compile(here, "docs/api.md", "exec"), names)
    printed = [line for code in examples for line in re.findall(r"print\(.*\)  # (.*)", code)]
    assert capsys.readouterr().out.splitlines() == printed
    assert verify.verify(tmp_path / "corpus").ok


def test_the_page_lists_every_public_name():
    page = (SAMPLES.parent / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page.partition("## ")[0], re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)", row)]
    assert sorted(listed) == sorted(paracaption.__all__)
