"""A vote and a fallback: who is asked, what the region has then, and the one drop that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import merge, reader
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.explorer import whatif
from paracaption.pipeline.explorer.evidence import read_evidence
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.recipes import recipe_of, stage_kinds
from paracaption.schemas.config import BuildConfig
from tests.building import build, calls, config_of, drops
from tests.synthetic import write_coconut

NUM_IMAGES = 3


def judge(root: Path, name: str, no: str) -> dict[str, Any]:
    """A judge of its own that says no to captions with a text in them."""
    options = {"log": str(root / f"{name}.log"), "refuse": no, "mended": str(root / "never"), "says": "no"}
    backend = {"name": "tests.picky:PickyJudge", "options": options, "num_cpus": 0.1}
    return {"stage": "verify_category", "id": name, "judge": backend}


def captioner(
    root: Path, name: str, cls: str = "tests.picky:OtherCaptioner", **options: Any
) -> dict[str, Any]:
    backend = {"name": cls, "options": {"log": str(root / f"{name}.log"), **options}, "num_cpus": 0.1}
    return {"stage": "caption", "id": name, "captioner": backend}


def configured(root: Path, *recipe: Any, **changes: Any) -> BuildConfig:
    """A configuration of one subset with a recipe."""
    config = config_of(root / "out", coconut=write_coconut(root / "source", NUM_IMAGES), **changes)
    values = config.model_dump()
    values["subsets"]["coconut"]["recipe"] = list(recipe)
    return BuildConfig.model_validate(values)


def rows(config: BuildConfig) -> dict[tuple[str, int], dict[str, Any]]:
    """Every region of the ledgers by (key, region)."""
    found = {}
    for path in sorted(Path(config.out).glob("coconut/ledger/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found[row["key"], row["region"]] = row
    return found


def test_a_vote_keeps_what_enough_members_keep_and_says_what_each_said(tmp_path):
    members = [judge(tmp_path, "cats", "cat"), judge(tmp_path, "trees", "tree"), judge(tmp_path, "all", "A ")]
    config = configured(tmp_path, "caption", {"vote": members, "id": "agreed", "at_least": 2})
    build(config)
    found = rows(config)
    assert {row["category"] for row in found.values()} >= {"cat", "tree"}
    for row in found.values():
        against = {"cat", "tree"} & {row["category"]}
        assert row["kept"] == (not against)
        if against:
            assert (row["drop_stage"], row["drop_reason"]) == ("agreed", "voted_out")
            [name] = [f"{word}s" for word in against]
            kept = "trees" if name == "cats" else "cats"
            assert row["drop_detail"].startswith("1 of 3 kept it, 2 needed: ")
            for part in (
                f"{name}: category_wrong (the judge says no)",
                f"{kept} kept it",
                "all: category_wrong",
            ):
                assert part in row["drop_detail"]
    for name in ("cats", "trees", "all"):
        assert len(calls(tmp_path / f"{name}.log")) == len(found), "every member is asked about every region"


def test_a_fallback_asks_the_next_member_only_where_one_is_against(tmp_path):
    first = ["caption", judge(tmp_path, "first", "A cat")]
    second = [captioner(tmp_path, "other"), judge(tmp_path, "second", "A cat of 4")]
    config = configured(tmp_path, {"fallback": [first, second], "id": "described"}, "clean_text")
    build(config)
    found = rows(config)
    cats = {place for place, row in found.items() if row["category"] == "cat"}
    assert 0 < len(cats) < len(found)
    assert len(calls(tmp_path / "first.log")) == len(found)
    assert {tuple(each.split("/")) for each in calls(tmp_path / "other.log")} == {
        (k, str(r)) for k, r in cats
    }
    for place, row in found.items():
        assert row["caption"].startswith("Another look. A cat" if place in cats else "A ")
        if not row["kept"]:
            assert (row["drop_stage"], row["drop_reason"]) == ("described", "category_wrong")
            assert "first: category_wrong" in row["drop_detail"] and "second: category" in row["drop_detail"]


def test_a_models_error_is_a_failure_and_no_reason_to_fall_back(tmp_path):
    picky = captioner(tmp_path, "picky", "tests.picky:PickyCaptioner")
    config = configured(tmp_path, {"fallback": [picky, captioner(tmp_path, "other")], "id": "described"})
    build(config)
    failed = drops(tmp_path / "out", "coconut")
    assert len(failed) == NUM_IMAGES
    assert set(failed.values()) == {("described", "model_error", "picky: no caption for this one")}
    assert calls(tmp_path / "other.log") == []


def test_a_vote_in_a_fallback_in_a_vote_is_one_drop(tmp_path):
    inner = {"vote": [judge(tmp_path, "a", "cat"), judge(tmp_path, "b", "cat")], "id": "inner"}
    middle = {"fallback": [inner, judge(tmp_path, "c", "cat of")], "id": "middle"}
    outer = {"vote": [middle, judge(tmp_path, "d", "cat")], "id": "outer", "at_least": 1}
    config = configured(tmp_path, "caption", outer)
    build(config)
    found = rows(config)
    cats = [row for row in found.values() if row["category"] == "cat"]
    assert {row["drop_stage"] for row in found.values()} <= {None, "outer"}
    assert all(not row["kept"] and "middle: category_wrong" in row["drop_detail"] for row in cats)
    assert len(calls(tmp_path / "c.log")) == len(cats) and len(calls(tmp_path / "d.log")) == len(found)


def test_a_filter_can_be_a_member_and_sees_only_what_it_is_asked_about(tmp_path):
    small = {"stage": "usable_masks", "id": "small", "min_area_px": 16}
    large = {"stage": "usable_masks", "id": "large", "min_area_px": 1_000}
    config = configured(tmp_path, {"fallback": [large, small], "id": "either"}, "caption")
    build(config)
    found = rows(config)
    assert found and all(row["kept"] for row in found.values())
    config = configured(tmp_path / "both", {"vote": [large, small], "at_least": 2}, "caption")
    build(config)
    assert any(row["drop_stage"] == "vote" for row in rows(config).values())


def test_the_funnel_has_one_line_for_a_composite_and_the_card_says_what_its_members_are(tmp_path):
    members = [judge(tmp_path, "cats", "cat"), judge(tmp_path, "trees", "tree")]
    config = configured(tmp_path, "usable_masks", "caption", {"vote": members, "id": "agreed"})
    progress = build(config)["coconut"]
    assert list(progress.stages)[3:6] == ["cats", "trees", "agreed"], "members have progress of their own"
    merge.merge(config.out, config)
    corpus = reader.open_corpus(config.out)
    funnel = corpus.summary.subsets["coconut"].counts.funnel
    assert [step.stage for step in funnel] == ["source", "usable_masks", "caption", "agreed"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- `agreed` keeps a region if enough of its members keep it (`vote`): `cats`, `trees`" in card
    assert "- `cats` asks the judge whether the caption describes the annotated category (`ver" in card
    assert "- `clean_text`" not in card


def test_members_have_evidence_of_their_own_and_nothing_is_asked_again(tmp_path):
    members = [judge(tmp_path, "cats", "cat"), judge(tmp_path, "trees", "tree")]
    config = configured(tmp_path, "caption", {"vote": members, "id": "agreed", "at_least": 1})
    build(config)
    asked = calls(tmp_path / "cats.log") + calls(tmp_path / "trees.log")
    folders = {path.name.rpartition("-")[0] for path in (tmp_path / "out/coconut/evidence").iterdir()}
    assert folders == {"caption", "cats", "trees"}
    values = config.model_dump()
    values["subsets"]["coconut"]["recipe"][1]["at_least"] = 2
    changed = BuildConfig.model_validate(values)
    build(changed)
    assert any(not row["kept"] for row in rows(changed).values())
    assert calls(tmp_path / "cats.log") + calls(tmp_path / "trees.log") == asked


def test_a_rebuild_does_not_load_a_model_that_no_region_falls_back_to(tmp_path):
    fallback = {"fallback": ["caption", captioner(tmp_path, "other")], "id": "described"}
    config = configured(tmp_path, fallback, "clean_text")
    build(config)
    assert calls(tmp_path / "other.log") == [] and all(row["kept"] for row in rows(config).values())
    changed = config.model_copy(update={"text": config.text.model_copy(update={"min_words": 50})})
    build(changed)
    assert not any(row["kept"] for row in rows(changed).values())
    *_, last = sorted((tmp_path / "out" / "events").iterdir(), key=lambda run: run.stat().st_mtime)
    assert {event.stage for event in EventReader(last).new() if event.what == "started"} == set()


def test_the_explorer_shows_what_each_captioner_and_each_judge_said(tmp_path):
    members = [judge(tmp_path, "cats", "cat"), judge(tmp_path, "trees", "tree")]
    config = configured(tmp_path, "caption", captioner(tmp_path, "other"), {"vote": members, "id": "agreed"})
    build(config)
    kinds = stage_kinds(config, "coconut")
    assert kinds == {
        **{"caption": "caption", "other": "caption"},
        **{"cats": "verify_category", "trees": "verify_category", "agreed": "vote"},
    }
    for place, row in rows(config).items():
        told = read_evidence(tmp_path / "out", "coconut", [row], kinds)[place[1]]
        assert told.captions["other"] == row["caption"] == f"Another look. {told.captions['caption']}"
        said = {name: "no" if row["category"] in name else "yes" for name in ("cats", "trees")}
        assert told.answers == said
    assert "is in a vote or a fallback" in whatif.why_not(config, "coconut")
    assert whatif.why_not(plain_of(config), "coconut") == ""


def plain_of(config: BuildConfig) -> BuildConfig:
    """The same with the recipe `verify`."""
    subset = config.subsets["coconut"].model_copy(update={"recipe": "verify"})
    return config.model_copy(update={"subsets": {"coconut": subset}})


@pytest.mark.parametrize("at_least", [1, 2])
def test_the_digest_covers_what_decides(tmp_path, at_least):
    members = [judge(tmp_path, "cats", "cat"), judge(tmp_path, "trees", "tree")]
    vote = {"vote": members, "id": "agreed", "at_least": at_least}
    stages = recipe_of(configured(tmp_path / "a", "caption", vote), "coconut")
    other = recipe_of(configured(tmp_path / "b", "caption", vote | {"at_least": 3 - at_least}), "coconut")
    assert [a.digest() == b.digest() for a, b in zip(stages, other, strict=True)] == [True, True, True, False]
    assert sum(isinstance(stage, ModelStage) for stage in stages) == 3
