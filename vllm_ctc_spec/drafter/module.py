"""A drafter as a training module in plain torch.

The Attention Draft Module ("adm") is one small transformer. It reads the target's hidden states as context keys and
values and turns 1 + T query slots, the anchor token and T learned frame queries, into T frames in one parallel forward:

    context = norm(fc(concat of auxiliary hidden states))      keys and values of every layer, positions 0..a-1
    queries = [embed(anchor), frame_1 .. frame_T]              positions a..a+T, bidirectional among themselves
    logits  = target_head(h_t)

In a SpecFormer the anchor alone attends to the context, and frames are made from its state (`specformer.py`).

Its lattice spells labels with frames (`lattice.py`). Embedding and head are the target's, frozen, and not part
of the state dict. With a draft vocabulary the head has the rows of its tokens only. `serving/model.py` serves a file
with the same parameters, by name and shape; a test holds both modules to the same frames.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_ctc_spec.drafter.config import WEIGHTS_NAME, DrafterConfig
from vllm_ctc_spec.drafter.lattice import FrameOutputs, Lattice, TransitionHead, read_lattice
from vllm_ctc_spec.drafter.layers import ContextAttention, DraftLayer
from vllm_ctc_spec.drafter.specformer import DepthNorm, StateToFrames
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.drafter.weights import check_weights
from vllm_ctc_spec.errors import DrafterConfigError

INIT_STD = 0.02


class MarkovHead(nn.Module):
    """Low-rank label-conditional bias: bias(v | last) = output.weight[v] . embedding.weight[last]."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.num_markov_inputs, config.markov_rank)
        self.output = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)

    def forward(self, last: Tensor) -> Tensor:
        """last `[...]` to bias `[..., L]`."""
        return self.output(self.embedding(last))


class CTCDrafter(nn.Module):
    """The drafter with the target's frozen embedding `[V, H]` and head `[V, H]`.

    Source: Attention Draft Module of arXiv 2412.00061; context keys and values as in DFlash
    (vllm/model_executor/models/qwen3_dflash.py).
    """

    def __init__(self, config: DrafterConfig, embedding: Tensor, head: Tensor, token_ids: Tensor | None = None):
        """token_ids `[L]`, increasing: the draft vocabulary, if the configuration has one."""
        super().__init__()
        self.config = config
        if (token_ids is None) == config.has_draft_vocabulary or (
            token_ids is not None and len(token_ids) != config.draft_vocab_size
        ):
            raise DrafterConfigError(
                f"The drafter has {config.draft_vocab_size} labels and the target {config.vocab_size} tokens, but "
                f"{'no' if token_ids is None else len(token_ids)} token ids were given for them."
            )
        for name, weight in (("embedding", embedding), ("head", head)):
            if weight.shape != (config.vocab_size, config.hidden_size):
                raise DrafterConfigError(
                    f"The target's {name} is {list(weight.shape)}, but this drafter's configuration needs "
                    f"{[config.vocab_size, config.hidden_size]}; use the target that it was made for."
                )
            self.register_buffer(f"target_{name}", weight.detach(), persistent=False)
        self._set_vocabulary(token_ids)
        d = config.hidden_size
        self.fc = nn.Linear(d * len(config.aux_hidden_state_layer_ids), d, bias=False)
        self.hidden_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self._build_body(config)
        self.norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.blank_head = nn.Linear(d, 1) if config.lattice == "ctc" else None
        self.transition_head = TransitionHead(config) if config.lattice == "transitions" else None
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.reset_parameters()

    def _build_body(self, config: DrafterConfig) -> None:
        """`layers` attend to the context; what one architecture has and the other has not is None there."""
        self.depth_norm = self.frame_queries = self.specformer = None
        if config.architecture == "specformer":
            self.depth_norm = DepthNorm(len(config.aux_hidden_state_layer_ids), config.hidden_size, config.rms_norm_eps)
            self.layers = nn.ModuleList([ContextAttention(config)])
            self.specformer = StateToFrames(config)
        else:
            self.frame_queries = nn.Parameter(torch.empty(config.num_frames, config.hidden_size))
            self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))

    @property
    def all_layers(self) -> list[nn.Module]:
        return [*self.layers, *(() if self.specformer is None else self.specformer.layers)]

    def _set_vocabulary(self, token_ids: Tensor | None) -> None:
        head = self.target_head
        self.has_draft_vocabulary = token_ids is not None
        if token_ids is None:
            self.register_buffer("draft_head", head, persistent=False)  # [L, H]
            return
        vocabulary = DraftVocabulary.of(token_ids.to(head.device), self.config.vocab_size)
        self.register_buffer("draft_head", head[vocabulary.token_ids], persistent=False)
        self.register_buffer("label_ids", vocabulary.labels, persistent=False)
        self.register_buffer("d2t", vocabulary.d2t)
        self.register_buffer("t2d", vocabulary.t2d)

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """None where every token of the target is a label."""
        if not self.has_draft_vocabulary:
            return None
        return DraftVocabulary(self.d2t + torch.arange(len(self.d2t), device=self.d2t.device), self.label_ids)

    def reset_parameters(self) -> None:
        """Labels start uniformly spread: of T frames, U labels leave a share of (T - U) / T."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
        if self.frame_queries is not None:
            nn.init.normal_(self.frame_queries, std=INIT_STD)
        if self.specformer is not None:
            nn.init.normal_(self.specformer.positional[-1].bias, std=INIT_STD)
        if self.markov_head is not None:
            nn.init.zeros_(self.markov_head.output.weight)
        spare = max(self.config.num_frames - self.config.num_labels, 0.05)
        self.spread_labels(spare / self.config.num_frames)

    def spread_labels(self, skipped: float) -> None:
        """Start with a share `skipped`, between 0 and 1, of frames that hold no label: P(blank), or the ratio of the
        geometric law of steps."""
        if self.blank_head is not None:
            nn.init.zeros_(self.blank_head.weight)
            nn.init.constant_(self.blank_head.bias, math.log(skipped / (1 - skipped)))
        if self.transition_head is not None:
            offset = self.transition_head.offset
            offset.data.copy_(torch.arange(len(offset)) * math.log(skipped))

    def encode_context(self, aux_hidden_states: Tensor) -> Tensor:
        """`[B, S, A * H]` concatenated auxiliary hidden states to the layers' common context `[B, S, H]`."""
        if self.depth_norm is not None:
            aux_hidden_states = self.depth_norm(aux_hidden_states)
        return self.hidden_norm(self.fc(aux_hidden_states))

    def forward_hidden(self, aux_hidden_states: Tensor, anchor_tokens: Tensor, anchor_positions: Tensor) -> Tensor:
        """Normalised hidden states of the anchor's slot and the frames, `[B, M, 1 + T, H]`.

        aux_hidden_states [B, S, A * H]; anchor_tokens, anchor_positions [B, M]: the anchor at position a sees the
        context 0..a-1 only (its own hidden state does not exist yet when it is drafted from).
        """
        num_rows, num_context = aux_hidden_states.shape[:2]
        num_anchors, num_queries = anchor_tokens.shape[1], self.config.num_query_rows
        device = aux_hidden_states.device
        context = self.encode_context(aux_hidden_states)
        context_positions = torch.arange(num_context, device=device).expand(num_rows, -1)
        hidden = F.embedding(anchor_tokens, self.target_embedding).unsqueeze(2)
        if self.frame_queries is not None:
            hidden = torch.cat([hidden, self.frame_queries.expand(num_rows, num_anchors, -1, -1)], 2)
        hidden = hidden.flatten(1, 2)
        positions = (anchor_positions[:, :, None] + torch.arange(num_queries, device=device)).flatten(1)
        positions = positions.clamp_max(self.config.max_position_embeddings - 1)
        sees_context = context_positions[:, None, :] < anchor_positions.repeat_interleave(num_queries, 1)[:, :, None]
        block = torch.arange(num_anchors, device=device).repeat_interleave(num_queries)
        sees_block = (block[:, None] == block[None, :]).expand(num_rows, -1, -1)
        mask = torch.cat([sees_context, sees_block], 2).unsqueeze(1)
        for layer in self.layers:
            hidden = layer(hidden, positions, context, context_positions, mask)
        hidden = hidden.unflatten(1, (num_anchors, num_queries))
        if self.specformer is not None:
            hidden = self.specformer(hidden)
        return self.norm(hidden)

    def forward(self, aux_hidden_states: Tensor, anchor_tokens: Tensor, anchor_positions: Tensor) -> FrameOutputs:
        """Frames for M anchors in each of B sequences; arguments as in `forward_hidden`."""
        return self.frames(self.forward_hidden(aux_hidden_states, anchor_tokens, anchor_positions))

    def frames(self, hidden: Tensor) -> FrameOutputs:
        """Normalised hidden states `[..., 1 + T, H]` to frames."""
        return FrameOutputs(F.linear(hidden[..., 1:, :], self.draft_head), self.lattice(hidden))

    def lattice(self, hidden: Tensor) -> Lattice:
        """Their lattice alone: no pass over the vocabulary."""
        return read_lattice(hidden, self.blank_head, self.transition_head)

    @property
    def markov_tables(self) -> tuple[Tensor, Tensor] | None:
        """(W_in [L, r], W_out [L, r]) of the label-conditional head, or None. W_in has one more row where an anchor may
        be no label."""
        return None if self.markov_head is None else (self.markov_head.embedding.weight, self.markov_head.output.weight)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (fp32; embedding and head stay with the target)."""
        self.config.save(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS_NAME)

    def start_from(self, folder: str | Path) -> None:
        """Take over another drafter's weights where name and shape agree: a start for another lattice, loss or number
        of layers (DrafterConfigError if none agrees)."""
        config = DrafterConfig.load(folder)
        check_weights(folder, config, expected_shapes(config))
        mine = dict(self.named_parameters())
        given = load_file(Path(folder) / WEIGHTS_NAME)
        if not self._has_labels_of(given):  # rows of the label-conditional head are labels
            given = {name: w for name, w in given.items() if not name.startswith("markov_head")}
        shared = {name: w for name, w in given.items() if name in mine and mine[name].shape == w.shape}
        if not shared:
            raise DrafterConfigError(f"The drafter at {folder} shares no weight with this one to start from.")
        self.load_state_dict(shared, strict=False)

    def _has_labels_of(self, weights: dict[str, Tensor]) -> bool:
        if not self.has_draft_vocabulary:
            return "d2t" not in weights
        return "d2t" in weights and torch.equal(weights["d2t"], self.d2t.cpu())

    @classmethod
    def load(cls, folder: str | Path, embedding: Tensor, head: Tensor) -> "CTCDrafter":
        config = DrafterConfig.load(folder)
        check_weights(folder, config, expected_shapes(config))
        weights, token_ids = load_file(Path(folder) / WEIGHTS_NAME), None
        if config.has_draft_vocabulary:
            token_ids = DraftVocabulary.from_d2t(weights["d2t"], config.vocab_size).token_ids
        drafter = cls(config, embedding, head, token_ids)
        drafter.load_state_dict(weights)
        return drafter


def expected_shapes(config: DrafterConfig) -> dict[str, list[int]]:
    """The shape of every tensor in this drafter's weights file; nothing is allocated."""
    with torch.device("meta"):
        table = torch.empty(config.vocab_size, config.hidden_size)
        token_ids = torch.empty(config.draft_vocab_size, dtype=torch.long) if config.has_draft_vocabulary else None
        state = CTCDrafter(config, table, table, token_ids).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}
