"""Sums over the vocabulary in chunks: their values and gradients, and the memory that they do not take."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from vllm_ctc_spec.training import vocabulary
from vllm_ctc_spec.training.vocabulary import label_scores

N, T, U, V, H, RANK = 3, 5, 4, 600, 6, 3


def inputs(num_tokens=V, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    labels = torch.randint(num_tokens, (N, U), generator=generator)
    labels[0, 1], labels[1, 2] = labels[0, 0], num_tokens - 1  # a repeat, and a token of the last chunk
    anchors = torch.randint(num_tokens, (N,), generator=generator)
    tables = normal(num_tokens, RANK), normal(num_tokens, RANK)
    return normal(N, T, H), normal(num_tokens, H), anchors, labels, tables


@pytest.fixture(params=[1, 2**30], ids=["chunks of 256", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(vocabulary.CHUNK_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("exclude_repeats", [True, False])
def test_scores_are_those_of_whole_tables(chunks, exclude_repeats):
    hidden, head, anchors, labels, tables = inputs()
    scores = label_scores(hidden, head, anchors, labels, tables, exclude_repeats)
    log_p = torch.log_softmax(hidden @ head.T, -1)  # [N, T, V]
    last = torch.cat([anchors[:, None], labels[:, :-1]], 1)
    bias = tables[0][last] @ tables[1].T  # [N, U, V]
    for n in range(N):
        for k in range(U):
            torch.testing.assert_close(scores.log_label[n, :, k], log_p[n, :, labels[n, k]])
            torch.testing.assert_close(scores.log_last[n, :, k], log_p[n, :, last[n, k]])
            torch.testing.assert_close(scores.label_bias[n, k], bias[n, k, labels[n, k]])
            torch.testing.assert_close(scores.last_bias[n, k], bias[n, k, last[n, k]])
            factor = bias[n, k].clone()
            if exclude_repeats and k > 0:  # the anchor is under no repeat rule
                factor[last[n, k]] = -torch.inf
            torch.testing.assert_close(scores.log_mass[n, k], torch.logsumexp(log_p[n] + factor, -1))


def test_without_a_head_there_are_the_frames_only(chunks):
    hidden, head, anchors, labels, _ = inputs()
    scores = label_scores(hidden, head, anchors, labels)
    assert scores.log_mass is scores.label_bias is scores.last_bias is None
    log_p = torch.log_softmax(hidden @ head.T, -1)
    expected = log_p.gather(-1, labels[:, None].expand(-1, T, -1))
    torch.testing.assert_close(scores.log_label, expected)


@pytest.mark.parametrize("with_head", [True, False])
def test_gradients(chunks, with_head):
    hidden, head, anchors, labels, tables = inputs(num_tokens=300)
    leaves = [hidden.requires_grad_(), *(table.requires_grad_() for table in tables if with_head)]

    def values(hidden, *tables):
        scores = label_scores(hidden, head, anchors, labels, tables or None)
        parts = [scores.log_label, scores.log_last]
        parts += [scores.log_mass, scores.label_bias, scores.last_bias] if with_head else []
        return torch.cat([part.flatten() for part in parts])

    assert torch.autograd.gradcheck(values, leaves, fast_mode=True)


def test_bf16_products_are_near_fp32(chunks):
    hidden, head, anchors, labels, tables = inputs(dtype=torch.float32)
    whole = label_scores(hidden, head, anchors, labels, tables)
    rounded = label_scores(hidden, head, anchors, labels, tables, dtype=torch.bfloat16)
    assert rounded.log_label.dtype == torch.float32
    torch.testing.assert_close(rounded.log_mass, whole.log_mass, atol=0.1, rtol=0.02)
    assert (rounded.log_mass != whole.log_mass).any()


def test_logits_far_apart_stay_finite(chunks):
    hidden, head, anchors, labels, tables = inputs(dtype=torch.float32)
    scores = label_scores(100 * hidden.requires_grad_(), head, anchors, labels, tables)
    (scores.log_mass.sum() + scores.log_label.sum()).backward()
    assert torch.isfinite(scores.log_mass).all() and torch.isfinite(hidden.grad).all()
    log_p = F.log_softmax(100 * hidden.detach() @ head.T, -1)
    expected = log_p.gather(-1, anchors[:, None, None].expand(-1, T, 1))[..., 0]
    torch.testing.assert_close(scores.log_last[:, :, 0].detach(), expected)


PEAK = """
import resource, torch
from vllm_ctc_spec.training.vocabulary import label_scores
anchors, frames, labels, tokens, width, rank = 512, 12, 8, 152_000, 32, 16
torch.manual_seed(0)
hidden = torch.randn(anchors, frames, width, requires_grad=True)
head = torch.randn(tokens, width)
tables = [torch.randn(tokens, rank, requires_grad=True) for _ in range(2)]
said = torch.randint(tokens, (anchors, labels))
label_scores(hidden[:1], head, said[:1, 0], said[:1], tables).log_mass.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = label_scores(hidden, head, said[:, 0], said, tables)
(scores.log_mass.sum() + scores.log_label.sum()).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_vocabulary_of_152_k_takes_little_memory():
    """Whole logits of 512 anchors and 12 frames would be 3.6 GiB in fp32, and there would be several such arrays."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 300  # MiB
