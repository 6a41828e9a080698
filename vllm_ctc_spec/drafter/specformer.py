"""SpecFormer: T frames from one state (arXiv 2511.20340).

Only the anchor attends to the context, so a draft has one query row there, whatever T:

    context = norm(fc(concat of each depth's own norm))        keys and values, positions 0..a-1
    state   = x + attention(norm(x)),  x = embed(anchor)       position a
    frames  = positional(norm(state))                          one linear map to T vectors
    frames  = layers(frames)                                   attention among the T of them, and SwiGLU

The released code drafts from the state of the last token that the target has read, as if the anchor were not known yet,
and its attention among the frames is causal where the paper says bidirectional. Here the anchor is the query, as in the
Attention Draft Module, and `frame_attention` chooses.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.layers import DraftLayer


class DepthNorm(nn.Module):
    """Normalises the hidden states of each depth of the target by themselves."""

    def __init__(self, num_depths: int, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_depths, hidden_size))

    def forward(self, aux_hidden_states: Tensor) -> Tensor:
        """`[..., A * H]` to the same."""
        depths = aux_hidden_states.unflatten(-1, self.weight.shape)
        return (F.rms_norm(depths, depths.shape[-1:], eps=self.eps) * self.weight).flatten(-2)


def positional(config: DrafterConfig) -> nn.Sequential:
    """The positional feed-forward: a state `[..., H]` to T vectors `[..., T * H]`, through `positional_rank` numbers
    where it is not 0. The bias tells the frames apart whatever the state."""
    hidden, outputs, rank = config.hidden_size, config.num_frames * config.hidden_size, config.positional_rank
    if not rank:
        return nn.Sequential(nn.Linear(hidden, outputs))
    return nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, outputs))


class StateToFrames(nn.Module):
    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        self.state_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.positional = positional(config)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))

    def forward(self, state: Tensor) -> Tensor:
        """`[B, M, 1, H]`, M anchors in each of B sequences, to the state and its frames `[B, M, 1 + T, H]`."""
        num_frames = self.config.num_frames
        hidden = self.positional(self.state_norm(state)).flatten(0, 2).unflatten(-1, (num_frames, -1))
        positions = torch.arange(num_frames, device=state.device).expand(len(hidden), -1)
        mask = torch.ones(num_frames, num_frames, dtype=torch.bool, device=state.device)
        if self.config.frame_attention == "causal":
            mask = mask.tril()
        for layer in self.layers:
            hidden = layer(hidden, positions, hidden[:, :0], positions[:, :0], mask)
        return torch.cat([state, hidden.view(*state.shape[:2], num_frames, -1)], 2)
