"""The Attention Draft Module as a vLLM model: DFlash's query and context machinery, frames on top.

`drafter/module.py` has the same weights and says what the module computes; a test holds both to the same frames. The
base class (vllm/model_executor/models/qwen3_dflash.py) writes the context's keys and values into the paged cache and
runs 1 + T query slots a request. Here the T slots after the anchor embed as learned frame queries, and the output has
the frames' lattice beside the logits of their labels.
"""

import copy

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed.communication_op import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.qwen3_dflash import (
    DFlashQwen3DecoderLayer,
    DFlashQwen3ForCausalLM,
    DFlashQwen3Model,
)

from vllm_ctc_spec.drafter.lattice import FrameOutputs, TransitionHead, read_lattice
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.errors import DrafterConfigError


class MarkovTables(nn.Module):
    """bias(v | last) = output.weight[v] . embedding.weight[last]; `[L, r]`, read by the kernels. The input table has
    one more row where an anchor may be no label."""

    def __init__(self, num_inputs: int, num_labels: int, rank: int):
        super().__init__()
        self.embedding = nn.Embedding(num_inputs, rank)
        self.output = nn.Linear(rank, num_labels, bias=False)


class CTCDraftLayer(DFlashQwen3DecoderLayer):
    """Sees the whole context, as in training. vLLM's attention takes the target's window where a layer names none."""

    def __init__(self, vllm_config: VllmConfig, *, cache_config: CacheConfig, **others):
        cache_config = copy.copy(cache_config)
        cache_config.sliding_window = None
        super().__init__(vllm_config, cache_config=cache_config, **others)


class CTCDraftInner(DFlashQwen3Model):
    decoder_layer_cls = CTCDraftLayer

    def __init__(self, *, vllm_config: VllmConfig, start_layer_id: int = 0, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, start_layer_id=start_layer_id, prefix=prefix)
        config = self.config
        self.frame_queries = None
        if config.num_query_rows > 1:
            self.frame_queries = nn.Parameter(torch.empty(config.num_frames, config.hidden_size), requires_grad=False)
        self.blank_head = nn.Linear(config.hidden_size, 1) if config.lattice == "ctc" else None
        self.transition_head = TransitionHead(config) if config.lattice == "transitions" else None
        sizes = config.num_markov_inputs, config.draft_vocab_size, config.markov_rank
        self.markov_head = MarkovTables(*sizes) if config.markov_rank else None

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows come in groups of 1 + T a request: the anchor's embedding, then the learned frame queries."""
        slot = torch.arange(input_ids.shape[0], device=input_ids.device) % (1 + self.frame_queries.shape[0])
        queries = self.frame_queries[(slot - 1).clamp_min(0)]
        return torch.where((slot == 0).unsqueeze(-1), self.embed_tokens(input_ids), queries)

    def _normalize_context_k(self, all_k: torch.Tensor) -> torch.Tensor:
        """all_k [layers, tokens, kv_heads, head_dim]. On a CPU, vLLM's `rms_norm` silently applies row 0 of a
        two-dimensional weight to every layer, so each layer is normalised by itself there."""
        if not all_k.is_cpu:
            return super()._normalize_context_k(all_k)
        normalized = torch.empty_like(all_k)
        for layer, weight in enumerate(self._k_norm_weights):
            ops.rms_norm(normalized[layer], all_k[layer], weight, self._rms_norm_eps)
        return normalized


class CTCDraftModel(DFlashQwen3ForCausalLM):
    model_cls = CTCDraftInner

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if not get_current_vllm_config().use_v2_model_runner:
            raise DrafterConfigError(
                "CTC speculative decoding needs vLLM's Model Runner V2; unset VLLM_USE_V2_MODEL_RUNNER or set it to 1."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vocabulary: DraftVocabulary | None = None  # None: every token of the target is a label
        self.draft_head: ReplicatedLinear | None = None  # [L, H]

    @torch.no_grad()
    def gather_draft_head(self) -> None:
        """Take the rows of the target's head for the labels of a draft vocabulary; vLLM has shared the head by now.
        Each rank of tensor parallelism holds all of them, and computes the frames' logits without the others."""
        if self.draft_id_to_target_id is None:
            return
        self.vocabulary = DraftVocabulary.from_d2t(self.draft_id_to_target_id.data, self.config.vocab_size)
        size, dtype = self.config.hidden_size, self.draft_model_config.dtype
        rows = head_rows(self.lm_head, self.vocabulary.token_ids, size, dtype)
        head = ReplicatedLinear(size, len(rows), bias=False, params_dtype=rows.dtype, return_bias=False)
        head.weight.data = rows
        head.quant_method.process_weights_after_loading(head)  # packed on a CPU: several times faster than F.linear
        self.draft_head = head.requires_grad_(False)

    def compute_frames(self, hidden: torch.Tensor) -> FrameOutputs:
        """Hidden states `[R, 1 + T, H]` of the anchor and the frames to logits by the target's head, and the lattice in
        fp32."""
        of_frames = hidden[:, 1:]
        compute_logits = self.compute_logits if self.draft_head is None else self.draft_head
        logits = compute_logits(of_frames.flatten(0, 1)).unflatten(0, of_frames.shape[:2])
        return FrameOutputs(logits, read_lattice(hidden, self.model.blank_head, self.model.transition_head))

    @property
    def markov_tables(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(W_in [L or L + 1, r], W_out [L, r]) of the label-conditional head, or None."""
        head = self.model.markov_head
        return None if head is None else (head.embedding.weight, head.output.weight)

    def _read_mask_embedding(self) -> None:
        """There is none to read: frame queries take the place of DFlash's mask embedding."""


HEAD_COLUMNS_AT_ONCE = 256


def head_rows(
    head: VocabParallelEmbedding, token_ids: torch.Tensor, hidden_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows `[L, H]` of a head `[V, H]` that may be sharded over ranks or quantised; dtype: the head's inputs'."""
    if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
        shard = head.shard_indices
        place = token_ids - shard.org_vocab_start_index
        is_here = (place >= 0) & (token_ids < shard.org_vocab_end_index)
        rows = head.weight[place.clamp(0, len(head.weight) - 1)]
        return tensor_model_parallel_all_reduce(rows.where(is_here[:, None], 0).contiguous())
    # For weights of any form: the logits of a unit vector are a column of the head.
    columns = []
    for start in range(0, hidden_size, HEAD_COLUMNS_AT_ONCE):
        size = min(HEAD_COLUMNS_AT_ONCE, hidden_size - start)
        unit = torch.zeros(size, hidden_size, dtype=dtype, device=token_ids.device)
        unit[:, start : start + size].fill_diagonal_(1)
        logits = tensor_model_parallel_all_gather(head.quant_method.apply(head, unit, bias=None))
        columns.append(logits[:, token_ids].T)
    return torch.cat(columns, 1).contiguous()
