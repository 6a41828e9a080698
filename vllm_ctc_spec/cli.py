"""The console script `vllm-ctc`: one subcommand per job, errors as one sentence."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_ctc_spec.config import DrafterConfigError
from vllm_ctc_spec.training.settings import DTYPES, LOSS_NAMES, TrainConfig, TrainingError, option

TRAIN_HELP = {
    "num_frames": "T, the parallel outputs of one draft forward",
    "num_labels": "U, the labels that one draft is trained to hold; at most T",
    "num_layers": "transformer layers of the drafter",
    "markov_rank": "rank of the label-conditional head, 0 = none (default: 64, and 0 with --loss ctc)",
    "loss": "prefix: exact prefix conditionals; ctc: the paper's full-sequence loss; ce: cross-entropy, for comparison",
    "steps": "updates",
    "batch_size": "sequences in a step",
    "anchors": "random drafting positions per sequence and step",
    "lr": "peak learning rate",
    "seed": "of the weights, the order and the anchors",
    "temperature": "of the target's responses, 0 = greedy",
    "max_new_tokens": "longest response of the target",
    "held_out": "last rows of the file that measure acceptance and are never trained on; at most a tenth",
    "save_every": "steps between checkpoints",
    "eval_every": "steps between measurements of the held-out acceptance length; the best one is kept",
    "dtype": "of the target, and of the drafter's matrix products",
}
CHOICES = {"loss": LOSS_NAMES, "dtype": DTYPES}


def add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a CTC drafter for a target",
        description="Train a CTC drafter on what the target itself says. Started again, a run continues.",
    )
    parser.add_argument("--target", required=True, metavar="DIR", help="Hugging Face folder of the model to speed up")
    parser.add_argument(
        "--data", required=True, metavar="FILE.jsonl", help="rows with question, prompt, turns or messages"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the finished drafter")
    for field in dataclasses.fields(TrainConfig):
        if field.name not in TRAIN_HELP:
            continue
        default = None if field.name == "markov_rank" else field.default
        text = TRAIN_HELP[field.name] + ("" if default is None else " (default: %(default)s)")
        parser.add_argument(
            option(field.name), type=field.type, default=default, choices=CHOICES.get(field.name), help=text
        )
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
    from vllm_ctc_spec.training.loop import train

    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)}
    if settings["markov_rank"] is None:
        settings["markov_rank"] = 0 if args.loss == "ctc" else TrainConfig.markov_rank
    if args.threads is not None:
        if args.threads < 1:
            raise TrainingError(f"--threads must be 1 or more, not {args.threads}.")
        torch.set_num_threads(args.threads)
    work = args.work or args.output / "work"
    print(train(TrainConfig(**settings), RunPaths(args.output, work, args.labels or work / "labels"), args.overwrite))


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
