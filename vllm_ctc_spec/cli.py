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

from vllm_ctc_spec.edge.config import EdgeConfig
from vllm_ctc_spec.errors import TrainingError, UserError
from vllm_ctc_spec.plan.config import PlanConfig
from vllm_ctc_spec.training.cache_config import CacheConfig
from vllm_ctc_spec.training.config import TrainConfig, WorkerOptions, kind_of, option
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.pivots_config import PivotsConfig


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


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
    int | str: number_or_word, tuple[int, ...]: whole_numbers, tuple[float, ...]: numbers, tuple[str, ...]: words,
    dict: json_object,
}  # fmt: skip


def add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """The command-line option of one setting. A default that follows from other settings is in its help."""
    required = field.default is dataclasses.MISSING
    shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    text = field.metadata["help"] + ("" if required or shown in (None, "") else f" (default: {shown})")
    if field.type is bool:
        parser.add_argument(option(field.name), action="store_true", help=field.metadata["help"])
        return
    kind = kind_of(field)
    options = {"type": ARGUMENT_TYPES.get(kind, kind), "choices": field.metadata["choices"] or None, "help": text}
    if parser.argument_default is not argparse.SUPPRESS:
        options |= {"required": True} if required else {"default": field.default}
    parser.add_argument(option(field.name), metavar=field.metadata["metavar"], **options)


def add_settings(parser: argparse.ArgumentParser, kind: type) -> None:
    """The options of all settings of this dataclass."""
    for field in dataclasses.fields(kind):
        add_setting(parser, field)


def asked(kind: type, args: argparse.Namespace) -> Any:
    """The settings of this dataclass, read from the command line."""
    given = vars(args)
    return kind(**{field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given})


def add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a CTC drafter for a target",
        description="Train a CTC drafter on what the target itself says. Started again, a run continues.",
        argument_default=argparse.SUPPRESS,  # a setting that is not given may be in the configuration file
    )
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings; options given here win")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the finished drafter")
    add_settings(parser, TrainConfig)
    add_settings(parser, WorkerOptions)
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
    workers = asked(WorkerOptions, args)
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
    from vllm_ctc_spec.training.files import read_settings  # as in run_train

    settings = read_settings(given["config"]) if "config" in given else {}
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    settings.update({name: given[name] for name in fields if name in given})
    for name in ("target", "data"):
        if name not in settings:
            raise TrainingError(f"{option(name)} is missing: give {fields[name].metadata['help']}.")
    return TrainConfig(**settings)


def add_data(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="let the target answer prompts, for training",
        description="Write a dataset of the target's own responses, by vLLM. Started again, it continues.",
    )
    add_settings(parser, DataConfig)
    add_ray(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of other settings")
    parser.set_defaults(run=run_data)


def add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ray", action="store_true", help="generate with Ray: one engine per worker")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="of a running cluster (Ray on this machine if absent)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="engines (one per GPU, or one, if absent)")


def generate_by(args: argparse.Namespace) -> Any:
    """`answers.Generate`, here or with Ray."""
    from vllm_ctc_spec.training.answers import generate_here  # as in run_train: --help needs no torch

    if not args.ray and (args.ray_address, args.num_workers) != (None, None):
        raise TrainingError("--ray-address and --num-workers choose Ray's workers: add --ray.")
    if not args.ray:
        return generate_here
    from vllm_ctc_spec.training.ray.data import RayOptions, generate_with_ray, refuse_to_guess_dtype

    refuse_to_guess_dtype(args.dtype, args.ray_address)
    return functools.partial(generate_with_ray, options=RayOptions(args.ray_address, args.num_workers))


def run_data(args: argparse.Namespace) -> None:
    generate = generate_by(args)
    from vllm_ctc_spec.training.answers import make_dataset  # as in run_train: --help needs no torch

    print(make_dataset(asked(DataConfig, args), args.overwrite, generate))


def add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure a drafter's acceptance length",
        description="Measure the acceptance length that serving gets from a drafter, without a server.",
    )
    add_settings(parser, EvalConfig)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, versions and every prompt's numbers")
    parser.set_defaults(run=run_eval, after_interrupt="nothing was written")


def run_eval(args: argparse.Namespace) -> None:
    config = asked(EvalConfig, args)
    set_threads(args.threads)
    from vllm_ctc_spec.training.evaluate import evaluate  # as in run_train: --help needs no torch

    print(evaluate(config, args.json))


def add_cache(commands) -> None:
    parser = commands.add_parser(
        "cache",
        help="make a table of what commonly follows each token",
        description="Write, from a dataset of the target's answers, the table of the option ctc_cache_table.",
    )
    add_settings(parser, CacheConfig)
    parser.set_defaults(run=run_cache, after_interrupt="nothing was written")


def run_cache(args: argparse.Namespace) -> None:
    config = asked(CacheConfig, args)
    from vllm_ctc_spec.training.cache import make_table  # as in run_train: --help needs no torch

    print(make_table(config))


def add_pivots(commands) -> None:
    parser = commands.add_parser(
        "pivots",
        help="train the classifier of a lossy rule of acceptance",
        description="Let the target go on behind tokens that it would reject, and learn which of them change its "
        "answer. Started again, it continues.",
    )
    add_settings(parser, PivotsConfig)
    add_ray(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a run with other settings")
    parser.set_defaults(run=run_pivots)


def run_pivots(args: argparse.Namespace) -> None:
    config, generate = asked(PivotsConfig, args), generate_by(args)
    from vllm_ctc_spec.training.pivots import make_pivots  # as in run_train: --help needs no torch

    print(make_pivots(config, args.overwrite, generate))


def add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="choose what to draft at each batch size on this machine",
        description="Measure what drafts bring and cost on this machine, and write what to draft at each batch size.",
    )
    add_settings(parser, PlanConfig)
    parser.set_defaults(run=run_plan, after_interrupt="nothing was written")


def run_plan(args: argparse.Namespace) -> None:
    config = asked(PlanConfig, args)
    from vllm_ctc_spec.plan.run import make_plan  # as in run_train: --help needs no torch

    print(make_plan(config))


def add_edge(commands) -> None:
    parser = commands.add_parser(
        "edge",
        help="draft on this device, and let a server verify",
        description="Answer a prompt: a small model on this device drafts, and a vLLM server verifies its drafts.",
    )
    add_settings(parser, EdgeConfig)
    parser.set_defaults(run=run_edge, after_interrupt="the answer is not complete")


def run_edge(args: argparse.Namespace) -> None:
    config = asked(EdgeConfig, args)
    from vllm_ctc_spec.edge.run import run  # as in run_train: --help needs no torch

    print(f"vllm-ctc: {run(config)}", file=sys.stderr)


class Terminated(KeyboardInterrupt):
    """SIGTERM. It unwinds the stack as Ctrl-C does, or vLLM's and Ray's processes would outlive this one."""


def terminate(*_: object) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    # vLLM sets it too, when it is imported. Without it torch.cuda.is_available() starts CUDA, and the processes that
    # vLLM forks from this one later could not use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    parser = argparse.ArgumentParser(prog="vllm-ctc", description="CTC drafters for vLLM's speculative decoding.")
    parser.set_defaults(after_interrupt="the same command continues")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    add_data(commands)
    add_eval(commands)
    add_plan(commands)
    add_edge(commands)
    add_cache(commands)
    add_pivots(commands)
    args = parser.parse_args(argv)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        args.run(args)
    except UserError as error:
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
