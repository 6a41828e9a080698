"""CTCProposer: vLLM's DFlash proposer, told about frames, with a source of drafts in place of per-slot sampling.

`num_speculative_tokens` (N) is the verification budget, the checkpoint's frames (T) are the width of the drafter's
forward; the two differ. After `super().__init__` has sized the draft buffers with N, DFlash's own machinery (query
slots, sample indices, CUDA graphs) is told T. (vLLM V2 calls a proposer a speculator; base class:
vllm/v1/worker/gpu/spec_decode/dflash/speculator.py; model for the overrides: its DSpark and DFlash2 subclasses.)
"""

import copy
import itertools
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_ctc_spec.draft.ctc import read_frames
from vllm_ctc_spec.kernels.contract import ChainSampling
from vllm_ctc_spec.serving.acceptance import is_ours
from vllm_ctc_spec.serving.chain import attach_chains
from vllm_ctc_spec.serving.drafts import ProposesFromSources
from vllm_ctc_spec.serving.graphs import num_drafted_by_batch
from vllm_ctc_spec.serving.tree.attach import attach_trees, target_layers


def most_verified_rows(vllm_config: VllmConfig) -> list[int]:
    """`[R]` is the most rows, anchors and drafts, that the target verifies for up to R requests: fewer than 1 + N each
    where larger batches verify less."""
    num_drafted = num_drafted_by_batch(vllm_config, vllm_config.scheduler_config.max_num_seqs)
    return list(itertools.accumulate((reqs * (1 + drafted) for reqs, drafted in enumerate(num_drafted)), max))


class CTCProposer(ProposesFromSources, DFlashSpeculator):
    _speculator_name = "CTC"

    def __init__(self, vllm_config: VllmConfig, device: torch.device, request_states: RequestState):
        # Before the base class is constructed: vLLM 0.33 sizes buffers there by `_num_graph_context_tokens`.
        self._most_verified_rows = most_verified_rows(vllm_config)
        super().__init__(vllm_config, device)
        hf_config = self.draft_model_config.hf_config
        self.num_frames: int = hf_config.num_frames  # T
        self.set_up(self.num_frames, request_states)
        self.label_logits: torch.Tensor | None = None  # [R, N, L] fp32, with a draft vocabulary
        self._idle = False  # nothing is to be drafted for this batch; goes with vLLM 0.32, see `propose`
        self.num_query_per_req: int = hf_config.num_query_rows
        # Rows that vLLM takes for samples: the frames, or the anchor where frames are no rows of the query.
        self.sample_from_anchor = self.num_query_per_req == 1
        self.num_speculative_steps = 1 if self.sample_from_anchor else self.num_frames
        num_rows = self.max_num_reqs * self.num_speculative_steps
        self.sample_indices = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.sample_pos = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.sample_idx_mapping = torch.full((num_rows,), -1, dtype=torch.int64, device=device)

    def load_model(self, target_model: nn.Module) -> None:
        layers = target_layers(self.vllm_config)
        super().load_model(target_model)
        self.model.gather_draft_head()
        if self.draft_logits is not None and self.model.vocabulary is not None:
            # The chain's own rows of logits; vLLM's have the target's vocabulary.
            shape = *self.draft_logits.shape[:2], len(self.model.vocabulary.token_ids)
            self.label_logits = self.draft_logits.new_full(shape, -torch.inf)
        if self.trees is not None:
            attach_trees(self.vllm_config, target_model, layers, self.trees, self.layout, self, self.rule)
        else:
            ours = is_ours(self.rule, self.vllm_config.speculative_config)
            attach_chains(self.vllm_config, target_model, self.rule if ours else None)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """A schedule of smaller drafts for larger batches changes the rows that are verified, never the draft's forward
        of 1 + T rows a request. So vLLM must not capture a graph for each size."""
        whole = self.vllm_config
        self.vllm_config = copy.copy(whole)
        self.vllm_config.speculative_config = copy.copy(whole.speculative_config)
        self.vllm_config.speculative_config.num_speculative_tokens_per_batch_size = None
        try:
            super().init_cudagraph_manager(cudagraph_mode)
        finally:
            self.vllm_config = whole

    def capture(self) -> None:
        """A graph always drafts, whatever the last batch was. Before the capture vLLM warms up with steps like real
        ones (vllm/v1/worker/gpu/warmup.py); these do not count."""
        self._idle = False
        super().capture()
        if self.meter is not None:
            self.meter.reset()

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """After a tree was verified, the drafter's context is the accepted path. Once the path's rows are first, all
        that follows is as for a chain."""
        verdict, self._verdict = self._verdict, None
        if verdict is not None and aux_hidden_states:
            self.layout.put_path_first(verdict, aux_hidden_states)
        # vLLM 0.32 runs the draft even for a batch that is too large for drafts. The context has to be stored, and no
        # CUDA graph of the draft may be replayed, because a graph would draft. vLLM 0.33 returns before by itself.
        self._idle = kwargs.get("num_speculative_tokens") == 0
        if self._idle:
            kwargs["is_profile"] = True
        return super().propose(
            input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, *args, **kwargs
        )

    def draft_logits_spec(self, vllm_config: VllmConfig) -> tuple[torch.dtype, float]:
        """log q(v | prefix) up to a constant, fp32; -inf marks tokens that a row cannot propose."""
        return torch.float32, float("-inf")

    def _num_graph_context_tokens(self, num_reqs: int) -> int:
        # Rows of a verification, not 1 + T a request. vLLM stores a batch's further rows outside of the graph.
        return min(self._most_verified_rows[num_reqs], self.max_num_tokens)

    def _generate_draft(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    ) -> None:
        """Run the module, let the source draft, store and count the draft. Recorded in the draft's CUDA graph: fixed
        shapes, nothing is read on the host."""
        if self._idle:
            return
        num_queries = num_reqs * self.num_query_per_req
        requests = self.sample_idx_mapping[: num_reqs * self.num_speculative_steps : self.num_speculative_steps]
        anchor = self.input_buffers.input_ids[: num_queries : self.num_query_per_req].long()
        vocabulary = self.model.vocabulary
        frames = stats = None
        if "frames" in self.source.reads:
            hidden = self._run_model(
                num_tokens_padded, attn_metadata, slot_mappings, num_tokens_across_dp, cudagraph_runtime_mode
            )
            num_rows = 1 + self.num_frames
            hidden = hidden[: num_reqs * num_rows].unflatten(0, (num_reqs, num_rows))  # [R, 1 + T, H]
            label = anchor if vocabulary is None else vocabulary.to_labels(anchor)
            frames, stats = read_frames(self.model.compute_frames(hidden), label, self.model.markov_tables)
        if self.trees is not None:
            self.draft_tokens[:num_reqs] = self.draft_trees(requests, anchor, frames, vocabulary)
            return
        labels, lengths = self.source.chain(frames, stats, self.num_drafted, self._sampling(num_reqs))
        self.draft_tokens[:num_reqs] = labels if vocabulary is None else vocabulary.to_tokens(labels)
        if self.label_logits is not None:
            spread_label_logits(self.label_logits, vocabulary.token_ids, requests, self.draft_logits)
        if self.meter is not None:
            self.meter.record(requests, lengths, frames=frames)

    def _sampling(self, num_reqs: int) -> ChainSampling | None:
        """None for greedy drafts. `sample_pos` of a request's first sample is the first label's position; like the
        target's draws, a draft's are keyed by the position before it."""
        if self.draft_logits is None:
            return None
        first = slice(0, num_reqs * self.num_speculative_steps, self.num_speculative_steps)
        return ChainSampling(
            temperature=self.temperature,
            seeds=self.seeds,
            positions=self.sample_pos[first] - 1,
            requests=self.sample_idx_mapping[first],
            draft_logits=self.draft_logits if self.label_logits is None else self.label_logits,
        )


def spread_label_logits(
    label_logits: torch.Tensor, token_ids: torch.Tensor, requests: torch.Tensor, draft_logits: torch.Tensor
) -> None:
    """Copy the logits of each label to the column of its token. Tokens that are no labels keep their -inf.

    label_logits [R, N, L] and draft_logits [R, N, V] fp32 by request slot, token_ids [L] int64, requests [B] int64. An
    inert row, -1, writes the first slot's rows once more.
    """
    rows = requests.clamp_min(0)
    label = torch.arange(label_logits.shape[1], device=token_ids.device)
    draft_logits[rows[:, None, None], label[:, None], token_ids] = label_logits[rows]
