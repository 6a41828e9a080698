"""What `vllm-ctc data` was asked for. Kept free of torch, so that `--help` starts quickly."""

import dataclasses
from pathlib import Path
from typing import Any

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.config import option


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What `vllm-ctc data` was asked for, except where it runs and what it replaces."""

    target: str
    prompts: str
    output: Path
    max_new_tokens: int
    temperature: float
    seed: int
    held_out: int
    hidden_states: bool
    dtype: str
    aux_layers: tuple[int, ...] | None = None
    tensor_parallel_size: int = 1
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "held_out", "tensor_parallel_size"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{option(name)} must be more than 0, not {getattr(self, name)}.")
        if not 0 <= self.temperature < float("inf"):
            raise TrainingError(f"--temperature must be 0 (greedy) or more, not {self.temperature}.")
        if not 0 <= self.seed < 2**32:
            raise TrainingError(f"--seed must be between 0 and 2**32 - 1, not {self.seed}.")
        if self.aux_layers and not self.hidden_states:
            raise TrainingError("--aux-layers says which --hidden-states are stored: add those, or leave it out.")
