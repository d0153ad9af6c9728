"""What the pages show is what the ledgers and the evidence say."""

import html
import io
from importlib import resources

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from paracaption.filters import rle
from paracaption.flows.cli.app import app
from paracaption.pipeline.corpus import inspect, reader
from paracaption.pipeline.explorer import evidence, pictures, training
from paracaption.pipeline.explorer.app import PAGES, make_app
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.explorer.pictures import Pictures
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Rle
from tests.pipeline.explorer import corpus


def test_the_overview_has_the_funnel_of_the_terminal(client, catalog):
    page = client.get("/").text
    for subset in ("coconut", "sa1b"):
        for step in catalog.counts(subset).funnel:
            for reason, number in step.reasons.items():
                link = f"/browse?subset={subset}&amp;stage={step.stage}&amp;reason={reason}"
                assert f'href="{link}">{reason.replace("_", " ")}</a> {number:,}' in page
                assert catalog.total(corpus_query(subset, step.stage, reason))[0] == number
    assert "GPU s held" in page and "min_iou = 0.5" not in page
    assert "min_iou = 0.5" in client.get("/distributions/sa1b").text
    assert "min_iou = 0.5" in client.get("/?distributions=1").text
    assert client.get("/distributions/other").status_code == 404


def corpus_query(subset, stage, reason):
    from paracaption.pipeline.explorer.query import Query

    return Query(subset=subset, stage=stage, reason=reason)


def test_the_image_page_has_the_evidence_of_each_stage(client, out, catalog):
    [row] = [r for r in corpus.regions(out, "sa1b") if (r["iou"] or 0) > 0.5 and r["kept"]][:1]
    answers = evidence.read_evidence(out, "sa1b", catalog.image("sa1b", row["key"]))[row["region"]]
    size = (row["image_height"], row["image_width"])
    assert answers.mask is not None and answers.num_candidates == 1
    [[iou]] = rle.iou([answers.mask], [Rle(size, row["rle_counts"])])
    assert iou == pytest.approx(row["iou"])
    page = client.get(f"/image/sa1b/{row['key']}").text
    for text in (
        row["caption"],
        f"IoU {row['iou']:.3g}",
        f"Judge: {answers.answers['extract_category']}",
        row["core_category"],
    ):
        assert html.escape(text) in page
    assert f'data-predicted="{row["region"]}"' in page


def test_the_reason_of_a_drop_is_shown_with_its_numbers(client, out):
    [row] = [r for r in corpus.regions(out, "sa1b") if r["drop_reason"] == "iou_low"][:1]
    page = client.get(f"/image/sa1b/{row['key']}").text
    assert "agree with segmenter: iou low" in page and row["drop_detail"] in page


def test_evidence_of_another_model_is_not_shown(out, tmp_path):
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(out, tmp_path / "out")
    [folder] = (tmp_path / "out/sa1b/evidence").glob("agree_with_segmenter-*")
    other = folder.with_name("agree_with_segmenter-ffff")
    other.mkdir()
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.set_column(3, "iou", pa.array([2.0] * len(table))), other / path.name)
    rows = [row for row in corpus.regions(out, "sa1b") if row["iou"]]
    shown = evidence.read_evidence(tmp_path / "out", "sa1b", [rows[0]])
    assert shown == evidence.read_evidence(out, "sa1b", [rows[0]])
    assert shown[rows[0]["region"]].mask is not None


def test_an_outline_encloses_its_mask_and_no_more():
    cv2 = pytest.importorskip("cv2")
    mask = np.zeros((300, 400), np.uint8)
    cv2.ellipse(mask, (200, 150), (120, 80), 30, 0, 360, 1, -1)
    cv2.circle(mask, (200, 150), 30, 0, -1)
    code = rle.from_mask(mask).rle
    parts = pictures.outline(code).removesuffix("Z").split("Z")
    drawn = np.zeros_like(mask)
    for part in parts:  # even-odd: a hole inverts what is painted
        points = np.array([[float(v) for v in pair.split()] for pair in part[1:].split("L")])
        again = cv2.fillPoly(np.zeros_like(mask), [points.astype(np.int32)], 1)
        drawn ^= again
    both, either = (drawn & mask).sum(), (drawn | mask).sum()
    assert both / either > 0.96
    [layer] = pictures.draw_layers([(3, code)])
    assert mask[layer.y, layer.x] and layer.color == pictures.css_color(pictures.color_of(3))


def test_outlines_stand_out_on_any_photo():
    """The two tones of an outline: whatever lies beneath, one of them has a contrast of 2 to it or more."""
    from paracaption.pipeline.io import draw

    def luminance(color) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def contrast(a: float, b: float) -> float:
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    for color in draw.PALETTE:
        halo = (255, 255, 255) if pictures.halo_of(color) == "#ffffff" else (0, 0, 0)
        tones = luminance(color), luminance(halo)
        assert contrast(*tones) > 3.4
        for beneath in np.linspace(0, 1, 101):
            assert max(contrast(tone, beneath) for tone in tones) > 1.8, (color, beneath)
        numbered = contrast(*tones)  # the number is in the halo's tone on the colour
        assert numbered > 3, "large text of WCAG"


def test_a_photo_is_a_jpeg_of_ours_whether_its_image_was_kept_or_not(out):
    client = TestClient(make_app(Explorer(out, outside=True)), base_url="http://localhost:8080")
    kept = {row["key"] for row in corpus.regions(out, "coconut") if row["kept"]}
    lost = {row["key"] for row in corpus.regions(out, "coconut")} - kept - {"000000000002"}
    assert lost, "the corpus has an image without a kept region"
    for key in (min(kept), min(lost)):
        answer = client.get(f"/photo/coconut/{key}")
        with Image.open(io.BytesIO(answer.content)) as photo:
            assert photo.format == "JPEG" and photo.size == (128, 96) and not photo.getexif()
    answer = client.get("/photo/coconut/000000000002")
    assert answer.headers["content-type"] == "image/svg+xml" and "cannot be read" in answer.text
    assert client.get("/photo/coconut/nothing").status_code == 404


def test_shards_are_read_by_url_too(catalog, out):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in (out / "sa1b" / "shards").glob("*.tar"):
        memory.pipe(f"/far/sa1b/shards/{path.name}", path.read_bytes())
    rows = next(catalog.image("sa1b", r["key"]) for r in corpus.regions(out, "sa1b") if r["kept"])
    near, far = Pictures(catalog).pixels(rows), Pictures(catalog, "memory://far").pixels(rows)
    assert (near == far).all()


def test_a_thumbnail_shows_the_masks_that_are_asked_for(client):
    plain, one, two = (client.get(f"/thumb/sa1b/sa_3?r={r}").content for r in ("", "1", "1,2"))
    assert len({plain, one, two}) == 3
    assert client.get("/thumb/sa1b/sa_3?r=1,99,x,-4").content == one


def test_reviews_are_made_from_the_pages(client):
    rows = {"subset": "sa1b", "key": "sa_5", "region": "4"}
    answer = client.post("/marks", data=rows | {"right": "wrong", "back": "image"}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/image/sa1b/sa_5"
    assert 'value="wrong" aria-pressed="true"' in client.get("/image/sa1b/sa_5").text
    assert client.post("/marks", data=rows | {"right": "none"}).status_code == 204
    assert 'aria-pressed="true"' not in client.get("/image/sa1b/sa_5").text
    away = client.post(
        "/marks", data=rows | {"right": "none", "back": "//evil.example"}, follow_redirects=False
    )
    assert away.headers["location"].startswith("/review?")


def test_the_run_page_reads_what_a_run_writes(client, run):
    found = training.read_run(run)
    assert found.steps == (500, 1000) and found.num_pictures == 1
    assert [curve.title for curve in found.curves][:2] == ["loss", "cross-entropy of masked tokens, in nats"]
    assert found.samples[0].regions == [("0", corpus.HOSTILE, "A cup.")]
    page = client.get("/train").text
    assert "step 500 of 1,000" in page and "exact" in page
    assert "Left out of training: 3 images (benchmark photos)." in page
    assert client.get("/train/picture/0").headers["content-type"] == "image/jpeg"


def test_a_regions_number_is_read_of_runs_of_every_release():
    early = {"image": "/a/corpus#k", "regions": [{"source": "/a/corpus#k: region 3"}, {"source": "0"}]}
    assert [number for number, *_ in training._sample(early).regions] == ["3", "0"]
    late = {"image": "corpus#k", "regions": [{"region": 0, "source": "corpus#k: region 0"}]}
    assert [number for number, *_ in training._sample(late).regions] == ["0"]


def test_a_run_without_anything_but_steps_is_shown_and_no_run_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnot json\n[1]\n')
    found = training.read_run(tmp_path)
    assert found.steps == (1, None) and not found.samples and not found.summary
    with pytest.raises(ConfigError, match="no training run"):
        training.read_run(tmp_path / "nowhere")


@pytest.mark.soak
def test_the_report_is_one_file_with_samples_of_each_reason(out, tmp_path):
    path = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(out), "--to", str(path)])
    assert done.exit_code == 0 and done.stdout.strip() == str(path)
    page = path.read_text()
    assert "<script" not in page and 'src="/' not in page and "href=" not in page and "url(" not in page
    assert "data:image/jpeg;base64," in page
    for subset in ("coconut", "sa1b"):
        _, dropped = inspect.sample_regions(reader.open_corpus(out), subset, 0, 3)
        for name, samples in dropped.items():
            assert html.escape(name.replace("/", ": ").replace("_", " ")) in page
            assert all(sample.key in page for sample in samples)


def test_commands_say_what_is_wrong_in_a_line(out, tmp_path):
    nowhere = str(tmp_path / "nowhere" / "report.html")
    for arguments in (
        ["explore", str(tmp_path)],
        ["explore", str(out), "--token", "short"],
        ["explore", str(out), "--run", str(tmp_path)],
        ["report", str(tmp_path)],
        ["report", str(out), "--to", nowhere],
    ):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, ConfigError), arguments


def test_package_data_goes_with_the_package():
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[3]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "pipeline" / "explorer"
    shipped = {path for pattern in patterns["paracaption.pipeline.explorer"] for path in folder.glob(pattern)}
    there = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert shipped == there


def test_each_link_of_the_navigation_opens_its_page_and_each_page_has_its_template(client):
    folder = resources.files("paracaption.pipeline.explorer").joinpath("templates")
    for page in PAGES:
        assert folder.joinpath(f"{page.__name__.rpartition('.')[2]}.html").is_file()
    for path, title in (page.LINK for page in PAGES if page.LINK):
        assert f'<a href="{path}" aria-current="page">{title}</a>' in client.get(path).text


def test_without_a_run_the_navigation_has_no_link_to_it(out):
    page = TestClient(make_app(Explorer(out)), base_url="http://localhost").get("/").text
    assert ">Review</a>" in page and ">Train</a>" not in page


def test_a_card_says_the_outcome_before_the_caption_and_the_score_that_it_is_sorted_by(client):
    page = client.get("/browse?outcome=dropped&sort=-iou&subset=sa1b").text
    cards = page.split('<li class="card"')[1:]
    for card in cards:
        listed = card.partition('<ol class="captions">')[2]
        assert "tag dropped" in listed.partition("<span>")[0] or listed.index("tag dropped") < 1200
        assert '<b class="measure">iou ' in listed and "badge dropped" in listed


def test_an_order_by_a_score_says_what_has_no_such_score_and_is_therefore_not_shown(client, out):
    rows = [row for row in corpus.regions(out, "sa1b") if not row["kept"] and row["region"] is not None]
    scored = [row for row in rows if row["iou"] is not None]
    assert 0 < len(scored) < len(rows)
    line = client.get("/total?subset=sa1b&outcome=dropped&sort=-iou").text
    assert line.endswith("with a value for iou are shown")
    assert line.startswith(f"{len(rows)} regions") and f"; only the {len(scored)} regions of " in line
    assert "shown" not in client.get("/total?subset=sa1b&outcome=dropped").text
    assert "shown" not in client.get("/total?subset=sa1b&sort=-area").text, "every region has an area"
    stage = next(row["drop_stage"] for row in rows if row["iou"] is None)
    page = html.unescape(client.get(f"/browse?stage={stage}&subset=sa1b&sort=-iou").text)
    assert "No region matches and has a value for iou, by which you sort." in page
    assert f'href="/browse?subset=sa1b&stage={stage}"' in page


def test_an_image_keeps_the_query_that_led_to_it_and_shows_what_was_asked_for_first(client, out):
    rows = [row for row in corpus.regions(out, "sa1b") if row["drop_reason"] == "iou_low"]
    row = next(r for r in rows if (r["key"], 0) not in {(each["key"], each["region"]) for each in rows})
    num_asked = sum(each["key"] == row["key"] for each in rows)
    page = client.get(f"/image/sa1b/{row['key']}?reason=iou_low").text
    assert page.index(f'id="region-{row["region"]}"') < page.index('id="region-0"')
    assert page.count('class="region asked"') == num_asked and 'class="region pale"' in page
    back = page.partition('aria-label="Images of the result"')[2].partition("Back to the results")[0]
    assert "/browse?reason=iou_low" in html.unescape(back)
    links = html.unescape(page).split('rel="next" href="')[1:]
    assert all("reason=iou_low" in link.partition('"')[0] for link in links)
    data = {"subset": "sa1b", "key": row["key"], "region": row["region"], "right": "none", "back": "image"}
    answer = client.post("/marks", data=data | {"query": "reason=iou_low"}, follow_redirects=False)
    assert answer.headers["location"].endswith("?reason=iou_low")


def test_dropped_regions_look_dropped_on_the_image_page(client, out):
    rows = [row for row in corpus.regions(out, "sa1b") if row["key"] == "sa_3" and row["rle_counts"]]
    page = client.get("/image/sa1b/sa_3").text
    dropped = [row["region"] for row in rows if not row["kept"]]
    assert 0 < len(dropped) < len(rows)
    assert page.count('class="mask dropped"') == page.count('class="line dashes"') - page.count(
        'class="predicted"'
    )
    for row in rows:
        assert (f"url(#stripes-{row['region']})" in page) is not row["kept"]


def test_the_report_says_each_reason_before_the_caption_and_cuts_nothing(out, tmp_path):
    path = tmp_path / "report.html"
    CliRunner().invoke(app, ["report", str(out), "--to", str(path)])
    page = path.read_text()
    assert '<ol class="captions">' not in page and ".captions.whole span { display: block" in page
    for part in page.split('<ol class="captions whole">')[1:]:
        assert 0 < part.index('class="tag ') < part.index("<span>")
