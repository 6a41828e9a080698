"""SpecFormer against loops over numbers, what its frames may see, and what is refused."""

import dataclasses
import math

import pytest
import torch

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import DrafterConfigError

SHAPE = dict(
    hidden_size=8, vocab_size=11, target_num_layers=4, aux_hidden_state_layer_ids=(1, 3), num_frames=3, num_labels=2,
    lattice="transitions", transition_rank=4, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    intermediate_size=5, rope_theta=100.0,
)  # fmt: skip
CONFIG = DrafterConfig(**SHAPE, architecture="specformer", num_layers=2)
VARIANTS = {
    "bidirectional": CONFIG,
    "causal": dataclasses.replace(CONFIG, frame_attention="causal"),
    "low rank": dataclasses.replace(CONFIG, positional_rank=2),
}


@pytest.fixture(params=VARIANTS)
def drafter(request) -> CTCDrafter:
    torch.manual_seed(5)
    drafter = CTCDrafter(VARIANTS[request.param], torch.randn(11, 8), torch.randn(11, 8))
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_(std=0.7)
    return drafter.double()


Vector = list[float]


def times(weight: torch.Tensor, x: Vector) -> Vector:
    return [sum(float(w) * v for w, v in zip(row, x, strict=True)) for row in weight]


def plus(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]


def norm(weight: torch.Tensor, x: Vector) -> Vector:
    size = math.sqrt(sum(v * v for v in x) / len(x) + CONFIG.rms_norm_eps)
    return [float(w) * v / size for w, v in zip(weight, x, strict=True)]


def turned(x: Vector, position: int) -> Vector:
    half = len(x) // 2
    out = list(x)
    for i in range(half):
        angle = position * CONFIG.rope_theta ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def heads(x: Vector) -> list[Vector]:
    return [x[i : i + CONFIG.head_dim] for i in range(0, len(x), CONFIG.head_dim)]


def attend(module, x: Vector, position: int, seen: list[tuple[Vector, int]]) -> Vector:
    """One query over (vector, position) pairs, itself among them where it is seen."""
    queries = [turned(norm(module.q_norm.weight, head), position) for head in heads(times(module.q_proj.weight, x))]
    keys = [turned(norm(module.k_norm.weight, times(module.k_proj.weight, y)), at) for y, at in seen]  # one head
    values = [times(module.v_proj.weight, y) for y, _ in seen]
    out = []
    for query in queries:
        scores = [math.exp(sum(map(float.__mul__, query, key)) / math.sqrt(CONFIG.head_dim)) for key in keys]
        for i in range(CONFIG.head_dim):
            out.append(sum(s * value[i] for s, value in zip(scores, values, strict=True)) / sum(scores))
    return times(module.o_proj.weight, out)


def feed_forward(mlp, x: Vector) -> Vector:
    gate, up = times(mlp.gate_proj.weight, x), times(mlp.up_proj.weight, x)
    return times(mlp.down_proj.weight, [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])


def in_loops(drafter: CTCDrafter, aux: torch.Tensor, anchor: int, position: int) -> list[Vector]:
    """The state and the T frames of an anchor. aux `[S, A * H]`."""
    config, maker = drafter.config, drafter.specformer
    context = []
    for at in range(position):
        depths = aux[at].view(-1, config.hidden_size).tolist()
        normed = [norm(weight, depth) for weight, depth in zip(drafter.depth_norm.weight, depths, strict=True)]
        context.append((norm(drafter.hidden_norm.weight, times(drafter.fc.weight, sum(normed, []))), at))
    layer = drafter.layers[0]
    x = drafter.target_embedding[anchor].tolist()
    query = norm(layer.input_layernorm.weight, x)
    state = plus(x, attend(layer.self_attn, query, position, [*context, (query, position)]))
    made = norm(maker.state_norm.weight, state)
    for linear in maker.positional:
        made = times(linear.weight, made)
        if linear.bias is not None:
            made = plus(made, linear.bias.tolist())
    frames = [made[i : i + config.hidden_size] for i in range(0, len(made), config.hidden_size)]
    for layer in maker.layers:
        normed = [norm(layer.input_layernorm.weight, frame) for frame in frames]
        for t in range(config.num_frames):
            last = t if config.frame_attention == "causal" else config.num_frames - 1
            frames[t] = plus(frames[t], attend(layer.self_attn, normed[t], t, [*zip(normed, range(last + 1))]))
        normed = [norm(layer.post_attention_layernorm.weight, frame) for frame in frames]
        frames = [plus(frame, feed_forward(layer.mlp, x)) for frame, x in zip(frames, normed, strict=True)]
    return [norm(drafter.norm.weight, x) for x in (state, *frames)]


@torch.no_grad()
def test_frames_are_those_of_loops_over_numbers(drafter):
    aux = torch.randn(2, 6, 16, dtype=torch.float64)
    anchors, positions = torch.tensor([[3, 7], [1, 10]]), torch.tensor([[1, 6], [4, 2]])
    hidden = drafter.forward_hidden(aux, anchors, positions)
    assert hidden.shape == (2, 2, 4, 8)
    for row in range(2):
        for m in range(2):
            expected = in_loops(drafter, aux[row], int(anchors[row, m]), int(positions[row, m]))
            torch.testing.assert_close(hidden[row, m], torch.tensor(expected, dtype=torch.float64))


@torch.no_grad()
def test_frames_of_an_anchor_depend_on_it_and_on_what_is_before_it_alone(drafter):
    aux, anchors, positions = torch.randn(1, 9, 16, dtype=torch.float64), torch.tensor([[3, 4]]), torch.tensor([[2, 7]])
    before = drafter(aux, anchors, positions).logits
    later = aux.clone()
    later[0, 2:] += 1.0
    after = drafter(later, anchors, positions).logits
    assert torch.equal(after[0, 0], before[0, 0]) and not torch.allclose(after[0, 1], before[0, 1])
    other = torch.tensor([[3, 9]])
    after = drafter(aux, other, positions).logits
    assert torch.equal(after[0, 0], before[0, 0]) and not torch.allclose(after[0, 1], before[0, 1])
    earlier = aux.clone()
    earlier[0, 0] += 1.0
    assert ((drafter(earlier, anchors, positions).logits - before).abs().amax(-1) > 0).all()


@torch.no_grad()
def test_a_frame_sees_the_frames_that_its_attention_says(drafter):
    arguments = torch.randn(1, 5, 16, dtype=torch.float64), torch.tensor([[3]]), torch.tensor([[5]])
    before = drafter(*arguments).logits
    drafter.specformer.positional[-1].bias[8:16] += 1.0  # of frame 2
    changed = ((drafter(*arguments).logits - before).abs().amax(-1) > 1e-9)[0, 0].tolist()
    assert changed == [drafter.config.frame_attention == "bidirectional", True, True]


def test_one_row_a_draft_attends_to_the_context():
    assert CONFIG.num_query_rows == 1
    assert dataclasses.replace(CONFIG, architecture="adm").num_query_rows == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "mlp"}, "architecture must be one of adm, specformer, not 'mlp'"),
        ({"frame_attention": "none"}, "frame_attention must be one of bidirectional, causal, not 'none'"),
        ({"architecture": "adm", "frame_attention": "causal"}, "are a SpecFormer's; leave them out"),
        ({"architecture": "adm", "positional_rank": 2}, "are a SpecFormer's; leave them out"),
        ({"positional_rank": -1}, "positional_rank must be 0 to"),
    ],
)
def test_other_shapes_are_refused(change, message):
    with pytest.raises(DrafterConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_files_keep_the_architecture(drafter, tmp_path):
    drafter.save(tmp_path)
    loaded = CTCDrafter.load(tmp_path, drafter.target_embedding, drafter.target_head)
    assert loaded.config == drafter.config
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in drafter.state_dict().items())
