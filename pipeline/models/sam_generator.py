"""The `sam` mask generator: Segment Anything asked at every point of a grid, as SA-1B was made.

segment-anything's own generator decides which masks stay. It gets the checkpoint that `sam` reads, matrix
products in bfloat16 on a GPU, and batches of points that are halved when memory runs out.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from ...schemas.errors import OutOfMemory
from ...schemas.records import Rle
from ..io import weights
from .masks import check_finite, find_device, products_in
from .options import BackendOptions, read_options
from .protocols import Candidate, Checked
from .sam import build, check_checkpoint, checkpoint_file, read_tensors

log = logging.getLogger(__name__)

VERSION = "1"

_PROTOCOL = "mask_generator"
_NOT_IN_IDENTITY = ("model", "device", "points_at_once")


class GridOptions(BackendOptions, frozen=True):
    """The options of generators that ask at the points of a grid. The defaults are segment-anything's.

    Attributes:
        model: the checkpoint.
        points_per_side: of the grid; its square is the number of points.
        pred_iou_thresh: a mask stays if the model's own estimate of its quality is above this.
        stability_score_thresh: and if it hardly changes with another cutoff of the logits: the least IoU of
            the two.
        crop_n_layers: 1 looks at the photo's quarters as well, 2 also at its sixteenths.
        min_mask_region_area: pieces and holes of a mask with fewer pixels are removed; 0 removes none.
        box_nms_thresh: of two masks whose boxes have a larger IoU, the worse one goes.
        device: "auto", "cpu" or "cuda".
        dtype: of the image encoder's matrix products; "auto" is bfloat16 on a GPU and float32 on a CPU.
        points_at_once: in the mask decoder; halved when memory runs out.
    """

    model: str
    points_per_side: Annotated[int, Meta(ge=1, le=256)] = 32
    pred_iou_thresh: Annotated[float, Meta(ge=0, le=1)] = 0.88
    stability_score_thresh: Annotated[float, Meta(ge=0, le=1)] = 0.95
    crop_n_layers: Annotated[int, Meta(ge=0, le=3)] = 0
    min_mask_region_area: Annotated[int, Meta(ge=0)] = 0
    box_nms_thresh: Annotated[float, Meta(gt=0, le=1)] = 0.7
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    points_at_once: Annotated[int, Meta(ge=1)] = 64

    def identity(self) -> dict[str, str]:
        """The options that decide which masks stay."""
        names = [name for name in self.__struct_fields__ if name not in _NOT_IN_IDENTITY]
        return {name: str(getattr(self, name)) for name in names}


class SamGeneratorOptions(GridOptions, frozen=True):
    """The options of `sam`: `model` is the publisher's `.pth`."""


class SamMaskGenerator:
    """Finds the masks of a photo at the points of a grid.

    Args:
        options: see `SamGeneratorOptions`.

    Raises:
        ConfigError: an option, the file or the device is wrong; the message names the fix.
    """

    def __init__(self, **options: Any):
        given = read_options(SamGeneratorOptions, options, f"{_PROTOCOL}.options")
        device, dtype = find_device(given.device, given.dtype, _PROTOCOL)
        path = Path(given.model)
        model = build(read_tensors(path, protocol=_PROTOCOL), path).to(device).eval()
        self._grid = PointGrid(_predictor_type()(model, dtype, f"sam ({given.model})"), given, "sam")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Weights, and the options that decide which masks stay."""
        given = read_options(SamGeneratorOptions, options, f"{_PROTOCOL}.options")
        path = checkpoint_file(Path(given.model), _PROTOCOL)
        return {"version": VERSION, "weights": weights.identity(path), **given.identity()}

    @classmethod
    def check(cls, **options: Any) -> Checked:
        """Read names and shapes of the tensors, not the tensors.

        Raises:
            ConfigError: the file is no SAM checkpoint, or holds code; the message names the fix.
        """
        given = read_options(SamGeneratorOptions, options, f"{_PROTOCOL}.options")
        return check_checkpoint(Path(given.model), _PROTOCOL)

    def generate(self, photo: np.ndarray) -> list[Candidate]:
        """The masks that segment-anything's generator keeps; the score is SAM's estimate, cut to 0..1.

        A photo of which a part is less than a pixel wide as SAM sees it, such as 1 x 5,000, has none.

        Args:
            photo: (H, W, 3) uint8 RGB.

        Raises:
            OutOfMemory: one point alone does not fit.
            StageFailed: the model says NaN or infinity.
        """
        return self._grid.generate(photo)


class PointGrid:
    """segment-anything's generator with a predictor of ours, which halves its batches when memory runs out.

    Args:
        predictor: answers as `segment_anything.SamPredictor` does, and says by `can_see(height, width)`
            whether a crop of that size can be resized.
        options: of the backend.
        name: of the backend, for messages.
    """

    def __init__(self, predictor: Any, options: GridOptions, name: str):
        from segment_anything import SamAutomaticMaskGenerator

        self.name, self._predictor = name, predictor
        self.generator = SamAutomaticMaskGenerator(
            _unused_model(),
            points_per_side=options.points_per_side,
            points_per_batch=options.points_at_once,
            pred_iou_thresh=options.pred_iou_thresh,
            stability_score_thresh=options.stability_score_thresh,
            crop_n_layers=options.crop_n_layers,
            min_mask_region_area=options.min_mask_region_area,
            box_nms_thresh=options.box_nms_thresh,
            output_mode="coco_rle",
        )
        self.generator.predictor = predictor

    def generate(self, photo: np.ndarray) -> list[Candidate]:
        """The masks of a photo that the generator keeps; none if a part of it cannot be seen."""
        if not self._can_be_seen(photo.shape[0], photo.shape[1]):
            return []
        return [
            Candidate(
                Rle(tuple(each["segmentation"]["size"]), each["segmentation"]["counts"]),
                min(1.0, max(0.0, each["predicted_iou"])),
            )
            for each in self._generate(np.ascontiguousarray(photo))
        ]

    def _can_be_seen(self, height: int, width: int) -> bool:
        from segment_anything.utils.amg import generate_crop_boxes

        layers, overlap = self.generator.crop_n_layers, self.generator.crop_overlap_ratio
        boxes, _ = generate_crop_boxes((height, width), layers, overlap)
        return all(self._predictor.can_see(y2 - y1, x2 - x1) for x1, y1, x2, y2 in boxes)

    def _generate(self, photo: np.ndarray) -> list[dict[str, Any]]:
        import torch

        while True:
            points = self.generator.points_per_batch
            try:
                return self.generator.generate(photo)
            except torch.OutOfMemoryError as error:
                if points == 1:
                    raise OutOfMemory(
                        f"{self.name}: points of one photo: out of memory with one point at a time ({error})"
                        "; use a larger GPU, or raise num_gpus"
                    ) from error
            # Outside of the handler: the traceback holds the batch's tensors.
            self.generator.points_per_batch = points // 2
            log.warning(
                "%s: out of memory with %d points at once; going on with %d", self.name, points, points // 2
            )
            torch.cuda.empty_cache()


def _unused_model() -> Any:
    """What segment-anything's generator makes its own predictor of, which ours replaces."""
    return SimpleNamespace(image_encoder=SimpleNamespace(img_size=1))


@cache
def _predictor_type() -> Any:
    """segment-anything's predictor, which is imported when it is needed, with our checks and dtype."""
    import torch
    from segment_anything import SamPredictor

    class Predictor(SamPredictor):
        """Encodes photos with matrix products in a dtype, and refuses numbers that are none."""

        def __init__(self, model: Any, dtype: torch.dtype, name: str):
            super().__init__(model)
            self._dtype, self._name = dtype, name

        def can_see(self, height: int, width: int) -> bool:
            """Whether a crop has a pixel on its short side as SAM sees it."""
            short, long = sorted((height, width))
            return short >= 1 and int(short * self.model.image_encoder.img_size / long + 0.5) >= 1

        def set_torch_image(self, *given: Any, **named: Any) -> None:
            with products_in(self.device, self._dtype), self.device:  # as in `sam`
                super().set_torch_image(*given, **named)
            self.features = self.features.float()

        def predict_torch(self, *given: Any, **named: Any) -> Any:
            masks, quality, low = super().predict_torch(*given, **named)
            check_finite(self._name, quality, low, _PROTOCOL)
            return masks, quality, low

    return Predictor
