"""A drafter whose frames are not numbers, or garbage, costs acceptance and never a token; the log says it once."""

import logging
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from vllm_ctc_spec.accept.rule import make_rule
from vllm_ctc_spec.draft.ctc import CTCSource
from vllm_ctc_spec.drafter.config import WEIGHTS_NAME
from vllm_ctc_spec.drafter.lattice import FrameOutputs
from vllm_ctc_spec.kernels.contract import Frames
from vllm_ctc_spec.serving import metrics
from vllm_ctc_spec.serving.proposer import CTCProposer

from ..fuzz.checkpoints import lay_traps
from .conftest import TREE
from .ties import differences

DRAFTS = {
    "chain": {},
    "argmax": {"ctc_search": "argmax"},
    "sampled": {"draft_sample_method": "probabilistic"},
    "tree": TREE,
}
PROMPTS = ["A plum", "A box of eggs", "Omar walks 3 miles", "x", "The sum of 2 and 3", "Lena"]
PARAMETERS = [
    SamplingParams(max_tokens=24, ignore_eos=True, **law)
    for law in ({"temperature": 0}, {"temperature": 0.9, "seed": 3}) * 3
]
NAN, INF = float("nan"), float("inf")


def everywhere(value: float):
    return lambda logits: logits.fill_(value)


def in_places(*values: float):
    """Some logits of some frames of every other request."""

    def spoil(logits: torch.Tensor) -> None:
        for place, value in enumerate(values):
            logits[::2, place :: 1 + len(values), place::5] = value

    return spoil


SPOILED = {
    "not numbers": everywhere(NAN),
    "infinite": everywhere(INF),
    "empty": everywhere(-INF),
    "not numbers in places": in_places(NAN),
    "all of it in places": in_places(NAN, INF, -INF, 3e38),
    "garbage": lambda logits: logits.normal_(std=1e4, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture(scope="module")
def expected(plain):
    return plain.generate(PROMPTS, PARAMETERS, use_tqdm=False)


@pytest.fixture(scope="module")
def overflowing(tiny_pair, tmp_path_factory):
    """Finite weights that pass every check, whose context is too large for fp32; and what must not be executed."""
    folder = tmp_path_factory.mktemp("overflowing")
    drafter = shutil.copytree(tiny_pair.drafter, folder / "drafter")
    weights = load_file(drafter / WEIGHTS_NAME)
    weights["fc.weight"] = weights["fc.weight"].sign() * 3e38
    save_file(weights, drafter / WEIGHTS_NAME)
    lay_traps(drafter, folder / "executed")
    return drafter


@pytest.fixture(scope="module", params=DRAFTS)
def drafting(request, engine, tiny_pair, overflowing):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PUBLISH_SECONDS", 0.05)
        patch.setattr(logging.getLogger("vllm"), "propagate", True)
        yield (
            request.param,
            engine(tiny_pair.target, {"method": "ctc", "model": str(overflowing), **DRAFTS[request.param]}),
        )


def assert_nothing_but_speed_is_lost(draft, llm, plain, expected) -> None:
    given = llm.generate(PROMPTS, PARAMETERS, use_tqdm=False)
    same_dice = range(len(PROMPTS)) if draft == "tree" else range(0, len(PROMPTS), 2)
    pick = lambda outputs: [outputs[i] for i in same_dice]  # noqa: E731
    assert differences(plain, pick(PARAMETERS), pick(expected), pick(given)) == []
    assert all(len(output.outputs[0].token_ids) == 24 for output in given)


def test_weights_that_overflow(drafting, plain, expected, overflowing, caplog):
    draft, llm = drafting
    llm.counters.clear()
    for _ in range(2):
        assert_nothing_but_speed_is_lost(draft, llm, plain, expected)
        time.sleep(4 * metrics.PUBLISH_SECONDS)
    assert llm.counters["drafts"] > 100 and llm.counters["accepted"] < 0.2 * llm.counters["drafts"]
    said = [record.getMessage() for record in caplog.records if "frames that are not numbers" in record.getMessage()]
    assert len(said) == 1
    assert not (overflowing.parent / "executed").exists(), "something in the drafter's folder was executed"


@pytest.mark.parametrize("spoiled", SPOILED)
def test_frames_of_any_kind(spoiled, drafting, plain, expected, monkeypatch):
    draft, llm = drafting
    proposer = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.speculator
    steps = []

    def compute_frames(slots: torch.Tensor) -> FrameOutputs:
        generator = torch.Generator().manual_seed(len(steps))
        logits = torch.randn(slots.shape[0], slots.shape[1] - 1, 98, generator=generator)
        odds = torch.randn(logits.shape[:2], generator=generator)
        SPOILED[spoiled](logits)
        if len(steps) % 2:
            SPOILED[spoiled](odds[..., None])
        steps.append(logits)
        frames = real(torch.zeros_like(slots))
        return FrameOutputs(logits, frames.lattice._replace(blank_odds=odds))

    real = proposer.model.compute_frames
    monkeypatch.setattr(proposer.model, "compute_frames", compute_frames)
    assert_nothing_but_speed_is_lost(draft, llm, plain, expected)
    assert len(steps) > 10


def test_broken_frames_are_looked_for_without_statistics():
    proposer = object.__new__(CTCProposer)
    vars(proposer).update(
        max_num_reqs=2, num_drafted=3, device=torch.device("cpu"), rule=make_rule("exact"), source=CTCSource("prefix")
    )
    proposer.vllm_config = SimpleNamespace(
        observability_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(rank=0, world_size=1, pipeline_parallel_size=1, data_parallel_index=0),
        model_config=SimpleNamespace(served_model_name="m"),
    )
    meter = proposer._make_meter(num_frames=4)
    not_numbers = torch.full((1, 4), NAN)
    frames = Frames(not_numbers[..., None], not_numbers, not_numbers, torch.tensor([0]))
    meter.record(torch.tensor([0]), torch.tensor([0], dtype=torch.int32), frames=frames)
    meter._timer = object()  # nothing is published here
    meter.observe(torch.tensor([0]), torch.tensor([4]))
    assert meter.totals[metrics.BROKEN] == 4
