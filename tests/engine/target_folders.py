"""Tiny random targets in folders like those that people publish: a kind is one property of such a folder."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..training.tiny import CHARACTERS, TEMPLATE

SPECIAL = ["<pad>", "<u>", "<a>", "<e>"]  # the last three: TEMPLATE's
ADDED = ["<tool>", "<think>"]
TRAINED_POSITIONS = 64  # before rotary embeddings are scaled
FACTOR = 4.0
LENGTHS = (3, 20, 40, 90, 120)
NUM_PROMPTS = 24
NEW_TOKENS = 60
DEFAULTS = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}


def scaled(rope_type: str, positions: int, **others: float) -> dict[str, Any]:
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": FACTOR, **others}
    return {"max_position_embeddings": positions, "rope_parameters": rope}


FULL, ORIGINAL = int(FACTOR * TRAINED_POSITIONS), {"original_max_position_embeddings": TRAINED_POSITIONS}
KINDS: dict[str, dict[str, Any]] = {
    "rows of padding in the vocabulary": {"padding": 33},
    "tokens added to the tokenizer": {"added": ADDED},
    "a tokenizer larger than the model": {"added": ADDED, "padding": -1},
    "tied embedding and head": {"tie_word_embeddings": True},
    "embedding and head of their own": {},
    "weights in several files": {"file_size": "40KB"},
    "weights in bfloat16": {"dtype": torch.bfloat16},
    "weights in float16": {"dtype": torch.float16},
    "llama3 rotary scaling": scaled("llama3", FULL, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
    "yarn rotary scaling": scaled("yarn", FULL, **ORIGINAL),
    "linear rotary scaling": scaled("linear", TRAINED_POSITIONS),
    "dynamic rotary scaling": scaled("dynamic", TRAINED_POSITIONS),
    "heads wider than hidden / heads": {"head_dim": 64},
    "several end tokens and sampling defaults": {"defaults": DEFAULTS},
}
"""Arguments of `publish`; kinds that share none of them fit one folder."""


def publish(folder: Path, defaults: dict[str, Any] | None = None, **kind: Any) -> tuple[Path, Path]:
    """The target's folder and a file of prompts, with the added tokens among their characters.

    kind: arguments of `save_folder`. defaults: sampling parameters for generation_config.json, which then names end
    tokens that the target does say to these prompts.
    """
    target, prompts = folder / "target", folder / "prompts.jsonl"
    model, tokenizer = save_folder(target, **kind)
    dice = random.Random(0)
    rows = []
    for number in range(NUM_PROMPTS):
        text = dice.choices(CHARACTERS, k=LENGTHS[number % len(LENGTHS)])
        rows.append({"question": "".join([text[0], dice.choice(kind.get("added", [""])), *text[1:]])})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if defaults is not None:
        texts = [f"<u>{row['question']}<e><a>" for row in rows]
        *ends, own = end_tokens([answer(model, tokenizer(text).input_ids) for text in texts])
        model.generation_config.update(**defaults, eos_token_id=ends)
        model.generation_config.save_pretrained(target)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(own)
        tokenizer.save_pretrained(target)
    return target, prompts


def save_folder(
    folder: Path,
    added: Sequence[str] = (),
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    file_size: str | None = None,
    **shape: Any,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama with a token for each character.

    added: tokens of the tokenizer behind these. padding: rows of the vocabulary behind the tokenizer's tokens.
    file_size: of the largest file of weights. shape: of the Llama.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<e>", chat_template=TEMPLATE
    )
    tokenizer.add_tokens(list(added))
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": len(tokenizer) + padding, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": FULL,
        "tie_word_embeddings": False, "initializer_range": 0.3, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **shape,
    })  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": file_size} if file_size else {}))
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@torch.no_grad()
def answer(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    """Greedy, without end."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[])
    return output[0, len(prompt) :].tolist()


def end_tokens(answers: Sequence[list[int]], count: int = 3) -> list[int]:
    """Tokens that end these answers at different places, none of them at once."""
    ends: list[int] = []
    for tokens in answers:
        for place, token in enumerate(tokens):
            if token in ends:
                break
            if place >= 8 and token not in tokens[:place]:
                ends.append(token)
                break
        if len(ends) == count:
            return ends
    raise AssertionError("this target says too little to end in several ways")
