"""The decode step by step: what a slot is shown as, the frames of the GIF, and the page."""

import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.model_training.decoding import caption_photo, trace, trace_gif, trace_page
from paracaption.model_training.decoding.snapshots import Slot, Snapshot
from paracaption.pipeline.io import draw
from paracaption.schemas.errors import ConfigError

EOT = 1
EVIL = " </script><script>alert(1)</script>&<b>"
MASKED = Slot(None, 0, math.nan)


def word(text, token=5):
    return Slot(text, token, 0.75)


END = Slot("<|eot|>", EOT, 0.9)


def a_trace(*steps, size=(60, 90), labels=("cup", "")):
    """Each step is the slots of every region."""
    masks = []
    for number in range(len(steps[0])):
        mask = np.zeros(size, bool)
        mask[10:50, 10 + 30 * number : 30 + 30 * number] = True
        masks.append(rle.from_mask(mask).rle)
    photo = np.full((*size, 3), (200, 40, 40), np.uint8)
    marks = [draw.Overlay(mask, "", label) for mask, label in zip(masks, labels, strict=False)]
    snapshots = [Snapshot(n, list(slots), [""] * len(slots)) for n, slots in enumerate(steps)]
    return trace.Trace(photo, marks, snapshots, EOT, "photo <1>.jpg")


@pytest.fixture
def short():
    return a_trace(
        [[MASKED] * 4, [MASKED] * 4],
        [[word(" a"), MASKED, MASKED, MASKED], [MASKED, word(EVIL, 8), MASKED, MASKED]],
        [[word(" a"), word(" cat"), MASKED, MASKED], [word(" the"), word(EVIL, 8), END, MASKED]],
        [[word(" a"), word(" dog", 6), word("s"), END], [word(" the"), word(EVIL, 8), END, word(" x")]],
    )


def states(traced, step, region):
    return [piece.state for piece in traced.pieces(step)[region]]


def test_a_token_is_fresh_in_the_step_that_writes_it_and_only_there(short):
    assert states(short, 0, 0) == ["open"] * 4
    assert states(short, 1, 0) == ["fresh", "open", "open", "open"]
    assert states(short, 2, 0) == ["kept", "fresh", "open", "open"]
    assert states(short, 3, 0) == ["kept", "fresh", "fresh", "end"], "another token in a slot is fresh, too"


def test_what_stands_behind_the_first_end_is_no_part_of_the_caption(short):
    assert states(short, 3, 1) == ["kept", "kept", "end", "after"]


def test_a_slot_that_is_masked_again_is_open_again():
    traced = a_trace([[word("a")]], [[MASKED]], [[word("a")]])
    assert [states(traced, step, 0) for step in range(3)] == [["kept"], ["open"], ["fresh"]]


def test_the_line_counts_steps_and_tokens(short):
    assert [short.line(step) for step in (0, 2)] == [
        "step 0 of 3, 0 of 8 tokens",
        "step 2 of 3, 5 of 8 tokens",
    ]


def test_the_gif_has_a_frame_for_every_snapshot_and_rests_on_the_last(short):
    opened = Image.open(io.BytesIO(trace_gif.render_gif(short)))
    durations = []
    for frame in range(opened.n_frames):
        opened.seek(frame)
        durations.append(opened.info["duration"])
    assert opened.n_frames == len(short.snapshots) == 4
    assert durations[-1] > 5 * durations[0] and len(set(durations[:-1])) == 1 and opened.info["loop"] == 0


def share_of(frame, color, left=0):
    return (np.asarray(frame)[:, left:] == color).all(axis=2).mean()


def test_frames_show_grey_boxes_that_become_words_and_numbers_in_the_palettes_colours(short):
    first, *_, last = list(trace_gif.render_frames(short))
    assert first.size == last.size
    assert share_of(first, (214, 214, 214)) > 3 * share_of(last, (214, 214, 214))
    assert share_of(first, (255, 224, 130)) == 0 < share_of(last, (255, 224, 130))
    for number in range(2):
        assert share_of(last, draw.PALETTE[number], left=640) > 0


def test_the_gifs_paper_is_white_and_its_photo_does_not_flicker(short):
    opened = Image.open(io.BytesIO(trace_gif.render_gif(short)))
    shown = []
    for frame in range(opened.n_frames):
        opened.seek(frame)
        shown.append(np.asarray(opened.convert("RGB")))
    assert (shown[0][-1, -1] == 255).all()
    assert all(np.array_equal(frame[:300, :640], shown[0][:300, :640]) for frame in shown)


def test_captions_stand_beside_a_photo_and_below_a_wide_one_or_where_there_are_many():
    beside = next(trace_gif.render_frames(a_trace([[MASKED] * 4])))
    below = next(trace_gif.render_frames(a_trace([[MASKED] * 4], size=(60, 200))))
    assert beside.width > 640 and beside.height == round(640 * 60 / 90)
    assert below.width == 640 and below.height > round(640 * 60 / 200)
    many = a_trace([[MASKED] * 99] * 12, size=(60, 400), labels=[""] * 12)
    assert next(trace_gif.render_frames(many)).width == 1040


def test_words_stay_together_and_lines_keep_to_their_room():
    face = draw.load_font(17)
    texts = " the quick bro wn fox jumps over".split(" ")
    pieces = [trace.Piece(f" {text}", "kept") for text in texts if text]
    pieces[3] = pieces[3]._replace(text="wn")
    for room in (60, 100, 200):
        flowed = list(trace_gif._flow(pieces, face, room))
        assert all(x + width <= room for _, x, _, width in flowed)
        assert flowed[2][2] == flowed[3][2], "bro and wn are one word"
        assert [piece.text for piece, *_ in flowed] == [piece.text.strip() for piece in pieces]


class Page(HTMLParser):
    """Tags, and the text of each caption and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], {"p": [], "script": [], "h1": [], "h2": []}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside[-1]][-1] += data


def test_a_caption_with_a_script_in_it_is_text_in_the_page(short):
    page = Page(trace_page.render_page(short))
    assert page.texts["p"] == ["a dogs\N{MIDDLE DOT}", f"the{EVIL}\N{MIDDLE DOT} x"]
    assert page.texts["h1"] == ["photo <1>.jpg"] and page.texts["h2"] == ["cup"]
    assert len(page.texts["script"]) == 2 and not any("alert(1)<" in text for text in page.texts["script"])
    assert EVIL in json.dumps(json.loads(page.texts["script"][0]))


def test_the_page_loads_nothing_and_may_not(short):
    text = trace_page.render_page(short)
    page = Page(text)
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert [source[:23] for source in sources] == ["data:image/jpeg;base64,"]
    assert any("default-src 'none'" in attrs.get("content", "") for _, attrs in page.tags)


def test_the_pages_slider_has_a_step_for_every_snapshot_and_every_control_has_a_name(short):
    page = Page(trace_page.render_page(short))
    [slider] = [attrs for tag, attrs in page.tags if tag == "input"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "3", "3")
    assert ("label", {"for": slider["id"]}) in page.tags
    [picture] = [attrs for tag, attrs in page.tags if tag == "img"]
    assert "2 regions" in picture["alt"]


def test_the_numbers_of_the_page_have_the_palettes_colours(short):
    text = trace_page.render_page(short)
    assert f"background:rgb{draw.PALETTE[0]};color:#000" in text
    assert f"background:rgb{draw.PALETTE[1]};color:#fff" in text


def test_what_the_page_plays_is_what_the_steps_were(short):
    played = trace_page.playback(short)
    for step in range(len(short.snapshots)):
        for region, pieces in enumerate(short.pieces(step)):
            shown = [[each for each in slot if each[0] <= step][-1] for slot in played["regions"][region]]
            assert [tuple(each[1:3]) for each in shown] == [piece[:2] for piece in pieces]
    assert [line for line, _ in played["steps"]] == [short.line(step) for step in range(4)]


@pytest.mark.parametrize("name", ["a.png", "a", "no/such/folder.gif"])
def test_a_trace_goes_into_a_gif_or_a_page_in_a_folder_that_exists(name, short, tmp_path):
    with pytest.raises(ConfigError, match=str((tmp_path / name).parent)):
        caption_photo.write_trace(short, tmp_path / name)
    for good, start in (("a.gif", b"GIF89a"), ("a.HTML", b"<!doctype html>")):
        caption_photo.write_trace(short, tmp_path / good)
        assert (tmp_path / good).read_bytes().startswith(start)
