"""Chains are verified by vLLM's rejection sampler, with the scores that it forgets; or, under a rule of acceptance that
it does not know, as trees are: a chain is one, and walks."""

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_ctc_spec.accept.rule import AcceptanceRule
from vllm_ctc_spec.accept.walk import walk
from vllm_ctc_spec.serving.hidden import HiddenRows, hidden_rows
from vllm_ctc_spec.serving.scores import ScoringRejectionSampler
from vllm_ctc_spec.serving.tree.verification import draw_target_tokens


def attach_chains(vllm_config: VllmConfig, target: nn.Module, rule: AcceptanceRule | None) -> None:
    """Let `target` verify chains by `rule`, None where vLLM applies it itself: as for trees, by the hook that vLLM asks
    for the model's state."""
    stock: Any = resolve_model_state_cls(vllm_config, target)
    hidden = None if rule is None else hidden_rows(target, rule)

    class ChainModelState(stock):
        def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
            settings = vllm_config.speculative_config, self.device
            if rule is None:
                return sampler, ScoringRejectionSampler(sampler, *settings)
            return sampler, ChainRejectionSampler(rule, hidden, sampler, *settings)

    target.get_model_state_cls = lambda: ChainModelState


class ChainRejectionSampler(ScoringRejectionSampler, RejectionSampler):  # vLLM's too: tests/versions reads it here
    """Draws a token of the target after each row of a chain, and walks by the rule. Drafts are deterministic given the
    context: for sampled ones the draw would have to be the rejection sampler's."""

    def __init__(
        self,
        rule: AcceptanceRule,
        hidden: HiddenRows | None,
        sampler: Sampler,
        spec_config: SpeculativeConfig,
        device: torch.device,
    ):
        super().__init__(sampler, spec_config, device)
        self.rule, self.hidden = rule, hidden
        self.chain = torch.arange(-1, self.num_speculative_steps, dtype=torch.int32, device=device)[None]

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        processed_logits = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        sampled, num_sampled, _ = walk(
            self.rule,
            processed_logits,
            draw_target_tokens(self.sampler, processed_logits, expanded_idx_mapping, pos),
            verify_draft_sampled.long(),
            self.chain,
            torch.zeros_like(idx_mapping),  # the parents of all requests are the one row of `chain`
            cu_num_logits,
            None if self.hidden is None else self.hidden.take(len(logits)),
        )
        return processed_logits, sampled, num_sampled
