"""The held-out measure: serving's walk by hand, the drafts that it uses, and its interval."""

import math

import pytest
import torch

from vllm_ctc_spec import ctc
from vllm_ctc_spec.config import DrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter, Frames
from vllm_ctc_spec.training import acceptance
from vllm_ctc_spec.training.acceptance import Acceptance, measure_acceptance, parallel_drafts, prefix_drafts, walk
from vllm_ctc_spec.training.generate import Example
from vllm_ctc_spec.training.target import AuxHiddenStates


@pytest.fixture
def drafter(target):
    torch.manual_seed(3)
    config = DrafterConfig.for_target(target.model.config, num_frames=6, num_labels=4, markov_rank=5)
    drafter = CTCDrafter(config, target.embedding, target.head)
    torch.nn.init.normal_(drafter.markov_head.embedding.weight)
    torch.nn.init.normal_(drafter.markov_head.output.weight)
    return drafter


@pytest.mark.parametrize(
    ("accepted", "steps"),
    [([0, 0, 0], 3), ([2, 9, 9], 1), ([1, 9, 0], 2), ([3, 9, 9, 9, 1, 9, 0], 3), ([], 0)],
)
def test_walk_advances_by_the_accepted_labels_and_one(accepted, steps):
    assert walk(accepted) == (len(accepted), steps)


def test_drafts_are_the_oracles_greedy_chains(drafter):
    generator = torch.Generator().manual_seed(0)
    frames = Frames(2 * torch.randn(5, 6, 31, generator=generator), torch.randn(5, 6, generator=generator))
    anchors = torch.tensor([4, 5, 6, 7, 8])
    drafts = prefix_drafts(frames, anchors, drafter).tolist()
    bias = drafter.markov_head(torch.arange(31)).detach()
    log_probs = ctc.frame_log_probs(frames.logits, frames.blank_odds)
    for row in range(5):
        expected = ctc.chain(log_probs[row], 4, label_bias=bias, anchor=int(anchors[row])).labels
        assert tuple(drafts[row]) == expected


def test_parallel_drafts_read_frame_k_given_the_label_before(drafter):
    frames = Frames(torch.randn(2, 6, 31), torch.zeros(2, 6))
    drafts = parallel_drafts(frames, torch.tensor([4, 9]), drafter)
    last = torch.tensor([4, 9])
    for k in range(4):
        last = (frames.logits[:, k] + drafter.markov_head(last)).argmax(-1)
        assert drafts[:, k].tolist() == last.tolist()


def test_measured_steps_are_those_of_serving_one_anchor_at_a_time(drafter, target, monkeypatch):
    monkeypatch.setattr(acceptance, "ANCHORS_AT_ONCE", 4)
    examples = [Example([1, 5, 3, 2], [6, 7, 8, 9, 9, 9, 6, 7, 3]), Example([1, 2], [3]), Example([1, 9, 2], [4, 5, 5])]
    examples.append(Example([1, 2], [10, 11, 12, 13]))
    aux = AuxHiddenStates(target, drafter.config.aux_hidden_state_layer_ids)
    answers = {6: [7, 8, 0, 0], 9: [9, 9, 9, 9], 7: [3, 0, 0, 0], 4: [5, 5, 5, 5], 10: [0, 12, 13, 0]}

    def chain(frames, anchors, drafter):
        return torch.tensor([answers.get(anchor, [0, 0, 0, 0]) for anchor in anchors.tolist()])

    # first: 6 -> (7 8) 9; 9 -> (9 9) 6; 6 -> (7) 3, the response ends; third: 4 -> (5 5), ends;
    # fourth: a wrong first label takes the right ones behind it along: 11; 12; 13
    result = measure_acceptance(drafter, aux, examples, chain)
    assert (result.tokens, result.steps) == ([8, 2, 3], [3, 1, 3])
    assert result.length == 13 / 7


def test_the_real_chain_is_measured_like_a_loop_over_steps(drafter, target):
    example = Example([1, 5, 3, 2], [6, 7, 8, 9, 9, 9, 6, 7, 3])
    tokens = torch.tensor([example.prompt + example.response])
    aux_states = AuxHiddenStates(target, drafter.config.aux_hidden_state_layer_ids)
    position, steps = 4, 0
    with torch.no_grad():
        while position < 12:
            context = aux_states(tokens[:, :position])
            frames = drafter(context, tokens[:, position : position + 1], torch.tensor([[position]]))
            rows = Frames(frames.logits[0], frames.blank_odds[0])
            draft = prefix_drafts(rows, tokens[0, position : position + 1], drafter)[0].tolist()
            following = tokens[0, position + 1 :].tolist()
            while draft and following and draft[0] == following[0]:
                draft, following, position = draft[1:], following[1:], position + 1
            position, steps = position + 1, steps + 1
    result = measure_acceptance(drafter, aux_states, [example], prefix_drafts)
    assert result.steps == [steps]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits, trials = 0, 400
    for _ in range(trials):
        tokens = torch.randint(20, 200, (60,), generator=generator)
        noise = 0.4 * torch.randn(60, generator=generator)
        steps = (tokens / (2.5 + noise)).round().clamp_min(1)
        measured = Acceptance(tokens.tolist(), [int(s) for s in steps])
        truth = 1 / float((1 / (2.5 + 0.4 * torch.randn(20000, generator=generator))).mean())
        hits += abs(measured.length - truth) <= measured.half_width
    assert 0.91 <= hits / trials <= 0.985
    assert Acceptance([5], [2]).half_width == math.inf
