"""A tiny random Qwen3 in the published layout, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
"""What Qwen3's own does for messages without tools: an empty thought if thinking is off."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenizer."""


PUBLISHED_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
"""The sizes of Qwen3-8B."""


def write_qwen3(
    folder: Path,
    merges: list[tuple[str, str]] | None = None,
    seed: int = 0,
    max_positions: int = 4096,
    published: bool = False,
) -> Path:
    """Write the checkpoint.

    Args:
        folder: made if it is not there.
        merges: of the tokenizer, in order; None learns 700 from our own prompts, "yes" and "no" among them.
        seed: of the weights.
        max_positions: the model's own limit of its context.
        published: the sizes of Qwen3-8B, with weights that are zeros and take no room, see `hollow.py`.

    Returns:
        The folder.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    size, ids = _write_tokenizer(folder, merges)
    torch.manual_seed(seed)
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": max_positions}
    config = Qwen3Config(
        **(PUBLISHED_8B if published else tiny | {"vocab_size": -(-size // 64) * 64}),
        tie_word_embeddings=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    if published:
        from tests.tiny.hollow import write_hollow

        with torch.device("meta"):
            model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        config.architectures, config.dtype = ["Qwen3ForCausalLM"], torch.bfloat16
        config.save_pretrained(folder)
        write_hollow(folder / "model.safetensors", model.state_dict().items())
        return folder
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # far enough from zero that answers depend on the question
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, merges: list[tuple[str, str]] | None) -> tuple[int, dict[str, int]]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if merges is None:
        merges = _learned(alphabet)
    vocab = {token: index for index, token in enumerate(alphabet)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in merges))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "special": True,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for token in SPECIAL
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return tokenizer.get_vocab_size(), {token: tokenizer.token_to_id(token) for token in SPECIAL}


def _learned(alphabet: list[str]) -> list[tuple[str, str]]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from paracaption.pipeline.models import prompts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 700, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    text = [prompt.system + prompt.user for prompt in map(prompts.load_prompt, prompts.NAMES)]
    tokenizer.train_from_iterator([*text, *["yes\nno\n"] * 50], trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
