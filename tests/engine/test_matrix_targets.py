"""Targets of other kinds: tiny random ones with drafters that agree with them now and then. Each is answered as without
drafter, or the kind of draft that cannot serve it is refused at startup."""

import importlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
)
from vllm import SamplingParams

from vllm_ctc_spec import cpu, plugin

from .conftest import DRAFTS, HIDDEN, Pair, save_drafter, save_tokenizer
from .test_bad_input import is_one_sentence, startup_error
from .ties import differences

WINDOW = 24
SHAPE = {
    "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "initializer_range": 0.08, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def save_pair(folder: Path, make: Callable[[dict], PreTrainedModel]) -> Pair:
    """A target made by `make(its shape)`, and a drafter that agrees with it now and then."""
    pair = Pair(folder / "target", folder / "drafter")
    shape = {**SHAPE, "vocab_size": save_tokenizer(pair.target)}
    torch.manual_seed(3)
    target = make(shape).float()
    torch.nn.init.normal_(target.get_input_embeddings().weight)
    torch.nn.init.normal_(target.get_output_embeddings().weight, std=0.5)
    target.save_pretrained(pair.target)
    save_drafter(pair.drafter, target, seed=4)
    return pair


def drafting(pair: Pair, draft: str) -> dict:
    return {"method": "ctc", "model": str(pair.drafter), **DRAFTS[draft]}


def answered_as_without_drafter(engine, pair: Pair, draft: str, **options):
    """An engine that answers so: prompts and answers of different lengths, greedy; with trees seeded ones too."""
    dice = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": torch.randint(2, 97, (length,), generator=dice).tolist()} for length in (3, 70, 31, 130)
    ] * 2
    greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    seeded = SamplingParams(temperature=0.8, seed=7, max_tokens=48, ignore_eos=True)
    parameters = [greedy] * 4 + [seeded if draft == "tree" else greedy] * 4
    plain = engine(pair.target, max_logprobs=-1, **options)
    expected = plain.generate(prompts, parameters, use_tqdm=False)
    llm = engine(pair.target, drafting(pair, draft), **options)
    given = llm.generate(prompts, parameters, use_tqdm=False)
    assert differences(plain, parameters, expected, given) == []
    assert all(len(set(output.outputs[0].token_ids)) > 8 for output in given)
    assert llm.counters["accepted"] > 20
    return llm


def uniform_windows(shape: dict) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**shape, sliding_window=WINDOW))


def mixed_windows(shape: dict) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * 2
    return Qwen3ForCausalLM(
        Qwen3Config(**shape, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=4, layer_types=kinds)
    )


@pytest.mark.feature("sliding-window targets", chain="same tokens")
@pytest.mark.parametrize("make", [uniform_windows, mixed_windows], ids=["all layers", "every other layer"])
def test_sliding_windows(engine, tmp_path, make):
    llm = answered_as_without_drafter(engine, save_pair(tmp_path, make), "chain")
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    # A window is the target's own: the drafter has learned to see the whole context.
    assert [layer.self_attn.attn.sliding_window for layer in runner.speculator.model.model.layers] == [None, None]


def latent_attention(shape: dict) -> PretrainedConfig:
    return DeepseekV3Config(**shape, kv_lora_rank=512, architectures=["DeepseekV3ForCausalLM"])


def linear_attention(shape: dict) -> PretrainedConfig:
    return Qwen3NextConfig(**shape, architectures=["Qwen3NextForCausalLM"])


ON_A_CPU = "not testable on a CPU: refused there"


@pytest.mark.skipif(not cpu.is_needed(), reason="what a CPU lacks")
@pytest.mark.parametrize(("draft", "says"), [("chain", "On a CPU"), ("tree", "draft trees do not work")])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(make, what, marks=pytest.mark.feature(what, chain=ON_A_CPU), id=what)
        for make, what in ((latent_attention, "MLA targets"), (linear_attention, "hybrid and recurrent targets"))
    ],
)
def test_targets_without_kernels_on_a_cpu(tiny_pair, tmp_path, monkeypatch, make, what, draft, says):
    monkeypatch.setenv(plugin.V2_VARIABLE, "1")
    save_tokenizer(tmp_path)
    make({**SHAPE, "vocab_size": 98}).save_pretrained(tmp_path)
    text = startup_error(tmp_path, drafting(tiny_pair, draft))
    assert says in text and what in text
    assert is_one_sentence(text)


def save_int8(pair: Pair, folder: Path) -> Pair:
    """The target with weights of 8 bits, in the format of compressed-tensors; activations are quantised as it runs."""
    quantised = Pair(folder / "target", pair.drafter)
    save_tokenizer(quantised.target)
    tensors = load_file(pair.target / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, quantised.target / "model.safetensors")
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((pair.target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    (quantised.target / "config.json").write_text(json.dumps(config))
    return quantised


@pytest.mark.feature("quantised targets (int8, compressed-tensors)")
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_target_of_8_bit_weights(engine, tiny_pair, tmp_path, draft):
    answered_as_without_drafter(engine, save_int8(tiny_pair, tmp_path), draft)


NO_TORCHVISION = "not testable on a CPU: vLLM's CPU build is installed without torchvision"


@pytest.mark.feature("multimodal targets", chain=NO_TORCHVISION, tree=NO_TORCHVISION)
@pytest.mark.skipif(
    find_spec("torchvision") is not None, reason="there is torchvision: multimodal targets can be tested"
)
@pytest.mark.parametrize("module", ["llava", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_multimodal_targets_need_torchvision(module):
    """Those of vLLM's multimodal models that report auxiliary hidden states; with and without a drafter."""
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        importlib.import_module(f"vllm.model_executor.models.{module}")
