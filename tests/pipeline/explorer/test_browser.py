"""The pages in a real browser: no error on any, filters, what-if, keys, reviews, and a small screen."""

import os
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import reader
from paracaption.pipeline.explorer import whatif
from tests.pipeline.explorer import corpus
from tests.pipeline.explorer.corpus import serving

HOSTILE_IMAGE = "/image/coconut/000000000001"
PAGES = [
    "/",
    "/browse",
    "/browse?outcome=dropped&sort=-iou",
    HOSTILE_IMAGE,
    "/whatif?min_iou=0.7&text.max_words=8",
    "/review",
    "/train",
]
WIDTHS = [1280, 390]
pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser, address):
    """A page that fails its test at the end if anything was said on the console."""
    context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: said.append(f"error: {error}"))
    opened.on(
        "response",
        lambda answer: said.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None,
    )
    yield opened
    context.close()
    assert not said


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", PAGES)
@pytest.mark.soak(keep=2)
def test_each_page_loads_without_errors_and_fits_the_screen(page, path, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(path, wait_until="networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    cut = page.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, h1, h2, label")]
            .filter((e) => e.checkVisibility() && e.closest(".sr, .skip, .scroll, thead") === null)
            .map((e) => [e.getBoundingClientRect(), e.outerHTML.slice(0, 100)])
            .filter(([box]) => box.left < 0 || box.right > innerWidth + 1)
            .map(([, text]) => text)"""
    )
    assert cut == []


def test_distributions_follow_the_funnel_and_say_what_a_bar_is(page):
    page.goto("/")
    chart = page.get_by_role("img", name="IoU with the segmenter's mask").first
    chart.wait_for()
    assert "regions kept" in chart.locator("title").first.text_content()
    page.get_by_role("link", name="iou low").click()
    assert "reason=iou_low" in page.url and page.locator(".card").count() > 0


@pytest.mark.soak
def test_filters_narrow_the_grid(page, catalog):
    page.goto("/browse")
    page.get_by_label("Reason").select_option("iou_low")
    page.get_by_label("Caption contains").fill("red")
    page.get_by_role("button", name="Show").click()
    from paracaption.pipeline.explorer.query import Query

    regions, images = catalog.total(Query(reason="iou_low", text="red"))
    page.get_by_text(f"{regions} regions of {images} images").wait_for()
    assert page.locator(".card").count() == min(images, 24) > 0
    assert (
        page.locator(".card .tag").all_inner_texts()
        == ["agree with segmenter: iou low"] * page.locator(".captions li").count()
    )
    page.get_by_role("link", name="Without text: red").click()
    assert "red" not in page.url and "iou_low" in page.url


@pytest.mark.soak
def test_pages_are_turned_with_the_keyboard(page):
    page.goto("/browse")
    first = page.locator(".where span").first.inner_text()
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**after=**")
    assert page.locator(".where span").first.inner_text() != first
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**before=**")
    assert page.locator(".where span").first.inner_text() == first


@pytest.mark.soak
def test_a_caption_with_a_script_is_text(page):
    page.goto(HOSTILE_IMAGE)
    assert page.locator("#region-1 .caption").inner_text() == corpus.HOSTILE
    assert page.locator("#region-1 b").inner_text() == corpus.CATEGORY
    page.goto("/browse?text=script")
    assert corpus.HOSTILE in page.locator(".captions").first.inner_text()
    page.goto("/train")
    assert page.get_by_role("cell", name=corpus.HOSTILE).is_visible()
    assert page.evaluate("window.hacked") is None


def test_masks_and_captions_are_tied_by_hover_click_and_keys(page):
    page.goto("/image/sa1b/sa_3")
    chosen = "document.querySelector('.region.on')?.dataset.region"
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate(chosen) == "1" and page.locator(".mask.on").get_attribute("data-region") == "1"
    page.keyboard.press("x")
    assert not page.locator('.mask[data-region="1"] .fill').is_visible()
    page.keyboard.press("k")
    assert page.evaluate(chosen) == "0"
    page.locator('.mask[data-region="4"] .fill').click()
    assert page.evaluate(chosen) == "4" and page.locator("#region-4").evaluate(
        "e => e === document.activeElement"
    )
    page.locator("#region-2").hover()
    assert page.locator(".mask.on").get_attribute("data-region") == "2"
    page.keyboard.press("a")
    assert page.locator('.mask[data-region="1"] .fill').is_visible()
    page.get_by_role("button", name="No masks").click()
    assert not page.locator(".mask .fill").first.is_visible()
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/sa_4?**")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/sa_3?**")


def test_the_predicted_mask_is_shown_on_request(page, out):
    row = next(row for row in corpus.regions(out, "sa1b") if (row["iou"] or 0) > 0.5)
    page.goto(f"/image/sa1b/{row['key']}#region-{row['region']}")
    mask = page.locator(f'[data-predicted="{row["region"]}"]')
    assert not mask.is_visible()
    page.keyboard.press("p")
    assert mask.is_visible()


@pytest.mark.soak
def test_walking_through_images_stays_within_the_result(page, out):
    keys = list(
        dict.fromkeys(r["key"] for r in corpus.regions(out, "sa1b") if r["drop_reason"] == "segmenter_none")
    )
    page.goto("/browse?reason=segmenter_none")
    with page.expect_navigation():
        page.locator(".card a").first.click()
    for key in keys[1:]:
        page.keyboard.press("ArrowRight")
        page.wait_for_url(f"**/{key}?**")
    assert page.get_by_role("link", name="Next").count() == 0


def test_what_if_counts_follow_the_slider(page, catalog, out):
    config = reader.read_config(out)
    page.goto("/whatif")
    slider = page.get_by_label("least IoU with the segmenter's mask, slider")
    slider.fill("0.7")
    wanted, _ = whatif.compare(catalog, "sa1b", config, whatif.change_config(config, {"min_iou": 0.7}))
    row = page.locator('[data-subset="sa1b"]')
    page.get_by_text("min_iou: 0.7", exact=True).wait_for()
    assert row.locator("[data-lost]").inner_text() == str(wanted.lost) != "0"
    assert row.locator("[data-then]").inner_text() == str(wanted.then)
    assert "min_iou=0.7" in page.url
    assert page.locator("#result .threshold-text", has_text="min_iou = 0.7 (tried)").is_visible()
    assert page.locator("#result .threshold-text", has_text="min_iou = 0.5 (now)").is_visible()
    assert (
        page.locator("#result .threshold.now").count()
        == page.locator("#result .threshold.tried").count()
        == 1
    )
    assert page.get_by_text("would change", exact=True).is_visible()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "min_iou: 0.7"


@pytest.mark.parametrize("width", [1440, 390])
def test_labels_of_thresholds_do_not_overlap_in_a_chart(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto("/whatif?min_iou=0.55&text.min_words=4&text.max_words=8&text.max_repeat_share=0.42")
    boxes = page.evaluate(
        """() => [...document.querySelectorAll("#result .chart svg")].map((chart) =>
            [...chart.querySelectorAll(".threshold-text")].map((e) => e.getBBox())
                .map((box) => [box.x, box.y, box.width, box.height]))"""
    )
    assert max(map(len, boxes)) == 4
    for chart in boxes:
        for number, (x, y, across, _) in enumerate(chart):
            assert -4 <= x and x + across <= 424
            for other_x, other_y, other_across, _ in chart[:number]:
                assert y != other_y or x + across <= other_x or other_x + other_across <= x


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.soak(keep=1)
def test_the_review_page_fits_the_screen_with_a_precision_and_a_review_to_take_back(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto("/review?subset=coconut&decision=verify_category/category_wrong")
    with page.expect_navigation():
        page.keyboard.press("r")
    assert page.get_by_role("button", name="Take back").is_visible()
    assert page.get_by_role("region", name="Precision").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.soak
def test_reviewing_with_keys_gives_a_precision(page):
    page.goto("/review?subset=coconut&decision=clean_text/text_too_short")
    shown = page.locator(".detail").first.inner_text()
    for key in ("r", "w", "r"):
        with page.expect_navigation():
            page.keyboard.press(key)
    assert page.locator("main table tbody tr", has_text="text too short").inner_text().split("\t")[2:4] == [
        "2",
        "3",
    ]
    with page.expect_navigation():
        page.keyboard.press("s")
    assert shown


@pytest.mark.soak
def test_a_slip_of_the_finger_is_taken_back_with_a_key_and_by_going_back(page):
    place = "[...document.querySelectorAll('.reviews input')].slice(0, 3).map((e) => e.value).join()"
    page.goto("/review?subset=sa1b&decision=agree_with_segmenter/iou_low")
    first = page.evaluate(place)
    with page.expect_navigation():
        page.keyboard.press("w")
    second = page.evaluate(place)
    assert second != first
    with page.expect_navigation():
        page.keyboard.press("u")
    assert page.evaluate(place) == first and page.locator("[aria-pressed=true]").count() == 0
    with page.expect_navigation():
        page.keyboard.press("w")
    page.go_back()
    page.locator(".reviews").wait_for()
    assert page.evaluate(place) == first
    with page.expect_navigation():
        page.keyboard.press("r")
    assert page.evaluate(place) == second
    with page.expect_navigation():
        page.get_by_role("button", name="Take back").click()
    assert page.evaluate(place) == first


def test_a_review_of_a_region_is_saved_and_removed(page):
    page.goto("/image/coconut/000000000003")
    button = page.locator("#region-1").get_by_role("button").first
    for state in ("true", "false"):
        with page.expect_response("**/marks"):
            button.click()
        page.wait_for_function(
            "([e, s]) => e.getAttribute('aria-pressed') === s", arg=[button.element_handle(), state]
        )


@pytest.mark.soak
def test_everything_can_be_reached_with_the_tab_key_and_shows_that_it_has_the_focus(page):
    page.goto("/browse")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
                const e = document.activeElement, text = e === document.body ? "" : e.textContent.trim();
                return [e.name || text.slice(0, 20), getComputedStyle(e).outlineStyle]; }"""
        )
        if name:
            assert outline != "none", name
        seen.add(name)
    assert {"text", "category", "subset", "outcome", "stage", "reason", "sort", "Show", "Next →"} <= seen


@pytest.mark.soak
def test_beyond_this_machine_the_printed_address_opens_and_no_other_does(browser, out):
    with serving(out, "--host", "0.0.0.0") as printed:
        address, token = printed.split("/?token=")
        context = browser.new_context(base_url=f"http://127.0.0.1:{address.rpartition(':')[2]}")
        page = context.new_page()
        assert page.goto("/").status == 401
        assert page.goto(f"/?token={token}").status == 200 and "token" not in page.url
        page.get_by_role("link", name="Browse").click()
        page.locator(".card img").first.wait_for()
        context.close()


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.soak(keep=1)
def test_axe_finds_no_serious_violation(page, path):
    axe = os.environ.get("AXE", "")
    if not Path(axe).is_file():
        pytest.skip("AXE does not name axe.min.js; `npm pack axe-core`, and unpack it")
    page.goto(path, wait_until="networkidle")
    page.evaluate(Path(axe).read_text())
    found = page.evaluate("axe.run(document)")["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], [node["html"][:150] for node in each["nodes"][:3]]) for each in serious]
