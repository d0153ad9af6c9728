"""A held-out split: recorded in the index, counted by card and `inspect`, respected by exports."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from paracaption.filters.held_out import is_held_out
from paracaption.flows.cli.app import app
from paracaption.pipeline.corpus import export, inspect, ledger, merge, reader, undo, verify, versions
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.build import build_checked
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.sources.registry import complete
from paracaption.pipeline.stages import recipes
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests import committed
from tests.building import config_of
from tests.synthetic import write_coconut

SHARE = 0.4
FORMATS = list(export.FORMATS)


def holding_out(config: BuildConfig, share: float = SHARE) -> BuildConfig:
    return config.model_copy(update={"held_out_share": share})


def merged(out: Path, share: float) -> Path:
    """A committed corpus that is merged, and whose configuration holds out a share of its images."""
    config = holding_out(committed.write(out), share)
    with merge.own_or(None, str(out), "test") as owner:
        driver.write_config(config, owner)
    merge.merge(out, config)
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return merged(tmp_path_factory.mktemp("held") / "out", SHARE)


def keys_of(out: Path) -> tuple[set[str], set[str]]:
    """The keys of the images for training, and of those held out."""
    keys = {sample.key for sample, _ in reader.open_corpus(out).samples()}
    held = {key for key in keys if is_held_out(key, SHARE)}
    assert held and keys - held
    return keys - held, held


@pytest.fixture(scope="module", autouse=True)
def _plots_in_no_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge.plots, "draw_plots", lambda _: dict.fromkeys(merge.plots.NAMES, b""))
        yield


def digests(out: Path) -> dict[str, str]:
    kinds = ("*/shards/*", "*/ledger/*", "*/manifests/*", "index.parquet", "stats.json")
    files = [path for kind in kinds for path in out.glob(kind)]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.soak
def test_the_index_says_of_each_row_in_which_split_its_image_is(out):
    rows = pq.read_table(out / "index.parquet").to_pylist()
    train, held = keys_of(out)
    assert {row["key"] for row in rows if row["split"] == "held_out"} == held
    assert {row["key"] for row in rows if row["split"] == "train"} == train
    assert pq.read_schema(out / "index.parquet").names == [*ledger.index_schema().names, "split"]


@pytest.mark.soak
def test_without_a_share_nothing_is_written_that_was_not_before(out, tmp_path):
    plain = merged(tmp_path / "plain" / "out", 0.0)
    assert pq.read_schema(plain / "index.parquet").names == ledger.index_schema().names
    for name in ("stats.json", "config.yaml", "README.md"):
        assert "held" not in (plain / name).read_text().lower(), name
        assert "held" in (out / name).read_text().lower(), name
    before, now = digests(plain), digests(out)
    changed = {name for name in before if before[name] != now[name]}
    assert before.keys() == now.keys() and changed == {"index.parquet", "stats.json"}


def test_card_and_inspect_say_how_many_are_held_out_and_verify_is_content(out):
    _, held = keys_of(out)
    rows = [row for row in pq.read_table(out / "index.parquet").to_pylist() if row["subset"] == "coconut"]
    regions = sum(row["key"] in held for row in rows)
    images = len({row["key"] for row in rows} & held)
    card = (out / "README.md").read_text()
    assert f"(`split` in the index): {images} images with {regions} regions." in card
    assert "Shards hold the images of both splits" in card and 'sample["__key__"] in keys' in card
    shown = io.StringIO()
    Console(file=shown, width=120).print(inspect.inspect(out))
    assert f"held out of training: {images} images with captions, {regions} regions" in shown.getvalue()
    assert verify.verify(out).ok, verify.verify(out).text()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.soak(keep=1)
def test_an_export_is_of_the_images_for_training_unless_others_are_asked_for(out, tmp_path, form):
    train, held = keys_of(out)
    for split, wanted in ((None, train), ("train", train), ("held_out", held), ("all", train | held)):
        to = tmp_path / f"{split}"
        export.export(out, form, to, split=split)
        assert exported(to) == wanted


def exported(folder: Path) -> set[str]:
    """The keys of an export's images, which in each format are as many as its photos."""
    if (folder / "data").exists():
        return {key for path in folder.glob("data/*") for key in pq.read_table(path)["key"].to_pylist()}
    photos = [path.stem for path in folder.glob("images/*/*")]
    [document] = folder.glob("*.json")
    content = json.loads(document.read_text())
    named = content["images"] if isinstance(content, dict) else content
    names = [Path(each.get("file_name") or each["image"]).stem for each in named]
    assert sorted(names) == sorted(photos)
    return set(names)


def test_the_command_says_which_split_it_wrote_and_coco_too(out, tmp_path):
    done = CliRunner().invoke(app, ["export", str(out), "--format", "coco", "--to", str(tmp_path / "to")])
    train, held = keys_of(out)
    said = f"split train: {len(train)} of {len(train | held)} images; held_out_share is 0.4"
    assert done.exit_code == 0 and said in done.output
    assert json.loads((tmp_path / "to" / "instances.json").read_text())["info"]["split"] == "train"
    given = ["--format", "coco", "--to", str(tmp_path / "held"), "--split", "held_out"]
    assert "split held_out" in CliRunner().invoke(app, ["export", str(out), *given]).output


def test_a_corpus_without_a_split_is_exported_whole_and_has_none_to_export(tmp_path):
    plain = committed.merged(tmp_path / "out")
    done = CliRunner().invoke(app, ["export", str(plain), "--format", "coco", "--to", str(tmp_path / "to")])
    assert done.exit_code == 0 and "held_out_share" not in done.output
    assert "split" not in json.loads((tmp_path / "to" / "instances.json").read_text())["info"]
    with pytest.raises(ConfigError, match=r"no image is held out of training; set held_out_share"):
        export.export(plain, "coco", tmp_path / "held", split="held_out")
    with pytest.raises(ConfigError, match=r"split 'test': no such split; there are train, held_out, all"):
        export.export(plain, "coco", tmp_path / "test", split="test")
    assert not (tmp_path / "held").exists()


def test_a_copy_without_its_configuration_has_the_split_of_its_last_merge(tmp_path):
    out = merged(tmp_path / "out", SHARE)
    (out / "config.yaml").unlink()
    assert reader.open_corpus(out).held_out_share == SHARE
    (out / "stats.json").unlink()
    with pytest.raises(
        IntegrityError, match=r"index\.parquet: marks images as held out of training, but config"
    ):
        export.export(out, "coco", tmp_path / "to")
    (out / "index.parquet").unlink()
    assert reader.open_corpus(out).held_out_share == 0


def test_an_index_of_another_share_than_the_configuration_is_named_by_verify(tmp_path):
    out = merged(tmp_path / "out", 0.0)
    with merge.own_or(None, str(out), "test") as owner:
        driver.write_config(holding_out(reader.open_corpus(out).config), owner)
    found = verify.verify(out)
    assert (
        not found.ok
        and "does not describe the units that are committed now; run `paracaption merge CONFIG`"
        in found.text()
    )
    merge.merge(out)
    assert verify.verify(out).ok


def test_a_copy_that_holds_nothing_out_needs_no_file_that_says_so(tmp_path):
    out = merged(tmp_path / "out", 0.0)
    (out / "config.yaml").unlink()
    (out / "stats.json").unlink()
    assert reader.open_corpus(out).held_out_share == 0


def test_ids_of_a_coco_export_are_the_same_in_each_split(out, tmp_path):
    found = {}
    for split in ("train", "held_out", "all"):
        export.export(out, "coco", tmp_path / split, split=split)
        found[split] = json.loads((tmp_path / split / "instances.json").read_text())
    assert len(found["all"]["categories"]) > 1
    for name in ("images", "annotations"):
        parts = sorted([*found["train"][name], *found["held_out"][name]], key=lambda each: each["id"])
        assert parts == found["all"][name]
    for split in ("train", "held_out"):
        assert all(each in found["all"]["categories"] for each in found[split]["categories"])
        used = {each["category_id"] for each in found[split]["annotations"]}
        assert used == {each["id"] for each in found[split]["categories"]}


@pytest.mark.soak
def test_a_split_without_an_image_is_no_export(tmp_path):
    out = merged(tmp_path / "out", 1e-6)
    with pytest.raises(
        ConfigError, match=r"with a held_out_share of 1e-06, none of its \d+ images is in the"
    ):
        export.export(out, "coco", tmp_path / "to", split="held_out")
    assert export.export(out, "coco", tmp_path / "to")


@pytest.mark.soak
def test_another_share_only_merges_anew_and_a_build_that_died_before_the_merge_does(tmp_path):
    plain = complete(config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "source", 9)))
    build_checked(plain, LocalEngine(), driver.build, limit_images=None, retry_failed=False)
    before, asked = digests(tmp_path / "out"), (tmp_path / "captioner.log").read_text()
    held = holding_out(plain)
    assert not driver.is_finished(held) and driver.is_built(held)
    with merge.own_or(None, held.out, "test") as owner:
        driver.write_config(held, owner)  # and then the build dies
    assert not driver.is_finished(held)
    build_checked(held, LocalEngine(), driver.build, limit_images=None, retry_failed=False)
    assert driver.is_finished(held) and (tmp_path / "captioner.log").read_text() == asked
    now = digests(tmp_path / "out")
    assert {name for name in now if now[name] != before[name]} == {"index.parquet", "stats.json"}
    build_checked(plain, LocalEngine(), driver.build, limit_images=None, retry_failed=False)
    assert digests(tmp_path / "out") == before
    made = [recipes.recipe_digest(recipes.recipe_of(each, "coconut"), each) for each in (plain, held)]
    assert made[0] == made[1]


@pytest.mark.soak
def test_diff_and_undo_say_which_share_was_held_out(tmp_path):
    source = write_coconut(tmp_path / "source", 9)
    kept, strict = (
        complete(config_of(tmp_path / "out", coconut=source, masks={"min_area_px": area}))
        for area in (16, 1000)
    )
    for config in (kept, strict, holding_out(strict)):
        driver.build(config, LocalEngine())
    out = str(tmp_path / "out")
    entries = [each for each in versions.list_versions(out) if each.kind == "config"]
    assert entries[-1].text == "held_out_share: not set -> 0.4"
    number = entries[-1].number
    compared = CliRunner().invoke(app, ["diff", out, str(number - 1), str(number)])
    assert compared.exit_code == 0 and "held out of training: 0 -> 0.4 of the images" in compared.output
    before = CliRunner().invoke(app, ["diff", out, "1", str(number - 1)])
    assert before.exit_code == 0 and "held out" not in before.output
    rebuild = undo.find_rebuild(out)
    assert rebuild.units and "held_out_share: 0.4 -> not set" in rebuild.changes
    undo.undo(out, rebuild)
    assert reader.open_corpus(out).held_out_share == 0
    assert "split" not in pq.read_schema(tmp_path / "out" / "index.parquet").names


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_a_share_is_from_zero_to_below_one(tmp_path, share):
    with pytest.raises(ValidationError, match="held_out_share"):
        config_of(tmp_path / "out", coconut={"annotations": [], "photos": []}, held_out_share=share)
