"""Scores of the tokens that a request names (`logprob_token_ids`), which vLLM's rejection sampler forgets."""

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class ScoringRejectionSampler(RejectionSampler):
    """vLLM's, which scores the sampled tokens and the most probable ones. A request that names tokens gets theirs, in
    place of the most probable ones, in every step that verifies drafts, as `Sampler` gives them in one that does not.
    """

    _num_named = 0  # most tokens that a request of this step names
    _requests: torch.Tensor  # [rows] request of each row of the step
    _next_row = 0  # of the chunk of rows that is scored next

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        self._num_named = self.sampler.logprob_token_ids_state.max_num_token_ids(input_batch.idx_mapping_np)
        self._requests, self._next_row = input_batch.expanded_idx_mapping, 0
        return super().__call__(logits, input_batch, draft_logits, invalid_drafts)

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """vLLM calls this for the batch, or for its chunks in their order. All of these get columns for the tokens that
        any request names, because they are concatenated."""
        if not self._num_named:
            return super()._get_logprobs_tensors(
                sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np, max_num_logprobs
            )
        own = super()._get_logprobs_tensors(sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np, 0)
        first, self._next_row = self._next_row, self._next_row + logits.shape[0]
        return compute_topk_scores(
            logits,
            max(max_num_logprobs, 0),
            own.logprob_token_ids[:, 0],  # the sampled tokens, each in its row
            own.cu_num_generated_tokens,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=self._requests[first : self._next_row],
            max_per_req_token_ids=self._num_named,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )


def attach_scores(vllm_config: VllmConfig, target: nn.Module) -> None:
    """Let `target`, whose drafts are chains, be verified by a ScoringRejectionSampler; trees have it by themselves.

    vLLM makes the model state, and with it the samplers, from the target after the drafter is loaded
    (`GPUModelRunner.load_model`).
    """
    stock = resolve_model_state_cls(vllm_config, target)

    def custom_sampler(state: Any, sampler: Any) -> tuple[Any, Any] | None:
        return stock.custom_sampler(state, sampler) or (
            sampler, ScoringRejectionSampler(sampler, vllm_config.speculative_config, state.device),
        )  # fmt: skip

    model_state = type(stock.__name__, (stock,), {"custom_sampler": custom_sampler})
    target.get_model_state_cls = lambda: model_state
