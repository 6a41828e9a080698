"""One token of the target per node, drawn by vLLM's own sampler, and the walk that accepts a path."""

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_ctc_spec.accept.walk import walk
from vllm_ctc_spec.serving.scores import ScoringRejectionSampler
from vllm_ctc_spec.serving.tree.layout import Verdict, in_path_order


def draw_target_tokens(
    sampler: Sampler, processed_logits: torch.Tensor, expanded_idx_mapping: torch.Tensor, pos: torch.Tensor
) -> torch.Tensor:
    """[L] int64: one draw of the target after each row, as without speculation.

    processed_logits [L, V] fp32, behind temperature and the other sampling parameters; expanded_idx_mapping [L] int32,
    request slots; pos [L] int64, positions.
    """
    return gumbel_sample(
        processed_logits,
        expanded_idx_mapping,
        sampler.sampling_states.temperature.gpu,
        sampler.sampling_states.seeds.gpu,
        pos,
        apply_temperature=False,
        is_drafting=False,
        use_fp64=sampler.use_fp64_gumbel,
    )


class TreeRejectionSampler(ScoringRejectionSampler, RejectionSampler):  # vLLM's too: tests/versions reads it here
    """Draws a token of the target at each node, and walks down the tree by the rule of acceptance.

    The exact rule steps to the child whose token was drawn, else emits that token and stops. The tree is deterministic
    given the context, so this is exact at any temperature: each emitted token is one draw from the target's law. The
    draw at a node uses the seed and position that a sampler without speculation would use there, so that even seeded
    output is token-identical. Other rules take some of the nodes that the target has not drawn, too.
    """

    def __init__(self, state: Any, sampler: Sampler):
        super().__init__(sampler, state.vllm_config.speculative_config, state.device)
        self.trees, self.layout, self.compaction, self.proposer, self.rule, self.hidden = (
            state.trees, state.layout, state.compaction, state.proposer, state.rule, state.hidden,
        )  # fmt: skip
        self._paths: list[torch.Tensor] = []  # of the requests that `_verify` was called for, in their order

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        self._paths.clear()
        output = super().__call__(logits, input_batch, draft_logits, invalid_drafts)
        verdict = Verdict(torch.cat(self._paths) if len(self._paths) > 1 else self._paths[0], output.num_sampled)
        # Now: before the drafter, a cache lookup or a connector can read the rows that move.
        self.compaction.run(self.layout, verdict)
        self.proposer.verified(verdict)
        return output

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
        sampler = self.sampler
        depths = self.trees.depths[expanded_idx_mapping, expanded_local_pos.long()]
        pos = pos + (depths - expanded_local_pos)
        processed_logits = sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            depths,
            seq_lens_upper_bound_np,
        )
        target_tokens = draw_target_tokens(sampler, processed_logits, expanded_idx_mapping, pos)
        sampled, num_sampled, path = walk(
            self.rule,
            processed_logits,
            target_tokens,
            verify_draft_sampled.long(),
            self.trees.parents,
            idx_mapping,
            cu_num_logits,
            None if self.hidden is None else self.hidden.take(len(logits)),
        )
        self._paths.append(path)
        return processed_logits, sampled, num_sampled

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """vLLM pairs the k-th emitted token with the request's k-th row: put the accepted nodes' rows there."""
        if max_num_logprobs == NO_LOGPROBS and not self._num_named:
            return None
        rows = in_path_order(cu_num_logits[:-1], Verdict(self._paths[-1], num_sampled), logits.shape[0])
        return super()._get_logprobs_tensors(
            sampled, num_sampled, logits[rows], cu_num_logits, cu_num_logits_np, max_num_logprobs
        )
