"""The closed list of reasons for which a region (or a whole image) is dropped."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a region is not in the corpus. `ERRORS` are those that corrected input or a retry can change."""

    # The photo.
    PHOTO_MISSING = "photo_missing"  # named by the annotation, not found in any photo folder or tar
    PHOTO_UNREADABLE = "photo_unreadable"  # not an image, truncated, or a format that is not decoded
    PHOTO_TOO_LARGE = "photo_too_large"  # above the pixel limit (a decompression bomb)
    SOURCE_UNAVAILABLE = "source_unavailable"  # its source failed for a while; not a verdict on the record
    SIZE_MISMATCH = "size_mismatch"  # photo, annotation and label map disagree on width and height
    # The annotation.
    ANNOTATION_MISSING = "annotation_missing"  # a photo without its annotation, a PNG without its record
    ANNOTATION_UNREADABLE = "annotation_unreadable"  # not JSON, not UTF-8, NaN, a missing or ill-typed field
    PAIR_AMBIGUOUS = "pair_ambiguous"  # which photo and which label map belong together is not certain
    DUPLICATE_KEY = "duplicate_key"  # the same image again; the first one is kept
    UNSAFE_NAME = "unsafe_name"  # a member or file name that is absolute or leaves its folder
    UNKNOWN_CATEGORY = "unknown_category"  # a category id that the category list does not have
    LABELS_UNREADABLE = "labels_unreadable"  # the label map (panoptic PNG) is missing or does not decode
    LABELS_DISAGREE = "labels_disagree"  # the label map's areas are not those that the annotation declares
    SEGMENT_ABSENT = "segment_absent"  # declared, but without a pixel in the label map
    TOO_MANY_MASKS = "too_many_masks"  # more masks on the image than the limit
    MASK_EMPTY = "mask_empty"  # an RLE without a foreground pixel
    BOX_EMPTY = "box_empty"  # a box without a pixel of its photo, in the place of a mask
    BOX_DUPLICATE = "box_duplicate"  # the same box with the same category again; the first one is kept
    MASK_UNDECODABLE = "mask_undecodable"  # an RLE that is no RLE, or does not fill its image exactly
    GONE = "gone"  # was in the source when the image was planned, and is not any more
    REMOVED = "removed"  # taken out of the corpus on request; no later build brings it back
    BENCHMARK_PHOTO = "benchmark_photo"  # a photo of a benchmark, which is not to be trained on
    CROWD = "crowd"  # a crowd segment: many objects under one mask
    VOID = "void"  # the label 0, or a segment declared with it
    # Masks.
    MASK_NONE = "mask_none"  # the mask generator found nothing in the photo
    MASK_TOO_SMALL = "mask_too_small"
    MASK_DUPLICATE = "mask_duplicate"  # overlaps a mask kept before it almost completely
    MASK_OCCLUDED = "mask_occluded"  # nothing visible once the masks on top of it are painted
    MASK_PART = "mask_part"  # nested in a larger object's mask
    # Model verdicts.
    CAPTION_NONE = "caption_none"  # the captioner returned nothing
    CATEGORY_WRONG = "category_wrong"  # the caption does not describe the annotated category
    CATEGORY_NONE = "category_none"  # no core category could be named from the caption
    SEGMENTER_NONE = "segmenter_none"  # the segmenter found nothing for the category, or in the box
    IOU_LOW = "iou_low"  # the re-predicted mask does not match the original
    # Text.
    TEXT_TOO_SHORT = "text_too_short"
    TEXT_TOO_LONG = "text_too_long"
    TEXT_REPEATS = "text_repeats"  # repeated n-grams, a looping phrase or a repeated sentence
    TEXT_ENUMERATES = "text_enumerates"  # a runaway list
    TEXT_REFUSAL = "text_refusal"  # "I'm sorry, I cannot ..."
    TEXT_BOILERPLATE = "text_boilerplate"  # "The image shows an object." and nothing more
    TEXT_JUNK = "text_junk"  # not prose: markup, tokens, symbols, broken encoding
    TEXT_UNSURE = "text_unsure"  # the captioner itself is not sure of it
    # Stages that a recipe puts together, and stages of the user's own.
    VOTED_OUT = "voted_out"  # fewer members of a vote kept it than have to
    OWN_RULE = "own_rule"  # a stage of the user's own dropped it; its detail says why
    # Things that went wrong while asking.
    MODEL_ERROR = "model_error"  # the backend raised on this record alone
    ANSWER_INVALID = "answer_invalid"  # the model answered outside its schema, after retries
    WORKER_CRASHED = "worker_crashed"  # the worker process died each time it was given this record


ERRORS: frozenset[Reason] = frozenset(
    {
        Reason.PHOTO_MISSING,
        Reason.PHOTO_UNREADABLE,
        Reason.SOURCE_UNAVAILABLE,
        Reason.GONE,
        Reason.LABELS_UNREADABLE,
        Reason.MODEL_ERROR,
        Reason.ANSWER_INVALID,
        Reason.WORKER_CRASHED,
    }
)
"""Reasons that another attempt may turn. The work list does not depend on them."""

RETRIED: frozenset[Reason] = ERRORS | {Reason.ANNOTATION_UNREADABLE}
"""What `--retry-failed` looks for: older releases took an annotation that could not be read for a bad one."""

LEFT: frozenset[Reason] = frozenset({Reason.GONE, Reason.REMOVED})
"""Reasons of images that are in the work list and not to be looked for in a source."""
