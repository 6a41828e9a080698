"""Frames, heads and comparisons that the tests of the prefix search share."""

import torch

from vllm_ctc_spec.kernels.contract import DraftTree, Frames

from ..oracle.frames import anchors, from_odds, generator

Nodes = list[tuple[tuple[int, ...], float]]  # labels and log score, best first


def realistic_frames(batch: int, num_frames: int, num_tokens: int, seed: int) -> Frames:
    """As a trained drafter gives: a few tokens carry a frame, neighbours share them, over a heavy tail."""
    draw = generator(seed)
    logits = torch.randn(batch, num_frames, num_tokens, generator=draw) * 2
    peaks = torch.randint(0, num_tokens, (batch, num_frames, 6), generator=draw)
    peaks[:, 1:, :2] = peaks[:, :-1, 2:4]
    logits.scatter_add_(2, peaks, torch.rand(batch, num_frames, 6, generator=draw) * 10)
    return from_odds(logits, torch.randn(batch, num_frames, generator=draw) * 1.5 - 0.7)


def certain_frames(num_frames: int) -> Frames:
    """Frame t holds token t, with a little more than all mass: what rounding does to frames that are sure."""
    logits = torch.full((1, num_frames, num_frames), -torch.inf)
    logits[0].fill_diagonal_(0)
    return Frames(logits, torch.full((1, num_frames), 1e-6), torch.full((1, num_frames), -torch.inf), anchors(1))


def nodes_of(tree: DraftTree, row: int) -> Nodes:
    return [
        (tuple(tree.path(row, node)), tree.scores[row, node].item()) for node in range(1, int(tree.num_nodes[row]) + 1)
    ]


def assert_same_nodes(got: Nodes, expected: Nodes, atol: float = 1e-4) -> None:
    """The same scores, and the same labels, except that of nodes that tie for the last place either may be there."""
    assert len(got) == len(expected)
    assert len(dict(got)) == len(got)
    if not got:
        return
    got_scores, expected_scores = torch.tensor([s for _, s in got]), torch.tensor([s for _, s in expected])
    torch.testing.assert_close(got_scores, expected_scores, rtol=0, atol=atol)
    for one, other in ((dict(got), dict(expected)), (dict(expected), dict(got))):
        for labels, score in one.items():
            assert abs(score - other.get(labels, expected[-1][1])) < 2 * atol, labels
