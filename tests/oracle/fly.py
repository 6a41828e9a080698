"""vLLM 0.33's rule of FLy for one chain, as its kernel says it, and FLy of a tree by its definition."""

from collections.abc import Sequence


def accepted_by_vllm(
    drafts: Sequence[int],
    accepted_natively: Sequence[bool],
    can_be_said: Sequence[bool],
    entropies: Sequence[float],
    window: int,
    threshold: float,
) -> int:
    """How many drafts of a chain are accepted: the loop of `_rejection_kernel`
    (vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py, 0.33.0) with FLY_WINDOW_SIZE > 0, name by name.

    accepted_natively: what the kernel finds without FLy, by the arg-max or by the uniform number. can_be_said: whether
    the target (and the drafter, where drafts are sampled) give the token any probability.
    """
    num_draft_tokens = len(drafts)
    accepted_length, pending_rejection, verifying = 0, -1, True
    for i in range(num_draft_tokens):
        is_valid_draft = drafts[i] >= 0
        if verifying:
            accepted = accepted_natively[i] and is_valid_draft
            can_defer = is_valid_draft and can_be_said[i]
            if pending_rejection >= 0:
                verifying = accepted
                if accepted and i - pending_rejection == window:
                    accepted_length = i + 1
                    pending_rejection = -1
            elif accepted:
                accepted_length = i + 1
            else:
                verifying = can_defer and i + window < num_draft_tokens and entropies[i] >= threshold
                if verifying:
                    pending_rejection = i
    return accepted_length


def walk_by_definition(
    parents: Sequence[int],
    drafts: Sequence[int],
    targets: Sequence[int],
    can_be_said: Sequence[bool],
    entropies: Sequence[float],
    window: int,
    threshold: float,
) -> tuple[list[int], list[int]]:
    """Emitted tokens and the nodes after which they are emitted, for one tree. can_be_said: of a node's own token at
    its parent; entropies and targets: after a node."""

    def children(node: int) -> list[int]:
        return [child for child in range(1, len(parents)) if parents[child] == node and drafts[child] >= 0]

    def following(node: int) -> int | None:
        return next((child for child in children(node) if drafts[child] == targets[node]), None)

    def run(node: int) -> int:
        child = following(node)
        return 0 if child is None else 1 + run(child)

    emitted, nodes = [], [0]
    while True:
        node = nodes[-1]
        below = following(node)
        if below is None and entropies[node] >= threshold:
            below = next((child for child in children(node) if can_be_said[child] and run(child) >= window), None)
        if below is None:
            return [*emitted, targets[node]], nodes
        emitted.append(drafts[below])
        nodes.append(below)
