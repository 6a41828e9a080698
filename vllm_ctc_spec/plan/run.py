"""`vllm-ctc plan`: measures what drafts bring and cost on this machine, and writes what to draft at each batch size."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.kernels.limits import MAX_NODES
from vllm_ctc_spec.plan import report
from vllm_ctc_spec.plan.acceptance import acceptance_lengths, served_acceptance
from vllm_ctc_spec.plan.config import CPU_BATCH_SIZES, GPU_BATCH_SIZES, PlanConfig
from vllm_ctc_spec.plan.file import Plan
from vllm_ctc_spec.plan.process import in_own_process
from vllm_ctc_spec.plan.solve import (
    KINDS,
    MERGED,
    NONE,
    SERVED,
    UNBOUNDED,
    Choice,
    Draft,
    Schedule,
    better_kind,
    choose,
    confirmed,
    expected,
    needs_confirmation,
    schedule,
)
from vllm_ctc_spec.plan.step_times import ROOM, Steps, StepSettings, combine, measure_pair
from vllm_ctc_spec.serving.cpu.threads import is_large, threads_asked_for, threads_unbound
from vllm_ctc_spec.serving.options import SCHEDULE, TREE_SIZES
from vllm_ctc_spec.serving.plan import served_here
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.config import DTYPES
from vllm_ctc_spec.training.engine import check_vllm
from vllm_ctc_spec.training.evaluate import check_drafter, check_pair, read_eval_prompts
from vllm_ctc_spec.training.files import write_atomically
from vllm_ctc_spec.training.target import TargetText

STEP_TOKENS = 64  # of every request whose steps are timed, at most
REPEATS = 3


def make_plan(config: PlanConfig, elsewhere: Callable[..., Any] = in_own_process) -> str:
    """Write the plan and return the table.

    elsewhere: f(function, *arguments), where what measures runs.
    """
    check_vllm()
    drafter = check_drafter(config.drafter)
    drafts = drafts_to_measure(config, drafter)
    text = TargetText.load(config.target)
    text.refuse_quantised(config.target, "give the drafts to vLLM's num_speculative_tokens_per_batch_size yourself")
    check_pair(drafter, text)
    evaluation = config.evaluation()
    prompts = read_eval_prompts(evaluation, text)
    settings = step_settings(config, text.max_length)
    print(f"{prompts.report()}\nDrafts: {', '.join(map(str, drafts))}; batch sizes: "
          f"{', '.join(map(str, settings.batch_sizes))}.", flush=True)  # fmt: skip
    alone, merged = [d for d in drafts if d.kind != MERGED], [d for d in drafts if d.kind == MERGED]
    accepted = elsewhere(acceptance_lengths, evaluation, prompts, alone) if alone else {}
    for draft in tqdm(merged, desc="several sources", unit="draft", disable=not merged):
        speculative = speculative_config(config.drafter, draft)
        accepted[str(draft)] = elsewhere(served_acceptance, settings, speculative, evaluation, prompts)
    pairs = {
        str(draft): elsewhere(measure_pair, settings, str(draft), speculative_config(config.drafter, draft))
        for draft in tqdm(drafts, desc="step times", unit="draft")
    }
    steps = combine(pairs)
    lengths = {draft: acceptance.length for draft, acceptance in accepted.items()}
    kinds = [kind for kind in KINDS if any(draft.kind == kind for draft in drafts)]
    by_kind = {kind: choose(steps, lengths, kind, config.min_speedup) for kind in kinds}
    kind = better_kind(by_kind)
    by_kind[kind], as_served = confirm(config, settings, kind, by_kind[kind], elsewhere)
    plan = Plan(
        draft=kind if any(choice.size for choice in by_kind[kind]) else NONE,
        schedule=schedule(by_kind[kind]),
        made_for={**served_here(config.target, config.drafter, DTYPES[config.dtype]), "threads": settings.threads},
        expected=expected(by_kind[kind], steps, lengths),
        min_speedup=config.min_speedup,
        measured=record(config, accepted, steps, pairs | as_served, by_kind),
    )
    write_atomically(config.plan_file, plan.to_json())
    plot = report.plot(config.plan_file.with_suffix(".png"), steps, lengths, by_kind[kind], plan.made_for["device"])
    return report.text(plan, kind, by_kind, config.plan_file, plot)


def drafts_to_measure(config: PlanConfig, drafter: DrafterConfig) -> list[Draft]:
    """Those asked for, or some of every kind; TrainingError for one that this drafter does not have."""
    labels = drafter.num_labels
    if config.drafts is None:
        chains = sorted({min(2, labels), -(-labels // 2), labels})
        trees = [Draft(kind, size) for kind in ("tree", MERGED) for size in sorted(TREE_SIZES)]
        return [Draft("chain", size) for size in chains] + trees
    drafts = [Draft.parse(text) for text in config.drafts]
    for draft in drafts:
        largest, what = (labels, "this drafter's chains") if draft.kind == "chain" else (MAX_NODES, "trees")
        if draft.size > largest:
            raise TrainingError(f"--drafts {draft} is more than {what} have, 1 to {largest}.")
    return drafts


def step_settings(config: PlanConfig, max_length: int) -> StepSettings:
    on_gpu = torch.cuda.is_available()
    tokens = max(1, min(STEP_TOKENS, config.max_new_tokens, max_length // 4))
    context = min(config.context, max_length // 2)
    threads = None
    if not on_gpu:
        default = len(os.sched_getaffinity(0)) if is_large(config.target) else 1
        threads = threads_asked_for() or threads_unbound(default)
    return StepSettings(
        target=config.target,
        batch_sizes=tuple(sorted(config.batch_sizes or (GPU_BATCH_SIZES if on_gpu else CPU_BATCH_SIZES))),
        context=context,
        max_tokens=tokens,
        repeats=REPEATS,
        max_model_len=min(max_length, context + 2 * tokens + ROOM),
        threads=threads,
        engine={"dtype": DTYPES[config.dtype]},
    )


def speculative_config(drafter: str, draft: Draft, sizes: Schedule | None = None) -> dict[str, Any]:
    """With a schedule, as a plan is served; by default one of this draft alone."""
    return {
        "method": "ctc",
        "model": str(drafter),
        **{f"ctc_{name}": value for name, value in draft.options.items()},
        "num_speculative_tokens": draft.size,
        SCHEDULE: sizes or [(1, UNBOUNDED, draft.size)],
    }


def confirm(
    config: PlanConfig, settings: StepSettings, kind: str, choices: tuple[Choice, ...], elsewhere: Callable[..., Any]
) -> tuple[tuple[Choice, ...], dict[str, Steps]]:
    """The choices after a server that follows them was measured, and what was."""
    if not needs_confirmation(choices):
        return choices, {}
    largest = Draft(kind, max(choice.size for choice in choices))
    served = speculative_config(config.drafter, largest, schedule(choices))
    with tqdm(total=1, desc="step times of the plan", unit="plan") as bar:
        steps = elsewhere(measure_pair, settings, SERVED, served)
        bar.update()
    return confirmed(choices, steps, config.min_speedup), {SERVED: steps}


def record(
    config: PlanConfig,
    accepted: Mapping[str, Acceptance],
    steps: Steps,
    pairs: Mapping[str, Steps],
    by_kind: Mapping[str, Sequence[Choice]],
) -> dict[str, Any]:
    """Everything that was measured, and what follows from it. Of paths only the last name."""
    settings = dataclasses.asdict(config)
    for name in ("target", "drafter", "prompts"):
        settings[name] = Path(settings[name]).name
    del settings["output"]
    return {
        "settings": settings,
        "acceptance": {
            draft: {
                "length": acceptance.length,
                "half_width": acceptance.half_width if math.isfinite(acceptance.half_width) else None,
            }
            for draft, acceptance in accepted.items()
        },
        "step_ms": steps,
        "pairs_ms": pairs,
        "choices": {kind: [choice._asdict() for choice in choices] for kind, choices in by_kind.items()},
    }
