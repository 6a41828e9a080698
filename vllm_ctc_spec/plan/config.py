"""What `vllm-ctc plan` was asked for. Kept free of torch, so that `--help` starts quickly."""

import dataclasses
import math
from pathlib import Path

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.plan.file import PLAN_NAME
from vllm_ctc_spec.plan.solve import MERGED, Draft
from vllm_ctc_spec.training.config import DEFAULT_DTYPE, PROMPT_FILES, as_in_training, option, setting
from vllm_ctc_spec.training.data_config import is_dataset
from vllm_ctc_spec.training.eval_config import DEFAULT_MAX_NEW_TOKENS, EvalConfig

CPU_BATCH_SIZES = (1, 2, 4, 8)
GPU_BATCH_SIZES = (*CPU_BATCH_SIZES, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Settings that are None follow from the drafter or from the machine."""

    target: str = setting("Hugging Face folder of the target", metavar="DIR")
    drafter: str = setting("folder that `vllm-ctc train` wrote", metavar="DIR")
    prompts: str = setting(f"{PROMPT_FILES}, like those to be served, or a folder of such files", metavar="FILE")
    output: Path | None = setting(
        f"the plan (default: DRAFTER/{PLAN_NAME}, which servers then follow without being asked)",
        None,
        metavar="FILE.json",
    )
    drafts: tuple[str, ...] | None = setting(
        "what to measure, ctc+cache:NODES too (default: chains of 2, U / 2 and U labels, and trees of the sizes that "
        "are served, of the drafter alone and together with the cache)",
        None,
        metavar="chain:5,tree:16",
    )
    batch_sizes: tuple[int, ...] | None = setting(
        "requests at a time; nothing is drafted beyond the largest (default: 1,2,4,8, and up to 128 on a GPU)",
        None,
        metavar="1,2,4,8",
    )
    temperature: float = setting("of the target's responses, 0 or 1", 0.0)
    num_prompts: int = setting("the first usable rows of the file", 50)
    max_new_tokens: int = setting("longest response of the target", DEFAULT_MAX_NEW_TOKENS)
    context: int = setting("tokens of the prompts by which steps are timed", 128)
    min_speedup: float = setting("a draft is taken from this many times the speed of no speculation on", 1.0)
    dtype: str | None = as_in_training("dtype", help=f"of target and drafter, as served (default: {DEFAULT_DTYPE})")
    seed: int = as_in_training("seed", help="of sampled responses")
    chat_template_kwargs: dict | None = as_in_training("chat_template_kwargs", metavar="JSON")

    def __post_init__(self) -> None:
        if is_dataset(self.prompts):
            raise TrainingError(f"--prompts {self.prompts} is a dataset; give a file of prompts.")
        if self.plan_file.is_dir():
            raise TrainingError(f"--output {self.plan_file} is a folder; give a file.")
        object.__setattr__(self, "dtype", self.evaluation().dtype)
        for name in ("drafts", "batch_sizes"):
            value = getattr(self, name)
            if value is not None:
                if not value:
                    raise TrainingError(f"{option(name)} is empty; give at least one, or leave it out.")
                object.__setattr__(self, name, tuple(dict.fromkeys(value)))
        for text in self.drafts or ():
            if Draft.parse(text) is None:
                raise TrainingError(f"--drafts takes chain:LABELS, tree:NODES and {MERGED}:NODES, not {text!r}.")
        for name, values in (("batch_sizes", self.batch_sizes or ()), ("context", (self.context,))):
            if any(value < 1 for value in values):
                raise TrainingError(f"{option(name)} must be 1 or more, not {min(values)}.")
        if not 0 < self.min_speedup < math.inf:
            raise TrainingError(f"--min-speedup must be more than 0, not {self.min_speedup:g}.")

    @property
    def plan_file(self) -> Path:
        return self.output or Path(self.drafter) / PLAN_NAME

    def evaluation(self) -> EvalConfig:
        """The acceptance lengths' part of what was asked for, checked."""
        return EvalConfig(
            target=self.target,
            drafter=self.drafter,
            data=self.prompts,
            num_prompts=self.num_prompts,
            seed=self.seed,
            dtype=self.dtype,
            temperature=(self.temperature,),
            max_new_tokens=self.max_new_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )
