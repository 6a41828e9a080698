"""A drafter that knows what the target will say, and hides it in random trees."""

import random

import torch

from vllm_ctc_spec.kernels.contract import DraftTree, Frames
from vllm_ctc_spec.kernels.tree_mask import tree_mask
from vllm_ctc_spec.serving.proposer import CTCProposer


class OracleProposer(CTCProposer):
    """Trees of random topology in which the true continuation lies on late rows, among siblings and strangers.

    Set `sequences` (prompt and answer, token ids) and `request_states` before use. Where a context is the beginning of
    no sequence, the tree holds random tokens only.
    """

    sequences: list[list[int]] = []
    request_states = None
    seed = 0

    def _search_tree(self, frames: Frames, requests: torch.Tensor) -> DraftTree:
        self.random = getattr(self, "random", None) or random.Random(self.seed)
        vocab_size = frames.logits.shape[-1]
        tokens, parents = [], []
        for slot in requests.tolist():
            truth = self._truth(slot)
            tree = self._chain if self.trees.chain_only[slot] else self._tree
            row_tokens, row_parents = tree(truth, vocab_size)
            tokens.append(row_tokens)
            parents.append(row_parents)
        parents = torch.tensor(parents, dtype=torch.int32)
        depths, ancestors = tree_mask(parents)
        scores = -torch.arange(parents.shape[1]).float().expand(parents.shape).contiguous()
        scores[parents < 0] = -torch.inf
        scores[:, 0] = 0
        tokens = torch.cat([frames.anchor[:, None], torch.tensor(tokens)], 1)
        tree = DraftTree(tokens, parents, depths, scores, ancestors)
        tree.check(vocab_size)
        return tree

    def _truth(self, slot: int) -> list[int]:
        """Up to six tokens after what request `slot` has so far."""
        if slot < 0 or self.request_states is None:
            return []
        length = int(self.request_states.total_len.gpu[slot])
        seen = self.request_states.all_token_ids.gpu[slot][:length].tolist()
        return next((s[length : length + 6] for s in self.sequences if s[:length] == seen), [])

    def _chain(self, truth: list[int], vocab_size: int) -> tuple[list[int], list[int]]:
        right = self.random.randint(0, min(len(truth), self.num_labels))
        wrong = [self.random.randrange(vocab_size) for _ in range(self.num_labels - right)]
        return truth[:right] + wrong, list(range(-1, self.num_labels))

    def _tree(self, truth: list[int], vocab_size: int) -> tuple[list[int], list[int]]:
        """Every node hangs below a random earlier one; some, at random places, are the next true token."""
        tokens, parents, children = [], [-1], set()
        hidden = truth[: self.random.randint(0, min(len(truth), self.num_labels))]
        deepest, found = 0, 0
        used = self.random.choice([self.num_labels, self.num_labels, self.random.randint(1, self.num_labels)])
        for node in range(1, self.num_labels + 1):
            if node > used:
                tokens.append(0)
                parents.append(-1)
                continue
            left, next_true = len(hidden) - found, None if found == len(hidden) else hidden[found]
            if left and (used - node < left or self.random.random() < 0.3):
                parent, token = deepest, next_true
                deepest, found = node, found + 1
            else:
                parent, token = self.random.randrange(node), self.random.randrange(vocab_size)
                while (parent, token) in children or (parent, token) == (deepest, next_true):
                    token = (token + 1) % vocab_size
            children.add((parent, token))
            tokens.append(token)
            parents.append(parent)
        return tokens, parents
