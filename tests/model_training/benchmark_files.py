"""A small benchmark on disk, in both published layouts, and a judge that says what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from paracaption.filters import rle
from tests.chat_server import ChatServer, Reply, serving

WHICH = "Which of the following is applicable to the description?"


def question(kind: str, *choices: tuple[str, float]) -> dict:
    return {"question": WHICH, "choices": choices, "type": kind}


def write_bench(folder: Path, kind: str = "paradlc", images: int = 2) -> Path:
    """Photos of 60 x 40 pixels with two regions each, a cat and dogs, and two questions about each."""
    (folder / "images").mkdir(parents=True)
    annotations, qa, names, photos = [], {}, {}, []
    for image in range(images):
        pixels = np.random.default_rng(image).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{image}.png")
        regions = []
        for index, name in enumerate(("cat", "dogs")):
            mask = np.zeros((40, 60), bool)
            mask[5 + index : 15, 5 + 20 * index : 20 + 20 * index] = True
            segmentation = {"size": [40, 60], "counts": rle.from_mask(mask).rle.counts}
            key = f"{image}_{index}" if kind == "paradlc" else str(10 * image + index)
            regions.append({"index": index, "mask_rle": segmentation, "bbox": [0, 0, 1, 1]})
            annotations.append({"id": 10 * image + index, "image_id": image, "segmentation": segmentation})
            names[key] = name
            qa[key] = [
                question("positive", (f"The {name} is red.", 1), ("It is not.", -1), ("Nobody says.", 0)),
                question("negative", ("The tree is mentioned.", -1), ("The tree is not mentioned.", 1)),
            ]
        about = {"file_name": f"{image}.png", "height": 40, "width": 60}
        photos.append({**about, "id": image, "image_id": str(image), "annotations": regions})
    published = photos if kind == "paradlc" else {"images": photos, "annotations": annotations}
    for name, content in (("annotations", published), ("qa", qa), ("class_names", names)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def predictions(folder: Path, captions: dict[str, str]) -> dict:
    """A captioner's configuration that says these."""
    path = folder / "said.json"
    path.write_text(json.dumps(captions))
    return {"name": "predictions", "options": {"path": str(path)}}


def served(answer: Callable[[str], str]):
    """A server that answers prompts; as `serving` of tests/chat_server.py."""

    def reply(body: dict, _: int) -> Reply:
        content = body["messages"][-1]["content"]
        return Reply(answer(content if isinstance(content, str) else content[-1]["text"]))

    return serving(reply)


def judge_of(server: ChatServer, **options: object) -> dict:
    """The configuration of a judge behind that server."""
    given = {"model": "tiny", "base_url": server.url, "max_retries": 0, "max_concurrency": 2, **options}
    return {"name": "openai", "options": given}
