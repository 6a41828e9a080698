"""The layers of a drafter in plain torch; attention reads a context of keys and values beside its own rows."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_ctc_spec.drafter.config import DrafterConfig

WITHOUT_GROUPED_HEADS = ("cuda",)  # devices whose fused attention takes a mask or grouped heads, not both


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding, half-split ("neox") layout: x `[B, heads, S, head_dim]`, positions `[B, S]`."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class DraftAttention(nn.Module):
    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        d, hd = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(d, config.num_attention_heads * hd, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * hd, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * hd, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, d, bias=False)
        self.q_norm = nn.RMSNorm(hd, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(hd, eps=config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def forward(
        self, hidden: Tensor, positions: Tensor, context: Tensor, context_positions: Tensor, mask: Tensor
    ) -> Tensor:
        """hidden [B, Q, H] attends to context [B, S, H] and itself where mask [B, 1, Q, S + Q] is true."""
        theta = self.config.rope_theta
        both = torch.cat([context, hidden], 1)
        both_positions = torch.cat([context_positions, positions], 1)
        q = rotate(self.q_norm(self._heads(self.q_proj(hidden))), positions, theta)
        k = rotate(self.k_norm(self._heads(self.k_proj(both))), both_positions, theta)
        v = self._heads(self.v_proj(both))
        if hidden.device.type in WITHOUT_GROUPED_HEADS:
            # Without this it falls back to materialising all scores: 6 GB and more with thousands of context tokens.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DraftMLP(nn.Module):
    def __init__(self, config: DrafterConfig):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = DraftMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, positions: Tensor, context: Tensor, context_positions: Tensor, mask: Tensor
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions, context, context_positions, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class ContextAttention(nn.Module):
    """A layer without a feed-forward part: attention over the context, and its residual."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, positions: Tensor, context: Tensor, context_positions: Tensor, mask: Tensor
    ) -> Tensor:
        return hidden + self.self_attn(self.input_layernorm(hidden), positions, context, context_positions, mask)
