"""Scores of the tokens that a request names (`logprob_token_ids`), which vLLM's rejection sampler forgets."""

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class ScoringRejectionSampler(RejectionSampler):
    """vLLM's, which scores the sampled tokens and the most probable ones. A request that names tokens gets theirs, in
    place of the most probable ones, in every step that verifies drafts, as `Sampler` gives them in one that does not.
    """

    _requests: torch.Tensor  # [rows] request of each row of the step

    def __init__(self, sampler: Sampler, spec_config: SpeculativeConfig, device: torch.device):
        super().__init__(sampler, spec_config, device)
        self._num_named = 0  # most tokens that a request of this step names
        self._next_row = 0  # of the chunk of rows that is scored next
        # Where ranks sample a part of the batch each, vLLM would gather no columns of a step that verifies drafts.
        dims = sampler.get_logprobs_dims
        sampler.get_logprobs_dims = lambda requests, include_token_ids=True: dims(requests)

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
