"""The cases of `../shared/cases/pages` that mislead, on a corpus of our own.

Each test begins with the name of its case. Zoom, phones, weight and links are cases of another kind.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from paracaption.pipeline.corpus import contact_sheet
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.explorer.reviews import Reviews
from paracaption.pipeline.io import draw, figure
from tests.pipeline.explorer import corpus


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return corpus.write_merged(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def client(out) -> TestClient:
    """A browser of its own."""
    return TestClient(make_app(Explorer(out)), base_url="http://localhost")


@pytest.fixture(autouse=True)
def _no_reviews(out):
    """Each test begins without the reviews of the one before."""
    for path in (out / "review").glob("*"):
        path.unlink()


def listed(page: str) -> list[list[str]]:
    """The entries below each picture, card by card."""
    cards = page.split('<li class="card"')[1:]
    return [
        card.partition('<ol class="captions')[2].partition("</ol>")[0].split("<li>")[1:] for card in cards
    ]


def rows_of(out: Path) -> dict[tuple[str, int], dict]:
    rows = [row for subset in ("coconut", "sa1b") for row in corpus.regions(out, subset)]
    return {(row["key"], row["region"]): row for row in rows if row["region"] is not None}


@pytest.mark.soak
def test_colours_mean_two_things_no_region_has_the_color_of_an_outcome(client, out):
    outcomes = {figure.KEPT.lower(), figure.DROPPED.lower(), figure.MOVED.lower()}
    assert not outcomes & {"#{:02x}{:02x}{:02x}".format(*color) for color in draw.PALETTE}
    painted = set()
    for key in {key for key, _ in rows_of(out) if key.startswith("sa_")}:
        page = client.get(f"/image/sa1b/{key}").text
        picture = page.partition('<div class="photo">')[2].partition("</div>")[0]
        painted |= {color.lower() for color in re.findall(r'(?:fill|stroke)="(#[0-9a-fA-F]{6})"', picture)}
    assert len(painted) > 5 and not outcomes & painted


def test_colours_mean_two_things_outcomes_differ_by_more_than_a_color(client, out):
    rows = rows_of(out)
    key = next(key for key, region in rows if not rows[key, region]["kept"] and key.startswith("sa_"))
    page = client.get(f"/image/sa1b/{key}").text
    dropped = [
        row for (each, _), row in rows.items() if each == key and not row["kept"] and row["rle_counts"]
    ]
    assert dropped and page.count('class="mask dropped"') == len(dropped)
    assert page.count('class="badge dropped"') == sum(
        not row["kept"] for (each, _), row in rows.items() if each == key
    )


@pytest.mark.parametrize("sort", ["iou", "-iou"])
def test_browse_sort_hides_ranking_region_the_first_on_a_card_has_the_score_of_its_rank(client, sort):
    page = client.get(f"/browse?subset=sa1b&iou.min=0.05&iou.max=0.95&sort={sort}").text
    ranks = re.findall(r"regions?, iou ([\d.]+)</span>", page)
    cards = listed(page)
    assert len(ranks) == len(cards) > 5
    for rank, entries in zip(ranks, cards, strict=True):
        scores = [re.findall(r'class="measure">iou ([\d.]+)<', entry) for entry in entries]
        assert all(len(each) == 1 for each in scores) and scores[0] == [rank]
        numbers = [float(each[0]) for each in scores]
        assert numbers == sorted(numbers, reverse=sort.startswith("-"))
    assert [float(rank) for rank in ranks] == sorted(map(float, ranks), reverse=sort.startswith("-"))


@pytest.mark.parametrize("sort", ["iou", "-iou"])
def test_browse_sort_hides_ranking_region_it_is_drawn_on_the_thumbnail(client, sort):
    page = client.get(f"/browse?subset=sa1b&iou.min=0.05&sort={sort}").text
    for card in page.split('<li class="card"')[1:]:
        drawn = re.search(r"\?r=([\d,]+)", html.unescape(card))
        first = re.search(r'aria-label="region (\d+)', card)
        assert drawn and first and drawn[1].split(",")[0] == first[1]


@pytest.mark.parametrize("outcome", ["kept", "dropped", ""])
def test_browse_outcome_hidden_each_region_says_kept_or_why_not_before_its_caption(client, outcome):
    page = client.get(f"/browse?outcome={outcome}").text
    entries = [entry for card in listed(page) for entry in card]
    assert len(entries) > 20
    for entry in entries:
        tag = re.search(r'<span class="tag (kept|dropped)">([^<]+)</span>', entry)
        assert tag and (not outcome or tag[1] == outcome)
        assert (tag[2] == "kept") is (tag[1] == "kept")
        caption = re.search(r"<span>", entry)
        assert caption and tag.end() <= caption.start()
    css = client.get("/static/explorer.css").text
    shown, cut = (
        css.index(".captions .tag { display: inline-block"),
        css.index(".captions span { display: -webkit"),
    )
    assert cut < shown, "a later rule of more weight lets tags out of the four lines of a caption"


def test_show_numbers_differ_a_picture_has_the_numbers_and_colors_of_the_ledger(out, tmp_path, monkeypatch):
    drawn = []

    def keep(photo, overlays, **_):
        drawn.append(overlays)
        return draw_image(photo, overlays)

    draw_image = draw.draw_image
    monkeypatch.setattr(draw, "draw_image", keep)
    rows, with_a_gap = rows_of(out), 0
    for key in ("sa_1", "sa_3", "000000000004"):
        contact_sheet.draw_corpus_image(out, key, tmp_path / "a.png")
        kept = [region for (each, region), row in rows.items() if each == key and row["kept"]]
        assert [each.number for each in drawn[-1]] == kept
        assert [each.color for each in drawn[-1]] == [draw.color_of_region(region) for region in kept]
        with_a_gap += kept != list(range(len(kept)))
    assert with_a_gap, "otherwise counting gives the same"


def test_report_reason_hidden_each_dropped_sample_says_its_whole_reason_before_its_caption(out, tmp_path):
    from paracaption.pipeline.explorer.report import write_report

    path = tmp_path / "report.html"
    write_report(out, path)
    page = path.read_text()
    reasons = {row["drop_reason"] for row in rows_of(out).values()} - {None}
    entries = [entry for card in listed(page) for entry in card]
    said = set()
    for entry in entries:
        tag = re.search(r'<b class="tag (kept|dropped)">([^<]+)</b>', entry)
        assert tag and tag.end() <= entry.index("<span>")
        said |= {reason for reason in reasons if reason.replace("_", " ") in tag[2]}
    assert said == reasons
    assert page.count('class="captions whole"') == len(entries)
    assert ".captions.whole span { display: block; overflow: visible; }" in page, "no caption is cut"


def shown(page: str) -> tuple[str, int]:
    """The region that the Review page asks about."""
    form = page.partition('class="reviews"')[2].partition("</form>")[0]
    key, region = (re.search(rf'name="{name}" value="([^"]*)"', form) for name in ("key", "region"))
    assert key and region
    return key[1], int(region[1])


def mark(client: TestClient, place: tuple[str, int], right: str, skip: int = 0) -> str:
    data = {"subset": "sa1b", "key": place[0], "region": place[1], "right": right, "back": "kept"}
    return client.post("/marks", data=data | {"skip": str(skip)}).text


def test_review_skip_returns_what_was_skipped_is_not_shown_again_and_is_counted(client):
    client.get("/review?subset=sa1b")
    skipped = [shown(client.get(f"/review?subset=sa1b&skip={number}").text) for number in range(2)]
    page = client.get("/review?subset=sa1b&skip=2").text
    seen = []
    for _ in range(6):
        assert "2 skipped" in page and f'name="skip" value="{2}"' in page
        seen.append(shown(page))
        page = mark(client, seen[-1], "right", skip=2)
    assert len({*seen, *skipped}) == 8


def test_review_two_people_both_answers_are_kept_with_their_names(client, out):
    other = TestClient(make_app(Explorer(out)), base_url="http://localhost")
    for browser, name in ((client, "Ada"), (other, "Ben")):
        browser.post("/reviewer", data={"name": name})
    first = shown(client.get("/review?subset=sa1b").text)
    assert shown(mark(client, first, "right")) != first, "one's own is not asked again"
    assert shown(other.get("/review?subset=sa1b").text) == first
    page = mark(other, first, "wrong")
    reviews = Reviews(Catalog(out))
    assert {each.reviewer: each.right for each in reviews.of_image("sa1b", first[0])[first[1]]} == {
        "Ada": True,
        "Ben": False,
    }
    [found], _ = reviews.precision()
    assert (found.reviewed, found.disputed) == (1, 1)
    assert re.findall(r'<td class="num">(\d+)</td>', page)[:3] == ["0", "1", "1"], "right, of, disputed"
    for browser, theirs in ((client, "Ben: wrong"), (other, "Ada: right")):
        assert theirs in browser.get(f"/image/sa1b/{first[0]}").text


def test_image_forgets_query_it_opens_on_what_was_asked_for_and_goes_on_in_the_result(client, out):
    found = client.get("/browse?outcome=dropped&subset=sa1b").text
    addresses = [html.unescape(each) for each in re.findall(r'<a href="(/image/[^"]+)"', found)]
    rows = rows_of(out)
    assert len(addresses) > 5
    for address in addresses[:4]:
        page, key = client.get(address).text, address.split("/")[3].partition("?")[0]
        order = [int(each) for each in re.findall(r'id="region-(\d+)"', page)]
        asked = {region for (each, region), row in rows.items() if each == key and not row["kept"]}
        assert set(order[: len(asked)]) == asked and len(order) >= len(asked)
        assert page.count('class="region asked"') == len(asked)
        assert page.count('class="region pale"') == len(order) - len(asked)
        links = [html.unescape(each) for each in re.findall(r'rel="(?:next|prev)" href="([^"]+)"', page)]
        assert links and all("outcome=dropped" in link and "subset=sa1b" in link for link in links)
        assert '<a href="/browse?' in page.partition('aria-label="Images of the result"')[2]


def test_card_absolute_paths_the_card_names_no_folder_of_the_builders_machine(out):
    card = (out / "README.md").read_text()
    assert str(out.parent) not in card
    assert not re.search(r"(?<![\w:./<>])/(?:home|root|tmp|work|Users|mnt|data)/", card)
