import hashlib
import json
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from paracaption.pipeline.corpus import ledger, merge, plots, reader
from paracaption.pipeline.sources.protocols import SOURCE_STAGE
from paracaption.pipeline.stages import recipes
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests import committed


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return committed.merged(tmp_path_factory.mktemp("corpus") / "out")


def test_the_index_has_every_kept_region_sorted_by_subset_and_unit(out):
    rows = pq.read_table(out / "index.parquet").to_pylist()
    order = [(row["subset"], row["unit"]) for row in rows]
    assert order == sorted(order) and {row["subset"] for row in rows} == {"coconut", "sa1b"}
    kept = [
        (subset, row["key"], row["region"])
        for subset in ("coconut", "sa1b")
        for path in sorted((out / subset / "ledger").iterdir())
        for row in pq.read_table(path).to_pylist()
        if row["kept"]
    ]
    assert [(row["subset"], row["key"], row["region"]) for row in rows] == kept


def test_each_row_of_the_index_leads_to_its_sample(out):
    for row in pq.read_table(out / "index.parquet").to_pylist():
        sample, photo = reader.open_corpus(out).read_sample(row)
        region = next(region for region in sample.regions if region.id == row["region"])
        assert (region.caption, region.area) == (row["caption"], row["area"])
        assert photo.startswith(b"\xff\xd8")


def test_offsets_that_lead_elsewhere_are_an_error_naming_shard_and_key(out):
    row = pq.read_table(out / "index.parquet").to_pylist()[0]
    for change in ({"json_offset": row["json_offset"] - 512}, {"key": "other"}, {"photo_length": 1 << 40}):
        with pytest.raises(IntegrityError, match=r"coconut-000000\.tar"):
            reader.open_corpus(out).read_sample(row | change)


def test_each_step_of_the_funnel_takes_what_the_one_before_left(out):
    summary = reader.read_summary(out)
    for subset in summary.subsets.values():
        steps = subset.counts.funnel
        assert steps[0].regions_in == subset.counts.regions
        for step, after in pairwise(steps):
            assert after.regions_in == step.regions_in - step.dropped
        assert steps[-1].regions_in - steps[-1].dropped == subset.counts.kept
    assert summary.kept == pq.read_metadata(out / "index.parquet").num_rows


def test_the_funnel_has_the_stages_of_the_recipe_in_their_order(out):
    config = reader.read_config(out)
    for subset, summary in reader.read_summary(out).subsets.items():
        stages = recipes.recipe_of(config, subset)
        steps = [step.stage for step in summary.counts.funnel]
        assert steps == [SOURCE_STAGE, *(stage.name for stage in stages)]


def test_a_subset_that_the_last_build_did_not_have_keeps_its_funnel(tmp_path):
    out = committed.merged(tmp_path / "out")
    corpus = reader.open_corpus(out)
    before = merge.count_subset(corpus, "sa1b")
    config = yaml.safe_load((out / "config.yaml").read_text())
    del config["subsets"]["sa1b"]
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    assert merge.count_subset(corpus, "sa1b") == before


def test_a_stage_that_the_recipe_does_not_have_is_shown_last():
    steps = merge.count_funnel(["caption"], 10, {"write/photo_missing": 2, "source/crowd": 3})
    assert (steps[0].stage, steps[0].dropped) == ("source", 3)
    assert (steps[-1].stage, steps[-1].regions_in, steps[-1].dropped) == ("write", 7, 2)


def test_merging_again_gives_the_same_bytes(out):
    names = [
        "index.parquet",
        "stats.json",
        "README.md",
        *(f"plots/{p.name}" for p in (out / "plots").iterdir()),
    ]
    assert len(names) == 7
    before = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    merge.merge(out)
    assert before == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


def test_statistics_count_captions_regions_and_areas_exactly(out):
    summary = reader.read_summary(out)
    rows = [row for row in pq.read_table(out / "index.parquet").to_pylist() if row["subset"] == "coconut"]
    found = summary.subsets["coconut"]
    assert found.caption_words.total == found.area_px.total == len(rows)
    assert found.caption_words.mean == pytest.approx(np.mean([row["num_words"] for row in rows]), abs=1e-3)
    assert found.area_px.mean == pytest.approx(np.mean([row["area"] for row in rows]), abs=1e-3)
    assert found.regions_per_image.total == len({row["key"] for row in rows})
    assert found.regions_per_image_declared.counts[4] == 9
    assert sum(number for _, number in found.categories) == len(rows)
    assert found.categories == sorted(found.categories, key=lambda each: (-each[1], each[0]))


def test_a_histogram_covers_each_value_once_and_knows_its_quantiles():
    tally = merge._Tally()
    for values in ([3, 3, 5], [], [900]):
        tally.add(np.array(values))
    result = tally.result()
    assert len(result.edges) == len(result.counts) + 1 and result.total == 4
    assert (result.quantile(0.5), result.quantile(1.0), result.mean) == (3, 900, 227.75)
    octaves = merge._Tally(octaves=True)
    octaves.add(np.array([0, 1, 2, 3, 1024, 2047]))
    assert dict(zip(octaves.result().edges, octaves.result().counts, strict=False))[1024] == 2
    assert octaves.result().edges[0] == 1 and octaves.result().counts[:2] == [2, 2]


@pytest.mark.soak
def test_an_empty_corpus_merges(tmp_path):
    def drop_all(images, config):
        for image in images:
            for region in image.live():
                region.drop = committed.Drop("caption", committed.Reason.CAPTION_NONE, "")

    out = tmp_path / "out"
    committed.write(out, decide=drop_all)
    summary = merge.merge(out)
    assert (summary["kept"], summary["regions"]) == (0, 48)
    assert pq.read_metadata(out / "index.parquet").num_rows == 0


@pytest.mark.soak
def test_units_that_are_not_committed_are_not_in_the_corpus(tmp_path):
    out = committed.uncommitted(committed.merged(tmp_path / "out"), "coconut-000000")
    (out / "coconut" / "manifests" / ".tmp-coconut-000000.json-1").write_text("{")
    merge.merge(out)
    units = set(pq.read_table(out / "index.parquet")["unit"].to_pylist())
    assert units == {"coconut-000001", "sa1b-000000"}


def test_a_committed_manifest_that_is_gone_stops_the_merge_and_says_what_to_do(tmp_path):
    out = committed.merged(tmp_path / "out")
    (out / "coconut" / "manifests" / "coconut-000000.json").unlink()
    with pytest.raises(IntegrityError, match=r"manifests/coconut-000000\.json: gone.*build CONFIG` again"):
        merge.merge(out)


def test_a_ledger_that_its_manifest_does_not_know_stops_the_merge_and_leaves_the_old_index(tmp_path):
    out = committed.merged(tmp_path / "out")
    before = (out / "index.parquet").read_bytes()
    folder = out / "coconut" / "ledger"
    (folder / "coconut-000001.parquet").write_bytes((folder / "coconut-000000.parquet").read_bytes())
    with pytest.raises(IntegrityError, match=r"coconut-000001\.parquet.*paracaption verify"):
        merge.merge(out)
    assert (out / "index.parquet").read_bytes() == before
    assert not list(out.glob(".tmp-*"))


def test_an_older_ledger_without_a_new_score_still_merges(tmp_path):
    table = pq.read_table(committed.merged(tmp_path / "out") / "sa1b/ledger/sa1b-000000.parquet")
    aligned = ledger.align_ledger(table.drop_columns(["repeat_share"]), "it")
    assert aligned["repeat_share"].null_count == table.num_rows
    with pytest.raises(IntegrityError, match="caption"):
        ledger.align_ledger(table.drop_columns(["caption"]), "it")


def test_the_card_shows_funnel_licences_and_configuration(out):
    card = (out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["configs"][0]["data_files"][0]["path"] == "coconut/shards/coconut-*.tar"
    assert "| verify_category | 28 | 5 | 23 |" in body and "category_wrong 5" in body
    assert "CC BY 4.0 \\| test" in body and "none: synthetic" in body
    config = body.split("```yaml\n")[1].split("```")[0]
    assert hashlib.sha256(config.encode()).hexdigest() in body
    assert yaml.safe_load(config)["min_iou"] == 0.5
    assert max(len(line) for line in body.splitlines() if line.startswith("|")) < 400


def test_names_in_the_card_are_no_markup():
    from paracaption.pipeline.corpus.card import plain

    assert plain("a|b\n<script>*x*") == "a\\|b &lt;script&gt;\\*x\\*"


def test_an_image_is_found_by_its_key_with_and_without_an_index(tmp_path):
    out = committed.merged(tmp_path / "out")
    for _ in range(2):
        found = reader.open_corpus(out).find_image("000000000005")
        assert found.subset == "coconut" and [row["region"] for row in found.rows] == [0, 1, 2, 3]
        assert len(reader.open_corpus(out).find_image("000000000002").rows) == 4  # nothing of it was kept
        with pytest.raises(ConfigError, match="no image nothing"):
            reader.open_corpus(out).find_image("nothing")
        (out / "index.parquet").unlink(missing_ok=True)


def test_a_key_in_both_subsets_must_be_told_apart(tmp_path):
    out = tmp_path / "out"
    committed.write(out)
    path = out / "sa1b" / "manifests" / "sa1b-000000.json"
    record = json.loads(path.read_text())
    record["images"]["000000000001"] = record["images"].pop("sa_1")
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="coconut/000000000001 or sa1b/000000000001"):
        reader.open_corpus(out).find_image("000000000001")
    assert reader.open_corpus(out).find_image("coconut/000000000001").subset == "coconut"


def test_counts_come_from_the_manifests_alone(out):
    counts = merge.count_subset(reader.open_corpus(out), "coconut")
    assert (counts.units, counts.images, counts.images_captioned, counts.regions) == (3, 9, 7, 36)
    assert counts.images_dropped == {"photo_unreadable": 1}
    assert counts == reader.read_summary(out).subsets["coconut"].counts


def test_a_folder_that_is_no_corpus_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no corpus here"):
        merge.merge(
            tmp_path, committed.config_of(tmp_path, coconut={"annotations": [], "labels": "l", "photos": []})
        )


def test_statistics_that_do_not_parse_are_an_error_with_its_mend(tmp_path):
    with pytest.raises(ConfigError, match="paracaption merge"):
        reader.read_summary(tmp_path)
    (tmp_path / "stats.json").write_text("{}")
    with pytest.raises(IntegrityError, match="paracaption merge"):
        reader.read_summary(tmp_path)


def test_shards_read_with_plain_webdataset(out):
    import webdataset as wds

    names = sorted(str(path) for path in (out / "coconut" / "shards").glob("*.tar"))
    samples = list(wds.WebDataset(names, shardshuffle=False))
    expected = [s for name in names for s, _ in reader.iter_shard(name)]
    assert [sample["__key__"] for sample in samples] == [each.key for each in expected]
    for sample, each in zip(samples, expected, strict=True):
        assert msgspec.json.decode(sample["json"], type=type(each)) == each
        assert sample["jpg"].startswith(b"\xff\xd8")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_shards_read_with_hugging_face_datasets(out, tmp_path, streaming):
    from datasets import load_dataset

    pattern = str(out / "coconut" / "shards" / "coconut-*.tar")
    data = load_dataset(
        "webdataset", data_files=pattern, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    samples = list(data)
    assert len(samples) == 7
    first = samples[0]
    assert first["jpg"].size == (first["json"]["width"], first["json"]["height"])
    assert first["json"]["regions"][0]["rle"]["size"] == [96, 128]
    assert reader.read_manifest(out / "coconut/manifests/coconut-000000.json").images[first["__key__"]] == 2


@pytest.mark.parametrize(
    "lost", ["index.parquet", "stats.json", "README.md", *(f"plots/{name}" for name in plots.NAMES)]
)
def test_a_corpus_that_lacks_one_of_its_files_is_not_merged(tmp_path, lost):
    out = committed.merged(tmp_path / "out")
    assert merge.is_merged(out) and sorted(plots.NAMES) == sorted(p.name for p in (out / "plots").iterdir())
    (out / lost).unlink()
    assert not merge.is_merged(out)


def test_statistics_that_cannot_be_read_are_merged_anew(tmp_path):
    out = committed.merged(tmp_path / "out")
    (out / "stats.json").write_text("{")
    assert not merge.is_merged(out)
