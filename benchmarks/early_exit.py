"""Early exit against parallel drafts: a draft by the target's own first layers and a network that imitates the rest.

    vllm-ctc data --target assets/target --prompts gsm8k_train.jsonl --output dataset --dtype float32
    vllm-ctc train --target assets/target --data dataset --features target --output drafter --steps 120
    python benchmarks/early_exit.py --data dataset --drafters drafter --steps 120

Self-speculation, as FastVLM (arXiv 2510.22641) and others have it: the target's first n layers run on each drafted
token, an imitation network maps their hidden state to the last layer's, and the target's own norm and head say the next
token. Such a draft takes one forward for each label, and no cache of its own. Here it is measured without a server:
acceptance length on the dataset's held-out responses, beside the drafters', and the speed that follows where a forward
costs the weights that it reads. OUTPUT.json and OUTPUT.md.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pair import RESULTS, add_pair_arguments, choose_pair, ready
from record import describe_run, machine_line, write_record
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import DrafterConfigError, TrainingError
from vllm_ctc_spec.training.acceptance import Acceptance, walk
from vllm_ctc_spec.training.batches import anchor_positions, epochs, make_batch
from vllm_ctc_spec.training.dataset import Example, open_dataset, target_fingerprint
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.measure import measure_chains, measure_trees
from vllm_ctc_spec.training.target import AuxHiddenStates, Target

NUM_LABELS, TREE_NODES = 8, 16
BATCH_SIZE, LEARNING_RATE = 8, 2e-3


class EarlyExit(nn.Module):
    """The target's first `num_layers` layers and a network that imitates the state after its last one."""

    def __init__(self, target: Target, num_layers: int):
        super().__init__()
        self.target, self.num_layers = target, num_layers
        config = target.config.get_text_config()
        size = config.hidden_size
        self.imitation = nn.Sequential(
            nn.RMSNorm(size), nn.Linear(size, 4 * size, bias=False), nn.SiLU(), nn.Linear(4 * size, size, bias=False)
        )
        nn.init.zeros_(self.imitation[-1].weight)  # untrained, it takes the exit's state for the last layer's
        shallow = type(target.config).from_dict({**target.config.to_dict(), "num_hidden_layers": num_layers})
        decoder = type(target.decoder)(shallow).eval().requires_grad_(False)
        decoder.load_state_dict(target.decoder.state_dict(), strict=False)
        decoder.norm = nn.Identity()
        self.shallow = [decoder.to(target.embedding)]  # in a list: none of this module's parameters

    def imitate(self, state: Tensor) -> Tensor:
        """Hidden states `[..., H]` after layer n to imitated ones after the last."""
        return state + self.imitation(state)

    def logits(self, state: Tensor) -> Tensor:
        """The target's own norm and head, `[..., H]` to `[..., V]`."""
        return F.linear(self.target.decoder.norm(state), self.target.head)

    @torch.no_grad()
    def draft(self, token_ids: Tensor, positions: Tensor, num_labels: int) -> Tensor:
        """Greedy labels `[M, U]` after each anchor of one sequence; token_ids `[S]`, positions `[M]` of the anchors.

        All anchors draft side by side: behind the sequence lie the labels drafted so far, each of which attends to
        the sequence up to its anchor and to its own chain.
        """
        length, num_anchors = len(token_ids), len(positions)
        chains = torch.empty(num_anchors, 0, dtype=torch.long)
        for drafted in range(num_labels):
            owners = torch.arange(num_anchors).repeat_interleave(drafted)
            depths = torch.arange(1, drafted + 1).repeat(num_anchors)
            rows = torch.cat([token_ids, chains.flatten()])
            where = torch.cat([torch.arange(length), positions[owners] + depths])
            sees = torch.zeros(len(rows), len(rows), dtype=torch.bool)
            sees[:length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
            sees[length:, :length] = torch.arange(length) <= positions[owners, None]
            sees[length:, length:] = (owners == owners[:, None]) & (depths <= depths[:, None])
            mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
            states = self.shallow[0](
                input_ids=rows[None], attention_mask=mask, position_ids=where[None], use_cache=False
            ).last_hidden_state[0]
            ends = positions if drafted == 0 else length + drafted * torch.arange(1, num_anchors + 1) - 1
            said = self.logits(self.imitate(states[ends])).argmax(-1)
            chains = torch.cat([chains, said[:, None]], 1)
        return chains


def imitation_loss(exit: EarlyExit, shallow: Tensor, deep: Tensor) -> Tensor:
    """States `[N, H]` after layer n and after the last: one minus their cosine, and the cross-entropy of the token that
    the target says. The mean over N."""
    imitated = exit.imitate(shallow)
    said = exit.logits(deep).argmax(-1)
    return (1 - F.cosine_similarity(imitated, deep, -1)).mean() + F.cross_entropy(exit.logits(imitated), said)


def train_exits(exits: Sequence[EarlyExit], examples: Sequence[Example], steps: int, seed: int) -> list[float]:
    """Train all at once, on every position at which a server would draft; returns the last step's losses."""
    target = exits[0].target
    layers = [exit.num_layers for exit in exits]
    depth = target.config.get_text_config().num_hidden_layers
    states_of = AuxHiddenStates(target, (*layers, depth))
    networks = [exit.imitation for exit in exits]
    optimizer = torch.optim.AdamW([p for network in networks for p in network.parameters()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    bar = tqdm(range(steps), desc="imitation", unit="step", leave=False)
    for _, batch in zip(bar, epochs(examples, BATCH_SIZE, seed)):
        token_ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(example.prompt + example.response) for example in batch], batch_first=True
        )
        drafts_at = torch.zeros_like(token_ids, dtype=torch.bool)
        for row, example in enumerate(batch):
            drafts_at[row, anchor_positions(example)] = True
        states = states_of(token_ids)[drafts_at].unflatten(-1, (-1, target.head.shape[1]))
        deep = states[:, -1]
        each = [imitation_loss(exit, states[:, i], deep) for i, exit in enumerate(exits)]
        optimizer.zero_grad()
        torch.stack(each).sum().backward()
        optimizer.step()
        schedule.step()
        losses = [loss.item() for loss in each]
        bar.set_postfix(loss=" ".join(f"{loss:.3f}" for loss in losses))
    return losses


def measure_exit(exit: EarlyExit, examples: Sequence[Example]) -> dict[int, Acceptance]:
    """By chain length, 1 to NUM_LABELS: as `measure_chains` does for drafters."""
    measured = {size: Acceptance([], []) for size in range(1, NUM_LABELS + 1)}
    for example in tqdm(examples, desc=f"exit after {exit.num_layers}", unit="response", leave=False):
        positions = torch.tensor(anchor_positions(example), dtype=torch.long)
        if not len(positions):
            continue
        batch = make_batch([example], positions[None], NUM_LABELS)
        chains = exit.draft(batch.token_ids[0], positions, NUM_LABELS)
        accepted = ((chains == batch.labels[0]) & batch.valid[0]).cumprod(1).sum(1)
        for size, acceptance in measured.items():
            acceptance.tokens.append(len(accepted))
            acceptance.steps.append(walk(accepted.clamp_max(size).tolist()))
    return measured


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of drafts: what it accepts, and the weights that a draft reads, as a share of a target's forward."""

    name: str
    length: float
    half_width: float
    cost: float

    @property
    def speed(self) -> float:
        """Tokens a second against no speculation, where a forward costs the weights that it reads."""
        return self.length / (1 + self.cost)


def num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def exit_rows(exit: EarlyExit, measured: dict[int, Acceptance], of_target: int) -> list[Row]:
    """One a chain length. Each label reads the first layers, the imitation and the head."""
    layers, head = num_weights(exit.shallow[0].layers), exit.target.head.numel()
    depth = exit.target.config.get_text_config().num_hidden_layers
    imitation = 0 if exit.num_layers == depth else num_weights(exit.imitation)
    cost = (layers + imitation + head) / of_target
    return [
        Row(f"exit after {exit.num_layers}, chain {size}", acceptance.length, acceptance.half_width, size * cost)
        for size, acceptance in measured.items()
    ]


def drafter_rows(
    name: str, drafter: CTCDrafter, target: Target, examples: Sequence[Example], of_target: int
) -> list[Row]:
    """Chains of each length and a tree; every draft reads the drafter and the rows of the head once."""
    hidden_states = in_process(target, drafter.config.aux_hidden_state_layer_ids)
    cost = (num_weights(drafter) + drafter.draft_head.numel()) / of_target
    sizes = range(1, drafter.config.num_labels + 1)
    drafts = {f"chain {k}": a for k, a in measure_chains(drafter, hidden_states, examples, sizes).items()}
    trees = measure_trees(drafter, hidden_states, examples, [TREE_NODES])
    drafts[f"tree {TREE_NODES}"] = trees[TREE_NODES]
    return [Row(f"{name}, {kind}", a.length, a.half_width, cost) for kind, a in drafts.items()]


def table(rows: Sequence[Row], run: dict[str, Any]) -> str:
    lines = [
        "# Early exit and parallel drafts: acceptance, weights read, speed by weights",
        "",
        "Tokens per target forward, the target's own included, on greedy responses. Cost of a draft: the weights that "
        "it reads for all of its labels, as a share of those that a target forward reads; more rows to verify cost "
        "nothing. Speed: tokens a second against no speculation by these costs; chains have the length that is best "
        "by it.",
        "",
        f"{machine_line(run)}. `{run['command']}`",
        "",
        "| drafts | acceptance length | cost of a draft | speed by weights read |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.name} | {r.length:.3f} ± {r.half_width:.3f} | {r.cost:.3f} | {r.speed:.2f} |" for r in rows]
    return "\n".join(lines) + "\n"


def best_chain_and_trees(rows: Sequence[Row]) -> list[Row]:
    chains = [row for row in rows if " chain " in row.name]
    return [max(chains, key=lambda row: row.speed), *(row for row in rows if row not in chains)]


def run(args: argparse.Namespace) -> list[Row]:
    folder = str(args.target)
    train, held_out = open_dataset(args.data, target_fingerprint(folder))
    target = Target.load(folder, torch.device("cpu"), torch.float32)
    depth = target.config.get_text_config().num_hidden_layers
    if wrong := [n for n in args.exits if not 1 <= n < depth]:
        raise TrainingError(f"--exits must lie between 1 and {depth - 1}, the target has {depth} layers; not {wrong}.")
    drafters = {path.name: CTCDrafter.load(path, target.embedding, target.head) for path in args.drafters}
    torch.manual_seed(args.seed)
    exits = [EarlyExit(target, n) for n in sorted(set(args.exits))]
    train_exits(exits, train, args.steps, args.seed)
    of_target = num_weights(target.decoder.layers) + target.head.numel()
    rows: list[Row] = []
    for name, drafter in drafters.items():
        rows += best_chain_and_trees(drafter_rows(name, drafter, target, held_out, of_target))
    for exit in [*exits, EarlyExit(target, depth)]:
        rows += best_chain_and_trees(exit_rows(exit, measure_exit(exit, held_out), of_target))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pair_arguments(parser, overrides=["target"])
    parser.add_argument("--data", type=Path, required=True, help="a dataset of `vllm-ctc data`")
    parser.add_argument("--drafters", type=Path, nargs="*", default=[], help="folders of CTC drafters to compare with")
    parser.add_argument("--exits", type=int, nargs="+", default=[1, 2, 4], help="layers of the target before the exit")
    parser.add_argument("--steps", type=int, default=120, help="of the imitation's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "early_exit", help="path without suffix")
    args = choose_pair(parser.parse_args())
    try:
        ready(args.pair, drafter=False)
        rows = run(args)
    except (TrainingError, DrafterConfigError) as error:
        raise SystemExit(f"error: {error}") from error
    record = describe_run("benchmarks/early_exit.py", sys.argv[1:])
    write_record(args.output, {"run": record, "rows": [dataclasses.asdict(row) for row in rows]}, table(rows, record))


if __name__ == "__main__":
    main()
