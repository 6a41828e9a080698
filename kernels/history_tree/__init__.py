"""A tree of what followed earlier: a text that repeats itself, or another text, says what may come next.

A *leader* is the last token of a context, and its *followers* are what came after it in a text, up to `length` tokens
each (fewer at the text's end, and where little agrees). That is Cacheback's table (arXiv 2511.21699), from leaders to
the followers that were used most recently; for the text of one request a scan gives its entries and no table has to be
kept. A context that agrees with the text in more than its last token says more, so followers come in the order of

    class    how many tokens before and at the leader agree with the context, in steps (`match_class`)
    recency  the later in the text the earlier, within a class

The tree grows in rounds: the followers of the anchor, of the ends of the best of these, and so on. A frozen table adds
followers of the last token that were common elsewhere, behind those of the text, as class 0.

Probabilities. The k-th child of a node, in the order above, is right with probability h(class, k) if the ones before it
are wrong: a hazard, measured online (`draft/cache.py`). So

    P(child k) = h(class_k, k) prod_{i<k} (1 - h(class_i, i))

never sums to more than 1 over siblings, and what is left is the mass of "none of them". Along a follower the class
rises with the tokens that agree.

Triton serves a GPU, numba a CPU.
"""

from typing import NamedTuple

from torch import Tensor

from vllm_ctc_spec.kernels.contract import DraftTree

MATCH = 8  # tokens of a context that are compared, the leader among them
CLASSES = 6  # 0: of the frozen table; 1: the leader alone agrees, 2: two tokens, 3: 3 or 4, 4: 5 to 7, 5: 8 or more
RANKS = 4  # of a child among its siblings; the last one is for all that follow
NO_TOKEN, BEFORE_TEXT = -1, -2  # in contexts: agrees with nothing; agrees with what is before a text's first token


class Texts(NamedTuple):
    """What is scanned, and what it is compared with, by request slot."""

    text: Tensor  # [S, L] int32
    text_lengths: Tensor  # [S] int32
    context: Tensor  # [S, L'] int32, a request's tokens so far, the anchor last
    context_lengths: Tensor  # [S] int32
    # [S] int32: only tokens from here on are compared. A text is another's continuation then, and its beginning follows
    # this place. None: the whole context, which is the text itself or like it.
    context_starts: Tensor | None = None


class Growth(NamedTuple):
    """How the tree grows. The paper's is (1, 3, .., by_match=False)."""

    leader: int = 1  # tokens that have to agree, at most MATCH
    length: int = 16  # FL, most tokens of a follower: 1 and two for each that agrees, or always all of them
    followers: int = 8  # FC, of a leader; one that is the beginning of an earlier one does not count
    leaders: int = 4  # ends of followers that a round goes on from
    rounds: int = 3
    scanned: int = 16  # places of each class that are looked at, the most recent ones
    nodes: int = 256  # of all candidates
    by_match: bool = True  # False, as in the paper: all places are of class 1, and all followers of full length

    def reach(self, agree: int) -> int:
        """Tokens of a follower where `agree` tokens of the context do."""
        return min(self.length, 1 + 2 * agree) if self.by_match else self.length


USUAL_GROWTH = Growth()


class HistoryTree(NamedTuple):
    tree: DraftTree  # [B, 1 + N]
    edges: Tensor  # [B, 1 + N] int64, class * RANKS + rank of each node; -1 for the anchor and in unused rows


def match_class(length: int) -> int:
    """The class of a place where `length` tokens agree."""
    return 0 if length < 1 else 1 + sum(length >= bound for bound in (2, 3, 5, 8))


def history_tree(
    texts: Texts,
    requests: Tensor,  # [B] int64
    anchor: Tensor,  # [B] int64
    hazards: Tensor,  # [CLASSES, RANKS] fp32
    num_nodes: int,
    depth: int,
    chain_only: Tensor | None = None,  # [B] bool
    frozen: Tensor | None = None,  # [V, F, length] int32
    growth: Growth = USUAL_GROWTH,
) -> HistoryTree:
    """The N best nodes of all that followed the end of each request's context.

    Arguments:
        texts: tokens by request slot; a request with an empty context or text gets an empty tree.
        requests: request slots, -1 for an inert row, which gets an empty tree too.
        anchor: the token of node 0, and of unused rows.
        hazards: h(class, rank), from 0 to 1.
        depth: no node is deeper.
        chain_only: None, or [B] bool: rows that get the best child of the best child and so on, one node per depth.
        frozen: followers by the token of their leader, most likely first, NO_TOKEN behind their ends; None: no table.

    Why custom: the scan reads the tokens of each request once a round, up to its own length, which torch could only do
    up to the longest possible one; the rest are short loops over a few hundred nodes.
    """
    arguments = texts, requests, anchor, hazards, num_nodes, depth, chain_only, frozen, growth
    if hazards.is_cuda:
        from vllm_ctc_spec.kernels.history_tree.gpu import history_tree_triton

        return history_tree_triton(*arguments)
    from vllm_ctc_spec.kernels.history_tree.cpu import history_tree_cpu  # numba is for a CPU only

    return history_tree_cpu(*arguments)
