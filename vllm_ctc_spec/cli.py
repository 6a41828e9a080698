"""The console script `vllm-ctc`: one subcommand per job, errors as one sentence."""

import argparse
import dataclasses
import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ctc_spec.drafter.config import LATTICES
from vllm_ctc_spec.errors import DrafterConfigError, TrainingError
from vllm_ctc_spec.training.config import (
    CHOICES,
    DEFAULT_DTYPE,
    PARALLEL,
    TrainConfig,
    WorkerOptions,
    option,
    read_settings,
)
from vllm_ctc_spec.training.eval_config import DEFAULT_MAX_NEW_TOKENS, EvalConfig

TRAIN_HELP = {
    "target": "Hugging Face folder of the model to speed up",
    "data": "rows with question, prompt, turns or messages (jsonl), or a folder that `vllm-ctc data` wrote",
    "features": "target: it runs beside the training; stored: what `vllm-ctc data --hidden-states` kept",
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
    "draft_vocab_size": "labels that a frame can hold: the tokens that the target says most often; full: all of them; "
    "auto: as many as make up 99 percent of what it says",
    "tree_nodes": "the tree that the drafter is served with and measured by, 0 = a chain of U labels",
    "init": "drafter to take weights from, by name and shape, such as one that --loss ce warmed up",
    "steps": "updates",
    "batch_size": "sequences in a step, of all workers together",
    "accumulate": "parts of a step, one after the other: the same update in less memory; a run may change it",
    "anchors": "random drafting positions per sequence and step",
    "position_decay": "label k weighs exp(-(k - 1) / this) in the loss",
    "optimizer": "muon: for the matrices, and AdamW for the rest; adamw: for everything",
    "lr": "peak learning rate",
    "warmup": "steps of linear warm-up, at most a tenth of all",
    "clip": "largest norm of the gradient",
    "seed": "of the weights, the order and the anchors",
    "temperature": "of the target's responses, 0 = greedy",
    "max_new_tokens": "longest response of the target",
    "chat_template_kwargs": "arguments of the target's chat template as a JSON object, those that the server will use, "
    """such as '{"enable_thinking": false}' for Qwen3""",
    "held_out": "last rows of the file that measure acceptance and are never trained on; at most a tenth",
    "save_every": "steps between checkpoints",
    "eval_every": "steps between measurements of the held-out acceptance length; the best one is kept",
    "dtype": f"of the target, and of the drafter's matrix products (default: {DEFAULT_DTYPE})",
}


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""{text!r} is not a JSON object, such as '{{"enable_thinking": false}}'.""")
    return value


def number_or_word(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


ARGUMENT_TYPES = {
    "draft_vocab_size": number_or_word,
    "aux_layers": whole_numbers, "blank_share": float, "markov_rank": int, "transition_rank": int,
    "chat_template_kwargs": json_object,
}  # fmt: skip


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
        choices = LATTICES if field.name == "lattice" else CHOICES.get(field.name)
        parser.add_argument(option(field.name), type=kind, choices=choices, help=text)
    parser.add_argument("--threads", type=int, help="CPU threads of each worker (default: PyTorch's choice, shared)")
    parser.add_argument("--num-workers", type=int, help="processes that share each step, with Ray (default: 1)")
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT", help="of a running cluster (default: Ray on this machine, if needed)"
    )
    parser.add_argument(
        "--parallel", choices=PARALLEL, help="each worker holds the drafter (ddp) or a shard of it (default: ddp)"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="checkpoint and log (default: OUTPUT/work)")
    parser.add_argument(
        "--labels", type=Path, metavar="DIR", help="the target's responses, which runs can share (default: WORK/labels)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run with other settings")
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option need no torch.
    from vllm_ctc_spec.training import run
    from vllm_ctc_spec.training.checkpoint import RunPaths

    given = vars(args)
    config = train_config(given)
    workers = WorkerOptions(**{f.name: given[f.name] for f in dataclasses.fields(WorkerOptions) if f.name in given})
    workers.check(config)
    set_threads(workers.threads)
    work = given.get("work", args.output / "work")
    paths, overwrite = RunPaths(args.output, work, given.get("labels", work / "labels")), given.get("overwrite", False)
    if workers.use_ray:
        from vllm_ctc_spec.training.ray.train import train

        print(train(config, paths, overwrite, workers))
    else:
        print(run.train(config, paths, overwrite))


def set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise TrainingError(f"--threads must be 1 or more, not {threads}.")
    import torch

    torch.set_num_threads(threads)


def train_config(given: dict[str, Any]) -> TrainConfig:
    """Settings of the configuration file, overridden by those of the command line."""
    settings = read_settings(given["config"]) if "config" in given else {}
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    settings.update({name: given[name] for name in names if name in given})
    for name in ("target", "data"):
        if name not in settings:
            raise TrainingError(f"{option(name)} is missing: give {TRAIN_HELP[name]}.")
    return TrainConfig(**settings)


def add_data(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="let the target answer prompts, for training",
        description="Write a dataset of the target's own responses, by vLLM. Started again, it continues.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", required=True, metavar="DIR", help=TRAIN_HELP["target"])
    parser.add_argument(
        "--prompts", required=True, metavar="FILE.jsonl", help="rows with question, prompt, turns or messages"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DATASET", help="folder of the dataset")
    for name in ("max_new_tokens", "temperature", "seed", "held_out"):
        default = getattr(TrainConfig, name)
        help_text = "of sampled responses" if name == "seed" else TRAIN_HELP[name]
        parser.add_argument(option(name), type=type(default), default=default, help=help_text)
    parser.add_argument(
        "--chat-template-kwargs", type=json_object, metavar="JSON", help=TRAIN_HELP["chat_template_kwargs"]
    )
    parser.add_argument("--hidden-states", action="store_true", help="store what a drafter reads of the target too")
    parser.add_argument("--aux-layers", type=whole_numbers, metavar="1,2,3", help=TRAIN_HELP["aux_layers"])
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the target, as in `vllm serve`; auto: float32 on a CPU",
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of an engine, as in `vllm serve`"
    )
    parser.add_argument("--ray", action="store_true", help="generate with Ray: one engine per worker")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="of a running cluster (Ray on this machine if absent)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="engines (one per GPU, or one, if absent)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of other settings")
    parser.set_defaults(run=run_data)


def run_data(args: argparse.Namespace) -> None:
    # As in run_train: --help needs no torch.
    from vllm_ctc_spec.training.answers import generate_here, make_dataset
    from vllm_ctc_spec.training.data_config import DataConfig

    if not args.ray and (args.ray_address, args.num_workers) != (None, None):
        raise TrainingError("--ray-address and --num-workers choose Ray's workers: add --ray.")
    generate = generate_here
    if args.ray:
        from vllm_ctc_spec.training.ray.data import RayOptions, generate_with_ray, refuse_to_guess_dtype

        refuse_to_guess_dtype(args.dtype, args.ray_address)

        generate = functools.partial(generate_with_ray, options=RayOptions(args.ray_address, args.num_workers))
    config = DataConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(DataConfig)})
    print(make_dataset(config, args.overwrite, generate))


EVAL_HELP = {
    "num_prompts": "the first usable rows of the file; of a dataset, held-out examples chosen by --seed",
    "nodes": "sizes of trees",
    "seed": "of sampled responses",
    "dtype": "of the target",
}


def add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure a drafter's acceptance length",
        description="Measure the acceptance length that serving gets from a drafter, without a server.",
    )
    parser.add_argument("--target", required=True, metavar="DIR", help="Hugging Face folder of the target")
    parser.add_argument("--drafter", required=True, metavar="DIR", help="folder that `vllm-ctc train` wrote")
    parser.add_argument("--data", required=True, metavar="DATA", help=TRAIN_HELP["data"])
    kinds = {"nodes": whole_numbers, "dtype": str}
    for name, text in EVAL_HELP.items():
        default = getattr(EvalConfig, name)
        shown = {"nodes": ",".join(map(str, EvalConfig.nodes)), "dtype": DEFAULT_DTYPE}.get(name, default)
        parser.add_argument(
            option(name), type=kinds.get(name, int), default=default, choices=CHOICES.get(name),
            help=f"{text} (default: {shown})",
        )  # fmt: skip
    parser.add_argument(
        "--temperature", type=numbers, metavar="0,1", help="of the target's responses (default: 0,1; of a dataset: 0)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help=f"longest response of the target (default: {DEFAULT_MAX_NEW_TOKENS})"
    )
    parser.add_argument(
        "--chat-template-kwargs", type=json_object, metavar="JSON", help=TRAIN_HELP["chat_template_kwargs"]
    )
    parser.add_argument("--category", metavar="NAME", help="only the rows whose field `category` is this")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, versions and every prompt's numbers")
    parser.set_defaults(run=run_eval, after_interrupt="nothing was written")


def run_eval(args: argparse.Namespace) -> None:
    config = EvalConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EvalConfig)})
    set_threads(args.threads)
    from vllm_ctc_spec.training.evaluate import evaluate  # as in run_train: --help needs no torch

    print(evaluate(config, args.json))


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unwinds the stack as Ctrl-C does: vLLM's and Ray's processes would outlive this one otherwise."""


def terminate(*_: object) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    # As vLLM does when it is imported: without it torch.cuda.is_available() starts CUDA, and the processes that vLLM
    # forks from this one later could not use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    parser = argparse.ArgumentParser(prog="vllm-ctc", description="CTC drafters for vLLM's speculative decoding.")
    parser.set_defaults(after_interrupt="the same command continues")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    add_data(commands)
    add_eval(commands)
    args = parser.parse_args(argv)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        args.run(args)
    except (TrainingError, DrafterConfigError) as error:
        print(f"vllm-ctc: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"vllm-ctc: the disk is full ({error}); {args.after_interrupt}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"vllm-ctc: interrupted; {args.after_interrupt}.", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
