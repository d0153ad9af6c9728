"""A published corpus, its logs and its events hold none of twenty planted secrets."""

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import merge
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import http_files
from paracaption.schemas import secrets
from paracaption.schemas.config import dump_config
from paracaption.schemas.errors import ConfigError, ParaCaptionError
from tests import building
from tests.backends import InstantCaptioner
from tests.file_server import serving
from tests.synthetic import write_coconut

SECRETS = [f"PLANTED{number:02}x{number * 7919:06}" for number in range(20)]

ENVIRONMENT = {
    "OPENAI_API_KEY": SECRETS[0],
    "AWS_SECRET_ACCESS_KEY": SECRETS[1],
    "HF_TOKEN": SECRETS[2],
    "DB_CONNECTION_STRING": f"Server=x;Pwd={SECRETS[3]}",
    "ALL_PROXY_OF_OURS": f"http://me:{SECRETS[4]}@proxy:3128",
    "GH_PAT": SECRETS[5],
}

SAID = [
    f"401 for key {SECRETS[0]}",
    f"SignatureDoesNotMatch: {SECRETS[1]}",
    f"cannot log in with {SECRETS[2]} or Server=x;Pwd={SECRETS[3]}",
    f"proxy http://me:{SECRETS[4]}@proxy:3128 refuses, pat {SECRETS[5]}",
    f"GET https://me:{SECRETS[6]}@host/x?X-Amz-Signature={SECRETS[7]}&X-Amz-Credential={SECRETS[8]} failed",
    f"Authorization: Bearer {SECRETS[9]}",
    f"password={SECRETS[10]}, api_key: '{SECRETS[11]}'",
]

REFUSED: list[tuple[str, dict[str, Any]]] = [
    (SECRETS[12], {"coconut": {"photos": [f"http://me:{SECRETS[12]}@host/photos"]}}),
    (SECRETS[13], {"coconut": {"annotations": [f"http://host/panoptic.json?X-Amz-Signature={SECRETS[13]}"]}}),
    (SECRETS[14], {"captioner": {"runtime_env": {"pip": [f"--index-url=https://me:{SECRETS[14]}@host/"]}}}),
    (SECRETS[15], {"captioner": {"runtime_env": {"env_vars": {"HTTPS_PROXY": f"http://a:{SECRETS[15]}@b"}}}}),
    (SECRETS[16], {"judge": {"runtime_env": {"env_vars": {"GH_PAT": SECRETS[16]}}}}),
    (SECRETS[17], {"segmenter": {"options": {"headers": {"Authorization": f"Bearer {SECRETS[17]}"}}}}),
    (SECRETS[18], {"judge": {"options": {"api_key": SECRETS[18]}}}),
    (SECRETS[19], {"benchmarks": {"photos": [f"s3://key:{SECRETS[19]}@bucket/x"]}}),
]


class Leaking(InstantCaptioner):
    """Says a secret of the environment or of its server in the error about some images."""

    def caption(self, images):
        for image in images:
            if (number := int(image.key)) < len(SAID):
                logging.getLogger("paracaption.of.somebody").debug("asking about %s", image.key)
                raise RuntimeError(SAID[number])
        return super().caption(images)


def texts(root: Path) -> dict[str, str]:
    """What each file below a folder says; Parquet in plain words."""
    pq = importlib.import_module("pyarrow.parquet")
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            said = repr(pq.read_table(path).to_pydict()) if path.suffix == ".parquet" else ""
            found[str(path.relative_to(root))] = said + path.read_bytes().decode("utf-8", "replace")
    return found


def told(root: Path, *more: str) -> list[tuple[str, str]]:
    """(secret, file) of every secret that is told."""
    said = texts(root) | {f"output {number}": text for number, text in enumerate(more)}
    return [(secret, name) for secret in SECRETS for name, text in said.items() if secret in text]


@pytest.mark.soak
def test_a_published_corpus_its_logs_and_events_hold_no_secret(tmp_path, monkeypatch, caplog, capfd):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        http_files, "_configured_headers", lambda: {"Authorization": f"Bearer {SECRETS[9]}"}
    )  # as FSSPEC_HTTP gives them
    entry = write_coconut(tmp_path / "source", 10)
    (tmp_path / "source/photos/000000000009.jpg").unlink()
    caplog.set_level(logging.DEBUG)
    with serving(tmp_path / "source") as server:
        entry |= {"photos": [f"{server.url}/photos"], "annotations": [f"{server.url}/panoptic.json"]}
        entry["labels"] = f"{server.url}/labels"
        config = building.config_of(
            tmp_path / "out", coconut=entry, failures={"unit_retries": 1, "stop_after_units": 99}
        )
        captioner = config.captioner.model_copy(update={"name": f"{__name__}:Leaking"})
        config = config.model_copy(update={"captioner": captioner})
        building.build(config, LocalEngine())
    merge.merge(config.out, config)
    out, err = capfd.readouterr()
    assert "RuntimeError" in str(texts(tmp_path / "out").values())  # the errors are in the ledger
    assert told(tmp_path / "out", caplog.text, out, err, dump_config(config)) == []


IN_RECORDS = [f"PLANTED{number:02}x{number * 7919:06}" for number in range(20, 31)]


def sign(url: str, secret: str) -> str:
    return f"{url}?X-Amz-Credential=AKIA{secret}&X-Amz-Signature={secret}"


def write_signed(root: Path) -> dict[str, Any]:
    """A release whose records name files and pages by signed addresses. Image 4 has no photo."""
    entry = write_coconut(root, 6)
    document = json.loads((root / "panoptic.json").read_text())
    images, annotations = document["images"], document["annotations"]
    for image in images:
        page = f"https://host/{image['file_name']}"
        image |= {
            "coco_url": sign(page.replace("//", f"//me:{IN_RECORDS[0]}@"), IN_RECORDS[1]),
            "flickr_url": f"{page}?sig={IN_RECORDS[2]}",
            "url": f"{page}?token={IN_RECORDS[3]}",
            "license": {"name": "ours", "url": sign("https://host/license", IN_RECORDS[4])},
        }
    images[1]["file_name"] = sign("000000000001.jpg", IN_RECORDS[5])
    images[2]["file_name"] = sign("https://host/000000000002.jpg", IN_RECORDS[6])
    annotations[3]["file_name"] = sign("000000000003.png", IN_RECORDS[7])
    images[4]["file_name"] = sign("photos/000000000004.jpg", IN_RECORDS[8])
    (root / "photos/000000000004.jpg").unlink()
    annotations[5]["segments_info"][0]["url"] = sign("https://host/crop.png", IN_RECORDS[9])
    document["info"] = {"url": sign("https://host/", IN_RECORDS[10])}
    text = json.dumps(document).replace("https://host/crop.png", r"https:\/\/host\/crop.png")
    (root / "panoptic.json").write_text(text.replace("&X-Amz", r"\u0026X-Amz"))
    return entry


def test_signed_addresses_in_the_records_of_a_source_are_published_nowhere(tmp_path, caplog, capfd):
    entry = write_signed(tmp_path / "source")
    caplog.set_level(logging.DEBUG)
    config = building.config_of(tmp_path / "out", coconut=entry)
    building.build(config, LocalEngine())
    merge.merge(config.out, config)
    out, err = capfd.readouterr()
    said = texts(tmp_path / "out") | {"log": caplog.text, "output": out + err}
    assert len(said) > 20
    assert [(s, name) for s in IN_RECORDS for name, text in said.items() if s in text] == []
    assert (
        "4 file names hold signed URLs, whose signatures were removed: they would be published. Photos and"
        in caplog.text
    )


def test_photos_and_label_maps_are_found_by_their_names_without_the_signatures(tmp_path):
    plain, signed = write_coconut(tmp_path / "plain", 6), write_signed(tmp_path / "signed")
    (tmp_path / "plain/photos/000000000004.jpg").unlink()
    for name, entry in (("a", plain), ("b", signed)):
        building.build(building.config_of(tmp_path / name / "out", coconut=entry), LocalEngine())
    shards = [building.committed(tmp_path / name / "out") for name in ("a", "b")]
    assert shards[0].keys() == shards[1].keys()
    missing = [{key for key, _ in building.drops(tmp_path / name / "out", "coconut")} for name in ("a", "b")]
    assert missing == [{"000000000004"}, {"000000000002", "000000000004"}]  # 2 is on a server alone


def test_a_record_without_secrets_is_kept_to_the_byte():
    raw = b'[{"id": 1,  "url": "https:\\/\\/host\\/a.png?v=2", "x": 1.0}]'
    assert secrets.open_json(raw) is raw
    assert secrets.open_json(raw.replace(b"v=2", b"sig=ab12")) == (
        b'[{"id": 1, "url": "https://host/a.png?...", "x": 1.0}]'
    )
    assert secrets.open_json(b'[{"url": "https://host/a?sig=ab12"') == b'[{"url": "https://host/a?..."'


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("a.jpg?X-Amz-Signature=ab12", "a.jpg"),
        ("train/a.jpg?sv=2020&se=2026-01-01&sig=ab12%3D", "train/a.jpg"),
        ("https://host/a.jpg?token=ab12", "https://host/a.jpg"),
        ("https://me:pw@host/a.jpg", "https://host/a.jpg"),
        ("what?.jpg", "what?.jpg"),
        ("a.jpg?v=2", "a.jpg?v=2"),
        ("me@home.jpg", "me@home.jpg"),
        ("a.jpg?", "a.jpg?"),
    ],
)
def test_a_name_is_published_without_what_lets_in(name, opened):
    assert secrets.open_name(name) == opened


def test_a_photo_at_a_signed_address_after_a_redirect_leaves_no_trace(tmp_path, caplog):
    from paracaption.pipeline.io import failures

    error = failures.ReadError(f"https://h/x?sig={SECRETS[7]}", "HTTP 403", failures.Kind.REFUSED)
    assert SECRETS[7] not in f"{error} {error.url} {failures.describe(error)}"
    found = failures.to_failure(
        OSError(f"https://me:{SECRETS[6]}@h/x is gone"),
        *(failures.Reason.PHOTO_MISSING, failures.Reason.PHOTO_UNREADABLE),
        where=f"https://me:{SECRETS[6]}@h/x",
    )
    assert SECRETS[6] not in str(found)


@pytest.mark.parametrize(("secret", "changes"), REFUSED)
def test_a_configuration_with_a_secret_is_refused_before_anything_is_written(tmp_path, secret, changes):
    entry = write_coconut(tmp_path / "source", 2)
    values = building.config_of(tmp_path / "out", coconut=entry).model_dump(mode="json")
    values |= {
        "subsets": {"coconut": {"sources": [{"source": "coconut", **entry, **changes.get("coconut", {})}]}}
    }
    for name, value in changes.items():
        if name != "coconut":
            values[name] = values[name] | value
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(values))
    for given in (tmp_path / "build.yaml", values):
        with pytest.raises(ConfigError) as refused:
            load_config(given)
        assert secret not in str(refused.value) and "environment" in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_command_says_a_refused_configuration_s_place_and_no_secret(tmp_path, capsys, monkeypatch):
    from paracaption.flows.cli import app as cli

    path = tmp_path / "build.yaml"
    path.write_text(f"out: out\ncoconut:\n- photos: http://me:{SECRETS[12]}@host/x\n")
    monkeypatch.setattr("sys.argv", ["paracaption", "build", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and "coconut.0.photos: holds a name or a password" in err
    assert SECRETS[12] not in out + err


def test_the_error_of_a_command_and_its_log_hide_secrets(capsys, monkeypatch, caplog):
    from paracaption.flows.cli import app as cli

    def fail():
        logging.getLogger("somebody").warning("key %s", SECRETS[0])
        raise ParaCaptionError(f"the server at https://me:{SECRETS[6]}@h/ refuses {SECRETS[0]}")

    monkeypatch.setenv("OPENAI_API_KEY", SECRETS[0])
    monkeypatch.setattr(cli, "app", fail)
    factory = logging.getLogRecordFactory()
    try:
        with pytest.raises(SystemExit):
            cli.main()
    finally:
        logging.setLogRecordFactory(factory)
    assert told(Path("/nonexistent"), *capsys.readouterr(), caplog.text) == []
