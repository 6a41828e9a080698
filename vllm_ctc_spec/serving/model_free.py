"""ModelFreeProposer: drafts of sources that read no drafter's module, for any target that can verify trees.

To vLLM it is a speculator with a draft model that has no weights, no attention layers and no passes of its own: no
hidden states of the target are asked for, no key/value slots beyond those of a verification, no CUDA graphs.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_ctc_spec.serving.drafts import ProposesFromSources
from vllm_ctc_spec.serving.tree.attach import attach_trees, target_layers


class ModelFreeProposer(ProposesFromSources, DraftModelSpeculator):
    def __init__(self, vllm_config: VllmConfig, device: torch.device, request_states: RequestState):
        super().__init__(vllm_config, device)
        self.set_up(0, request_states)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        raise AssertionError("there is none")

    def load_model(self, target_model: nn.Module) -> None:
        self.model = None
        self.draft_attn_layer_names: set[str] = set()
        layers = target_layers(self.vllm_config)
        attach_trees(self.vllm_config, target_model, layers, self.trees, self.layout, self, self.rule)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """No layers, no metadata."""

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """No passes, no graphs."""

    def capture(self) -> None:
        """What vLLM warmed up with before does not count."""
        if self.meter is not None:
            self.meter.reset()

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        self._verdict = None
        drafts = self.draft_tokens[: input_batch.num_reqs]
        if dummy_run or num_speculative_tokens == 0:  # slots of a dummy batch may be those of others
            return drafts
        requests = input_batch.idx_mapping[: input_batch.num_reqs].long()
        # In chunked prefill nothing was sampled: the prompt's next token is the anchor.
        anchor = torch.where(num_sampled > 0, last_sampled[requests, 0], next_prefill_tokens[0, requests].long())
        drafts.copy_(self.draft_trees(requests, anchor))
        return drafts
