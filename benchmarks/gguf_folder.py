"""A Hugging Face folder from a GGUF file of Llama's architecture: fp32 weights, tokenizer and chat template.

vLLM and the trainer take folders of safetensors. Small chat models are published as one GGUF file, with matrices
quantised in blocks. Dequantised, they are a model like any other: all compared methods get the same numbers.
Names and layouts: gguf-py's `constants.py`, llama.cpp's `conversion` of Llama (queries and keys interleave the two
halves that rotary embeddings pair, and are put back here).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

Progress = Callable[[int, int], None]
"""Told how many tensors of how many are done."""

TABLES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Whether tokens of a kind are special, that is no part of a text to show. All others are BPE's.
ADDED = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
# Digits one by one, then GPT-2's own rule: llama.cpp's pre-tokenizer "smollm" (src/llama-vocab.cpp).
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
}


class GGUFError(ValueError):
    """The file is no GGUF that this module can convert; the message is one sentence."""


class Fields(dict[str, Any]):
    """The file's metadata; `get` for what a file may lack."""

    def __missing__(self, name: str) -> Any:
        raise GGUFError(f"The GGUF file lacks the field {name}.")


def convert(file: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Write `folder`, which is complete when `config.json` is there: that file is written last (GGUFError)."""
    try:
        reader = GGUFReader(file)
        fields = Fields({name: field.contents() for name, field in reader.fields.items()})
    except (OSError, ValueError, LookupError) as error:
        raise GGUFError(f"{file} cannot be read as GGUF ({error}).") from error
    architecture, pre_tokenizer = fields.get("general.architecture"), fields.get("tokenizer.ggml.pre")
    if architecture != "llama" or pre_tokenizer not in PRE_TOKENIZERS:
        raise GGUFError(
            f"{file} holds architecture {architecture!r} with pre-tokenizer {pre_tokenizer!r}; only 'llama' with one "
            f"of {', '.join(PRE_TOKENIZERS)} can be converted."
        )
    # Models with these features exist, and the conversion would make other models of them.
    if fields.get("tokenizer.ggml.add_bos_token") or fields.get("llama.rope.scaling.type", "none") != "none":
        raise GGUFError(f"{file} adds a first token to every text or scales its positions, which is not converted.")
    config = model_config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(fields).save_pretrained(folder)
    save_file(weights(reader, config, progress), folder / "model.safetensors", metadata={"format": "pt"})
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(folder)


def model_config(fields: Fields, tied: bool) -> LlamaConfig:
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.rope.dimension_count", hidden // heads),
        max_position_embeddings=fields["llama.context_length"],
        # A float32 in the file: 1e-5 as it was meant, not 9.99999974e-06.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def weights(reader: GGUFReader, config: LlamaConfig, progress: Progress) -> dict[str, torch.Tensor]:
    found = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        name = weight_name(tensor.name)
        try:
            matrix = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise GGUFError(f"The GGUF file's {tensor.name} has the type {tensor.tensor_type.name}.") from error
        if name.endswith("q_proj.weight"):
            matrix = without_interleaving(matrix, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            matrix = without_interleaving(matrix, config.num_key_value_heads)
        found[name] = torch.from_numpy(np.array(matrix, np.float32, order="C"))
        progress(done, len(reader.tensors))
    # transformers would fill what is missing with random numbers.
    wanted = {f"model.layers.{i}.{name}.weight" for i in range(config.num_hidden_layers) for name in LAYER.values()}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
    if missing := wanted - found.keys():
        raise GGUFError(f"The GGUF file lacks {len(missing)} of the model's weights, {min(missing)} among them.")
    return found


def weight_name(name: str) -> str:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
    if len(parts) == 2 and parts[0] in TABLES and parts[1] == "weight":
        return f"{TABLES[parts[0]]}.weight"
    raise GGUFError(f"The GGUF file has a tensor {name!r} that Llama has no place for.")


def without_interleaving(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads, d / 2, 2]` of llama.cpp to `[heads, 2, d / 2]` of Hugging Face."""
    return matrix.reshape(heads, -1, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def tokenizer(fields: Fields) -> PreTrainedTokenizerFast:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = PRE_TOKENIZERS[fields["tokenizer.ggml.pre"]]()
    bpe.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]):
        if kind in ADDED:  # found in a text before anything is split or merged
            bpe.add_tokens([AddedToken(token, special=ADDED[kind], normalized=False)])
    special = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{name: tokens[token_id] for name, token_id in special.items() if token_id is not None},
    )
