"""Anchors, their labels, and an order that a resumed run repeats."""

import itertools

import torch

from vllm_ctc_spec.training.batches import anchor_positions, epochs, make_batch, sample_batch
from vllm_ctc_spec.training.dataset import Example

EXAMPLE = Example([10, 11, 12], [20, 21, 22, 23])
SHORT = Example([13], [30, 31])


def test_anchors_are_response_tokens_with_a_successor():
    assert list(anchor_positions(EXAMPLE)) == [3, 4, 5]
    assert list(anchor_positions(Example([1, 2], [3]))) == []


def test_labels_follow_the_anchor_and_stop_at_the_end():
    batch = make_batch([EXAMPLE, SHORT], torch.tensor([[3, 5], [1, -1]]), 3)
    assert batch.token_ids.tolist() == [[10, 11, 12, 20, 21, 22, 23], [13, 30, 31, 0, 0, 0, 0]]
    assert batch.anchors[0].tolist() == [20, 22] and batch.anchors[1, 0] == 30
    assert batch.labels[0].tolist() == [[21, 22, 23], [23, 0, 0]]
    assert batch.valid.tolist() == [[[True] * 3, [True, False, False]], [[True, False, False], [False] * 3]]


def test_sampled_anchors_are_distinct_and_follow_from_the_seed():
    long = Example(list(range(5)), list(range(50)))
    batches = [sample_batch([long], 20, 2, seed) for seed in (0, 0, 1)]
    assert batches[0].positions.tolist() == batches[1].positions.tolist() != batches[2].positions.tolist()
    assert len(set(batches[0].positions[0].tolist())) == 20
    assert set(batches[0].positions[0].tolist()) <= set(anchor_positions(long))


def test_an_epoch_has_every_example_and_full_batches_and_can_start_anywhere():
    examples = [Example([i], list(range(2 + i % 7))) for i in range(23)] + [Example([99], [1])]
    batches = list(itertools.islice(epochs(examples, 4, seed=5), 18))
    for start in (0, 6, 12):
        seen = sorted(example.prompt[0] for batch in batches[start : start + 6] for example in batch)
        assert seen == [0, *range(23)]  # the one without an anchor is never there, the last batch is filled up
    assert {len(batch) for batch in batches} == {4}
    assert batches[:6] != batches[6:12]
    assert batches[:6] != list(itertools.islice(epochs(examples, 4, seed=6), 6))
    assert list(itertools.islice(epochs(examples, 4, 5, first_step=8), 10)) == batches[8:]
