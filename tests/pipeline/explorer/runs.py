"""A training run's folder, as the trainer and its evaluation leave it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.pipeline.explorer.corpus import HOSTILE


def write(folder: Path) -> Path:
    (folder / "evaluation" / "pictures").mkdir(parents=True)
    lines = []
    for step in range(1, 501):
        record = {
            "step": step,
            "loss": 6.0 / step**0.3,
            "norm": 2.0,
            "tokens_per_s": 4000.0,
            "memory_gb": 1.2,
        }
        record |= {"ce_0.8": 5.0, "ce_1.0": 6.0, "lr_vision": 1e-4, "lr_language": 2e-4, "steps": 1000}
        lines.append(json.dumps(record | ({"loss": "nan"} if step == 250 else {})))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 501, "lo')
    (folder / "left_out.json").write_text('{"benchmark_photos": 3}')
    regions = [{"source": "0", "caption": HOSTILE, "corpus_caption": "A cup."}]
    record = {"image": "/somewhere/photo.jpg", "regions": regions, "forwards": 3, "tokens": 9, "seconds": 0.1}
    (folder / "evaluation" / "captions.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "evaluation" / "summary.json").write_text(json.dumps({"images": 1, "exact": 0.25}))
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(folder / "evaluation" / "pictures" / "000.jpg")
    return folder
