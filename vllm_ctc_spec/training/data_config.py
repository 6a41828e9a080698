"""The settings of `vllm-ctc data`, and where a dataset records them. Kept free of torch, so that `--help` starts
quickly."""

import dataclasses
from pathlib import Path

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.config import DTYPES, PROMPT_FILES, as_in_training, option, setting

SETTINGS_NAME = "settings.json"


def is_dataset(path: str | Path) -> bool:
    """Whether `vllm-ctc data` wrote this folder."""
    return (Path(path) / SETTINGS_NAME).is_file()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of `vllm-ctc data`, except the machines that it runs on and `--overwrite`."""

    target: str = as_in_training("target", metavar="DIR")
    prompts: str = setting(f"{PROMPT_FILES}, or a folder of such files", metavar="FILE")
    output: Path = setting("folder of the dataset", metavar="DATASET")
    max_new_tokens: int = as_in_training("max_new_tokens")
    temperature: float = as_in_training("temperature")
    seed: int = as_in_training("seed", help="of sampled responses")
    held_out: int = as_in_training("held_out")
    regenerate: bool = as_in_training("regenerate")
    hidden_states: bool = setting("store what a drafter reads of the target too", False)
    dtype: str = setting(
        "of the target, as in `vllm serve`; auto: float32 on a CPU", "auto", choices=("auto", *DTYPES.values())
    )
    aux_layers: tuple[int, ...] | None = as_in_training("aux_layers", metavar="1,2,3")
    tensor_parallel_size: int = setting("GPUs of an engine, as in `vllm serve`", 1, metavar="N")
    chat_template_kwargs: dict | None = as_in_training("chat_template_kwargs", metavar="JSON")

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
