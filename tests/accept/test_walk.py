"""One walk serves all rules: the exact one marks no node, and other marks lead where they say."""

import pickle
import random

import pytest
import torch
from torch import Tensor

from vllm_ctc_spec.accept.pivot import Classifier
from vllm_ctc_spec.accept.rule import RULES, Rows, make_rule
from vllm_ctc_spec.accept.walk import walk
from vllm_ctc_spec.kernels.tree_walk import tree_walk

WIDTH, VOCABULARY = 9, 4


def random_trees(seed: int, num_requests: int = 6) -> tuple[Tensor, ...]:
    """target_tokens, draft_tokens, parents, requests, cu_num_logits; siblings differ, some trees are cut or absent."""
    rng = random.Random(seed)
    parents = torch.full((num_requests + 2, WIDTH), -1, dtype=torch.int32)
    requests = torch.tensor(rng.sample(range(num_requests + 2), num_requests), dtype=torch.int32)
    target, draft, lengths = [], [], []
    for request in requests.tolist():
        used = rng.randint(0, WIDTH - 1)
        lengths.append(rng.choice([0, 1, 1 + used, WIDTH, WIDTH, WIDTH]))
        tokens, children = [rng.randrange(VOCABULARY)], set()
        for node in range(1, WIDTH):
            parent, token = rng.choice([node - 1, rng.randrange(node)]), rng.randrange(VOCABULARY)
            if node > used or len([c for c in children if c[0] == parent]) == VOCABULARY:
                used = min(used, node - 1)
                tokens.append(0)
                continue
            while (parent, token) in children:
                token = (token + 1) % VOCABULARY
            children.add((parent, token))
            parents[request, node] = parent
            tokens.append(rng.choice([token] * 8 + [-1]))
        draft += tokens[: lengths[-1]]
        drawn = [rng.randrange(VOCABULARY) for _ in range(WIDTH)]
        for parent, token in sorted(children):  # one of a node's children is often what the target says
            drawn[parent] = rng.choice([token, token, drawn[parent]])
        target += drawn[: lengths[-1]]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.tensor(target), torch.tensor(draft), parents, requests, starts


class Everything:
    name, exact, reads_hidden = "everything", False, False

    def loose(self, rows: Rows) -> Tensor:
        return torch.ones_like(rows.draft_tokens, dtype=torch.bool)


class Nothing(Everything):
    def loose(self, rows: Rows) -> Tensor:
        return torch.zeros_like(rows.draft_tokens, dtype=torch.bool)


@pytest.mark.parametrize("rule", [make_rule("exact"), Nothing()])
@pytest.mark.parametrize("seed", range(40))
def test_without_loose_nodes_the_walk_is_the_exact_one(seed, rule):
    target, *_ = trees = random_trees(seed)
    walked = walk(rule, torch.empty(len(target), 0), *trees)
    for given, expected in zip(walked, tree_walk(*trees), strict=True):
        assert given.dtype == expected.dtype and torch.equal(given, expected)


def test_random_trees_have_long_paths_and_refused_nodes():
    """A test of the test above."""
    lengths = torch.cat([tree_walk(*random_trees(seed))[1] for seed in range(40)])
    assert lengths.max() >= 4 and (lengths == 0).any() and (lengths == 1).any()
    assert any((random_trees(seed)[1] == -1).any() for seed in range(40))


@pytest.mark.parametrize("seed", range(10))
def test_a_rule_that_accepts_everything_is_stopped_by_leaves_and_forbidden_tokens_only(seed):
    target, draft, parents, requests, starts = trees = random_trees(seed)
    sampled, num_sampled, path = walk(Everything(), torch.empty(len(target), 0), *trees)
    for r, request in enumerate(requests.tolist()):
        start, num_logits = int(starts[r]), int(starts[r + 1] - starts[r])
        node, nodes, emitted = 0, [], []
        while num_logits:
            nodes.append(node)
            children = [
                child for child in range(1, num_logits) if parents[request, child] == node and draft[start + child] >= 0
            ]
            drawn = int(target[start + node])
            if not children:
                emitted.append(drawn)
                break
            node = next((child for child in children if draft[start + child] == drawn), children[0])
            emitted.append(int(draft[start + node]))
        count = len(nodes)
        assert num_sampled[r] == count
        assert sampled[r].tolist() == emitted + [0] * (WIDTH - count)
        assert path[r].tolist() == nodes + list(range(count, WIDTH))


def test_a_rule_reads_parents_and_hidden_states_of_its_rows():
    seen = []

    class Reading(Everything):
        def loose(self, rows: Rows) -> Tensor:
            seen.append(rows)
            return super().loose(rows)

    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, -1]], dtype=torch.int32)
    tokens, hidden, logits = torch.arange(7), torch.randn(7, 2), torch.randn(7, 5)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    walk(Reading(), logits, tokens, tokens, parents, torch.tensor([1, 0], dtype=torch.int32), starts, hidden)
    (rows,) = seen
    assert rows.parent.tolist() == [0, 0, 1, 3, 3, 3, 4]
    assert rows.hidden is hidden and rows.logits is logits


CLASSIFIER = Classifier(torch.ones(2, 5), torch.ones(2), torch.ones(2), torch.tensor(0.0))
SETTINGS = {
    "exact": {},
    "fly": {"window": 3},
    "pivot": {"threshold": 0.3, "min_probability": 1e-4, "digest": "0123", "classifier": CLASSIFIER},
}


@pytest.mark.parametrize("name", RULES)
def test_rules_have_the_name_that_they_are_found_by_and_travel_to_workers(name):
    rule = make_rule(name, **SETTINGS[name])
    assert rule.name == name
    assert rule.exact is (name == "exact")
    assert pickle.loads(pickle.dumps(rule)) == rule and hash(rule) is not None
    assert rule.to(torch.device("cpu")) == rule
    assert "0x" not in repr(rule) and "tensor" not in repr(rule)  # vLLM hashes what a configuration says of itself
