"""A server follows a plan: where it is found, and whether it was measured for what is served here."""

import functools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ctc_spec.drafter.weights import served_fingerprint
from vllm_ctc_spec.errors import DrafterConfigError, path_given
from vllm_ctc_spec.plan.file import PLAN_NAME, Plan
from vllm_ctc_spec.plan.online import FollowedPlan
from vllm_ctc_spec.serving.cpu.threads import threads_asked_for

logger = logging.getLogger("vllm.ctc_spec")


def plan_to_follow(asked: Any, contradicting: Sequence[str], drafter: Path, target: Any, parallel: Any) -> Plan | None:
    """The plan that was asked for, or that the folder `drafter` carries (DrafterConfigError).

    asked: the value of `ctc_plan`. contradicting: other options that say what to draft; with them, a plan that was not
    asked for is not followed, nor where it does not fit. target: vLLM's ModelConfig; parallel: its ParallelConfig, None
    for one device.
    """
    if asked is not None:
        if contradicting:
            raise DrafterConfigError(
                f"ctc_plan and {contradicting[0]} both say what to draft; remove one of them from --speculative-config."
            )
        path = _path_of(asked, drafter)
        plan = Plan.load(path)
        if problem := _misfit(plan, drafter, target, parallel):
            raise DrafterConfigError(
                f"The plan {path} {problem}; measure one for this server with `vllm-ctc plan`, or remove ctc_plan."
            )
    else:
        path = drafter / PLAN_NAME
        if contradicting or not path.is_file():
            return None
        try:
            plan = Plan.load(path)
        except DrafterConfigError as error:
            logger.warning("Ignored: %s", error)
            return None
        if problem := _misfit(plan, drafter, target, parallel):
            logger.warning("The drafter's plan %s is ignored: it %s.", path, problem)
            return None
    logger.info("Drafting by the plan %s: %s, (first batch size, last, tokens) %s.", path, plan.draft, plan.schedule)
    return plan


def follow(scheduler: Any, plan: Plan) -> None:
    """Let vLLM's scheduler draft by `plan` as far as its drafts pay on this server.

    The scheduler learns the accepted tokens of every step in any case, on the host, and looks up the next step's drafts
    in a list (vllm/v1/core/sched/scheduler.py: `update_from_output`, `schedule`).
    """
    followed = FollowedPlan(plan.schedule, plan.expected, plan.min_speedup)
    count = scheduler.make_spec_decoding_stats

    @functools.wraps(count)
    def make_spec_decoding_stats(*args: Any, num_draft_tokens: int, num_accepted_tokens: int, **others: Any) -> Any:
        followed.observe(num_draft_tokens, num_accepted_tokens)
        return count(*args, num_draft_tokens=num_draft_tokens, num_accepted_tokens=num_accepted_tokens, **others)

    scheduler.make_spec_decoding_stats = make_spec_decoding_stats
    scheduler.dynamic_sd_lookup = followed


def _path_of(asked: Any, drafter: Path) -> Path:
    path = path_given("ctc_plan", asked, "the file that `vllm-ctc plan` wrote")
    if path.is_file():
        return path
    if (drafter / path).is_file():
        return drafter / path
    raise DrafterConfigError(
        f"There is no plan {path}, here or in {drafter}; give the file that `vllm-ctc plan` wrote, or remove ctc_plan."
    )


def _misfit(plan: Plan, drafter: Path, target: Any, parallel: Any) -> str | None:
    if parallel is not None and parallel.data_parallel_size > 1:  # vLLM drops the schedule, with a warning
        return "varies drafts by batch size, which vLLM does not with data parallelism"
    if not Path(target.model).is_dir():
        return f"can be compared with a target in a folder only, and {target.model} is none"
    dtype = str(target.dtype).removeprefix("torch.")
    tensor_parallel_size = 1 if parallel is None else parallel.tensor_parallel_size
    return plan.difference(served_here(target.model, drafter, dtype, tensor_parallel_size))


def served_here(target: str | Path, drafter: str | Path, dtype: str, tensor_parallel_size: int = 1) -> dict[str, Any]:
    """The values of `plan.file.FIELDS`, on this machine. "threads" is not among them where vLLM chooses."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    found: dict[str, Any] = {"vllm": vllm.__version__, "torch": str(torch.__version__)}
    if current_platform.is_cpu():
        found |= {"device": processor(), "cores": len(os.sched_getaffinity(0))}
        if (threads := threads_asked_for()) is not None:
            found["threads"] = threads
    else:
        found |= {"device": current_platform.get_device_name(), "cores": None, "threads": None}
    found["dtype"] = dtype
    for name, folder in (("target", target), ("drafter", drafter)):
        found[name] = served_fingerprint(folder)
    return found | {"tensor_parallel_size": tensor_parallel_size}


def processor() -> str:
    """The CPU's name."""
    information = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    match = re.search(r"^model name\s*: (.+)$", information, re.MULTILINE)
    return match[1] if match else os.uname().machine
