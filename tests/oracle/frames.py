"""Random and hard frames, heads and samplings, for the mathematics, the losses and the kernels."""

import torch

from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.drafter.lattice import NEG, FrameOutputs, Lattice, slot_transitions, transition_log_probs
from vllm_ctc_spec.kernels.contract import ChainSampling, Frames
from vllm_ctc_spec.kernels.prefix_chain import prefix_chain

ANCHOR = 1
NEVER = 7.5  # what rows of draft_logits hold that must not be written


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_outputs(
    num_rows: int, num_frames: int, num_tokens: int, seed: int, lattice: str = "ctc", scale: float = 2.0
) -> FrameOutputs:
    """As the module emits them, in fp64."""
    draw = generator(seed)
    logits = torch.randn(num_rows, num_frames, num_tokens, generator=draw, dtype=torch.float64) * scale
    odds = torch.randn(num_rows, num_frames, generator=draw, dtype=torch.float64)
    if lattice == "ctc":
        return FrameOutputs(logits, Lattice(blank_odds=odds))
    if lattice == "slots":
        steps = slot_transitions(num_frames).double().log().clamp_min(NEG)
        return FrameOutputs(logits, Lattice(log_transitions=steps.expand(num_rows, -1, -1)))
    query, key = (torch.randn(num_rows, n, 2, generator=draw).double() for n in (1 + num_frames, num_frames))
    return FrameOutputs(logits, Lattice(log_transitions=transition_log_probs(query, key, odds[0])))


def random_log_probs(
    num_tokens: int, num_frames: int, seed: int, scale: float = 2.0, with_blank: bool = True
) -> torch.Tensor:
    """`[T, V + 1]` in fp64, the blank last."""
    outputs = random_outputs(1, num_frames, num_tokens, seed * 1000 + num_tokens * 10 + num_frames, scale=scale)
    return oracle.frame_log_probs(outputs.logits[0], outputs.lattice.blank_odds[0] if with_blank else None)


def random_frames(batch: int, num_frames: int, num_tokens: int, seed: int, scale: float = 3.0) -> Frames:
    logits = torch.randn(batch, num_frames, num_tokens, generator=generator(seed)) * scale
    return from_odds(logits, torch.randn(batch, num_frames, generator=generator(seed + 1)))


def from_odds(logits: torch.Tensor, odds: torch.Tensor) -> Frames:
    """P(blank) = sigmoid(odds)."""
    log_scale = torch.nn.functional.logsigmoid(-odds) - torch.logsumexp(logits.float(), -1)
    return Frames(logits, log_scale, torch.nn.functional.logsigmoid(odds), anchors(len(logits)))


def hard_frames(name: str, batch: int, num_frames: int, num_tokens: int) -> Frames:
    """Frames that break careless code; ids near both ends of the vocabulary carry the mass."""
    logits, odds = torch.zeros(batch, num_frames, num_tokens), torch.zeros(batch, num_frames)
    if name == "flat":
        pass
    elif name == "peaky":
        peaks = torch.randint(0, num_tokens, (batch, num_frames, 1), generator=generator(3))
        logits.scatter_(2, peaks, 60.0)
        odds.fill_(-4)
    elif name == "repeats":
        logits[..., num_tokens - 1] = 40.0
    elif name == "repeats of the anchor":
        logits[..., ANCHOR] = 40.0
    elif name == "all blank":
        odds.fill_(torch.inf)
    elif name == "nearly all blank":
        odds.fill_(50.0)
    elif name == "labels below the end of the chain":
        odds.fill_(75.0)  # 3e-33 for all labels together
    elif name == "no blank":
        logits = torch.randn(batch, num_frames, num_tokens, generator=generator(4)) * 4
        odds.fill_(-torch.inf)
    elif name == "no blank, one label":
        logits.fill_(-torch.inf)[..., num_tokens - 1] = 0.0
        odds.fill_(-torch.inf)
    elif name == "ties":
        logits[..., [2, num_tokens // 2, num_tokens - 1]] = 9.0
    elif name == "empty frames":
        logits = torch.randn(batch, num_frames, num_tokens, generator=generator(5)) * 4
        logits[:, ::2] = -torch.inf
    elif name == "blank of 0 and 1":
        logits = torch.randn(batch, num_frames, num_tokens, generator=generator(6)) * 4
        odds[:, ::2], odds[:, 1::2] = torch.inf, -torch.inf
    return from_odds(logits, odds)


HARD = [
    "flat",
    "peaky",
    "repeats",
    "repeats of the anchor",
    "all blank",
    "nearly all blank",
    "labels below the end of the chain",
    "no blank",
    "no blank, one label",
    "ties",
    "empty frames",
    "blank of 0 and 1",
]


def token_frames(batch: int, num_frames: int, num_tokens: int, seed: int, scale: float = 3.0) -> Frames:
    """Frames without blank, as transitions between frames have them."""
    logits = random_frames(batch, num_frames, num_tokens, seed, scale).logits
    return from_odds(logits, torch.full((batch, num_frames), -torch.inf))


def transitions_between(name: str, batch: int, num_frames: int) -> torch.Tensor:
    """`A [B, 1 + T, T]`, laws that break careless code among them."""
    draw = generator(num_frames)
    scores = torch.randn(batch, 1 + num_frames, num_frames, generator=draw) * (6 if name == "peaky" else 1)
    if name == "slots":
        return slot_transitions(num_frames).expand(batch, -1, -1)
    if name == "last frame only":
        scores[..., -1] = 300.0
    behind = torch.ones_like(scores, dtype=torch.bool).tril(-1)
    transitions = torch.softmax(scores.masked_fill(behind, NEG), -1).masked_fill(behind, 0)
    if name == "stops and gaps":
        transitions *= torch.rand(transitions.shape, generator=draw) > 0.4
        transitions[:, 0, 0] += 0.1
    if name == "nowhere":
        transitions[:, 0] = 0
    return transitions


TRANSITIONS = ["spread", "peaky", "slots", "last frame only", "stops and gaps", "nowhere"]


def markov_head(num_tokens: int, rank: int, scale: float = 0.7) -> tuple[torch.Tensor, torch.Tensor] | None:
    if rank == 0:
        return None
    w_in, w_out = torch.randn(2, num_tokens, rank, generator=generator(rank)) * (scale / rank**0.5) ** 0.5
    return w_in.contiguous(), w_out.contiguous()


def sampling_for(batch: int, num_labels: int, num_tokens: int, temperature: list[float]) -> ChainSampling:
    """Row b uses slot `batch - 1 - b` of `batch + 1`. What is told of rows is every third entry of a longer tensor, as
    vLLM has an entry a frame."""
    return ChainSampling(
        temperature=torch.tensor([*temperature, 1.0])[: batch + 1],
        seeds=torch.arange(batch + 1) * 1_000_003 - 2,
        positions=(torch.arange(3 * batch) // 3 * 17 + 2**32 - 3)[::3],
        requests=torch.stack([torch.arange(batch).flip(0), *torch.zeros(2, batch).long()], 1)[:, 0],
        draft_logits=torch.full((batch + 1, num_labels, num_tokens), NEVER),
    )


def whole_chain(
    frames: Frames, num_labels: int, sampling: ChainSampling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prefix_chain` with all tokens as candidates; without sampling a greedy one."""
    batch, _, num_tokens = frames.logits.shape
    if sampling is None:
        sampling = sampling_for(batch, num_labels, num_tokens, [0.0] * batch)
    return prefix_chain(frames, num_labels, num_tokens, sampling)


def anchors(batch: int) -> torch.Tensor:
    return torch.full((batch,), ANCHOR)


def log_probs(frames: Frames, row: int) -> torch.Tensor:
    """`[T, V + 1]` of one request in fp64, the blank last."""
    logits, log_scale, log_blank = (x[row].double() for x in frames[:3])
    log_p = torch.cat([logits + log_scale[:, None], log_blank[:, None]], 1)
    return log_p.masked_fill(torch.isneginf(torch.nn.functional.pad(logits, (0, 1))), -torch.inf).clamp_min(NEG)


def log_transitions(frames: Frames, row: int) -> torch.Tensor | None:
    return None if frames.transitions is None else frames.transitions[row].double().log().clamp_min(NEG)
