import json, pytest, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from .conftest import DRAFTS, HIDDEN
from .ties import differences
from .test_soak import mixed_requests

def save_adapter(folder, target, seed, rank=4, std=0.3):
    config = LlamaConfig.from_pretrained(target)
    torch.manual_seed(seed)
    folder.mkdir()
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, heads in (("q_proj", config.num_attention_heads), ("v_proj", config.num_key_value_heads)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, HIDDEN) * std
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(heads * config.head_dim, rank) * std
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "v_proj"]}))
    return folder

@pytest.mark.parametrize("draft", [None, *DRAFTS])
def test_lora(engine, tiny_pair, tmp_path, draft):
    adapter = save_adapter(tmp_path/"a", tiny_pair.target, 1)
    spec = None if draft is None else {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]}
    llm = engine(tiny_pair.target, spec, enable_lora=True, max_loras=2, max_lora_rank=8, lora_target_modules=["q_proj", "v_proj"], max_logprobs=-1)
    reqs = mixed_requests()[:24]
    prompts, params = zip(*reqs)
    lora = LoRARequest("a", 1, str(adapter))
    base = llm.generate(list(prompts), list(params), use_tqdm=False)
    print([o.outputs[0].token_ids[:6] for o in base[:6]])
    for _ in range(2):
        out = llm.generate(list(prompts), list(params), use_tqdm=False, lora_request=[lora if i % 2 else None for i in range(24)])
        print([o.outputs[0].token_ids[:6] for o in out[:6]])
        print(llm.counters, sum(a.outputs[0].token_ids != b.outputs[0].token_ids for a, b in zip(out, base)))
