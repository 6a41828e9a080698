"""The console script `vllm-ctc`: one subcommand per job, errors as one sentence."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ctc_spec.config import LATTICES, DrafterConfigError
from vllm_ctc_spec.training.settings import (
    DTYPES,
    LOSS_NAMES,
    OPTIMIZERS,
    TrainConfig,
    TrainingError,
    option,
    read_settings,
)

TRAIN_HELP = {
    "target": "Hugging Face folder of the model to speed up",
    "data": "rows with question, prompt, turns or messages (jsonl), or a folder that `vllm-ctc data` wrote",
    "loss": "prefix: exact prefix conditionals; ctc: the paper's full-sequence loss; ce: cross-entropy, the twin in "
    "which frame k is label k",
    "lattice": "how frames spell labels: ctc: with blanks and repeats; transitions: with learned steps between frames; "
    "slots: one label each (default: slots with --loss ce, else ctc)",
    "num_frames": "T, the parallel outputs of one draft forward",
    "num_labels": "U, the labels that one draft is trained to hold; at most T",
    "num_layers": "transformer layers of the drafter",
    "aux_layers": "layers of the target that the drafter reads, 1 = after the first (default: up to five, spread)",
    "markov_rank": "rank of the label-conditional head, 0 = none (default: 64, and 0 with --loss ctc)",
    "transition_rank": "of the steps' queries and keys (default: 64 with --lattice transitions)",
    "blank_share": "share of frames that hold no label at the start (default: (T - U) / T)",
    "tree_nodes": "the tree that the drafter is served with and measured by, 0 = a chain of U labels",
    "init": "drafter to take weights from, by name and shape, such as one that --loss ce warmed up",
    "steps": "updates",
    "batch_size": "sequences in a step, of all workers together",
    "accumulate": "parts of a step, one after the other: the same update in less memory",
    "anchors": "random drafting positions per sequence and step",
    "position_decay": "label k weighs exp(-(k - 1) / this) in the loss",
    "optimizer": "muon: for the matrices, and AdamW for the rest; adamw: for everything",
    "lr": "peak learning rate",
    "warmup": "steps of linear warm-up, at most a tenth of all",
    "clip": "largest norm of the gradient",
    "seed": "of the weights, the order and the anchors",
    "temperature": "of the target's responses, 0 = greedy",
    "max_new_tokens": "longest response of the target",
    "held_out": "last rows of the file that measure acceptance and are never trained on; at most a tenth",
    "save_every": "steps between checkpoints",
    "eval_every": "steps between measurements of the held-out acceptance length; the best one is kept",
    "dtype": "of the target, and of the drafter's matrix products",
}
CHOICES = {"loss": LOSS_NAMES, "lattice": LATTICES, "optimizer": OPTIMIZERS, "dtype": DTYPES}


def layer_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


ARGUMENT_TYPES = {"aux_layers": layer_numbers, "blank_share": float, "markov_rank": int, "transition_rank": int}


def add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a CTC drafter for a target",
        description="Train a CTC drafter on what the target itself says. Started again, a run continues.",
        argument_default=argparse.SUPPRESS,  # what is not given may be in the configuration file
    )
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings; options given here win")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the finished drafter")
    for field in dataclasses.fields(TrainConfig):
        is_given = field.default is dataclasses.MISSING or field.default in (None, "")
        text = TRAIN_HELP[field.name] + ("" if is_given else f" (default: {field.default})")
        kind = ARGUMENT_TYPES.get(field.name, field.type if isinstance(field.type, type) else str)
        parser.add_argument(option(field.name), type=kind, choices=CHOICES.get(field.name), help=text)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="checkpoint and log (default: OUTPUT/work)")
    parser.add_argument(
        "--labels", type=Path, metavar="DIR", help="the target's responses, which runs can share (default: WORK/labels)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run with other settings")
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option need no torch.
    import torch

    from vllm_ctc_spec.training.checkpoint import RunPaths
    from vllm_ctc_spec.training.run import train

    given = vars(args)
    config = train_config(given)
    if "threads" in given:
        if args.threads < 1:
            raise TrainingError(f"--threads must be 1 or more, not {args.threads}.")
        torch.set_num_threads(args.threads)
    work = given.get("work", args.output / "work")
    paths = RunPaths(args.output, work, given.get("labels", work / "labels"))
    print(train(config, paths, given.get("overwrite", False)))


def train_config(given: dict[str, Any]) -> TrainConfig:
    """Settings of the configuration file, overridden by those of the command line."""
    settings = read_settings(given["config"]) if "config" in given else {}
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    settings.update({name: given[name] for name in names if name in given})
    for name in ("target", "data"):
        if name not in settings:
            raise TrainingError(f"{option(name)} is missing: give {TRAIN_HELP[name]}.")
    return TrainConfig(**settings)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vllm-ctc", description="CTC drafters for vLLM's speculative decoding.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (TrainingError, DrafterConfigError) as error:
        print(f"vllm-ctc: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-ctc: interrupted; the same command continues.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
