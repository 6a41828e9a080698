"""The target's hidden states at the rows that are verified, for rules of acceptance that read them."""

from typing import Any

import torch
from torch import nn

from vllm_ctc_spec.accept.rule import AcceptanceRule


class HiddenRows:
    """vLLM's samplers get logits only. Right before, `compute_logits` of the target gets the states of the same rows
    (vllm/v1/worker/gpu/model_runner.py:sample); it is asked on the way, and nothing is copied."""

    def __init__(self, target: nn.Module):
        compute = target.compute_logits
        self._states: torch.Tensor | None = None
        self._taken = 0

        def compute_logits(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._states, self._taken = hidden_states, 0
            return compute(hidden_states, *args, **kwargs)

        target.compute_logits = compute_logits

    def take(self, count: int) -> torch.Tensor:
        """[count, H]: of the next rows. A large batch is verified in chunks, in their order."""
        first, self._taken = self._taken, self._taken + count
        return self._states[first : self._taken]


def hidden_rows(target: nn.Module, rule: AcceptanceRule) -> HiddenRows | None:
    """None where the rule reads none."""
    return HiddenRows(target) if rule.reads_hidden else None
