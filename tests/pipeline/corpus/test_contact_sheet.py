import pytest
from PIL import Image

from paracaption.pipeline.corpus import contact_sheet
from paracaption.pipeline.corpus.contact_sheet import draw_contact_sheet, draw_corpus_image
from paracaption.pipeline.corpus.reader import open_corpus
from paracaption.pipeline.io import draw
from paracaption.schemas.errors import ConfigError
from tests import committed


def test_an_image_of_the_corpus_is_drawn_by_its_key(tmp_path):
    out = committed.merged(tmp_path / "out")
    draw_corpus_image(out, "000000000003", tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 900 and picture.format == "PNG"
    draw_corpus_image(out, "sa1b/sa_1", tmp_path / "picture.jpg")


def test_the_error_says_why_an_image_cannot_be_drawn(tmp_path):
    out = committed.merged(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"000000000002\.jpg: cut short"):
        draw_corpus_image(out, "000000000002", tmp_path / "picture.png")
    with pytest.raises(ConfigError, match="no image nothing"):
        draw_corpus_image(out, "nothing", tmp_path / "picture.png")
    with pytest.raises(ConfigError, match="ends in"):
        draw_corpus_image(out, "000000000003", tmp_path / "picture.exe")
    with pytest.raises(ConfigError, match="no such folder"):
        draw_corpus_image(out, "000000000003", tmp_path / "nowhere" / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_contact_sheet_shows_both_subsets_and_is_the_same_each_time(tmp_path):
    out = committed.merged(tmp_path / "out")
    chosen = contact_sheet._choose_images(open_corpus(out), 4)
    assert [rows[0]["subset"] for rows in chosen] == ["coconut", "coconut", "sa1b", "sa1b"]
    for name in ("a.png", "b.png"):
        draw_contact_sheet(out, tmp_path / name, num_images=4)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_contact_sheet_of_nothing_is_a_clear_error(tmp_path):
    out = committed.unlogged(committed.merged(tmp_path / "out"))
    for path in out.glob("*/manifests/*.json"):
        path.unlink()
    with pytest.raises(ConfigError, match="no kept region"):
        draw_contact_sheet(out, tmp_path / "sheet.png")


def test_regions_of_a_picture_have_the_numbers_and_colors_of_the_ledger(tmp_path):
    corpus = open_corpus(committed.merged(tmp_path / "out"))
    seen = set()
    for table in corpus.ledgers():
        rows = [row for row in table.to_pylist() if row["kept"]]
        for key in {row["key"] for row in rows}:
            kept = [row for row in rows if row["key"] == key]
            _, overlays = contact_sheet._read_overlays(corpus, kept)
            assert [each.number for each in overlays] == [row["region"] for row in kept]
            assert [each.color for each in overlays] == [draw.color_of_region(r["region"]) for r in kept]
            seen.add([row["region"] for row in kept] == list(range(len(kept))))
    assert False in seen, "an image with a drop before a kept region"
