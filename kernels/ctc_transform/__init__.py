"""The paper's CTC transform (arXiv 2412.00061): a beam of raw alignments, collapsed into a draft tree.

The `k - 1` most probable tokens of a frame and its blank are its symbols. The raw tree is a beam of N:

    raw_t = the N most probable of raw_{t-1} x symbols_t,    P(s_1..s_t) = prod_{r<=t} p_r(s_r),    raw_0 = {()}

ranked by fp32 sums of log probabilities; ties go to the lower row of raw_{t-1}, then to the tokens by rank, then to the
blank, and paths of probability 0 are dropped. A raw path of raw_t *emits* when `s_t` is a token other than `s_{t-1}`
(the anchor is not in the frames: a token of the first frame always emits). Its collapse is then a node:

    P(y_1..y_j) = sum of P(s_1..s_t) over all t and all s in raw_t that emit and collapse to y_1..y_j

These events are disjoint, because an alignment emits its j-th label once: a lower bound of the prefix probability, and
equal to it where the beam dropped nothing. A child is held below its parent against rounding. The tree is the N most
probable nodes of depth <= D; ties go to the shallower one, then to the one that was emitted first.
"""

import torch

from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames
from vllm_ctc_spec.kernels.ctc_transform.gpu import ctc_transform_triton
from vllm_ctc_spec.kernels.ctc_transform.reference import ctc_transform_reference
from vllm_ctc_spec.kernels.limits import MAX_NODES


def ctc_transform(frames: Frames, budget: Budget, chain_only: torch.Tensor | None = None) -> DraftTree:
    """Collapse every path of a tree of raw alignments and merge equal prefixes.

    Arguments:
        frames: markov and transitions are not read. Equal logits rank as `torch.topk` ranks them. A log p_t above 0
            counts as 0. A row with a NaN has a tree without nodes.
        budget: N is the beam too. The width is k >= 1, the blank included; more than V + 1 are V + 1.
        chain_only: None, or [B] bool: rows with a beam of one, whose tree is the chain of the best raw alignment.
    Raises:
        ValueError: for a budget of 0 or of more than MAX_NODES nodes.

    Why custom: a step of the beam is a top-N of N * k sums and a search in the prefixes made so far, too small to fill
    a GPU and in torch some fifteen launches per frame. Here one program per request runs all frames; with the top-k of
    the frames, the ranking and the masks it is a static sequence of four steps that reads no tensor on the host.
    """
    if not 1 <= budget.nodes <= MAX_NODES:
        raise ValueError(f"a tree has 1 to {MAX_NODES} nodes, not {budget.nodes}")
    run = ctc_transform_triton if frames.logits.is_cuda else ctc_transform_reference
    return run(frames, budget, chain_only)
