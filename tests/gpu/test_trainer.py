"""The trainer on this device: losses and gradients against fp64 on the host, and a short training that must learn."""

import re
import subprocess
import sys

import pytest
import torch
from pair import TINY, read_pair

from vllm_ctc_spec.drafter.lattice import Lattice, transition_log_probs
from vllm_ctc_spec.training.loss import LOSSES
from vllm_ctc_spec.training.vocabulary import label_scores

ROWS, FRAMES, LABELS, VOCABULARY, HIDDEN, RANK = 6, 12, 8, 5000, 64, 16
TOLERANCE = 1e-4  # of the largest value, of the loss and of each gradient
STEPS = {"cuda": 300, "cpu": 60}
LEARNED = 1.4  # tokens per target forward after the training; a drafter that learned nothing has 1


def random_problem(lattice: str, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states, the two tables of the head, and the lattice's own; anchors, labels (one repeats), which count, and
    the target's head."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    own = [normal(ROWS, FRAMES)]
    if lattice == "transitions":
        own = [normal(ROWS, 1 + FRAMES, RANK), normal(ROWS, FRAMES, RANK), normal(FRAMES)]
    parameters = [normal(ROWS, FRAMES, HIDDEN) * 0.3, normal(VOCABULARY, RANK), normal(VOCABULARY, RANK) * 0.3, *own]
    labels = torch.randint(VOCABULARY, (ROWS, LABELS), generator=draw)
    labels[0, 2] = labels[0, 1]
    valid = torch.arange(LABELS) < torch.randint(1, 1 + LABELS, (ROWS, 1), generator=draw)
    return parameters, [torch.randint(VOCABULARY, (ROWS,), generator=draw), labels, valid, normal(VOCABULARY, HIDDEN)]


def loss_and_gradients(
    loss: str, lattice: str, parameters: list[torch.Tensor], others: list[torch.Tensor]
) -> list[torch.Tensor]:
    hidden, w_in, w_out, *own = parameters = [p.clone().requires_grad_() for p in parameters]
    anchors, labels, valid, head = others
    if lattice == "ctc":
        spelled = Lattice(blank_odds=own[0])
    else:
        spelled = Lattice(log_transitions=transition_log_probs(*own))
    markov = (w_in, w_out) if loss == "prefix" else None
    scores = label_scores(hidden, head.to(hidden.dtype), anchors, labels, markov, lattice == "ctc")
    result = LOSSES[loss](spelled, scores, labels, valid, 4.0).loss.sum()
    result.backward()
    return [result.detach(), *(p.grad for p in parameters if p.grad is not None)]


@pytest.mark.parametrize("lattice", ["ctc", "transitions"])
@pytest.mark.parametrize("loss", ["prefix", "ctc"])
def test_loss_and_gradients_are_those_of_fp64(loss: str, lattice: str, input_seed: int, device: torch.device) -> None:
    parameters, tokens = random_problem(lattice, input_seed)
    exact = loss_and_gradients(loss, lattice, [p.double() for p in parameters], tokens)
    found = loss_and_gradients(loss, lattice, [p.to(device) for p in parameters], [x.to(device) for x in tokens])
    for one, other in zip(found, exact, strict=True):
        assert (one.cpu().double() - other).abs().max() <= TOLERANCE * other.abs().max()


@pytest.mark.slow
def test_a_short_training_learns(input_seed: int, device: torch.device, tmp_path) -> None:
    """`vllm-ctc train` from prompts: the embedded target answers, the drafter learns, its acceptance is measured."""
    pytest.importorskip("vllm", reason="vLLM answers the prompts of the training")
    tiny, steps = read_pair(TINY), STEPS[device.type]
    command = [
        sys.executable, "-m", "vllm_ctc_spec.cli", "train", "--target", tiny.target, "--data", tiny.prompts,
        "--output", tmp_path / "drafter", "--lattice", "transitions", "--steps", steps, "--eval-every", steps,
        "--num-layers", 1, "--max-new-tokens", 48, "--held-out", 8, "--seed", input_seed % 1000,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"acceptance length with .*: ([\d.]+)", done.stdout).group(1)) >= LEARNED
