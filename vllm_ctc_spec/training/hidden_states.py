"""The source of the drafter's context: the frozen target in this process, or states that were stored before."""

from collections.abc import Callable, Sequence

from torch import Tensor

from vllm_ctc_spec.training.dataset import Example, stored_states
from vllm_ctc_spec.training.target import AuxHiddenStates, Target

HiddenStates = Callable[[Sequence[Example], Tensor], Tensor]
"""Examples and their token ids [B, S], padded on the right, to auxiliary hidden states [B, S, A * H], fp32."""


def stored(layer_ids: tuple[int, ...]) -> HiddenStates:
    return lambda examples, token_ids: stored_states(examples, layer_ids).to(token_ids.device)


def in_process(target: Target, layer_ids: tuple[int, ...]) -> HiddenStates:
    run = AuxHiddenStates(target, layer_ids)
    return lambda examples, token_ids: run(token_ids).float()
