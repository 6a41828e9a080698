"""FLy in an engine: whatever it writes, every token that the target would not have written is one that FLy allows.
Pivots in an engine: every such token is one that the classifier lets pass, by states of a forward of its own."""

import time
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY
from transformers import LlamaForCausalLM
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_ctc_spec.accept.fly import top_k_entropy
from vllm_ctc_spec.accept.pivot import ENTROPY_TOP_K
from vllm_ctc_spec.accept.pivot_file import Pivots
from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving import limits, metrics, plugin
from vllm_ctc_spec.serving.hidden import HiddenRows

from ..oracle.pivot import save_pivots
from .conftest import DRAFTS, HIDDEN

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


def pivots_options(pair, folder, threshold: float = 0.5, **classifier) -> dict:
    """Options of a server with a classifier that `save_pivots` makes."""
    pivots = save_pivots(folder / f"pivots{threshold}{classifier}", pair.target, HIDDEN, **classifier)
    return {"ctc_acceptance": "pivot", "ctc_pivots": str(pivots), "ctc_pivot_threshold": threshold}


@pytest.mark.feature("lossy verification (`pivot`)", chain="not the target's law", tree="not the target's law")
@pytest.mark.parametrize("draft", DRAFTS)
def test_every_changed_token_is_one_that_the_classifier_lets_pass(draft, engine, tiny_pair, tmp_path):
    floor, threshold = 1e-3, 0.5
    options = pivots_options(tiny_pair, tmp_path, threshold, floor=floor, scale=0.2)
    llm = engine(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft], **options})
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), use_tqdm=False)
    target, changed = LlamaForCausalLM.from_pretrained(tiny_pair.target), 0
    classifier, p_all = Pivots.load(options["ctc_pivots"]).classifier, []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = torch.tensor(output.outputs[0].token_ids)
        ids = torch.cat([torch.tensor(prompt["prompt_token_ids"]), answer])[None]
        with torch.no_grad():
            state = target.model(ids).last_hidden_state[0, -1 - len(answer) :]
            logits = target.lm_head(state)[:-1]
        log_p = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        p_pivot = classifier.log_odds(state[1:], top_k_entropy(logits, ENTROPY_TOP_K), log_p).sigmoid()
        p_all.append(p_pivot)
        is_changed = logits.max(-1).values - logits.gather(1, answer[:, None])[:, 0] > TIE
        changed += int(is_changed.sum())
        assert (p_pivot[is_changed] <= threshold + TIE).all()
        assert (log_p[is_changed].exp() >= floor * (1 - TIE)).all()
    assert changed > 20
    assert 0.1 < float((torch.cat(p_all) > threshold).float().mean()) < 0.9  # states of other rows would show
    labels = {"model_name": str(tiny_pair.target), "engine": "0", "acceptance": "pivot"}
    time.sleep(2 * metrics.PUBLISH_SECONDS)
    assert REGISTRY.get_sample_value("vllm_ctc_spec:drafts_total", labels) > 0


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_classifier_at_its_two_ends(draft, engine, tiny_pair, plain, tmp_path):
    """If all are pivots, the text without drafts, greedy and seeded; if none is, drafts are accepted to their ends."""
    sampling = [SamplingParams(temperature=t, seed=3, max_tokens=40, ignore_eos=True) for t in (0, 0.8)]
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]}
    always = pivots_options(tiny_pair, tmp_path, out_bias=50.0, scale=0.0, floor=1e-30)
    exact = engine(tiny_pair.target, {**speculative, **always})
    for params in sampling:
        found, expected = (llm.generate(PROMPTS[:12], params, use_tqdm=False) for llm in (exact, plain))
        for left, right in zip(found, expected, strict=True):
            assert left.outputs[0].token_ids == right.outputs[0].token_ids
    never = pivots_options(tiny_pair, tmp_path, out_bias=-50.0, scale=0.0, floor=1e-30)
    everything = engine(tiny_pair.target, {**speculative, **never})
    everything.generate(PROMPTS[:12], sampling[0], use_tqdm=False)
    counters = everything.counters
    if draft == "chain":
        assert counters["accepted"] == counters["drafted"]  # cut where the answer ends, too
    else:
        assert everything.acceptance_length > 1.3 * exact.acceptance_length


def test_states_are_taken_in_chunks_in_their_order():
    """vLLM verifies a batch of many logits in parts."""
    target = SimpleNamespace(compute_logits=lambda hidden: 2 * hidden)
    rows = HiddenRows(target)
    for _ in range(2):
        states = torch.randn(7, 3)
        assert torch.equal(target.compute_logits(states), 2 * states)
        assert torch.equal(torch.cat([rows.take(count) for count in (2, 4, 1)]), states)


def test_states_on_other_ranks_are_refused(tiny_pair, tmp_path, monkeypatch):
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **pivots_options(tiny_pair, tmp_path)}
    monkeypatch.setenv(plugin.V2_VARIABLE, "1")
    config = EngineArgs(str(tiny_pair.target), dtype="float32", speculative_config=speculative).create_engine_config()
    config.parallel_config.enable_batch_sharded_sampling = True
    with pytest.raises(DrafterConfigError, match="remove --enable-batch-sharded-sampling, or ctc_acceptance"):
        limits.check(config)


def test_responses_of_a_lossy_server_are_marked(tiny_pair, monkeypatch, tmp_path):
    """The string that each response has as `system_fingerprint`, as the API server asks for it."""
    from vllm.entrypoints.serve.utils import fingerprint

    monkeypatch.setenv(plugin.V2_VARIABLE, "1")
    monkeypatch.setattr(fingerprint, "_DEFAULT_MODE", "full")
    marks = {}
    rules = ("fly", FLY), ("pivot", pivots_options(tiny_pair, tmp_path)), ("exact", {})
    for name, options in rules:
        speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **options}
        config = EngineArgs(
            str(tiny_pair.target), dtype="float32", speculative_config=speculative
        ).create_engine_config()
        marks[name] = fingerprint.get_system_fingerprint(config)
        monkeypatch.setattr(fingerprint, "_DEFAULT_MODE", "none")
        assert fingerprint.get_system_fingerprint(config) is None  # the operator has turned it off
        monkeypatch.setattr(fingerprint, "_DEFAULT_MODE", "full")
    assert marks["fly"].startswith("vllm-") and marks["fly"].endswith("-lossy-fly")
    assert marks["pivot"].endswith("-lossy-pivot") and not any("nohash" in mark for mark in marks.values())
    assert "lossy" not in marks["exact"]
