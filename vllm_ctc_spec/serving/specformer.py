"""A SpecFormer as a vLLM model: one query row a request attends to the paged context, T frames are made from its state.

`drafter/specformer.py` has the same weights and says what they compute; a test holds both to the same frames. Attention
among the frames of a request has T keys and needs no cache, so a draft takes one slot of it where the Attention Draft
Module takes 1 + T.
"""

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.model_executor.models.utils import maybe_prefix

from vllm_ctc_spec.drafter.specformer import DepthNorm
from vllm_ctc_spec.serving.model import CTCDraftInner, CTCDraftLayer, CTCDraftModel


class ContextLayer(CTCDraftLayer):
    """Attention over the context and its residual. The positional map takes the place of a feed-forward part."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.mlp, self.post_attention_layernorm

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(positions=positions, hidden_states=normed)


class FrameAttention(nn.Module):
    """Attention among the T frames of each request. Heads are shared out among tensor-parallel ranks."""

    def __init__(self, config, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        self.num_frames, self.head_dim = config.num_frames, config.head_dim
        self.is_causal = config.frame_attention == "causal"
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads, bias=False,
            quant_config=quant_config, prefix=f"{prefix}.qkv_proj", return_bias=False,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False,
            quant_config=quant_config, prefix=f"{prefix}.o_proj", return_bias=False,
        )  # fmt: skip
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            config.head_dim, max_position=config.num_frames, rope_parameters=config.rope_parameters
        )
        num_ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.sizes = [config.head_dim * max(1, n // num_ranks) for n in (heads, kv_heads, kv_heads)]

    def _norm_heads(self, norm: RMSNorm, rows: torch.Tensor) -> torch.Tensor:
        return norm(rows.view(rows.shape[0], -1, self.head_dim)).view(rows.shape)

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        """`[R * T, heads * head_dim]` to `[R, heads, T, head_dim]`."""
        return rows.view(-1, self.num_frames, rows.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions `[R * T]`, the number of each frame; hidden_states `[R * T, H]`."""
        q, k, v = self.qkv_proj(hidden_states).split(self.sizes, -1)
        q, k = self.rotary_emb(positions, self._norm_heads(self.q_norm, q), self._norm_heads(self.k_norm, k))
        q, k, v = map(self._split, (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2).flatten(0, 1))


class FrameLayer(nn.Module):
    def __init__(self, config, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        self.self_attn = FrameAttention(config, quant_config, f"{prefix}.self_attn")
        self.mlp = Qwen2MLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, quant_config, prefix=f"{prefix}.mlp"
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(positions, self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class StateToFrames(nn.Module):
    def __init__(self, config, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        self.num_frames = config.num_frames
        hidden, outputs, rank = config.hidden_size, config.num_frames * config.hidden_size, config.positional_rank
        shared = dict(quant_config=quant_config, return_bias=False)
        first = f"{prefix}.positional.0"
        self.state_norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.positional = nn.Sequential()
        if rank:
            self.positional.append(ReplicatedLinear(hidden, rank, bias=False, prefix=first, **shared))
        last = f"{prefix}.positional.{len(self.positional)}"
        self.positional.append(ColumnParallelLinear(rank or hidden, outputs, gather_output=True, prefix=last, **shared))
        self.layers = nn.ModuleList(
            FrameLayer(config, quant_config, f"{prefix}.layers.{i}") for i in range(config.num_frame_layers)
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """`[R, H]` to the frames `[R, T, H]`."""
        hidden_states = self.positional(self.state_norm(state)).view(-1, state.shape[-1])
        positions = torch.arange(self.num_frames, device=state.device).repeat(state.shape[0])
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        return hidden_states.view(-1, self.num_frames, state.shape[-1])


class SpecFormerInner(CTCDraftInner):
    decoder_layer_cls = ContextLayer

    def __init__(self, *, vllm_config: VllmConfig, start_layer_id: int = 0, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, start_layer_id=start_layer_id, prefix=prefix)
        num_depths = len(self.config.eagle_aux_hidden_state_layer_ids)
        self.depth_norm = DepthNorm(num_depths, self.config.hidden_size, self.config.rms_norm_eps)
        self.specformer = StateToFrames(self.config, self.quant_config, maybe_prefix(prefix, "specformer"))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The anchor's, one row a request."""
        return self.embed_tokens(input_ids)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, input_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[R]` anchors to the normalised state and frames of each, `[R * (1 + T), H]`."""
        hidden_states = self.embed_input_ids(input_ids) if input_embeds is None else input_embeds
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        frames = self.specformer(hidden_states)
        return self.norm(torch.cat([hidden_states.unsqueeze(1), frames], 1).flatten(0, 1))


class SpecFormerModel(CTCDraftModel):
    model_cls = SpecFormerInner

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states `[rows, A * H]` of the target to `[rows, H]`."""
        return super().combine_hidden_states(self.model.depth_norm(hidden_states))
