"""Commands that take a configuration do for a corpus in a bucket what they do for one in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import log, merge, reader
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.io import files, scratch
from paracaption.pipeline.io.tables import TableFile
from paracaption.schemas.config import dump_config
from tests.building import build, config_of
from tests.pipeline.buckets import corpora
from tests.synthetic import write_coconut


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """By place of the corpus, a configuration whose captioner fails on an image as long as a file lacks."""
    folder = tmp_path_factory.mktemp("commands")
    source, found = write_coconut(folder / "coconut", 5), dict[str, Path]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(scratch.VARIABLE, str(folder / "scratch"))
        patch.setattr(merge.plots, "draw_plots", lambda _: dict.fromkeys(merge.plots.NAMES, b"a plot"))
        for out, name in ((str(folder / "folder"), "folder"), ("memory://commands/corpus", "bucket")):
            beside = folder / f"beside-{name}"
            beside.mkdir()
            fails = {"000000000002": f"raise-unless:{folder / 'works'}"}
            config = config_of(out, coconut=source, beside=beside, captioner={"misbehave": fails})
            build(config)
            found[out] = folder / f"{name}.yaml"
            found[out].write_text(dump_config(config))
        yield found


def say(configs: dict[str, Path], *command: str) -> str:
    """Run a command with both configurations; what it says of the corpus in the bucket is said of both."""
    said = []
    for out, config in configs.items():
        given = [str(config) if each == "CONFIG" else each for each in command]
        code, text = corpora.run(given, {str(config): "CONFIG", out: "CORPUS"})
        assert code == 0, text
        said.append(text)
    assert said[0] == said[1]
    return said[1]


def committed(out: str) -> dict[str, str]:
    return {file.path: file.sha256 for unit in log.read_units(out).values() for file in unit.files()}


def assert_equal(configs: dict[str, Path]) -> None:
    """Both have the same committed files and the same index, and are undamaged."""
    folder, bucket = configs
    assert committed(folder) == committed(bucket)
    indices = [files.sha256_of(reader.Corpus(out).index_path) for out in configs]
    assert indices[0] == indices[1]
    for out in configs:
        report = verify(out)
        assert report.ok and not [note for note in report.notes if "evidence" not in str(note)], report.text()


@pytest.mark.soak
def test_failed_records_are_tried_again(configs):
    before = [committed(out) for out in configs]
    assert any(unit.failed for unit in log.read_units(list(configs)[1]).values())
    (next(iter(configs.values())).parent / "works").touch()
    for config in configs.values():
        done = CliRunner().invoke(app, ["build", str(config), "--local", "--retry-failed"])
        assert done.exit_code == 0, done.output
    assert_equal(configs)
    assert before != [committed(out) for out in configs]
    assert not any(unit.failed for unit in log.read_units(list(configs)[1]).values())


@pytest.mark.soak
def test_a_merge_with_another_share_writes_index_and_card_again(configs):
    text = say(configs, "merge", "CONFIG", "--set", "held_out_share=0.5")
    assert "index" in text
    assert_equal(configs)
    assert [reader.read_summary(out).held_out_share for out in configs] == [0.5, 0.5]
    bucket = reader.Corpus(list(configs)[1])
    assert bucket.index_is_current() and bucket.config.held_out_share == 0.5


def test_an_audit_writes_its_full_list_into_the_corpus_or_where_it_is_told(configs, tmp_path):
    text = say(configs, "audit", "CONFIG")
    assert "full list: CORPUS/audit.parquet" in text
    tables = [TableFile(f"{out}/audit.parquet").read().to_pylist() for out in configs]
    assert tables[0] == tables[1]
    bucket = list(configs)[1]
    elsewhere = "memory://audits/one.parquet"
    assert elsewhere in say(configs, "audit", "CONFIG", "--parquet", elsewhere)
    assert TableFile(elsewhere).read().to_pylist() == tables[1]
    assert verify(bucket).ok


def test_a_build_is_estimated_from_a_pilot_in_a_bucket(configs, tmp_path):
    folder, bucket = configs
    shown = {}
    for out, config in configs.items():
        done = CliRunner().invoke(app, ["estimate", str(config), "--images", "coconut=6000"])
        assert done.exit_code == 0, done.output
        shown[out] = done.output
    assert "6,000" in shown[bucket]
    assert len(shown[bucket].splitlines()) == len(shown[folder].splitlines())
    other = CliRunner().invoke(app, ["estimate", str(configs[folder]), "--run", bucket, "--write-rates"])
    assert other.exit_code == 0 and "coconut" in other.output
    own = CliRunner().invoke(app, ["estimate", str(configs[bucket]), "--sources"])
    assert own.exit_code == 0, own.output


def test_a_configuration_is_begun_with_a_bucket_as_its_corpus(tmp_path, memory_out):
    """`init` says that a URL may stand there, and what it writes is read with one."""
    config = tmp_path / "corpus.yaml"
    assert CliRunner().invoke(app, ["init", str(config), "--source", "coconut"]).exit_code == 0
    assert "s3://bucket/corpus" in config.read_text()
    config.write_text(config.read_text().replace("out: corpus\n", f"out: {memory_out}\n"))
    assert load_config(config, ()).out == memory_out
