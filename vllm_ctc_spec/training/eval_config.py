"""What one evaluation was asked to measure; apart from it, so that the command line reads the defaults at once."""

import dataclasses
from pathlib import Path

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.kernels.limits import MAX_NODES
from vllm_ctc_spec.training.config import DTYPES, default_dtype, option

DEFAULT_TEMPERATURES = (0.0, 1.0)
DEFAULT_MAX_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Settings that are None follow from `data`: a file of prompts, or a dataset, whose responses are there already;
    dtype follows from the machine."""

    target: str
    drafter: str
    data: str
    num_prompts: int = 100
    nodes: tuple[int, ...] = (8, 16, 32, 64)
    temperature: tuple[float, ...] | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    category: str | None = None
    dtype: str | None = None
    chat_template_kwargs: dict | None = None

    def __post_init__(self) -> None:
        if self.dtype is None:
            object.__setattr__(self, "dtype", default_dtype())
        if self.dtype not in DTYPES:
            raise TrainingError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if self.is_dataset:
            self._refuse_for_dataset()
        object.__setattr__(self, "nodes", tuple(dict.fromkeys(self.nodes)))
        default = (0.0,) if self.is_dataset else DEFAULT_TEMPERATURES
        temperature = default if self.temperature is None else self.temperature
        object.__setattr__(self, "temperature", tuple(dict.fromkeys(temperature)))
        if self.max_new_tokens is None and not self.is_dataset:
            object.__setattr__(self, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        for name in ("num_prompts", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise TrainingError(f"{option(name)} must be 1 or more, not {value}.")
        if not 0 <= self.seed < 2**63:
            raise TrainingError(f"--seed must be 0 or more, below 2**63, not {self.seed}.")
        for size in self.nodes:
            if not 1 <= size <= MAX_NODES:
                raise TrainingError(f"--nodes takes trees of 1 to {MAX_NODES} nodes, not {size}.")
        for temperature in self.temperature:
            if temperature not in (0, 1):
                raise TrainingError(
                    f"--temperature takes 0 and 1, not {temperature:g}: the law of sampled drafts is known exactly at "
                    "temperature 1 only."
                )

    @property
    def is_dataset(self) -> bool:
        return Path(self.data).is_dir()

    def _refuse_for_dataset(self) -> None:
        """Held-out responses of a dataset are greedy, and as long as they are."""
        for name in ("max_new_tokens", "category", "chat_template_kwargs"):
            if getattr(self, name) is not None:
                raise TrainingError(
                    f"{option(name)} does nothing with the dataset {self.data}, whose responses are there already; "
                    "leave it out, or give a file of prompts."
                )
        if any(self.temperature or ()):
            raise TrainingError(
                f"The held-out responses of the dataset {self.data} are greedy: use --temperature 0, or give a file "
                "of prompts."
            )
