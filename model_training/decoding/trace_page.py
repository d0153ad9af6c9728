"""A trace as one HTML file: the picture, a slider over the steps, and the captions as text.

Without scripts the page shows the finished captions. It loads nothing, and its content security policy
forbids it to. Text of a model or a file is escaped: as HTML in the page, and as JSON in which no `<` is left.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from string import Template
from typing import Any

from ...pipeline.io import draw
from .trace import Piece, Trace

_SIDE, _QUALITY = 1000, 88
_WIDE = 1.9


def render_page(trace: Trace) -> str:
    """The HTML page of a trace."""
    last = len(trace.snapshots) - 1
    picture = draw.draw_masks(trace.photo, trace.overlays, _SIDE)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    pieces = trace.pieces(last)
    return Template(_PAGE).substitute(
        title=html.escape(trace.title or "Captions, step by step"),
        layout="below" if picture.width >= _WIDE * picture.height else "beside",
        picture=base64.b64encode(buffer.getvalue()).decode(),
        width=picture.width,
        height=picture.height,
        regions=len(trace.overlays),
        entries="\n".join(_entry(trace, number, pieces[number]) for number in range(len(trace.overlays))),
        line=html.escape(trace.line(last)),
        last=last,
        data=_in_script(playback(trace)),
    )


def playback(trace: Trace) -> dict[str, Any]:
    """The data that the page plays.

    Returns:
        `steps`: for each step, its line and the share of the slots that are written.
        `regions`: for each region and slot, its changes as [step, text, state, confidence or None].
    """
    steps = []
    regions: list[list[list[list[Any]]]] = [[] for _ in trace.overlays]
    for step in range(len(trace.snapshots)):
        written, total = trace.progress(step)
        steps.append([trace.line(step), round(written / max(1, total), 4)])
        for slots, pieces in zip(regions, trace.pieces(step), strict=True):
            slots += [[] for _ in range(len(pieces) - len(slots))]
            for changes, piece in zip(slots, pieces, strict=True):
                if not changes or changes[-1][1:3] != [piece.text, piece.state]:
                    sure = None if math.isnan(piece.confidence) else round(piece.confidence, 3)
                    changes.append([step, piece.text, piece.state, sure])
    return {"steps": steps, "regions": regions}


def _entry(trace: Trace, number: int, pieces: list[Piece]) -> str:
    overlay = trace.overlays[number]
    back = draw.color_of(overlay, number)
    front = "#fff" if draw.is_dark(back) else "#000"
    label = f"<h2>{html.escape(overlay.label)}</h2>" if overlay.label else ""
    words = "".join(map(_span, pieces))
    return (
        f'<li><span class="number" style="background:rgb{back};color:{front};border-color:{front}">'
        f'<span class="unseen">Region </span>{number + 1}</span>'
        f'<div>{label}<p class="caption">{words}</p></div></li>'
    )


def _span(piece: Piece) -> str:
    """A slot as HTML. The space before a word stands outside, so that only the word is marked."""
    text = piece.text.lstrip(" ")
    space = " " * (len(piece.text) - len(text))
    return f'{space}<span class="{piece.state}">{html.escape(text)}</span>'


def _in_script(value: Any) -> str:
    """JSON in which no HTML parser can find the end of its script."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --dim: #5f5f5f; --pale: #9a9a9a; --box: #d8d8d8;
  --fresh: #ffe082; --bar: #0072b2; --line: #e2e2e2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #e8e8e8; --dim: #a6a6a6; --pale: #777; --box: #3c3f43; --fresh: #7a5c00;
    --bar: #56b4e9; --line: #303236; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.5 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--line);
  padding: 10px 20px 12px; }
h1 { font-size: 15px; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; }
button { font: inherit; padding: 3px 12px; min-width: 44px; border: 1px solid var(--dim); border-radius: 6px;
  background: var(--paper); color: var(--ink); cursor: pointer; }
#play { min-width: 84px; }
input { flex: 1 1 220px; accent-color: var(--bar); }
#line { font-variant-numeric: tabular-nums; color: var(--dim); min-width: 17em; }
main { display: grid; gap: 20px; padding: 20px; max-width: 1700px; margin: 0 auto; }
main.beside { grid-template-columns: minmax(0, 6fr) minmax(320px, 5fr); align-items: start; }
img { display: block; width: 100%; height: auto; max-height: calc(100vh - 130px); object-fit: contain;
  object-position: 0 0; }
.beside figure { position: sticky; top: 100px; }
figure { margin: 0; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 16px; }
.below ol { grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); }
li { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 12px; }
.number { min-width: 28px; height: 28px; padding: 0 6px; border: 2px solid; border-radius: 14px;
  font: bold 15px/24px system-ui, sans-serif; text-align: center; box-shadow: 0 0 0 1px var(--line); }
h2 { font-size: 16px; margin: 1px 0 2px; }
p { margin: 1px 0; }
.caption { overflow-wrap: anywhere; white-space: pre-wrap; }
.open { display: inline-block; width: 1.15em; height: 0.72em; margin: 0 2px; border-radius: 3px;
  background: var(--box); }
.fresh { background: var(--fresh); border-radius: 3px; }
.end, .after { color: var(--pale); }
footer { color: var(--dim); font-size: 14px; padding: 0 20px 20px; max-width: 1700px; margin: 0 auto; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 860px) { main.beside { grid-template-columns: minmax(0, 1fr); }
  .beside figure { position: static; } }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<div class="controls">
<button id="play" type="button">Play</button>
<button id="back" type="button" aria-label="One step back">&#9664;</button>
<button id="next" type="button" aria-label="One step on">&#9654;</button>
<label for="step">Step</label>
<input id="step" type="range" min="0" max="$last" value="$last" aria-describedby="line">
<span id="line" role="status">$line</span>
</div>
</header>
<main class="$layout">
<figure><img alt="The photo with its $regions regions outlined and numbered" width="$width" height="$height"
 src="data:image/jpeg;base64,$picture"></figure>
<ol>
$entries
</ol>
</main>
<footer>A gray box is a masked slot, <span class="fresh">marked text</span> was written in this step, a dot
ends a caption, and pale text behind it is no part of it. Keys: left and right step, space plays.</footer>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const { steps, regions } = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("step"), play = document.getElementById("play");
const line = document.getElementById("line");
const captions = [...document.querySelectorAll(".caption")];
let timer = null;

function change(changes, step) {
  let found = changes[0];
  for (const each of changes) if (each[0] <= step) found = each;
  return found;
}

function show(step) {
  slider.value = step;
  line.textContent = steps[step][0];
  slider.setAttribute("aria-valuetext", steps[step][0]);
  captions.forEach((caption, number) => {
    const parts = regions[number].flatMap((changes) => {
      const [since, text, state, sure] = change(changes, step);
      const part = document.createElement("span");
      part.className = state;
      part.textContent = text.trimStart();
      if (state !== "open" && sure !== null) part.title = "step " + since + ", confidence " + sure;
      return text.startsWith(" ") ? [" ", part] : [part];
    });
    caption.replaceChildren(...parts);
  });
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "Play";
}

function move(by) {
  stop();
  show(Math.min(steps.length - 1, Math.max(0, Number(slider.value) + by)));
}

function toggle() {
  if (timer !== null) return stop();
  if (Number(slider.value) === steps.length - 1) show(0);
  play.textContent = "Pause";
  timer = setInterval(() => {
    const step = Number(slider.value) + 1;
    if (step < steps.length) show(step);
    if (step >= steps.length - 1) stop();
  }, 260);
}

play.addEventListener("click", toggle);
document.getElementById("back").addEventListener("click", () => move(-1));
document.getElementById("next").addEventListener("click", () => move(1));
slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === " " && event.target.tagName !== "BUTTON") toggle();
  else if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
  else if (event.key === "Home") move(-steps.length);
  else if (event.key === "End") move(steps.length);
  else return;
  event.preventDefault();
});
const asked = /^#step=(\\d+)$$/.exec(location.hash);
if (asked) show(Math.min(steps.length - 1, Number(asked[1])));
</script>
</body>
</html>
"""
