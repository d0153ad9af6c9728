"""Tasks for lmms-eval in the shape of five of the paper's 16 benchmarks, on data that are drawn here.

choices   one image, options A to D          (as MMStar, AI2D)
short     one image, a short answer          (as ChartQA, DocVQA)
yes_no    one image, Yes or No               (as HallusionBench)
several   two images with options            (as BLINK), by `doc_to_messages`
reasoning one image, a long answer           (as MathVista), left to right
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("choices", "short", "yes_no", "several", "reasoning")

KWARGS: dict[str, dict[str, Any]] = {
    "choices": {"max_new_tokens": 2, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": 0},
    "short": {"max_new_tokens": 8, "until": ["ASSISTANT:"], "image_aspect_ratio": "original"},
    "yes_no": {"max_new_tokens": 4, "steps": 2, "block_length": 4},
    "several": {"max_new_tokens": 6, "temperature": 0},
    "reasoning": {"max_new_tokens": 16, "steps": 16, "block_length": 1},
}
"""Their `generation_kwargs`."""

AFTER = {
    "choices": "\nAnswer with the letter.",
    "short": "\nOne word.",
    "yes_no": " Yes or no?",
    "several": "",
    "reasoning": "\nStep by step.",
}

_UTILS = """
def images(doc):
    return [doc[name].convert("RGB") for name in ("image_1", "image_2") if doc.get(name) is not None]


def text(doc, lmms_eval_specific_kwargs=None):
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"])]
    return "\\n".join([doc["question"], *lines]) + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def messages(doc, lmms_eval_specific_kwargs=None):
    first, second = images(doc)
    content = [
        {"type": "text", "text": "Look at "},
        {"type": "image", "url": first},
        {"type": "text", "text": "and "},
        {"type": "image", "url": second},
        {"type": "text", "text": text(doc, lmms_eval_specific_kwargs)},
    ]
    return [{"role": "user", "content": content}]


def results(doc, answers):
    return {"right": float(answers[0] == doc["answer"])}
"""


def photo(number: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    """A drawn photo; other numbers give other ones."""
    drawn = np.random.RandomState(number).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(drawn).resize(size, Image.Resampling.NEAREST)


def documents(name: str, count: int) -> list[dict[str, Any]]:
    """The documents of a task, without right answers."""
    return [
        {
            "question": f"What is in picture {number}?",
            "choices": ["a cat", "a dog", "a tree"] if name in ("choices", "several") else [],
            "image_1": photo(number, (40 + number % 3 * 20, 56)),
            "image_2": photo(100 + number) if name == "several" else None,
        }
        for number in range(count)
    ]


def prompt(name: str, doc: dict[str, Any]) -> str:
    """What a document is to be asked, with marks where its images stand."""
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=False)]
    text = "\n".join([doc["question"], *lines]) + AFTER[name]
    return f"Look at <image>\nand <image>\n{text}" if name == "several" else f"<image>\n{text}"


def write_tasks(folder: Path, answers: dict[str, list[str]]) -> Path:
    """Write the tasks, with the right answers to their documents."""
    import datasets
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(_UTILS)
    for name, right in answers.items():
        docs = documents(name, len(right))
        rows = {key: [doc[key] for doc in docs] for key in docs[0]} | {"answer": right}
        table = datasets.Dataset.from_dict(rows)
        for column in ("image_1", "image_2"):
            table = table.cast_column(column, datasets.Image())
        table.to_parquet(folder / f"{name}.parquet")
        task = {
            "task": f"toy_{name}",
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.parquet")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": KWARGS[name],
            "lmms_eval_specific_kwargs": {"default": {"post_prompt": AFTER[name]}},
            "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
        }
        functions = {"doc_to_visual": "images", "doc_to_text": "text", "process_results": "results"}
        if name == "several":
            functions["doc_to_messages"] = "messages"
        lines = [f"{key}: !function utils.{function}" for key, function in functions.items()]
        (folder / f"toy_{name}.yaml").write_text(yaml.safe_dump(task) + "\n".join(lines) + "\n")
    return folder
