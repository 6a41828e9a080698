"""Tiny random targets in folders as their makers publish them: each kind below is one property of such folders."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..training.tiny import CHARACTERS, TEMPLATE

SPECIAL = ["<p>", "<u>", "<a>", "<e>"]
ADDED = ["<tool>", "<think>"]
ORIGINAL = 64  # positions before rotary embeddings are scaled
FACTOR = 4.0
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}


def scaled(rope_type: str, max_position_embeddings: int, **others) -> dict:
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": FACTOR, **others}
    return {"shape": {"max_position_embeddings": max_position_embeddings, "rope_parameters": rope}}


KINDS = {
    "plain": {},
    "padded": {"padding": 33},
    "added": {"added": ADDED},
    "tied": {"shape": {"tie_word_embeddings": True}},
    "sharded": {"shard": "40KB"},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "llama3": scaled("llama3", 256, **LLAMA3),
    "yarn": scaled("yarn", 256, original_max_position_embeddings=ORIGINAL),
    "linear": scaled("linear", ORIGINAL),
    "dynamic": scaled("dynamic", ORIGINAL),
    "wide heads": {"shape": {"head_dim": 64}},
    "generation": {"generation": True},
}


def save_folder(folder: Path, shape: dict = {}, padding: int = 0, added: list[str] = (), dtype=torch.float32,
                shard: str | None = None, generation: bool = False) -> Path:
    tokens = [*SPECIAL, *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<p>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<p>", eos_token="<e>", chat_template=TEMPLATE)
    fast.add_tokens(list(added))
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": len(fast) + padding, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 3,
        "pad_token_id": 0, **shape,
    })
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return folder
