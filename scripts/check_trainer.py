"""The trainer on this device: losses and gradients against fp64 on the host, and a short training that must learn."""

import importlib.util
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from outcome import FAILED, NOT_RUN, Outcome, Settings, verdict
from pair import TINY, read_pair

from vllm_ctc_spec.drafter.lattice import Lattice, transition_log_probs
from vllm_ctc_spec.training.loss import LOSSES
from vllm_ctc_spec.training.vocabulary import label_scores

PART = "trainer"
ROWS, FRAMES, LABELS, VOCABULARY, HIDDEN, RANK = 6, 12, 8, 5000, 64, 16
TOLERANCE = 1e-4  # of the largest value, of the loss and of each gradient
STEPS = {True: 60, False: 300}
LEARNED = 1.4  # tokens per target forward after the training; a drafter that learned nothing has 1


def check(settings: Settings) -> Iterator[Outcome]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for loss in ("prefix", "ctc"):
        for lattice in ("ctc", "transitions"):
            try:
                yield loss_outcome(loss, lattice, device, settings.seed)
            except Exception as problem:
                traceback.print_exc()
                yield Outcome(PART, f"loss {loss}, {lattice}", FAILED, f"{type(problem).__name__}: {problem}"[:300])
    if importlib.util.find_spec("vllm") is None:
        yield Outcome(PART, "vllm-ctc train", NOT_RUN, "vLLM, which answers the prompts, is not installed")
        return
    yield training_outcome(STEPS[settings.quick], settings.seed)


def loss_outcome(loss: str, lattice: str, device: torch.device, seed: int) -> Outcome:
    parameters, tokens = random_problem(lattice, seed)
    exact = loss_and_gradients(loss, lattice, [p.double() for p in parameters], tokens)
    found = loss_and_gradients(loss, lattice, [p.to(device) for p in parameters], [x.to(device) for x in tokens])
    error = max(((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact))
    detail = f"fp32 against fp64, loss and gradients: relative error {error:.1e} of {TOLERANCE:.0e}"
    return verdict(PART, f"loss {loss}, {lattice}", error <= TOLERANCE, detail, error=error)


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


def training_outcome(steps: int, seed: int) -> Outcome:
    """`vllm-ctc train` from prompts: the embedded target answers, the drafter learns, its acceptance is measured."""
    check_name, tiny = f"vllm-ctc train, {steps} steps", read_pair(TINY)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "drafter"
        command = [
            sys.executable, "-m", "vllm_ctc_spec.cli", "train", "--target", tiny.target,
            "--data", tiny.prompts, "--output", output, "--lattice", "transitions",
            "--steps", steps, "--eval-every", steps, "--num-layers", 1, "--max-new-tokens", 48, "--held-out", 8,
            "--seed", seed % 1000,
        ]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return Outcome(PART, check_name, FAILED, last[:300])
    found = re.search(r"acceptance length with .*: ([\d.]+)", done.stdout)
    length = float(found.group(1)) if found else 0.0
    detail = f"held-out acceptance length {length} of {LEARNED}"
    return verdict(PART, check_name, length >= LEARNED, detail, acceptance_length=length)
