"""A tiny Llama with a byte-level BPE, and its GGUF file as llama.cpp's converter would write it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "It was 1984, and the clocks of Zürich struck 13.",
    "the cat, the hat, the other cat",
    "def f(x):\n    return x",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class TinyLlama:
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def make_llama(tied: bool = True) -> TinyLlama:
    """Rows of 64 and 96 numbers: whole blocks of any quantised type of 32."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=TEMPLATE, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, initializer_range=0.2, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would hide a norm in another's place
                weight.uniform_(0.5, 1.5)
    return TinyLlama(model, tokenizer)


def fields_of(llama: TinyLlama) -> dict[str, Any]:
    config, tokenizer = llama.model.config, llama.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def tensors_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """By GGUF's names, which are gguf's own, fp32, queries and keys interleaved."""
    names, found = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers), {}
    for name, weight in model.named_parameters():
        matrix = weight.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            matrix = interleaved(matrix, HEADS if "q_proj" in name else KV_HEADS)
        found[names.get_name(name, try_suffixes=(".weight",))] = matrix
    return found


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Row 2 i of a head is its row i of the first half, row 2 i + 1 its row i of the second: rotary embeddings of
    llama.cpp pair neighbours."""
    size = matrix.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return matrix[order]


def write_gguf(
    file: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], kind: str = "F32", architecture: str = "llama"
) -> Path:
    """Matrices as `kind`, vectors as fp32, as llama.cpp keeps them."""
    writer, matrices = GGUFWriter(file, architecture), GGMLQuantizationType[kind]
    for name, value in fields.items():
        add = {str: writer.add_string, list: writer.add_array, float: writer.add_float32, bool: writer.add_bool}
        add.get(type(value), writer.add_uint32)(name, value)
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or kind == "F32":
            writer.add_tensor(name, tensor.astype(np.float32))
        else:
            writer.add_tensor(name, quantize(tensor, matrices), raw_dtype=matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
