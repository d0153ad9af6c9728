"""The `sam3` mask generator: SAM 3's tracker asked at every point of a grid.

The published checkpoint is a video model's. Its tracker answers points, as SAM does, and shares the vision
encoder with the detector. transformers' implementation of it answers; which masks stay is decided by
segment-anything's generator, as for `sam`.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...schemas.errors import ConfigError, one_line
from ..io import tensor_files, weights
from ..io.transfers import upload
from .masks import check_finite, find_device, products_in
from .options import read_options
from .protocols import Candidate, Checked
from .sam3 import checkpoint_folder, load_processor
from .sam_generator import GridOptions, PointGrid

if TYPE_CHECKING:
    import torch

VERSION = "1"

_PROTOCOL = "mask_generator"

_PLACES = (
    ("detector_model.vision_encoder.backbone.", "vision_encoder.backbone."),
    ("tracker_neck.", "vision_encoder.neck."),
    ("tracker_model.", ""),
)
"""Beginnings of the published names, and what they are called in transformers' model of the tracker."""

_EMBEDDINGS = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
"""The same numbers, which a checkpoint may store once or twice."""


class Sam3GeneratorOptions(GridOptions, frozen=True):
    """The options of `sam3`: `model` is the folder of the checkpoint, the others are those of `sam`."""


class Sam3MaskGenerator:
    """Finds the masks of a photo at the points of a grid.

    Args:
        options: see `Sam3GeneratorOptions`.

    Raises:
        ConfigError: an option, the folder or the device is wrong; the message names the fix.
    """

    def __init__(self, **options: Any):
        import torch
        from transformers import Sam3TrackerModel

        given = read_options(Sam3GeneratorOptions, options, f"{_PROTOCOL}.options")
        device, dtype = find_device(given.device, given.dtype, _PROTOCOL)
        folder = checkpoint_folder(given.model, _PROTOCOL)
        read = _read(folder)
        model: Any = Sam3TrackerModel.from_pretrained(
            None,
            config=read.config,
            state_dict={name: tensor.load() for name, tensor in read.tensors.items()},
            dtype=torch.float32,
            trust_remote_code=False,
        )
        processor = load_processor(folder).image_processor
        predictor = _predictor_type()(model.to(device).eval(), processor, dtype, f"sam3 ({given.model})")
        self._grid = PointGrid(predictor, given, "sam3")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Weights, the options that decide which masks stay, and the release of transformers."""
        given = read_options(Sam3GeneratorOptions, options, f"{_PROTOCOL}.options")
        return {
            "version": VERSION,
            "weights": weights.identity(checkpoint_folder(given.model, _PROTOCOL)),
            "transformers": ".".join(importlib.metadata.version("transformers").split(".")[:2]),
            **given.identity(),
        }

    @classmethod
    def check(cls, **options: Any) -> Checked:
        """Read configuration and tensor shapes, not the weights.

        Raises:
            ConfigError: something does not fit; the message names the file and the fix.
        """
        given = read_options(Sam3GeneratorOptions, options, f"{_PROTOCOL}.options")
        folder = checkpoint_folder(given.model, _PROTOCOL)
        read = _read(folder)
        tower = read.config.vision_config.backbone_config
        side = load_processor(folder).image_processor.size["height"]
        what = f"SAM 3's tracker: vision {tower.num_hidden_layers} x {tower.hidden_size} at {side} px"
        num_bytes = 4 * sum(int(np.prod(tensor.shape)) for tensor in read.tensors.values())
        return Checked(what, num_bytes, ["weights stay in float32; bfloat16 is for matrix products only"])

    def generate(self, photo: np.ndarray) -> list[Candidate]:
        """The masks that segment-anything's generator keeps of what the tracker answers.

        Args:
            photo: (H, W, 3) uint8 RGB.

        Raises:
            OutOfMemory: one point alone does not fit.
            StageFailed: the model says NaN or infinity.
        """
        return self._grid.generate(photo)


class _Checkpoint(NamedTuple):
    """The tracker in a checkpoint: its configuration, and its tensors by the names of transformers' model."""

    config: Any
    tensors: dict[str, tensor_files.LazyTensor]


def _read(folder: Path) -> _Checkpoint:
    """The tracker's configuration and its tensors, checked.

    Raises:
        ConfigError: the folder has no tracker, or a tensor is missing or of another shape.
    """
    import torch
    from transformers import Sam3TrackerConfig, Sam3TrackerModel, Sam3VideoConfig

    try:
        whole = Sam3VideoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        given: dict[str, Any] = {name: getattr(whole.tracker_config, name).to_dict() for name in parts}
        config = Sam3TrackerConfig(**given)
        with torch.device("meta"):
            model = Sam3TrackerModel(config)
    except Exception as error:  # strict configurations raise errors of many types
        raise ConfigError(f"{folder / 'config.json'}: {one_line(error)}; download it again") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {_name_here(name): tensor for name, tensor in tensor_files.list_tensors(folder).items()}
    for name, same in (_EMBEDDINGS, _EMBEDDINGS[::-1]):
        if name not in found and same in found:
            found[name] = found[same]
    tensors = {name: found[name] for name in wanted if name in found}
    tensor_files.check_tensors(folder, tensors, wanted)
    return _Checkpoint(config, tensors)


def _name_here(name: str) -> str:
    """A published name as transformers' model of the tracker has it; other parts keep theirs."""
    for published, ours in _PLACES:
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return f"unused.{name}"


@cache
def _predictor_type() -> Any:
    """What segment-anything's generator asks, answered by the tracker."""
    import torch
    from torch.nn import functional

    class Predictor:
        """Sees one crop of a photo at a time; points are in pixels of the square that the model sees."""

        def __init__(self, model: Any, processor: Any, dtype: torch.dtype, name: str):
            self.model, self.processor, self._dtype, self._name = model, processor, dtype, name
            self.model.mask_threshold = 0.0
            self.transform = self
            self.side = processor.size["height"]

        @property
        def device(self) -> torch.device:
            return self.model.device

        def can_see(self, height: int, width: int) -> bool:
            """Whether a crop can be resized: any can, to the square."""
            return min(height, width) >= 1

        def apply_coords(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
            return points * np.array([self.side / size[1], self.side / size[0]])

        @torch.no_grad()
        def set_image(self, crop: np.ndarray) -> None:
            pixels = torch.tensor(np.ascontiguousarray(crop)).permute(2, 0, 1)
            inputs = self.processor(images=pixels, input_data_format="channels_first", return_tensors="pt")
            self._size = crop.shape[:2]
            with products_in(self.device, self._dtype):
                seen = self.model.get_image_embeddings(upload(inputs["pixel_values"], self.device))
            self._seen = [level.float() for level in seen]

        def reset_image(self) -> None:
            self._seen = []

        @torch.no_grad()
        def predict_torch(self, points: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
            output = self.model(
                input_points=points[None].float(),
                input_labels=labels[None],
                image_embeddings=self._seen,
                multimask_output=True,
            )
            low, quality = output.pred_masks[0].float(), output.iou_scores[0].float()
            check_finite(self._name, quality, low, _PROTOCOL)
            masks = functional.interpolate(low, size=self._size, mode="bilinear", align_corners=False)
            return masks, quality, low

    return Predictor
