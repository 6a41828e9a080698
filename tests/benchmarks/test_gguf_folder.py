"""A converted folder is the model that the GGUF file was made of: tensors, logits, tokens and chat template."""

import gguf_folder
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf.quants import quantize
from gguf_folder import GGUFError, convert
from transformers import AutoTokenizer, LlamaForCausalLM

from .tiny_gguf import TEXT, TinyLlama, fields_of, make_llama, tensors_of, write_gguf

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def llama() -> TinyLlama:
    return make_llama()


def load(folder) -> LlamaForCausalLM:
    model, report = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


@TIED
def test_every_tensor_and_the_logits_are_the_models(tmp_path, tied):
    llama, told = make_llama(tied), []
    file = write_gguf(tmp_path / "model.gguf", fields_of(llama), tensors_of(llama.model))
    convert(file, tmp_path / "folder", lambda done, total: told.append((done, total)))
    model = load(tmp_path / "folder")
    expected, found = dict(llama.model.named_parameters()), dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():  # also the configuration: heads, base of the rotary embedding, epsilon
        assert torch.equal(model(ids).logits, llama.model(ids).logits)
    assert told == [(done, len(tensors_of(llama.model))) for done in range(1, len(told) + 1)]
    for name in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps"):
        assert getattr(model.config, name) == getattr(llama.model.config, name)
    assert model.config.tie_word_embeddings is tied
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_quantised_matrices_are_the_numbers_of_their_blocks(llama, tmp_path, kind):
    tensors, quantised = tensors_of(llama.model), GGMLQuantizationType[kind]
    convert(write_gguf(tmp_path / "model.gguf", fields_of(llama), tensors, kind), tmp_path / "folder")
    found, steps = tensors_of(load(tmp_path / "folder")), {"Q8_0": 254, "Q4_1": 15, "Q4_0": 15}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            assert np.array_equal(found[name], tensor), name
            continue
        assert np.array_equal(found[name], dequantize(quantize(tensor, quantised), quantised)), name
        # And those are near the model's: a step of a block's range at most, or a rounding of 8 bits of mantissa.
        blocks = tensor.reshape(-1, 32)
        width = 2 * np.abs(blocks).max(1, keepdims=True)
        error = np.abs(found[name].reshape(blocks.shape) - blocks)
        assert (error <= 1.1 * width / steps.get(kind, 256)).all() and error.max() > 0, name


def test_the_tokenizer_is_the_models(llama, tmp_path):
    convert(write_gguf(tmp_path / "m.gguf", fields_of(llama), tensors_of(llama.model)), tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    texts = [*TEXT, "<|im_start|>user\n12 cats<|im_end|>", "  two  spaces ", "日本 🙂", "", "3.14159"]
    for text in texts:
        ids = llama.tokenizer(text)["input_ids"]
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == llama.tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "the cat"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat == "<|im_start|>user\nthe cat<|im_end|>\n"
    ids = tokenizer(chat)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nthe cat\n"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 128


def test_what_is_no_gguf_or_is_cut_off_is_said(llama, tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(GGUFError, match="cannot be read as GGUF"):
        convert(file, tmp_path / "folder")
    file.write_bytes(b"not a model, but long enough to be one")
    with pytest.raises(GGUFError, match="cannot be read as GGUF"):
        convert(file, tmp_path / "folder")
    write_gguf(file, fields_of(llama), tensors_of(llama.model))
    for share in (0.01, 0.1, 0.9):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        with pytest.raises(GGUFError, match="cannot be read as GGUF"):
            convert(cut, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'; only 'llama' with one of smollm can be"),
        ({"tokenizer.ggml.add_bos_token": True}, "adds a first token to every text"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its positions"),
        ({"tokenizer.ggml.merges": None}, "lacks the field tokenizer.ggml.merges"),
        ({"llama.block_count": None}, "lacks the field llama.block_count"),
        ({"llama.block_count": 3}, "lacks 9 of the model's weights, model.layers.2.input_layernorm.weight among them"),
    ],
)
def test_another_kind_of_model_is_refused(llama, tmp_path, change, sentence):
    fields = {name: value for name, value in (fields_of(llama) | change).items() if value is not None}
    with pytest.raises(GGUFError, match=sentence):
        convert(write_gguf(tmp_path / "m.gguf", fields, tensors_of(llama.model)), tmp_path / "folder")
    assert not (tmp_path / "folder/config.json").exists()


def test_another_architecture_and_other_tensors_are_refused(llama, tmp_path):
    fields, tensors = fields_of(llama), tensors_of(llama.model)
    with pytest.raises(GGUFError, match="architecture 'qwen3'"):
        convert(write_gguf(tmp_path / "a.gguf", fields, tensors, architecture="qwen3"), tmp_path / "folder")
    bias = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    with pytest.raises(GGUFError, match="a tensor 'blk.0.attn_q.bias' that Llama has no place for"):
        convert(write_gguf(tmp_path / "b.gguf", fields, tensors | bias), tmp_path / "folder")


def test_a_type_that_gguf_cannot_read_is_named(llama, tmp_path, monkeypatch):
    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf_folder, "dequantize", refuse)
    with pytest.raises(GGUFError, match="token_embd.weight has the type F32"):
        convert(write_gguf(tmp_path / "m.gguf", fields_of(llama), tensors_of(llama.model)), tmp_path / "folder")
