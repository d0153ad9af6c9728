"""The released code's own training data, in every form they come in, and what is refused."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from paracaption.flows.preflight import check_training
from paracaption.model_training.data.conversation_records import list_files
from paracaption.schemas.errors import BadSample, ConfigError
from paracaption.schemas.training import TrainConfig
from tests.model_training.released_data import (
    ASKED,
    drawn_masks,
    only,
    opened,
    photo,
    rles,
    said_in,
    texts,
    turns,
    write_json,
    write_parquet,
    write_photos,
)

# Files.


def test_a_folder_stands_for_its_parquet_files_and_a_glob_for_those_it_names(tmp_path: Path):
    data = tmp_path / "data"
    for name in ("b/two.parquet", "one.parquet", ".cache/download.parquet"):
        row = {"id": name, "image": photo(), "conversations": turns(*ASKED)}
        write_parquet(data / name, [row])
    (data / "README.md").write_text("a dataset")
    assert list_files(str(data)) == [str(data / "b/two.parquet"), str(data / "one.parquet")]
    assert set(texts(opened(data))) == {"one.parquet", "b/two.parquet"}
    assert list_files(f"{data}/*.parquet") == [str(data / "one.parquet")]
    assert list_files(f"{data}/[bo]*") == list_files(str(data))  # a folder and a file
    keys = [key for batch in opened(f"{data}/*.parquet") for key in batch.keys]
    assert keys == [f"{data}/one.parquet: one.parquet"]
    write_json(tmp_path / "x.json", [{"conversations": turns(("human", "hi"), ("gpt", "ho"))}])
    write_json(tmp_path / "y.json", [{"conversations": turns(("human", "hi"), ("gpt", "ho"))}])
    keys = [key for batch in opened(f"{tmp_path}/*.json") for key in batch.keys]
    assert sorted(keys) == [f"{tmp_path}/x.json: 0", f"{tmp_path}/y.json: 0"]  # each counts from its start


def test_a_file_more_in_a_folder_is_other_data_and_a_file_that_changed_is_read_again(tmp_path: Path):
    row = {"image": photo(), "conversations": turns(*ASKED)}
    write_parquet(tmp_path / "data/0.parquet", [row])
    cache = {"cache": str(tmp_path / "cache")}
    first = opened(tmp_path / "data", **cache)
    write_parquet(tmp_path / "data/1.parquet", [row, row])
    second = opened(tmp_path / "data", **cache)
    assert [each.num_items(0) for each in (first, second)] == [1, 3]
    assert first.fingerprint != second.fingerprint
    write_parquet(tmp_path / "data/1.parquet", [row, row, row])
    assert opened(tmp_path / "data", **cache).num_items(0) == 4


def test_folders_and_files_of_other_forms_are_errors_that_say_what_to_name(tmp_path: Path):
    saved = tmp_path / "saved"
    saved.mkdir()
    with pytest.raises(ConfigError, match=r"saved: no \.parquet file in this folder"):
        list_files(str(saved))
    (saved / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"saved: a folder of `save_to_disk`.*to_parquet"):
        list_files(str(saved))
    with pytest.raises(ConfigError, match=r"absent-\*\.parquet: no such file"):
        list_files(f"{tmp_path}/absent-*.parquet")
    (tmp_path / "said.csv").write_text("a")
    with pytest.raises(ConfigError, match=r"said\.csv: .*\.json, \.jsonl or \.parquet"):
        list_files(f"{tmp_path}/said.*")


def test_what_is_checked_before_a_run_takes_folders_and_globs(tmp_path: Path):
    write_parquet(tmp_path / "data/0.parquet", [{"conversations": turns(("human", "hi"), ("gpt", "ho"))}])
    paths = [tmp_path / "data", f"{tmp_path}/data/*.parquet", tmp_path / "absent"]
    config = TrainConfig.model_validate(
        {
            "out": str(tmp_path / "run"),
            "model": {"tokenizer": "toy"},
            "steps": 1,
            "conversations": [{"path": str(path)} for path in paths],
        }
    )
    found = [each for each in check_training(config) if each.subject.startswith("conversations")]
    assert [each.state for each in found] == ["ok", "ok", "FAIL"]
    assert "absent: no such file" in found[2].found


# Forms of records.


def forms_of_images(data: bytes) -> dict[str, dict[str, Any]]:
    text = base64.b64encode(data).decode()
    return {
        "path": {"image": "a.png"},
        "list of a path": {"images": ["a.png"]},
        "image as a list": {"image": ["a.png"]},
        "mapping of a path": {"images": [{"bytes": None, "path": "a.png"}]},
        "base64": {"image": text},
        "released base64": {"image": f"data:base64,{text}"},
        "data URL": {"images": [f"data:image/png;base64,{text}"]},
        "base64 in a mapping": {"image": {"bytes": text}},
        "base64 in lines": {"image": {"bytes": f"{text[:76]}\n{text[76:]}"}},
        "images null": {"images": None, "image": "a.png"},
    }


@pytest.mark.parametrize("form", forms_of_images(b""))
def test_an_image_comes_in_every_form_of_json(tmp_path: Path, form: str):
    images = write_photos(tmp_path / "images", "a.png")
    image = forms_of_images(photo(40))[form]
    record = {"id": "x", "conversations": turns(*ASKED)} | image
    (text,) = texts(opened(write_json(tmp_path / "said.json", [record]), images)).values()
    assert said_in(text) == ["<img>###</img>\nwhat?", "a cat"]  # 40x70: two tiles and the thumbnail


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("form", ["bytes", "mapping", "list of bytes", "list of mappings"])
def test_an_image_comes_in_every_form_of_parquet(tmp_path: Path, column: str, form: str):
    data = photo()
    image: Any = data if "bytes" in form else {"bytes": data, "path": "far/away.png"}
    row = {"id": "x", column: [image] if "list" in form else image, "conversations": turns(*ASKED)}
    assert only(write_parquet(tmp_path / "said.parquet", [row])) == ["<img>###</img>\nwhat?", "a cat"]


def test_turns_are_from_and_value_or_role_and_content_and_contents_may_be_lists_of_parts(tmp_path: Path):
    images = write_photos(tmp_path / "images", "a.png")
    image = {"type": "image", "image": "a.png"}
    parts = [image, {"type": "text", "text": "\nwhat?"}]
    answer = [{"type": "text", "text": "a cat"}]
    url = {"type": "image_url", "image_url": {"url": "a.png"}}
    records = [
        {"conversations": turns(*ASKED), "image": "a.png"},
        {"conversations": turns(("user", "<image>\nwhat?"), ("assistant", "a cat")), "image": "a.png"},
        {
            "messages": turns(("user", "<image>\nwhat?"), ("assistant", "a cat"), form="role"),
            "image": "a.png",
        },
        {"conversations": turns(("user", parts), ("assistant", answer), form="role")},
        {"messages": turns(("user", [{"type": "image"}, "\nwhat?"]), ("assistant", answer), form="role")}
        | {"images": ["a.png"]},
        {"messages": turns(("user", [url, "\nwhat?"]), ("assistant", "a cat"), form="role")},
        {"conversations": json.dumps(turns(*ASKED)), "image": "a.png"},
    ]
    found = texts(opened(write_json(tmp_path / "said.json", records), images))
    assert len(found) == len(records)
    assert {tuple(said_in(text)) for text in found.values()} == {("<img>###</img>\nwhat?", "a cat")}
    columns = dict.fromkeys(["conversations", "messages", "image"])
    rows = [columns | record for record in records[:3]]  # null where a record has none
    found = texts(opened(write_parquet(tmp_path / "said.parquet", rows), images))
    assert [said_in(text) for text in found.values()] == [["<img>###</img>\nwhat?", "a cat"]] * 3


def test_several_images_stand_where_the_questions_say(tmp_path: Path):
    images = write_photos(tmp_path / "images", "a.png", "b.png", "c.png")
    Image.new("RGB", (32, 32)).save(images / "b.png")
    asked = [("human", "<image> or <image>?"), ("gpt", "b"), ("human", "and <image>"), ("gpt", "c")]
    record = {"images": ["a.png", "b.png", "c.png"], "conversations": turns(*asked)}
    expected = ["<img>###</img> or <img>#</img>?", "b", "and <img>###</img>", "c"]
    assert only(write_json(tmp_path / "said.json", [record]), images) == expected
    row = {**record, "images": [(images / name).read_bytes() for name in record["images"]]}
    assert only(write_parquet(tmp_path / "said.parquet", [row])) == expected
    record["conversations"] = turns(("human", "which?"), ("gpt", "b"))  # no place: before the first question
    expected = ["<img>###</img><img>#</img><img>###</img>which?", "b"]
    assert only(write_json(tmp_path / "said.json", [record]), images) == expected


def test_each_of_several_images_is_the_photo_of_its_place(tmp_path: Path):
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    for number, color in enumerate(colors):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{number}.png")
    row = {
        "images": [{"bytes": (tmp_path / "0.png").read_bytes()}, {"path": "1.png"}, {"path": "2.png"}],
        "conversations": turns(("human", "<image><image>"), ("gpt", "a"), ("human", "<image>"), ("gpt", "b")),
    }
    source = write_parquet(tmp_path / "said.parquet", [row])
    (batch,) = opened(source, tmp_path)
    assert [tuple(view[:, 0, 0].tolist()) for view in batch.images.views_N3SS] == colors
    assert batch.images.grids_I2.tolist() == [[1, 1]] * 3


def test_a_system_turn_follows_every_question(tmp_path: Path):
    said = [("system", "Be brief."), ("human", "hi"), ("gpt", "ho"), ("human", "well?"), ("gpt", "so")]
    expected = ["hi\nBe brief.", "ho", "well?\nBe brief.", "so"]
    path = tmp_path / "said.json"
    assert only(write_json(path, [{"conversations": turns(*said)}])) == expected
    roles = {"human": "user", "gpt": "assistant"}
    renamed = turns(*[(roles.get(who, who), what) for who, what in said], form="role")
    assert only(write_json(path, [{"messages": renamed}])) == expected
    said[0] = ("system", " ")
    assert only(write_json(path, [{"conversations": turns(*said)}])) == ["hi", "ho", "well?", "so"]


def test_a_last_question_without_an_answer_is_left_out(tmp_path: Path):
    said = [("human", "hi"), ("gpt", "ho"), ("human", "well?")]
    assert only(write_json(tmp_path / "said.json", [{"conversations": turns(*said)}])) == ["hi", "ho"]


def test_an_image_that_is_an_empty_mapping_or_list_is_none(tmp_path: Path):
    hello = turns(("human", "hi"), ("gpt", "ho"))
    for image in ({"bytes": None, "path": None}, [], "", [None]):
        assert only(write_json(tmp_path / "said.json", [{"image": image, "conversations": hello}])) == [
            "hi",
            "ho",
        ]


def test_a_leading_folder_of_the_photo_folders_name_is_dropped_unless_there_is_one(tmp_path: Path):
    images = write_photos(tmp_path / "coco", "train/a.png", "b.png", "coco/c.png")
    for name in ("coco/train/a.png", "coco/b.png", "coco/c.png", f"{images}/b.png"):
        record = {"image": name, "conversations": turns(*ASKED)}
        path = write_json(tmp_path / "said.json", [record])
        assert only(path, images) == only(path, f"{images}/") == ["<img>###</img>\nwhat?", "a cat"]
    path = write_json(tmp_path / "said.json", [{"image": "/etc/b.png", "conversations": turns(*ASKED)}])
    with pytest.raises(BadSample, match=r"unsafe_name: .*/etc/b\.png leads out of the folder `images`"):
        list(opened(path, images))


# Errors: one line that names file and record.


def mistakes() -> dict[str, tuple[dict[str, Any], str]]:
    """A record that cannot be used, and what its error says."""
    hello = turns(("human", "hi"), ("gpt", "ho"))
    (mask,) = rles(drawn_masks(1, 40, 70))
    empty = {"size": [70, 40], "counts": [2800]}
    return {
        "video": (
            {"video": "a.mp4", "conversations": hello},
            r"conversation_unusable: .*`video`.*leave it out",
        ),
        "crop": ({"image": "a.png", "mask_rle": mask, "conversations": hello}, r"`mask_rle` asks for a crop"),
        "a place too many": (
            {"image": "a.png", "conversations": turns(("human", "<image><image>"), ("gpt", "ho"))},
            r"1 images?, but <image> stands 2 times",
        ),
        "no image": ({"conversations": turns(*ASKED)}, r"conversation_without_image: .*names no image"),
        "order": ({"conversations": hello[::-1]}, r"human and gpt have to take turns"),
        "two systems": (
            {"conversations": [*turns(("system", "a")), *turns(("system", "b")), *hello]},
            r"human and gpt have to take turns",
        ),
        "audio": (
            {"messages": turns(("user", [{"type": "audio"}]), ("assistant", "ho"), form="role")},
            r"conversation_unusable: .*a part of audio",
        ),
        "base64": (
            {"image": "data:image/png;base64,???", "conversations": hello},
            r"photo_unreadable: .*not base64",
        ),
        "empty photo": (
            {"image": "data:image/png;base64,", "conversations": hello},
            r"photo_unreadable: .*nothing in it",
        ),
        "no photo": (
            {"image": "data:image/png;base64,aGVsbG8=", "conversations": hello},
            r"photo_unreadable",
        ),
        "missing": ({"images": ["a.png", "z.png"], "conversations": hello}, r"photo_missing: .*z\.png"),
        "web": (
            {"image": "https://example.org/a.png", "conversations": hello},
            r"unsafe_name: .*q7: https://example\.org/a\.png",
        ),
        "captions": (
            {"image": "a.png", "mask_rles": [mask], "captions": []},
            r"regions_unusable: .*1 masks and 0 captions",
        ),
        "mask": (
            {"image": "a.png", "mask_rles": [empty], "captions": ["a"]},
            r"mask_empty: .*region 0",
        ),
        "polygon": (
            {"image": "a.png", "annotations": [{"caption": "a", "segmentation": [[1, 1, 9, 1, 9, 9]]}]},
            r"regions_unusable: .*region 0: no RLE",
        ),
    }


@pytest.mark.parametrize("mistake", mistakes())
def test_a_record_that_cannot_be_used_is_an_error_of_one_line_that_names_file_and_record(
    tmp_path: Path, mistake: str
):
    images = write_photos(tmp_path / "images", "a.png")
    record, message = mistakes()[mistake]
    path = write_json(tmp_path / "said.json", [record | {"id": "q7"}])
    with pytest.raises(BadSample, match=message) as raised:
        list(opened(path, images))
    text = str(raised.value)
    assert f"{path}: q7" in text and "\n" not in text


def unknown_forms() -> dict[str, tuple[Any, str]]:
    return {
        "a list": ([1], r"a record is a mapping"),
        "no turns": ({"id": 7, "text": "hi"}, r"\(id 7\): neither a list `conversations` nor `mask_rles`"),
        "text for turns": ({"conversations": "hi"}, r"a text that is not JSON"),
        "a turn of text": ({"conversations": ["hi"]}, r"a turn is a mapping of `from` and `value`"),
        "a turn without a speaker": ({"conversations": [{"value": "hi"}]}, r"a turn is a mapping"),
        "a turn without words": ({"messages": [{"role": "user", "content": None}]}, r"a turn is a mapping"),
        "a number for words": ({"conversations": turns(("human", 3))}, r"Expected `str`, got `int`"),
        "a part of text": (
            {"messages": turns(("user", [{"type": "text"}]), form="role")},
            r"a part of a turn is a mapping",
        ),
        "an unknown part": (
            {"messages": turns(("user", [{"type": "smell"}]), form="role")},
            r"a part of a turn",
        ),
        "a number for an image": ({"image": 3, "conversations": turns(*ASKED)}, r"an image is a path, bytes"),
        "annotations of text": ({"image": "a.png", "annotations": ["a"]}, r"an annotation is a mapping"),
    }


@pytest.mark.parametrize("form", unknown_forms())
def test_a_record_of_no_known_form_is_an_error_that_names_file_and_record(tmp_path: Path, form: str):
    record, message = unknown_forms()[form]
    good = {"conversations": turns(("human", "hi"), ("gpt", "ho"))}
    for name, text in (
        ("said.json", json.dumps([good, record])),
        ("said.jsonl", f"{json.dumps(good)}\n{json.dumps(record)}"),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"{name}: record 2.*{message}") as raised:
            opened(path)
        assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_errors_that_say_how_far_it_went(tmp_path: Path):
    broken = {
        "cut.json": (b'[{"conversations": []}', r"Input data was truncated; repair the file"),
        "object.json": (b'{"data": []}', r"record 1: neither a list `conversations`"),
        "lines.json": (b'{\n  "data": []\n}', r".*but it is a single mapping"),
        "text.json": (b'"said"', r".*has to be a list of records"),
        "half.json": (b'[{"conversations": "\\ud83d"}]', r"a text has half of a character"),
        "cut.jsonl": (b'{"conversations": [{"from": "human", "value": "a"}]}\n{"conv', r"after record 1: "),
        "cut.parquet": (b"PAR1 and no more", r"Parquet magic bytes not found"),
        "pointer.parquet": (
            b"version https://git-lfs.github.com/spec/v1",
            r"no Parquet file: a Git LFS point",
        ),
        "pointer.json": (b"version https://git-lfs.github.com/spec/v1", r"no JSON: a Git LFS pointer; run"),
        "page.jsonl": (b"<!doctype html><html></html>", r"no JSON: a web page"),
        "none.json": (b"", r"no JSON: the file is empty"),
        "deep.json": (b'[{"a": ' + b"[" * 100_000, r"maximum recursion depth"),
        "wide.jsonl": ("{}\n{}".encode("utf-16"), r"no JSON: UTF-16; save it as UTF-8"),
        "empty.json": (b"[]", r"no conversation in it"),
    }
    for name, (data, message) in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=rf"{name}: {message}") as raised:
            opened(tmp_path / name)
        assert "\n" not in str(raised.value)
    path = write_parquet(tmp_path / "other.parquet", [{"question": "hi", "answer": "ho"}])
    with pytest.raises(
        ConfigError,
        match=r"other\.parquet: the table has neither a column `conversations` .*question, answer",
    ):
        opened(path)


@pytest.mark.parametrize("name", ["said.json", "said.jsonl", "lines.json"])
def test_json_as_others_write_it_is_read(tmp_path: Path, name: str):
    """With a byte order mark, NaN for what is absent, and a record a line in a file named .json."""
    records = [
        {"id": number, "score": float("nan"), "image": float("nan"), "conversations": turns(*said)}
        for number, said in enumerate(
            [(("human", "hi"), ("gpt", "ho")), (("human", "hü 🐈"), ("gpt", "yes"))]
        )
    ]
    text = json.dumps(records) if name == "said.json" else "\r\n".join(map(json.dumps, records)) + "\r\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = texts(opened(tmp_path / name))
    assert {item: said_in(text) for item, text in found.items()} == {
        "0": ["hi", "ho"],
        "1": ["hü 🐈", "yes"],
    }


def test_a_mistake_in_a_folder_of_files_names_its_file_and_its_record_there(tmp_path: Path):
    row = {"image": photo(), "conversations": turns(*ASKED)}
    write_parquet(tmp_path / "data/0.parquet", [row, row])
    write_parquet(tmp_path / "data/1.parquet", [row, row | {"image": b"no photo"}, row])
    with pytest.raises(BadSample, match=r"data/1\.parquet: 1: "):
        list(opened(tmp_path / "data"))
    coded = rles(drawn_masks(9, 40, 70))
    said = [f"thing {number}" for number in range(9)]
    images = write_photos(tmp_path / "images", "a.png")
    regions = {"image": "a.png", "mask_rles": coded, "captions": said}
    wrong = {"image": "z.png", "conversations": turns(*ASKED)}
    path = write_json(tmp_path / "mixed.json", [regions, wrong])
    with pytest.raises(BadSample, match=r"mixed\.json: 1: .*z\.png"):  # the second, though the fourth item
        list(opened(path, images))


# Old runs.


def test_a_file_of_an_old_run_has_the_fingerprint_that_its_checkpoints_hold(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    records = []
    for number in range(12):
        Image.new("RGB", (20 + 9 * number, 60)).save(images / f"{number}.png")
        said = [*ASKED, ("user", "where?"), ("assistant", f"left of {number}")]
        record = {"image": f"{number}.png", "conversations": turns(*said[: 2 + 2 * (number % 2)])}
        record |= {"id": f"q{number}"} if number % 3 else {}
        records.append(record | {"annotations": [], "split": "a"})
    records[5]["conversations"].reverse()
    found = opened(write_json(tmp_path / "said.json", records), images)
    assert (
        found.mixture.sources[0].fingerprint
        == "a693f126ae96f42a7652b9bc3679fb297db74df74aa71f0a7c491b4a3112fe82"
    )
