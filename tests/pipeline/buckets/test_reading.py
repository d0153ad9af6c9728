"""Every command that reads a corpus says of one in a bucket what it says of the same one in a folder."""

import builtins
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import paracaption
from paracaption.flows.cli.app import app
from paracaption.pipeline.corpus import contact_sheet, log, verify
from paracaption.pipeline.corpus.shard_pipes import pipe_of
from paracaption.pipeline.explorer import report
from paracaption.pipeline.io import bucket_clients, bucket_files, files
from paracaption.pipeline.io.bucket_folders import upload_folder
from paracaption.pipeline.io.buckets import BucketStore
from paracaption.pipeline.io.location import locate
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import ConfigError, IntegrityError
from paracaption.schemas.records import Blob
from tests.pipeline.buckets import corpora
from tests.pipeline.buckets.corpora import count

COMMANDS = [
    ["verify", "CORPUS"],
    ["verify", "CORPUS", "--json"],
    ["inspect", "CORPUS"],
    ["inspect", "CORPUS", "--json"],
    ["inspect", "CORPUS", "--shards"],
    ["show", "CORPUS", "coconut/000000000001", "--out", "OUT.png"],
    ["report", "CORPUS", "--to", "OUT.html"],
    ["export", "CORPUS", "--format", "coco", "--to", "OUT/coco"],
    ["export", "CORPUS", "--format", "perceptiondlm-json", "--to", "OUT/json"],
    ["export", "CORPUS", "--format", "parquet", "--to", "OUT/parquet"],
    ["status", "CORPUS"],
    ["versions", "CORPUS"],
    ["versions", "CORPUS", "--all"],
    ["versions", "CORPUS", "--config", "14"],
    ["diff", "CORPUS", "0", "12"],
    ["diff", "CORPUS", "9", "17"],
]
REFUSED = [
    ["show", "CORPUS", "nobody", "--out", "OUT.png"],
    ["export", "CORPUS", "--format", "csv", "--to", "OUT/csv"],
    ["export", "CORPUS", "--format", "coco", "--split", "held_out", "--to", "OUT/held"],
    ["inspect", "CORPUS", "--pipe"],
    ["inspect", "CORPUS/none"],
    ["verify", "CORPUS/none"],
    ["status", "CORPUS/none"],
    ["versions", "CORPUS/none"],
    ["versions", "CORPUS", "--config", "1"],
    ["diff", "CORPUS", "1", "99"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.soak(keep=3)
def test_a_command_says_the_same(pair, command):
    code, text = pair.run(*command)
    assert code == 0 and text.strip(), text
    written = [
        Path(str(each).replace("OUT", f"{pair.beside}/out-{n}")) for n in (0, 1) for each in command[-1:]
    ]
    if written[0].exists() and "html" not in command[-1]:
        assert _content(written[0]) == _content(written[1])


def _content(path: Path) -> dict[str, bytes]:
    found = [each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()]
    return {str(each.relative_to(path)): each.read_bytes() for each in found}


@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
@pytest.mark.soak(keep=2)
def test_what_is_refused_is_refused_alike(pair, command):
    code, text = pair.run(*command)
    assert (code and "\n" not in text.strip() and "; " in text) or "nothing" in text, text


@pytest.mark.soak
def test_commands_that_write_do_the_same(pair):
    changed = pair.copy("written")
    keys = pair.beside / "keys.txt"
    keys.write_text("coconut/000000000002\n")
    for command in (
        ["undo", "CORPUS", "--yes"],
        ["remove", "CORPUS", "--keys", str(keys), "--yes", "--delete-replaced"],
        ["versions", "CORPUS"],
        ["verify", "CORPUS"],
    ):
        code, text = changed.run(*command)
        assert code == 0, text
    code, text = changed.run("undo", "CORPUS", "--yes")
    assert code and "are deleted by now" in text
    assert _committed(changed.folder) == _committed(changed.bucket)


def _committed(out: str | Path) -> dict[str, str]:
    return {file.path: file.sha256 for unit in log.read_units(str(out)).values() for file in unit.files()}


@pytest.mark.parametrize("what", ["verify", "report"])
@pytest.mark.soak(keep=1)
def test_a_check_and_a_report_need_few_requests(pair, what):
    """A check reads a unit's files once, its manifest twice; a report reads of shards samples alone."""
    units = log.read_units(pair.bucket)
    with count(pair.server) as asked:
        verify.verify(pair.bucket) if what == "verify" else _report(pair.bucket)
    of_units = [key for key in asked if any(f"/{name.partition('/')[2]}" in key for name in units)]
    shards = [key for key in of_units if "/shards/" in key]
    most = {"verify": (7, 4), "report": (3, 24)}[what]
    assert len(of_units) - len(shards) <= most[0] * len(units), sorted(of_units)
    assert len(shards) <= most[1], sorted(shards)
    assert len(asked) - len(of_units) <= 75, sorted(asked)


def _report(out: str) -> None:
    report.render_report(report.Explorer(out))


@pytest.mark.soak
def test_processes_that_check_units_find_the_bucket(pair):
    changed = pair.copy("checked")
    shard = next(unit.shard for unit in paracaption.open_corpus(changed.bucket).units("sa1b"))
    data = files.read(Blob(shard))
    store_of(shard).put(shard, data[:600] + b"?" + data[601:])
    found = verify.verify(changed.bucket, workers=2)
    assert [problem.file for problem in found.problems] == [shard.removeprefix(f"{changed.bucket}/")]
    with pytest.raises(ConfigError, match=r"this process's memory.*give 1 worker"):
        verify.verify(_in_memory(pair), workers=2)


def _in_memory(pair: corpora.Pair) -> str:
    for url, name in files.walk(pair.bucket):
        store_of("memory://pair").put(f"memory://pair/corpus/{name}", files.read(Blob(url)))
    assert verify.verify("memory://pair/corpus").ok
    return "memory://pair/corpus"


def test_a_corpus_is_read_by_a_process_that_is_given_it(pair):
    corpus = paracaption.open_corpus(pair.bucket)
    code = "import pickle, sys; print(sum(1 for _ in pickle.load(sys.stdin.buffer).samples()))"
    told = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(corpus), capture_output=True)
    assert told.stdout.split() == [b"11"], told.stderr


def test_an_export_goes_into_a_bucket_whole(pair):
    target = "s3://corpus/exports/coco"
    code, text = pair.run("export", "CORPUS", "--format", "coco", "--to", "OUT/again")
    assert code == 0, text
    told = corpora.run(["export", pair.bucket, "--format", "coco", "--to", target], {target: "OUT/again"})
    assert told == (code, text.replace(str(pair.folder), pair.bucket).replace("CORPUS", pair.bucket))
    local = _content(pair.beside / "out-0" / "again")
    assert {name: files.read(Blob(f"{target}/{name}")) for name in local} == local
    assert {name for _, name in files.walk(target)} == set(local)
    code, text = corpora.run(["export", pair.bucket, "--format", "coco", "--to", target], {})
    assert code and "already exists" in text


def test_an_export_into_the_corpus_itself_is_refused(pair):
    """A build would take some of its files for those of a killed driver, and delete them."""
    before = pair.server.objects("corpus")
    for target in (f"{pair.bucket}/coco", pair.bucket):
        code, text = corpora.run(["export", pair.bucket, "--format", "coco", "--to", target], {})
        assert code and f"{target}: lies in the corpus" in text
    assert pair.server.objects("corpus") == before


def test_an_export_that_fails_leaves_nothing(pair):
    gate = pair.server.fail("403", "PUT", "exports/failed/*", count=None)
    code, text = corpora.run(
        ["export", pair.bucket, "--format", "parquet", "--to", "s3://corpus/exports/failed"], {}
    )
    pair.server.release(gate)
    assert code and "AWS_ACCESS_KEY_ID" in text
    assert not pair.server.objects("corpus", "exports/failed/")


def test_an_export_that_fails_leaves_what_another_one_writes_there(pair, monkeypatch, tmp_path):
    """Both began while nothing was there. And who stops an export does not wait for the rest of it."""
    target, uploads = locate("s3://corpus/exports/twice"), list[str]()
    (tmp_path / "folder").mkdir()
    for name in range(100):
        (tmp_path / "folder" / f"{name}").write_bytes(b"1")
    store_of(target).put(f"{target}/another", b"1")
    write = BucketStore.write

    def fail_at_second(self, path):
        uploads.append(path)
        if len(uploads) > 1:
            raise OSError("no more")
        return write(self, path)

    monkeypatch.setattr(BucketStore, "write", fail_at_second)
    with pytest.raises(OSError, match="no more"):
        upload_folder(tmp_path / "folder", target)
    assert list(pair.server.objects("corpus", "exports/twice/")) == ["exports/twice/another"]
    assert len(uploads) < 100


def test_shards_are_listed_for_other_programs(pair):
    urls = paracaption.list_shards(pair.bucket, "coconut")
    assert len(urls) == 3 and all(files.exists(url) for url in urls)
    told = CliRunner().invoke(app, ["inspect", pair.bucket, "--shards", "--pipe"]).output.splitlines()
    assert told[:3] == [f"pipe:aws s3 cp {url} -" for url in urls]
    assert "-c box -n a/b.tar" in pipe_of("az://box/a/b.tar")
    with pytest.raises(ConfigError, match="no subset"):
        paracaption.list_shards(pair.bucket, "nobody")


@pytest.mark.soak
def test_a_contact_sheet_is_the_same(pair, tmp_path):
    for name, out in (("a.png", pair.folder), ("b.png", pair.bucket)):
        contact_sheet.draw_contact_sheet(out, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.soak
def test_a_report_is_written_into_the_corpus(pair):
    changed = pair.copy("reported")
    written = report.write_report(changed.bucket)
    assert str(written) == f"{changed.bucket}/report.html"
    assert b"</html>" in files.read(Blob(str(written)))


def test_without_obstore_the_extra_is_named(pair, monkeypatch):
    monkeypatch.setattr(bucket_clients, "_clients", {})
    take = builtins.__import__

    def refuse(name, *rest):
        if name.partition(".")[0] == "obstore":
            raise ImportError(name)
        return take(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"obstore .*is not installed; .*extra `remote`"):
        paracaption.open_corpus("s3://elsewhere/corpus")


@pytest.mark.parametrize("what", ["shards", "ledger", "manifests", "plan"])
@pytest.mark.soak(keep=2)
def test_a_store_that_is_away_is_no_damage(pair, monkeypatch, tmp_path, what):
    """Nobody is told to delete something that could not be read, nor to build it again."""
    ask = bucket_files.ask

    def away(question, url):
        if f"/{what}/" in url:
            raise bucket_clients.BucketError("HTTP 503 Service Unavailable", 503)
        return ask(question, url)

    monkeypatch.setattr(bucket_files, "ask", away)
    said = [problem.what for problem in verify.verify(pair.bucket).problems]
    code, text = corpora.run(["export", pair.bucket, "--format", "parquet", "--to", str(tmp_path / "x")], {})
    assert said and (code or what in ("ledger", "plan"))  # which this export does not read
    for each in [*said, text] if code else said:
        assert each.endswith("run the same command again when the store answers"), each
        assert "delete" not in each and "paracaption build" not in each


@pytest.mark.soak
def test_a_shard_that_is_gone_is_an_error_that_names_it(pair):
    changed = pair.copy("gone")
    corpus = paracaption.open_corpus(changed.bucket)
    shard = corpus.units("sa1b")[0].shard
    store_of(shard).delete(shard)
    with pytest.raises(IntegrityError, match=shard):
        list(corpus.samples("sa1b"))
    found = verify.verify(changed.bucket).problems
    assert [problem.file for problem in found] == [shard.removeprefix(f"{changed.bucket}/")]
    assert found[0].what.startswith("missing; ")


def test_the_card_of_a_bucket_says_how_webdataset_reads_it(pair, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    folder = (pair.folder / "README.md").read_text()
    bucket = files.read(Blob(log.place_of(pair.bucket, "README.md"))).decode()
    assert _numbers_of(folder) == _numbers_of(bucket)
    assert "shards/coconut-*.tar" in folder and "shards/coconut-*" not in bucket
    code = bucket.partition("```python\n")[2].partition("```")[0].replace("s3://BUCKET/CORPUS", pair.bucket)
    aws = tmp_path / "aws"  # `aws s3 cp s3://corpus/KEY -`
    aws.write_text(
        f"#!{sys.executable}\nimport sys, urllib.request\n"
        f"url = sys.argv[3].replace('s3://', '{pair.server.address}/')\n"
        "sys.stdout.buffer.write(urllib.request.urlopen(url).read())\n"
    )
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    keys: list[str] = []
    exec(f"{code}    keys.append(record['key'])\n", {"keys": keys})
    assert len(keys) == 9 and keys[0] == "000000000000"


def _numbers_of(card: str) -> str:
    return card.partition("# Region captions")[2].partition("## Reading it")[0]
