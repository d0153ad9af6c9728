"""Record what the released PerceptionDLM-Base answers at tiny size: writes `answers.json` beside this file.

    git clone https://github.com/MSALab-PKU/PerceptionDLM released     # commit e1215de
    pip install torch==2.8.0 transformers==4.51.3 pillow==11.0.0       # as the released code pins them
    python -m tests.model_training.base.record released                # on a CPU, in a few minutes

The weights are `tiny_base.py`'s and the questions those of `cases.py`. Per case, the JSON has the ids of the
prompt, those of the answer, the step that wrote each of them and its confidence, the text, and `gap`: by how
much, as a share, the closest decision between two tokens or two places was decided. Where it is far above
float32's rounding, an honest implementation gives the same answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.model_training.base import tiny_base
from tests.model_training.base.cases import CASES, Case

FILE = Path(__file__).with_name("answers.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Record answers of the released PerceptionDLM-Base.")
    parser.add_argument("released", type=Path, help="Checkout of the released code.")
    parser.add_argument("--only", help="Print this case, and write nothing.")
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.released))
    model, tokenizer = released_model(Path("build/tiny-base"))
    chosen = {asked.only: CASES[asked.only]} if asked.only else CASES
    found = {}
    for name, case in chosen.items():
        found[name] = record(model, tokenizer, case)
        sys.stderr.write(f"{name}: {found[name]['answer']!r}, gap {found[name]['gap']:.1e}\n")
    if not asked.only:
        FILE.write_text(
            "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n"
        )


def released_model(folder: Path) -> tuple[Any, Any]:
    """The released code's model with our weights, and its tokenizer."""
    from safetensors.torch import load_file
    from smallvlm.models.dmllm.configuration_dmllm import DMLLMConfig
    from smallvlm.models.dmllm.configuration_llada import LLaDAConfig
    from smallvlm.models.dmllm.modeling_dmllm import DMLLM
    from smallvlm.models.dmllm.modeling_llada import LLaDAModelLM
    from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

    tiny_base.write_checkpoint(folder)
    fields = tiny_base.config()
    language = LLaDAConfig(**fields.pop("language_model_config"))
    vision = SiglipVisionConfig(**fields.pop("vision_model_config"))
    config = DMLLMConfig(language_model_config=language, vision_model_config=vision, **fields)
    model = DMLLM(
        config, language_model=LLaDAModelLM(language), vision_model=SiglipVisionModel(vision)
    ).eval()
    lacking, unknown = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    unused = ("encoder.layers.2.", "post_layernorm.", "head.")
    assert not unknown and all(any(part in name for part in unused) for name in lacking), (lacking, unknown)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def record(model: Any, tokenizer: Any, case: Case) -> dict[str, Any]:
    """What the released `chat` answers."""
    views = [cut(photo) for photo in case.photos]
    watch = Watch(model.language_model, case.length)
    settings = {"steps": case.steps, "gen_length": case.length, "block_length": case.block}
    if case.stop:
        settings |= {"tokenizer": tokenizer, "stopping_criteria": list(case.stop)}
    generate, seen = model.generate, {}

    def noted(pixel_values: Any = None, input_ids: Any = None, **options: Any) -> Any:
        seen["prompt"] = input_ids[0].tolist()
        seen["tokens"] = generate(pixel_values=pixel_values, input_ids=input_ids, **options)
        return seen["tokens"]

    with watch.watching(), mock.patch.object(model, "generate", noted):
        answer = model.chat(
            tokenizer,
            pixel_values=torch.cat(views) if views else None,
            question=case.question,
            generation_config=settings,
            history=history(model.get_template(), case) or None,
            num_patches_list=[len(view) for view in views],
        )
    tokens = seen["tokens"][0].tolist()
    start = len(seen["prompt"])
    steps = [watch.step_of.get(start + place, 0) for place in range(len(tokens))]
    return {
        "prompt": seen["prompt"],
        "tokens": tokens,
        "steps": steps,
        "confidences": [
            round(watch.confidence_of.get(start + place, 0.0), 6) for place in range(len(tokens))
        ],
        "forwards": watch.forwards,
        "answer": answer,
        "gap": watch.gap,
    }


def history(template: dict[str, Any], case: Case) -> str:
    """The turns before, by the released template. What `chat` returns as history repeats itself from turn 3
    on."""
    return "".join(
        template["INSTRUCTION"].format(input=question) + answer + template["SUFFIX"]
        for question, answer in case.turns
    )


def cut(photo: tuple[int, int, int]) -> torch.Tensor:
    """The views of a photo, as the released code's benchmarks prepare them."""
    from smallvlm.models.dmllm.processing_dmllm import dynamic_preprocess
    from transformers import SiglipImageProcessor

    views = dynamic_preprocess(tiny_base.photo(*photo), image_size=tiny_base.TILE_PX, use_thumbnail=True)
    processor = SiglipImageProcessor(size={"height": tiny_base.TILE_PX, "width": tiny_base.TILE_PX})
    return processor.preprocess(images=views, return_tensors="pt")["pixel_values"]


class Watch:
    """Sees which places each step writes, and how closely that was decided."""

    def __init__(self, language_model: Any, length: int):
        self.language_model, self.length = language_model, length
        self.forwards, self.gap = 0, float("inf")
        self.step_of: dict[int, int] = {}
        self.confidence_of: dict[int, float] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        topk, argmax = torch.topk, torch.argmax

        def seen_topk(values: torch.Tensor, k: int) -> Any:
            found = topk(values, k=k)
            self._written(values.double().numpy(), found.indices.tolist())
            return found

        def seen_argmax(values: torch.Tensor, dim: int) -> torch.Tensor:
            if values.ndim == 3 and values.shape[-1] == tiny_base.ROWS:
                best = topk(values[0, -self.length :], k=2).values.double()
                self.logits = best[:, 0] - best[:, 1]
            return argmax(values, dim=dim)

        def count(*_: Any) -> None:
            self.forwards += 1

        hook = self.language_model.model.register_forward_hook(count)
        with mock.patch("torch.topk", seen_topk), mock.patch("torch.argmax", seen_argmax):
            yield
        hook.remove()

    def _written(self, confidence: np.ndarray, chosen: list[int]) -> None:
        may = np.flatnonzero(np.isfinite(confidence))
        inside = sorted(set(chosen) & set(may.tolist()))
        first = len(confidence) - self.length
        for place in inside:
            self.step_of[place], self.confidence_of[place] = self.forwards, float(confidence[place])
            self.gap = min(self.gap, float(self.logits[place - first]))
        left_out = np.setdiff1d(may, inside)
        if inside and len(left_out):
            worst, best = confidence[inside].min(), confidence[left_out].max()
            self.gap = min(self.gap, float((worst - best) / worst))


if __name__ == "__main__":
    main()
