import pytest
from rich.console import Console

from paracaption.pipeline.corpus import inspect, merge, reader, utilization
from paracaption.pipeline.corpus.inspect import ShownRegion
from paracaption.schemas.errors import ConfigError
from tests import committed


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return committed.merged(tmp_path_factory.mktemp("inspect") / "out")


def text_of(renderable, width: int = 120) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text()


def test_the_funnel_shows_each_step_with_its_share_and_reasons(out):
    shown = text_of(inspect.inspect(out))
    assert "COCONut  3 units, 9 images (7 with captions), 36 regions declared, 20 kept" in shown
    line = next(line for line in shown.splitlines() if line.startswith("verify category"))
    assert line.split()[2:4] == ["23", "64%"] and line.rstrip().endswith("5  category wrong 5")
    assert "images dropped as a whole: photo unreadable 1" in shown


def test_samples_are_shown_of_what_was_kept_and_of_each_reason(out):
    kept, dropped = inspect.sample_regions(reader.open_corpus(out), "coconut", 5, 2)
    assert len(kept) == 5 and all(sample.caption.startswith("A plain") for sample in kept)
    assert set(dropped) == {
        "source/photo_unreadable",
        "caption/caption_none",
        "verify_category/category_wrong",
        "clean_text/text_too_short",
    }
    assert all(len(group) == 2 for group in dropped.values())
    assert dropped["clean_text/text_too_short"][0].caption == "A thing."


def test_samples_are_the_same_each_time_and_fewer_are_a_part_of_more(out):
    few, many = (inspect.sample_regions(reader.open_corpus(out), "coconut", n, 1)[0] for n in (2, 6))
    assert few == many[:2]
    assert text_of(inspect.inspect(out)) == text_of(inspect.inspect(out))


def test_it_needs_no_merge_and_counts_committed_units_alone(tmp_path):
    committed.write(tmp_path / "out")
    committed.uncommitted(tmp_path / "out", "coconut-000001")
    assert "COCONut  2 units, 5 images" in text_of(inspect.inspect(tmp_path / "out"))


def test_captions_are_text_and_neither_markup_nor_terminal_codes():
    hostile = ShownRegion("key", 0, "[bold]cat[/bold]", "[link=x]\x1b[2Ja\r\nb" + "c" * 900, "[/]")
    shown = text_of(inspect._samples("kept", [hostile]), width=2000)
    assert "[bold]cat[/bold]" in shown and "[link=x]" in shown and "\x1b[2J" not in shown
    assert len(shown) < 500


def test_it_fits_a_narrow_terminal(out):
    assert max(len(line) for line in text_of(inspect.inspect(out), width=80).splitlines()) <= 80


def test_a_folder_that_is_no_corpus_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no corpus here"):
        inspect.inspect(tmp_path)


def test_plots_are_drawn_also_of_a_corpus_in_which_nothing_was_kept(tmp_path):
    def drop_all(images, config):
        for image in images:
            image.regions.clear()

    committed.write(tmp_path / "out", decide=drop_all)
    merge.merge(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    assert names == {"funnel.png", "caption_words.png", "regions_per_image.png", "mask_area.png"}
    summary = reader.read_summary(tmp_path / "out")
    assert (summary.regions, summary.images) == (0, 12)


def test_the_table_of_stages_without_gpus_is_whole_in_80_columns():
    stage = utilization.StageUtilization(actors=1, asked=22_694, busy_s=1.0, alive_s=2.0)
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(inspect.utilization_table({"agree_with_segmenter": stage}))
    assert "regions/s each" in captured.get() and "…" not in captured.get()
