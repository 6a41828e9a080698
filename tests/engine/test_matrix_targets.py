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
    BloomConfig,
    DeepseekV3Config,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    WhisperConfig,
)
from vllm import SamplingParams

from vllm_ctc_spec.serving import cpu, plugin

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
    assert all(len(set(output.outputs[0].token_ids)) > 8 for output in expected), "this target is too dull to show much"
    llm = engine(pair.target, drafting(pair, draft), **options)
    given = llm.generate(prompts, parameters, use_tqdm=False)
    assert differences(plain, parameters, expected, given) == []
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


@pytest.mark.feature("targets with attention sinks", chain="same tokens")
def test_attention_sinks(engine, tmp_path):
    def make(shape: dict) -> PreTrainedModel:
        return GraniteForCausalLM(GraniteConfig(**shape, attention_sinks=True, attention_multiplier=32**-0.5))

    pair = save_pair(tmp_path, make)
    tensors = load_file(pair.target / "model.safetensors")
    sinks = torch.linspace(-2, 5, 8).view(4, 2)  # transformers' model has none
    tensors.update({f"model.layers.{layer}.self_attn.sinks": row.clone() for layer, row in enumerate(sinks)})
    save_file(tensors, pair.target / "model.safetensors")
    llm = answered_as_without_drafter(engine, pair, "chain")
    assert torch.stack([attention.impl.sinks for attention in attention_of(llm)]).equal(sinks)


@pytest.mark.feature("targets with attention soft caps", chain="same tokens")
def test_attention_soft_caps(engine, tmp_path):
    def make(shape: dict) -> PreTrainedModel:
        config = Gemma4TextConfig(
            **{**shape, "eos_token_id": 1}, layer_types=["full_attention"] * 4, global_head_dim=32,
            hidden_size_per_layer_input=0, attn_logit_softcapping=2.0,
        )  # fmt: skip
        return Gemma4ForCausalLM(config)

    llm = answered_as_without_drafter(engine, save_pair(tmp_path, make), "chain")
    assert [attention.impl.logits_soft_cap for attention in attention_of(llm)] == [2.0] * 4


def attention_of(llm) -> list:
    """The target's attention layers."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return [layer.self_attn.attn for layer in runner.model.model.layers]


REFUSED_BY_VLLM = "not testable on a CPU: vLLM refuses it there"


@pytest.mark.feature("targets with ALiBi", chain=REFUSED_BY_VLLM)
@pytest.mark.skipif(not cpu.is_needed(), reason="other backends have it")
@pytest.mark.parametrize("draft", [None, "chain"])
def test_alibi_is_refused_on_a_cpu(engine, tiny_pair, draft):
    """With a drafter as without, for the one architecture of vLLM's that has ALiBi and reports hidden states: a Step
    model has a Llama's tensors. Should this fail, it can be tested."""
    with pytest.raises(ValueError, match="use_alibi_sqrt is not supported by backend CPU_ATTN"):
        step = {"architectures": ["Step1ForCausalLM"]}
        engine(tiny_pair.target, draft and drafting(tiny_pair, draft), hf_overrides=step)


@pytest.mark.feature(
    "attention backends other than FLASH_ATTN, TRITON_ATTN and CPU_ATTN",
    chain="not testable on a CPU: vLLM has one backend there",
)
@pytest.mark.skipif(not cpu.is_needed(), reason="there are other backends")
def test_another_backend_is_not_taken_on_a_cpu(engine, tiny_pair):
    llm = engine(tiny_pair.target, drafting(tiny_pair, "chain"), attention_backend="FLASHINFER")
    assert [attention.attn_backend.get_name() for attention in attention_of(llm)] == ["CPU_ATTN"] * 4


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
        for make, what in (
            (latent_attention, "MLA targets"),
            (linear_attention, "hybrid and recurrent targets"),
        )
    ],
)
def test_targets_without_kernels_on_a_cpu(tiny_pair, tmp_path, monkeypatch, make, what, draft, says):
    monkeypatch.setenv(plugin.V2_VARIABLE, "1")
    save_tokenizer(tmp_path)
    make({**SHAPE, "vocab_size": 98}).save_pretrained(tmp_path)
    text = startup_error(tmp_path, drafting(tiny_pair, draft))
    assert says in text and what in text
    assert is_one_sentence(text)


def without_hidden_states(shape: dict) -> PretrainedConfig:
    return BloomConfig(**shape, n_layer=4, n_head=2, architectures=["BloomForCausalLM"])


def encoder_and_decoder(shape: dict) -> PretrainedConfig:
    layers = {"encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return WhisperConfig(
        vocab_size=shape["vocab_size"], d_model=HIDDEN, **layers, max_target_positions=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, architectures=["WhisperForConditionalGeneration"],
    )  # fmt: skip


NOT_REPORTED = "refused: vLLM's model does not report them"
NONE_REPORTS = "refused: none of vLLM's reports hidden states"


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    ("make", "architecture"),
    [
        pytest.param(
            without_hidden_states,
            "BloomForCausalLM",
            marks=pytest.mark.feature("targets without auxiliary hidden states", chain=NOT_REPORTED, tree=NOT_REPORTED),
        ),
        pytest.param(
            encoder_and_decoder,
            "WhisperForConditionalGeneration",
            marks=pytest.mark.feature("encoder-decoder targets", chain=NONE_REPORTS),
        ),
    ],
    ids=["Bloom", "Whisper"],
)
def test_targets_that_do_not_report_hidden_states(tiny_pair, tmp_path, monkeypatch, make, architecture, draft):
    """Chains would not help them: trees say the same."""
    monkeypatch.setenv(plugin.V2_VARIABLE, "1")
    save_tokenizer(tmp_path)
    make({**SHAPE, "vocab_size": 98}).save_pretrained(tmp_path)
    text = startup_error(tmp_path, drafting(tiny_pair, draft))
    assert f"vLLM's {architecture} does not report" in text and "serve this target without drafter" in text
    assert is_one_sentence(text)


# Of weights. On an x86 processor without VNNI, vLLM's int8 products (oneDNN) add pairs of them in 16 bits, which those
# beyond 63 overflow: the target is another one there, with and without drafter.
LARGEST_INT8 = {"small": 63, "usual": 127}


def save_int8(pair: Pair, folder: Path, largest: int) -> Pair:
    """The target with weights of 8 bits, in the format of compressed-tensors; activations are quantised as it runs."""
    quantised = Pair(folder / "target", pair.drafter)
    save_tokenizer(quantised.target)
    tensors = load_file(pair.target / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / largest
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


def int8_in_float(pair: Pair, quantised: Pair) -> LlamaForCausalLM:
    """The quantised target, whose products are computed in float: those of whole numbers below 2 ** 24 are exact."""
    model = LlamaForCausalLM.from_pretrained(pair.target).eval()
    tensors = load_file(quantised.target / "model.safetensors")

    def product(linear: torch.nn.Module, inputs: tuple[torch.Tensor], _) -> torch.Tensor:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127
        return (inputs[0] / scale).round() @ linear.weight.T * scale * linear.scale

    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            module.weight.data = tensors[f"{name}.weight"].float()
            module.scale = tensors[f"{name}.weight_scale"].T
            module.register_forward_hook(product)
    return model


@pytest.fixture(scope="module", params=LARGEST_INT8)
def int8_pair(request, engine, tiny_pair, tmp_path_factory) -> Pair:
    """Skipped where vLLM itself computes another target, which may say the same few words for ever."""
    pair = save_int8(tiny_pair, tmp_path_factory.mktemp("int8"), LARGEST_INT8[request.param])
    prompt = {"prompt_token_ids": list(range(2, 60))}
    scored = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=-1)
    answer = engine(pair.target, max_logprobs=-1).generate(prompt, scored, use_tqdm=False)[0].outputs[0]
    given = torch.tensor([[scores[token].logprob for token in sorted(scores)] for scores in answer.logprobs])
    with torch.no_grad():
        logits = int8_in_float(tiny_pair, pair)(torch.tensor([[*prompt["prompt_token_ids"], *answer.token_ids]])).logits
    expected = logits[0, -1 - len(given) : -1].log_softmax(-1)
    if (given - expected).abs().max() > 0.1:
        pytest.skip("vLLM's int8 products are wrong on this processor, with and without drafter")
    return pair


@pytest.mark.feature("quantised targets (int8, compressed-tensors)")
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_target_of_8_bit_weights(engine, int8_pair, draft):
    answered_as_without_drafter(engine, int8_pair, draft)


NO_TORCHVISION = "not testable on a CPU: vLLM's CPU build is installed without torchvision"


@pytest.mark.feature("diffusion targets", chain=NO_TORCHVISION)
@pytest.mark.skipif(find_spec("torchvision") is not None, reason="there is torchvision: they can be tested")
def test_diffusion_targets_need_torchvision():
    """vLLM has one, and it is multimodal; transformers says which of its classes is not there for lack of it."""
    with pytest.raises(ModuleNotFoundError, match="torchvision|Gemma4Processor"):
        importlib.import_module("vllm.model_executor.models.diffusion_gemma")
