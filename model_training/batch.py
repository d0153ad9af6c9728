"""A batch as the model takes it: tensors, and the few sizes that stay on the host."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from model_training.attention import Structure

PADDING = -1
"""Of `slots_BS`, `slot_regions_BS` and `documents_BL`."""


@dataclass(frozen=True)
class Batch:
    """B rows of L positions. A row holds one sequence and padding, or, packed, several sequences.

    T tiles, M sequences, N regions and I, R places are those of the whole batch, in the order of its
    sequences; places are flat, row * L + position.

    Attributes:
        pixels_TCSS: tiles, each sequence's real ones row by row and then its thumbnail. uint8.
        prompts_TPK: how many regions mark patch P with prompt K. uint8.
        grids: (columns, rows) of real tiles for each of the M sequences.
        regions: number of regions of each of the M sequences.
        boxes_N4: x1, y1, x2, y2 as shares of the image. float32.
        input_ids_BL: token ids; image and replay places hold their placeholders.
        region_ids_BL, documents_BL: who may attend to whom, see `attention.Structure`.
        positions_BL: for the rotary embedding.
        image_at_I: where image features go. replay_at_R: where replayed features go (empty without replay).
        slots_BS: places of the caption slots within each row, in order; PADDING after them.
        slot_regions_BS: the slot's answer, as an index into `origins`; PADDING after the last.
        origins: for each answer of the batch, (image, mask) as the caller numbered them. Answers belong to
            regions; an image without regions has one answer, with mask -1.
        labels_BL: token to predict, -100 elsewhere; with captions only.
    """

    pixels_TCSS: Tensor
    prompts_TPK: Tensor
    grids: tuple[tuple[int, int], ...]
    regions: tuple[int, ...]
    boxes_N4: Tensor
    input_ids_BL: Tensor
    region_ids_BL: Tensor
    documents_BL: Tensor
    positions_BL: Tensor
    image_at_I: Tensor
    replay_at_R: Tensor
    slots_BS: Tensor
    slot_regions_BS: Tensor
    origins: tuple[tuple[int, int], ...]
    labels_BL: Tensor | None = None

    @property
    def structure(self) -> Structure:
        """Who may attend to whom."""
        return Structure(self.region_ids_BL, self.documents_BL)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device. Copy once: the model takes everything else from here."""
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)
