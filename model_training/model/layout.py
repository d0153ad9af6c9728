"""How an image and its regions become a sequence.

A layout is data, because published weights were trained with quirks. `REFERENCE` follows PerceptionDLM's
released code to the last quirk, and is what published weights need. `CORRECTED` is the same architecture
doing what its paper says, and the default for new training. Each difference is an option of its own, so that
its effect can be measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ...schemas.errors import ConfigError

IMAGE = "<image>"
"""Stands for an image in a question about whole images."""


@dataclass(frozen=True)
class Layout:
    """The options; the defaults are the corrected layout.

    Attributes:
        mask_resample: which patches show a region. "area": those it covers at least `min_patch_share` of, and
            in each view of the image at least one. "bicubic": the painted mask is resized with bicubic
            ringing, and one pixel decides for its patch, so that a small region can vanish.
        min_patch_share: share of a patch that the region has to cover. A quarter keeps thin objects
            connected.
        replay_map: which of an image's views form the feature map that replay samples. "tiles": its tiles.
            "shifted": all views but the first, so that every place holds its right neighbor and the last one
            the thumbnail.
        replay_scale: factor on boxes that are already in cells of the feature map. The released code scales
            twice: by 1/32 at inference, by 1/28 in training.
        inclusive_boxes: whether a box ends at the near edge of its last pixel instead of the far one.
        hidden_newlines: whether captions do not see the line breaks between the replayed regions.
        isolate_prefix: whether prompt, image and replay do not see captions. Then captions are independent of
            each other, and keys and values of everything before them are the same at every step.
        restart_positions: whether every caption starts at the same position, so that regions are
            exchangeable.
        block_end: what closes each caption's block: "eot", or "newline" with one eot after the last block.
        cut: where a caption ends: at the first eot of its own "block", or of the whole "answer", which leaves
            the captions after it empty.
        instruction: what the user says after the regions.
    """

    mask_resample: Literal["area", "bicubic"] = "area"
    min_patch_share: float = 0.25
    replay_map: Literal["tiles", "shifted"] = "tiles"
    replay_scale: float = 1.0
    inclusive_boxes: bool = False
    hidden_newlines: bool = False
    isolate_prefix: bool = True
    restart_positions: bool = False
    block_end: Literal["eot", "newline"] = "eot"
    cut: Literal["block", "answer"] = "block"
    instruction: str = "Describe each masked region in detail."


CORRECTED = Layout()

REFERENCE = Layout(
    mask_resample="bicubic",
    replay_map="shifted",
    replay_scale=1 / 32,
    inclusive_boxes=True,
    hidden_newlines=True,
    isolate_prefix=False,
    block_end="newline",
    cut="answer",
)
"""PerceptionDLM's released code (MSALab-PKU/PerceptionDLM) at inference."""

LAYOUTS = {"corrected": CORRECTED, "reference": REFERENCE}


def resolve_layout(name: str, options: dict[str, Any] | None = None) -> Layout:
    """The named layout, with some options set differently.

    Raises:
        ConfigError: no such layout or option, or a value that the option does not take.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"layout: unknown layout {name!r}; choose one of {', '.join(sorted(LAYOUTS))}")
    fields = {field.name: field for field in dataclasses.fields(Layout)}
    for option, value in (options or {}).items():
        if option not in fields:
            raise ConfigError(
                f"layout_options: unknown option {option!r}; the options are {', '.join(fields)}"
            )
        kind = type(getattr(CORRECTED, option))
        choices = _CHOICES.get(option)
        fits = value in choices if choices else type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            wanted = " or ".join(map(repr, choices)) if choices else kind.__name__
            raise ConfigError(f"layout_options.{option}: {value!r}; give {wanted}")
    return dataclasses.replace(LAYOUTS[name], **(options or {}))


_CHOICES: dict[str, tuple[str, ...]] = {
    "mask_resample": ("area", "bicubic"),
    "replay_map": ("tiles", "shifted"),
    "block_end": ("eot", "newline"),
    "cut": ("block", "answer"),
}
