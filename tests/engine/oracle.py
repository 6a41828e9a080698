"""A source of drafts that knows what the target will say, and hides it in random trees."""

import random
from collections import Counter
from typing import Any

import torch

from vllm_ctc_spec.draft.source import DraftStep
from vllm_ctc_spec.kernels.contract import Budget, DraftTree
from vllm_ctc_spec.kernels.tree_mask import tree_mask


class OracleSource:
    """Trees of random topology in which the true continuation lies on late rows, among siblings and strangers.

    sequences: prompt and answer, token ids. request_states: vLLM's, by which a request's tokens so far are known. Where
    a context is the beginning of no sequence, the tree holds random tokens only.
    """

    name = "oracle"
    reads = frozenset()

    def __init__(self, sequences: list[list[int]], request_states: Any, vocab_size: int, seed: int):
        self.sequences, self.request_states, self.vocab_size = sequences, request_states, vocab_size
        self.random = random.Random(seed)
        self.calls: Counter[str] = Counter()

    def prepare(self, requests: torch.Tensor, num_sampled: torch.Tensor, num_logits: torch.Tensor) -> None:
        assert requests.shape == num_sampled.shape == num_logits.shape
        self.calls["prepare"] += 1

    def reset(self, request: int) -> None:
        self.calls["reset"] += 1

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        assert step.frames is None  # nobody reads them
        self.calls["draft"] += 1
        tokens, parents = [], []
        for request, chain_only in zip(step.requests.tolist(), step.chain_only.tolist(), strict=True):
            truth = self._truth(request)
            make = self._chain if chain_only else self._tree
            row_tokens, row_parents = make(truth, budget.nodes)
            tokens.append(row_tokens)
            parents.append(row_parents)
        parents = torch.tensor(parents, dtype=torch.int32)
        depths, ancestors = tree_mask(parents)
        scores = -torch.arange(parents.shape[1]).float().expand(parents.shape).contiguous()
        scores[parents < 0] = -torch.inf
        scores[:, 0] = 0
        tree = DraftTree(torch.cat([step.anchor[:, None], torch.tensor(tokens)], 1), parents, depths, scores, ancestors)
        tree.check(self.vocab_size)
        return tree

    def _truth(self, request: int) -> list[int]:
        """Up to six tokens after what the request in this slot has so far."""
        if request < 0:
            return []
        length = int(self.request_states.total_len.gpu[request])
        seen = self.request_states.all_token_ids.gpu[request][:length].tolist()
        return next((s[length : length + 6] for s in self.sequences if s[:length] == seen), [])

    def _chain(self, truth: list[int], num_nodes: int) -> tuple[list[int], list[int]]:
        right = self.random.randint(0, min(len(truth), num_nodes))
        wrong = [self.random.randrange(self.vocab_size) for _ in range(num_nodes - right)]
        return truth[:right] + wrong, list(range(-1, num_nodes))

    def _tree(self, truth: list[int], num_nodes: int) -> tuple[list[int], list[int]]:
        """Every node hangs below a random earlier one; some, at random places, are the next true token."""
        tokens, parents, children = [], [-1], set()
        hidden = truth[: self.random.randint(0, min(len(truth), num_nodes))]
        deepest, found = 0, 0
        used = self.random.choice([num_nodes, num_nodes, self.random.randint(1, num_nodes)])
        for node in range(1, num_nodes + 1):
            if node > used:
                tokens.append(0)
                parents.append(-1)
                continue
            left, next_true = len(hidden) - found, None if found == len(hidden) else hidden[found]
            if left and (used - node < left or self.random.random() < 0.3):
                parent, token = deepest, next_true
                deepest, found = node, found + 1
            else:
                parent, token = self.random.randrange(node), self.random.randrange(self.vocab_size)
                while (parent, token) in children or (parent, token) == (deepest, next_true):
                    token = (token + 1) % self.vocab_size
            children.add((parent, token))
            tokens.append(token)
            parents.append(parent)
        return tokens, parents
