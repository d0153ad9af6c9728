"""The language model one prompt at a time, in the transformers that the original GAR pins.

Run by `python -m benchmarks.gar --original PYTHON` with that interpreter; needs nothing of this project there
but torch, safetensors and transformers:

    PYTHON gar_original.py FOLDER PROMPTS ATTENTION MAX_TOKENS STOP

FOLDER is the exported language model, PROMPTS a safetensors file with one tensor of embeddings a prompt, by
its number. Prints one line of JSON: versions, wall and CPU seconds, and the tokens of each answer.
"""

import json
import sys
import time
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers import LlamaForCausalLM


def main(folder: str, file: str, attention: str, max_tokens: str, stop: str) -> None:
    torch.set_num_threads(1)
    found = safetensors.torch.load_file(file)
    prompts = [found[str(number)] for number in range(len(found))]
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, attn_implementation=attention, trust_remote_code=False
    )
    model.to(prompts[0].dtype).eval()

    def ask(prompt: torch.Tensor) -> list[int]:
        with torch.inference_mode():
            tokens = model.generate(
                inputs_embeds=prompt[None],
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=int(max_tokens),
                do_sample=False,
                eos_token_id=int(stop),
                pad_token_id=int(stop),
                use_cache=True,
            )
        return tokens[0].tolist()

    ask(prompts[0])
    wall, cpu = time.perf_counter(), time.process_time()
    answers = [ask(prompt) for prompt in prompts]
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
    print(json.dumps({**versions, **took, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
