"""The settings of `vllm-ctc cache`. Kept free of torch, so that `--help` starts quickly."""

import dataclasses
from pathlib import Path

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.config import option, setting


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    data: str = setting("dataset that `vllm-ctc data` wrote", metavar="DATASET")
    output: Path = setting("the table", metavar="FILE.safetensors")
    followers: int = setting("of each token", 8, metavar="N")
    length: int = setting("tokens of a follower", 3, metavar="N")

    def __post_init__(self) -> None:
        for name, most in (("followers", 64), ("length", 16)):
            if not 1 <= getattr(self, name) <= most:
                raise TrainingError(f"{option(name)} must be 1 to {most}, not {getattr(self, name)}.")
