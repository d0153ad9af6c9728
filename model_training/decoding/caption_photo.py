"""Captions the regions of one photo with a saved model; the answer as text, JSON, picture or trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...pipeline.io import draw, files
from ...schemas.errors import ConfigError
from .read_regions import PhotoRegions
from .trace import Trace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...schemas.decoding import DecodeOptions
    from .region_captioner import RegionCaptioner, RegionCaptions

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_TRACES = (".gif", ".html")


class CaptionedPhoto(NamedTuple):
    """A photo with the captions of its regions, and how they came to be.

    Attributes:
        photo: the photo and its regions.
        found: the captions in the order of the regions, and what they cost.
        tokens: how many tokens the text of each caption has.
        options: how the captions were decoded.
        model: folder, layout, device and type of the model.
    """

    photo: PhotoRegions
    found: RegionCaptions
    tokens: list[int]
    options: DecodeOptions
    model: dict[str, str]

    @property
    def tokens_per_forward(self) -> float:
        """Slots filled by a pass of the language model, over all regions."""
        return self.found.tokens / max(1, self.found.forwards)

    def overlays(self) -> list[draw.Overlay]:
        """The regions with their captions, to be drawn."""
        pairs = zip(self.photo.regions, self.found.captions, strict=True)
        return [draw.Overlay(region.mask.rle, caption, region.label) for region, caption in pairs]


def check_outputs(
    picture: str | Path | None = None, steps: str | Path | None = None, record: str | Path | None = None
) -> None:
    """Whether what is asked for can be written, before a model is loaded for it.

    Args:
        picture: as `write_picture` takes it.
        steps: as `write_trace` takes it.
        record: of the JSON; "-" is none.

    Raises:
        ConfigError: an ending of no known format, or a folder that does not exist.
    """
    if steps is not None:
        _check_trace(steps)
    if picture is not None and Path(picture).suffix.lower() not in _PICTURES:
        raise ConfigError(f"{picture}: a picture's name ends in {', '.join(_PICTURES)}")
    for path in (picture, record):
        if path is not None and str(path) != "-" and not Path(path).parent.is_dir():
            raise ConfigError(f"{path}: no such folder; make it first")


def caption_regions(
    captioner: RegionCaptioner,
    photo: PhotoRegions,
    options: DecodeOptions,
    regions_per_call: int | None = None,
) -> CaptionedPhoto:
    """Caption every region of a photo.

    Args:
        captioner: the model.
        photo: the photo and its regions.
        options: how captions are decoded.
        regions_per_call: the most regions that share a sequence; by default as many as the model can.

    Raises:
        ConfigError: an option does not suit the model.
    """
    model = captioner.model
    masks = [region.dense() for region in photo.regions]
    [found] = captioner.caption_photos([(photo.pixels, masks)], options, regions_per_call=regions_per_call)
    tokens = [len(captioner.processor.tokenize(caption)) for caption in found.captions]
    about = {
        "folder": str(model.name_or_path),
        "layout": model.config.layout,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return CaptionedPhoto(photo, found, tokens, options, about)


def trace_photo(
    captioner: RegionCaptioner, answer: CaptionedPhoto, regions_per_call: int | None = None
) -> Trace:
    """Decode a captioned photo once more and keep every step, which takes longer than the captions did."""
    photo = answer.photo
    masks = [region.dense() for region in photo.regions]
    steps = captioner.caption_steps(photo.pixels, masks, answer.options, regions_per_call=regions_per_call)
    eot = captioner.model.config.eot_token_id
    return Trace(photo.pixels, answer.overlays(), list(steps), eot, Path(photo.name).name)


def write_picture(answer: CaptionedPhoto, path: str | Path) -> None:
    """Draw the photo with masks and captions, and write it whole or not at all.

    Raises:
        ConfigError: no such picture format or folder.
    """
    title = Path(answer.photo.name).name
    draw.save_picture(draw.draw_image(answer.photo.pixels, answer.overlays(), title=title), path)


def _check_trace(path: str | Path) -> None:
    """Whether a trace can be written there.

    Raises:
        ConfigError: its name ends in neither .gif nor .html, or its folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in _TRACES:
        raise ConfigError(f"{path}: a trace's name ends in {' or '.join(_TRACES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: no such folder; make it first")


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace as a GIF or as a page, as the name's ending says, whole or not at all.

    Raises:
        ConfigError: its name ends in neither .gif nor .html, or its folder does not exist.
    """
    from .trace_gif import render_gif
    from .trace_page import render_page

    _check_trace(path)
    data = render_gif(trace) if Path(path).suffix.lower() == ".gif" else render_page(trace).encode()
    with files.write_atomic(path) as file:
        file.write(data)


def write_record(answer: CaptionedPhoto, path: str | Path) -> None:
    """Write `record` as a JSON file, whole or not at all."""
    with files.write_atomic(path) as file:
        file.write(to_json(answer).encode())


def to_json(answer: CaptionedPhoto) -> str:
    """`record` as text."""
    return json.dumps(record(answer), indent=2, ensure_ascii=False) + "\n"


def record(answer: CaptionedPhoto) -> dict[str, Any]:
    """Everything about an answer but its pixels and masks; `bbox` is x, y, width, height in pixels."""
    found = answer.found
    rows = zip(answer.photo.regions, found.captions, answer.tokens, strict=True)
    return {
        "photo": answer.photo.name,
        "width": answer.photo.pixels.shape[1],
        "height": answer.photo.pixels.shape[0],
        "model": answer.model,
        "options": answer.options.stored(),
        "regions": [
            {
                "number": number,
                "label": region.label,
                "caption": caption,
                "tokens": tokens,
                "area": region.mask.area,
                "bbox": list(region.mask.bbox),
                "source": region.source,
                "corpus_caption": region.caption,
            }
            for number, (region, caption, tokens) in enumerate(rows, 1)
        ],
        "left_out": answer.photo.left_out,
        "forwards": found.forwards,
        "tokens": found.tokens,
        "tokens_per_forward": round(answer.tokens_per_forward, 3),
        "seconds": round(found.seconds, 4),
        "agreement": found.agreement,
    }


def render(answer: CaptionedPhoto) -> RenderableType:
    """The captions with their numbers, for a terminal, and a line of what they cost."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    for number, overlay in enumerate(answer.overlays()):
        red, green, blue = draw.color_of(overlay, number)
        ink = "white" if draw.is_dark((red, green, blue)) else "black"
        caption = Text(overlay.caption or "(no caption)", style="" if overlay.caption else "dim")
        if overlay.label:
            caption = Text.assemble((f"{overlay.label}: ", "bold"), caption)
        table.add_row(Text(f" {number + 1} ", style=f"bold {ink} on rgb({red},{green},{blue})"), caption)
    return Group(table, Text(_cost(answer), style="dim"))


def _cost(answer: CaptionedPhoto) -> str:
    found, options = answer.found, answer.options
    num_regions = len(found.captions)
    device = answer.model["device"]
    line = (
        f"{num_regions} region{'s' * (num_regions != 1)}, {found.forwards} forwards, "
        f"{answer.tokens_per_forward:.1f} tokens a forward, {found.seconds:.2f} s on {device} "
        f"({options.strategy}, cache {options.cache})"
    )
    if found.agreement is not None:
        line += f"; {found.agreement:.1%} of the tokens as without a cache"
    return line
