"""FLy in an engine: whatever it writes, every token that the target would not have written is one that FLy allows."""

import time

import pytest
import torch
from prometheus_client import REGISTRY
from transformers import LlamaForCausalLM
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_ctc_spec.accept.fly import top_k_entropy
from vllm_ctc_spec.serving import metrics, plugin

from .conftest import DRAFTS

WINDOW, THRESHOLD, TIE = 1, 0.2, 1e-3
FLY = {"rejection_sample_method": "fly", "fly_window_size": WINDOW, "fly_entropy_threshold": THRESHOLD}
PROMPTS = [{"prompt_token_ids": [2 + (7 * i + j) % 95 for j in range(3 + i % 9)]} for i in range(48)]


@pytest.mark.feature("lossy verification (`fly`)", chain="not the target's law", tree="not the target's law")
@pytest.mark.parametrize("draft", DRAFTS)
def test_every_changed_token_is_one_that_fly_allows(draft, engine, tiny_pair):
    """Greedy: each token is the target's, or a possible one where the target hesitates, after which it agrees."""
    llm = engine(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft], **FLY})
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), use_tqdm=False)
    target, changed = LlamaForCausalLM.from_pretrained(tiny_pair.target), 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        ids = torch.tensor([prompt["prompt_token_ids"] + answer[:-1]])
        with torch.no_grad():
            logits = target(ids, logits_to_keep=len(answer)).logits[0]
        written = torch.tensor(answer)
        behind = logits.max(-1).values - logits.gather(1, written[:, None])[:, 0]  # 0 for the target's own token
        hesitates = top_k_entropy(logits, 3) >= THRESHOLD - TIE
        for place in (behind > TIE).nonzero()[:, 0].tolist():
            changed += 1
            assert hesitates[place]
            assert (behind[place + 1 : place + 1 + WINDOW] <= TIE).all()
    assert changed > 20
    labels = {"model_name": str(tiny_pair.target), "engine": "0", "acceptance": "fly"}
    time.sleep(2 * metrics.PUBLISH_SECONDS)
    assert REGISTRY.get_sample_value("vllm_ctc_spec:drafts_total", labels) > 0


def test_responses_of_a_lossy_server_are_marked(tiny_pair, monkeypatch):
    """The string that each response has as `system_fingerprint`, as the API server asks for it."""
    from vllm.entrypoints.serve.utils import fingerprint

    monkeypatch.setenv(plugin.V2_VARIABLE, "1")
    monkeypatch.setattr(fingerprint, "_DEFAULT_MODE", "full")
    marks = {}
    for name, options in (("fly", FLY), ("exact", {})):
        speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **options}
        config = EngineArgs(
            str(tiny_pair.target), dtype="float32", speculative_config=speculative
        ).create_engine_config()
        marks[name] = fingerprint.get_system_fingerprint(config)
        monkeypatch.setattr(fingerprint, "_DEFAULT_MODE", "none")
        assert fingerprint.get_system_fingerprint(config) is None  # the operator has turned it off
        monkeypatch.setattr(fingerprint, "_DEFAULT_MODE", "full")
    assert marks["fly"].startswith("vllm-") and marks["fly"].endswith("-lossy-fly")
    assert "lossy" not in marks["exact"]
