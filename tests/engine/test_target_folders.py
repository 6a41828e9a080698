"""Targets as they come: for each kind of folder a drafter is trained from prompts, and served as without one.

Two folders have many properties each; with `-m slow` every property has a folder of its own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.training.answers import make_dataset
from vllm_ctc_spec.training.checkpoint import RunPaths
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import Example, open_dataset, target_fingerprint
from vllm_ctc_spec.training.generate import respond
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.measure import measure_chain, measure_trees
from vllm_ctc_spec.training.run import train
from vllm_ctc_spec.training.target import Target, TargetTables

from .conftest import DRAFTS, TREE, Pair
from .target_folders import KINDS, NEW_TOKENS, publish
from .test_matrix_targets import drafting
from .ties import differences

RUN: dict[str, Any] = dict(
    num_frames=6, num_labels=4, markov_rank=16, steps=60, batch_size=8, anchors=24, save_every=60, eval_every=60,
    dtype="fp32",
)  # fmt: skip
TOGETHER = [
    (
        "rows of padding in the vocabulary", "tokens added to the tokenizer", "tied embedding and head",
        "weights in several files", "weights in bfloat16", "llama3 rotary scaling", "heads wider than hidden / heads",
        "several end tokens and sampling defaults",
    ),
    (
        "a tokenizer larger than the model", "embedding and head of their own", "weights in float16",
        "linear rotary scaling",
    ),
]  # fmt: skip
LIMITS = {"dynamic rotary scaling": "same tokens: with `--max-model-len` at most `max_position_embeddings`"}


def features(kinds: tuple[str, ...]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.feature(f"targets with {kind}", **dict.fromkeys(DRAFTS, LIMITS.get(kind, "same tokens")))
            for kind in kinds]  # fmt: skip


def train_drafter(folder: Path, kinds: tuple[str, ...]) -> tuple[Pair, list[Example]]:
    """The pair, and what the target said to the prompts."""
    together: dict[str, Any] = {}
    for kind in kinds:
        assert not together.keys() & KINDS[kind].keys(), f"{kind} contradicts the other kinds"
        together |= KINDS[kind]
    target, prompts = publish(folder, **together)
    data, drafter = folder / "data", folder / "drafter"
    make_dataset(DataConfig(str(target), str(prompts), data, NEW_TOKENS, held_out=2, dtype="float32"), overwrite=False)
    paths = RunPaths(drafter, drafter / "work", drafter / "labels")
    train(TrainConfig(target=str(target), data=str(data), **RUN), paths, overwrite=False)
    examples, held_out = open_dataset(data, target_fingerprint(str(target)))
    return Pair(target, drafter), examples + held_out


@pytest.mark.parametrize(
    "kinds",
    [pytest.param(kinds, id="together", marks=features(kinds)) for kinds in TOGETHER]
    + [pytest.param((kind,), id=kind, marks=[pytest.mark.slow, *features((kind,))]) for kind in KINDS],
)
def test_from_prompts_to_a_server(engine, tmp_path, kinds):
    pair, examples = train_drafter(tmp_path, kinds)
    target = Target.load(str(pair.target), torch.device("cpu"), torch.float32)
    prompts = [example.prompt for example in examples]
    # In vLLM it said what it says in transformers, up to the same end.
    assert respond(target, prompts, NEW_TOKENS) == examples
    tables = TargetTables.load(str(pair.target), torch.device("cpu"), torch.float32)
    assert tables.embedding.equal(target.embedding) and tables.head.equal(target.head)

    drafter = CTCDrafter.load(pair.drafter, target.embedding, target.head)
    states, nodes = in_process(target, drafter.config.aux_hidden_state_layer_ids), TREE["num_speculative_tokens"]
    measured = {
        "chain": measure_chain(drafter, states, examples),
        "tree": measure_trees(drafter, states, examples, [nodes])[nodes],
    }
    options = {"max_model_len": target.max_length}
    plain = engine(pair.target, max_logprobs=-1, **options)
    texts = [{"prompt_token_ids": prompt} for prompt in prompts]
    lengths = [min(NEW_TOKENS, target.max_length - len(prompt)) for prompt in prompts]
    greedy = [SamplingParams(temperature=0, max_tokens=length) for length in lengths]
    sampled = [plain.get_default_sampling_params() for _ in lengths]
    for params, length in zip(sampled, lengths, strict=True):
        params.seed, params.max_tokens = 7, length
    expected = plain.generate(texts, sampled, use_tqdm=False)
    at_the_end = sum(length < NEW_TOKENS for length in lengths)  # of the context, which has no room for a last draft
    for draft in DRAFTS:
        llm = engine(pair.target, drafting(pair, draft), **options)
        given = llm.generate(texts, greedy, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in given] == [example.response for example in examples]
        steps = sum(measured[draft].steps)
        assert llm.counters["drafts"] == pytest.approx(steps, abs=0.01 * steps + at_the_end)
        assert llm.acceptance_length > 1.2
        if draft == "tree":
            given = llm.generate(texts, sampled, use_tqdm=False)
            assert differences(plain, sampled, expected, given) == []
