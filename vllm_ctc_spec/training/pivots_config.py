"""The settings of `vllm-ctc pivots`. Kept free of torch, so that `--help` starts quickly."""

import dataclasses
from pathlib import Path

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.config import DEFAULT_DTYPE, as_in_training, check_choices, default_dtype, option, setting


@dataclasses.dataclass(frozen=True)
class PivotsConfig:
    """Settings of `vllm-ctc pivots`, except the machines that it runs on and `--overwrite`."""

    target: str = as_in_training("target", metavar="DIR")
    drafter: str = setting("folder that `vllm-ctc train` wrote, whose rejected tokens are judged", metavar="DIR")
    data: str = setting(
        "rows with question and answer, which ends in a number, or test_list, unit tests of a Python program",
        metavar="FILE",
    )
    output: Path = setting("folder of the classifier", metavar="PIVOTS")
    num_questions: int = setting("the first usable rows of the file", 1000)
    candidates: int = setting("rejected tokens of an answer, at most, chosen by --seed", 8)
    rollouts: int = setting("the target's answers behind each of them, and behind its own token there", 20)
    temperature: float = setting("of these answers", 0.7)
    alpha: float = setting("a token is a pivot if it leaves less than this of the right answers", 0.9)
    max_new_tokens: int = as_in_training("max_new_tokens")
    seed: int = as_in_training("seed", help="of answers and choices")
    run_code: bool = setting(
        "run the target's programs on this machine: rows with test_list need it, and the limits of a process, which "
        "they get, are no sandbox",
        False,
    )
    dtype: str | None = as_in_training("dtype", help=f"of the target (default: {DEFAULT_DTYPE})")
    tensor_parallel_size: int = setting("GPUs of an engine, as in `vllm serve`", 1, metavar="N")
    chat_template_kwargs: dict | None = as_in_training("chat_template_kwargs", metavar="JSON")

    def __post_init__(self) -> None:
        if self.dtype is None:
            object.__setattr__(self, "dtype", default_dtype())
        check_choices(self)
        for name in ("num_questions", "candidates", "rollouts", "max_new_tokens", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{option(name)} must be 1 or more, not {getattr(self, name)}.")
        if not 0 < self.temperature < float("inf"):
            raise TrainingError(f"--temperature must be more than 0, not {self.temperature}: rollouts are samples.")
        if not 0 < self.alpha <= 1:
            raise TrainingError(f"--alpha must be more than 0 and at most 1, not {self.alpha}.")
        if not 0 <= self.seed < 2**32:
            raise TrainingError(f"--seed must be between 0 and 2**32 - 1, not {self.seed}.")
