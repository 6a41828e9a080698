"""TreeModelState: vLLM's default model state, with a tree's layout, positions and sampler."""

from typing import Any, Protocol

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_ctc_spec.accept.rule import AcceptanceRule
from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.tree_layout import tree_layout
from vllm_ctc_spec.serving.hidden import HiddenRows
from vllm_ctc_spec.serving.tree.compaction import PathCompaction
from vllm_ctc_spec.serving.tree.layout import Attend, TreeLayout, Verdict
from vllm_ctc_spec.serving.tree.table import TreeTable
from vllm_ctc_spec.serving.tree.verification import TreeRejectionSampler


class Proposer(Protocol):
    """The messages that the proposer gets."""

    def new_request(self, request: int, data: NewRequestData) -> None:
        """A new request takes this slot."""

    def apply_staged_writes(self) -> None:
        """All new requests of this step have come."""

    def verified(self, verdict: Verdict) -> None:
        """The verdict on the step whose hidden states it reads next."""


class TreeModelState(DefaultModelState):
    """Created by vLLM from the class that `attach` makes, which carries what is shared with the proposer and the
    attention layers (hooks: vllm/v1/worker/gpu/model_states/interface.py)."""

    trees: TreeTable
    layout: TreeLayout
    compaction: PathCompaction
    proposer: Proposer
    rule: AcceptanceRule
    hidden: HiddenRows | None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.trees.reset(req_index, _depends_on_history(new_req_data.sampling_params))
        self.proposer.new_request(req_index, new_req_data)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.proposer.apply_staged_writes()

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.compaction.bind(kv_cache_config)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """Full CUDA graphs for batches of verifications only: a prefill row in a graph would need both kernels."""
        return AttentionCGSupport.UNIFORM_BATCH, "tree attention"

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        layout = self.layout
        layout.expect(*_tree_rows(input_batch, for_capture))
        layout.slot_mappings = slot_mappings
        tree_layout(
            input_batch.positions,
            input_batch.query_start_loc[: input_batch.num_reqs + 1],
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.trees.depths,
            self.trees.ancestors,
            layout.positions,
            TreeRows(layout.anchor_rows, layout.num_rows, layout.ancestors),
        )
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, *args, for_capture=for_capture, **kwargs
        )

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        # The same buffers on every step: CUDA graphs keep their addresses.
        inputs = super().prepare_inputs(input_batch, req_states)
        if self.rope_state is None:
            return {**inputs, "positions": self.layout.positions[: input_batch.num_tokens_after_padding]}
        # Multimodal rotary positions [dimensions, tokens], counted up row by row too: from a row to its node's depth it
        # is as far in every dimension.
        rows = input_batch.num_tokens
        self.rope_state.positions[:, :rows] += self.layout.positions[:rows] - input_batch.positions[:rows]
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs if self.rope_state is not None else {**inputs, "positions": self.layout.positions[:num_tokens]}

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        return sampler, TreeRejectionSampler(self, sampler)


def _tree_rows(input_batch: InputBatch, for_capture: bool) -> tuple[Attend, int]:
    """Which rows our attention takes, and how many of them a request has at most. Computed on the host. While a CUDA
    graph is replayed, the captured values win and these are ignored.

    Full graphs are captured with a dummy batch, which has no drafts, and replayed for verifications of that many rows a
    request (UNIFORM_BATCH); with one row a request there is nothing to verify, and the stock attention is right.
    """
    rows = np.diff(input_batch.query_start_loc_np[: input_batch.num_reqs + 1])
    tree_rows = rows if for_capture else np.diff(input_batch.cu_num_logits_np)
    most = int(tree_rows.max())
    if most == 1:
        return Attend.NO_ROWS, most
    return Attend.ALL_ROWS if np.array_equal(rows, tree_rows) else Attend.TREE_ROWS, most


def _depends_on_history(params: SamplingParams | None) -> bool:
    """Whether vLLM judges a row of this request by the rows before it, which in a tree are no history: penalties and
    bad words read them (`sample/penalties.py`, `sample/bad_words.py`), a grammar advances over them, a thinking budget
    counts them."""
    return params is not None and bool(
        params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or params.bad_words
        or params.structured_outputs is not None
        or params.thinking_token_budget is not None
    )
