"""The page on which drafted questions are accepted or rejected, in a real browser."""

import json
from pathlib import Path

import pytest

from paracaption.model_training.evaluation import annotations
from tests.chromium import browser as browser
from tests.model_training.evaluation.test_make_benchmark import DRAFT, made

pytestmark = [pytest.mark.browser, pytest.mark.soak]


@pytest.fixture(scope="module")
def bench(world, tmp_path_factory) -> Path:
    """Made before the browser starts, beside which a judge cannot be asked."""
    folder = tmp_path_factory.mktemp("benchmark") / "bench"
    nasty = DRAFT | {"elsewhere": ["</script><script>document.title = 'ran'</script>"]}
    made(world, folder, lambda _: json.dumps(nasty), images=2)
    return folder


def test_reviews_outlive_the_page_and_what_is_saved_is_the_reviewed_file(bench, browser):
    before = json.loads((bench / "qa.json").read_text())
    questions = [(key, each) for key, some in before.items() for each in some]
    said: list[str] = []
    page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((bench / "review.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out"
    page.locator("fieldset").nth(0).get_by_label("accept").check()
    page.locator("fieldset").nth(1).get_by_label("reject").check()
    page.locator("fieldset").nth(2).get_by_label("reject").check()
    page.locator("fieldset").nth(2).get_by_label("accept").check()  # on second thoughts
    page.reload()
    counts = f"2 accepted, 1 rejected, {len(questions) - 3} undecided"
    assert page.get_by_role("status").inner_text() == counts
    with page.expect_download() as download:
        page.get_by_role("button", name="Save qa.json").click()
    download.value.save_as(bench / "qa.json")
    assert download.value.suggested_filename == "qa.json"
    assert said == [] and page.title() == f"Review of {len(questions)} drafted questions"
    page.context.close()

    saved = json.loads((bench / "qa.json").read_text())
    kept = [(key, each) for key, some in saved.items() for each in some]
    accepted = [(key, {**each}) for key, each in (questions[0], questions[2])]
    for _, each in accepted:
        assert each.pop("verified") is False
    assert kept == [*accepted, *questions[3:]]
    assert annotations.read_benchmark(bench, "paradlc").unverified == len(questions) - 3
