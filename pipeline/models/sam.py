"""The `sam` segmenter: Segment Anything asked for the object in a region's box.

A photo goes through the image encoder once; all its boxes then go through the mask decoder in batches. The
published checkpoints are pickles of plain tensors; they are read by torch's restricted unpickler, which runs
nothing, and the model's size comes from the tensors' shapes, not from the file's name.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from msgspec import Meta

from ...schemas.errors import ConfigError, one_line
from ..io import tensor_files, weights
from ..io.transfers import upload
from .batching import Batches
from .masks import check_finite, find_device, products_in, to_candidates
from .options import BackendOptions, read_options
from .protocols import Candidate, Checked

if TYPE_CHECKING:
    import torch
    from segment_anything.modeling import Sam

VERSION = "1"

DECODER_HEADS = 8
"""Attention heads of the mask decoder: the same in every published size, and in no tensor's shape."""

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""The publisher's, of RGB in 0..255; not in the checkpoint."""

NAMES = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}


class SamOptions(BackendOptions, frozen=True):
    """The options of `sam`.

    Attributes:
        model: the publisher's `.pth`.
        multimask: three candidates a box (whole, part, sub-part) instead of one.
        centre_point: ask with the box's centre as well; wrong for rings and crescents.
        device: "auto", "cpu" or "cuda".
        dtype: of the image encoder's matrix products; "auto" is bfloat16 on a GPU and float32 on a CPU.
        boxes_at_once: in the mask decoder; halved when memory runs out.
    """

    model: str
    multimask: bool = False
    centre_point: bool = False
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    boxes_at_once: Annotated[int, Meta(ge=1)] = 64


class SamShape(NamedTuple):
    """What the tensors' shapes say of a checkpoint. `grid` and `window` count patches, `patch` pixels."""

    embed_dim: int
    depth: int
    num_heads: int
    patch: int
    grid: int
    window: int
    global_blocks: tuple[int, ...]
    width: int
    mask_channels: int
    decoder_depth: int
    decoder_mlp: int
    num_masks: int
    iou_depth: int
    iou_width: int

    @property
    def name(self) -> str:
        """The publisher's name of the size, or the size."""
        return NAMES.get((self.embed_dim, self.depth), f"{self.depth} x {self.embed_dim}")


class SamSegmenter:
    """Predicts the object in each box. The phrases are not read.

    Args:
        options: see `SamOptions`.

    Raises:
        ConfigError: an option, the file or the device is wrong; the message names the fix.
    """

    reads_phrases = False

    def __init__(self, **options: Any):
        self.options = read_options(SamOptions, options, "segmenter.options")
        self.device, self.dtype = find_device(self.options.device, self.options.dtype)
        path = Path(self.options.model)
        self.model = build(read_tensors(path), path).to(self.device).eval()
        self._photo = Batches(1, "sam: the image encoder")
        self._boxes = Batches(self.options.boxes_at_once, "sam: boxes of one photo")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Weights, and what is asked of them."""
        given = read_options(SamOptions, options, "segmenter.options")
        return {
            "version": VERSION,
            "weights": weights.identity(checkpoint_file(Path(given.model))),
            "multimask": str(given.multimask),
            "centre_point": str(given.centre_point),
            "dtype": given.dtype,
        }

    @classmethod
    def check(cls, **options: Any) -> Checked:
        """Read names and shapes of the tensors, not the tensors.

        Raises:
            ConfigError: the file is no SAM checkpoint, or holds code; the message names the fix.
        """
        given = read_options(SamOptions, options, "segmenter.options")
        return check_checkpoint(Path(given.model))

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> list[list[Candidate]]:
        """The object in each box, best first: one candidate, or up to three with `multimask`.

        Args:
            photo: (H, W, 3) uint8 RGB.
            phrases: N core categories; not read.
            boxes: (N, 4) x1, y1, x2, y2 in pixels, exclusive at the far edge; clipped to the photo. A box
                with nothing in it finds nothing.

        Raises:
            OutOfMemory: one box alone does not fit.
            StageFailed: the model says NaN or infinity.
        """
        if len(phrases) != len(boxes):
            raise ValueError(f"{len(phrases)} phrases for {len(boxes)} boxes")
        height, width = photo.shape[:2]
        corners = np.asarray(boxes, np.float64).reshape(-1, 4).clip(0, [width, height, width, height])
        full = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])  # False for NaN
        if not full.any():
            return [[] for _ in phrases]
        import torch

        # SAM's own boxes end on the last pixel, not behind it.
        asked = corners[full]
        asked[:, 2:] = np.maximum(asked[:, :2], asked[:, 2:] - 1)
        with torch.no_grad():
            (seen,) = self._photo.run([photo], lambda photos: [self._see(photos[0])])
            found = iter(self._boxes.run(list(asked), partial(self._find, *seen, (height, width))))
        return [next(found) if is_full else [] for is_full in full]

    def _see(self, photo: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        """Features of one photo, and its size (height, width) as the model sees it, without the padding."""
        import torch
        from PIL import Image

        height, width = photo.shape[:2]
        side = self.model.image_encoder.img_size
        scale = side / max(height, width)
        # A photo that is all but a line keeps one pixel of its short side.
        rows, columns = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        resized = Image.fromarray(photo).resize((columns, rows), Image.Resampling.BILINEAR)
        pixels = upload(torch.tensor(np.asarray(resized)), self.device).permute(2, 0, 1)[None]
        # segment-anything makes tables of positions on torch's default device, and indexes with them.
        with products_in(self.device, self.dtype), self.device:
            features = self.model.image_encoder(self.model.preprocess(pixels))
        return features.float(), (rows, columns)

    def _find(
        self,
        features: torch.Tensor,
        inner: tuple[int, int],
        size: tuple[int, int],
        boxes: Sequence[np.ndarray],
    ) -> list[list[Candidate]]:
        """Candidates of each box, given in pixels of the photo, the far edge inside."""
        import torch

        scale = np.array([inner[1] / size[1], inner[0] / size[0]])
        corners = np.stack(boxes).reshape(-1, 2, 2) * scale  # (n, corner, x and y)
        points = None
        if self.options.centre_point:
            centres = torch.tensor(corners.mean(axis=1, keepdims=True), dtype=torch.float)
            centres = upload(centres, self.device)
            points = (centres, torch.ones(centres.shape[:2], dtype=torch.int, device=self.device))
        asked = upload(torch.tensor(corners.reshape(-1, 4), dtype=torch.float), self.device)
        sparse, dense = self.model.prompt_encoder(points=points, boxes=asked, masks=None)
        masks, quality = self.model.mask_decoder(
            image_embeddings=features,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=self.options.multimask,
        )
        scores = check_finite(f"sam ({self.options.model})", quality, masks)

        def enlarge(low: torch.Tensor) -> torch.Tensor:
            large = self.model.postprocess_masks(low[None], inner, size)
            return large[0] > self.model.mask_threshold

        return to_candidates(masks, scores, size, enlarge)


# The checkpoint.


def check_checkpoint(path: Path, protocol: str = "segmenter") -> Checked:
    """Read names and shapes of the tensors, not the tensors.

    Raises:
        ConfigError: the file is no SAM checkpoint, or holds code; the message names the fix.
    """
    tensors = read_tensors(path, "meta", protocol)
    shape = measure(tensors, path)
    build(tensors, path)
    side = shape.grid * shape.patch
    what = f"SAM {shape.name}: image encoder {shape.depth} x {shape.embed_dim} at {side} px"
    num_bytes = 4 * sum(tensor.numel() for tensor in tensors.values())
    return Checked(what, num_bytes, ["weights stay in float32; bfloat16 is for matrix products only"])


def read_tensors(path: Path, device: str = "cpu", protocol: str = "segmenter") -> dict[str, torch.Tensor]:
    """The state dict of a `.pth`, mapped from the file; nothing in it is executed.

    Args:
        path: the file.
        device: "meta" for names and shapes alone.
        protocol: whose option the path is, for messages.

    Raises:
        ConfigError: no such file, it is broken, or it holds more than named tensors.
    """
    import torch

    mapped = zipfile.is_zipfile(checkpoint_file(path, protocol))
    try:
        found = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path}: a pickle with more than tensors in it, which could run code; it was not loaded. "
            "Use the publisher's file, or, if you trust this one, load it elsewhere and save only its "
            "state_dict()"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({one_line(error)}); download it again") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        keys = f" with {', '.join(sorted(map(str, found))[:5])}" if isinstance(found, Mapping) else ""
        raise ConfigError(
            f"{path}: a {type(found).__name__}{keys}, not a state dict of named tensors; "
            "save the part that is the model's state_dict() on its own"
        )
    return dict(found)


def measure(tensors: Mapping[str, torch.Tensor], path: Path) -> SamShape:
    """The model's size from its tensors' shapes.

    Raises:
        ConfigError: they are not SAM's.
    """
    try:
        grid = tensors["image_encoder.pos_embed"].shape[1]
        embed_dim, _, patch, _ = tensors["image_encoder.patch_embed.proj.weight"].shape
        depth = _count(tensors, "image_encoder.blocks.")
        heights = [tensors[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape for i in range(depth)]
        reach = [(rows + 1) // 2 for rows, _ in heights]  # a table of 2 n - 1 rows looks n patches far
        iou_depth = _count(tensors, "mask_decoder.iou_prediction_head.layers.")
        return SamShape(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=embed_dim // heights[0][1],
            patch=patch,
            grid=grid,
            window=min(reach) if min(reach) < grid else 0,
            global_blocks=tuple(i for i in range(depth) if reach[i] == grid),
            width=tensors["image_encoder.neck.0.weight"].shape[0],
            mask_channels=tensors["prompt_encoder.mask_downscaling.6.weight"].shape[1],
            decoder_depth=_count(tensors, "mask_decoder.transformer.layers."),
            decoder_mlp=tensors["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
            num_masks=tensors["mask_decoder.mask_tokens.weight"].shape[0] - 1,
            iou_depth=iou_depth,
            iou_width=tensors["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{path}: not SAM's tensors ({type(error).__name__}: {error}); use the publisher's sam_vit_*.pth"
        ) from error


def build(tensors: Mapping[str, torch.Tensor], path: Path) -> Sam:
    """SAM around these tensors, which it takes as they are, on the CPU or on meta.

    Raises:
        ConfigError: tensors are missing, unknown or of another shape.
    """
    import torch
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    shape = measure(tensors, path)
    side = shape.grid * shape.patch
    with torch.device("meta"):
        sam = Sam(
            image_encoder=ImageEncoderViT(
                img_size=side,
                patch_size=shape.patch,
                embed_dim=shape.embed_dim,
                depth=shape.depth,
                num_heads=shape.num_heads,
                out_chans=shape.width,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
                use_rel_pos=True,
                window_size=shape.window,
                global_attn_indexes=shape.global_blocks,
            ),
            prompt_encoder=PromptEncoder(
                embed_dim=shape.width,
                image_embedding_size=(shape.grid, shape.grid),
                input_image_size=(side, side),
                mask_in_chans=shape.mask_channels,
            ),
            mask_decoder=MaskDecoder(
                transformer_dim=shape.width,
                transformer=TwoWayTransformer(
                    depth=shape.decoder_depth,
                    embedding_dim=shape.width,
                    num_heads=DECODER_HEADS,
                    mlp_dim=shape.decoder_mlp,
                ),
                num_multimask_outputs=shape.num_masks,
                iou_head_depth=shape.iou_depth,
                iou_head_hidden_dim=shape.iou_width,
            ),
        )
    sam.pixel_mean = torch.tensor(PIXEL_MEAN).view(-1, 1, 1)
    sam.pixel_std = torch.tensor(PIXEL_STD).view(-1, 1, 1)
    wanted = {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()}
    found = {name: tensor_files.from_torch(tensor) for name, tensor in tensors.items()}
    tensor_files.check_tensors(path, found, wanted)
    sam.load_state_dict(tensors, assign=True)
    return sam


def _count(tensors: Mapping[str, Any], prefix: str) -> int:
    """How many numbers follow the prefix in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def checkpoint_file(path: Path, protocol: str = "segmenter") -> Path:
    """The path, refused if there is no such file."""
    if not path.is_file():
        raise ConfigError(
            f"{protocol}.options.model: no file {path}; download sam_vit_h_4b8939.pth (or _l_, _b_) from the "
            "publisher once, where every node sees it"
        )
    return path
