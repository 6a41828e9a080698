"""The settings of one evaluation. Kept free of torch, so that `--help` starts quickly."""

import dataclasses

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.kernels.limits import MAX_NODES
from vllm_ctc_spec.training.config import DEFAULT_DTYPE, as_in_training, check_choices, default_dtype, option, setting
from vllm_ctc_spec.training.data_config import is_dataset

DEFAULT_TEMPERATURES = (0.0, 1.0)
DEFAULT_MAX_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Settings that are None follow from `data`: a file of prompts, or a dataset with its responses; dtype follows from
    the machine."""

    target: str = setting("Hugging Face folder of the target", metavar="DIR")
    drafter: str = setting("folder that `vllm-ctc train` wrote", metavar="DIR")
    data: str = as_in_training("data", metavar="DATA")
    against: str | None = setting(
        "another drafter of the same target, compared on the same responses", None, metavar="DIR"
    )
    num_prompts: int = setting(
        "the first usable rows of the file; of a dataset, held-out examples chosen by --seed", 100
    )
    nodes: tuple[int, ...] = setting("sizes of trees", (8, 16, 32, 64))
    seed: int = as_in_training("seed", help="of sampled responses")
    dtype: str | None = as_in_training("dtype", help=f"of the target (default: {DEFAULT_DTYPE})")
    temperature: tuple[float, ...] | None = setting(
        "of the target's responses (default: 0,1; of a dataset: 0)", None, metavar="0,1"
    )
    max_new_tokens: int | None = setting(f"longest response of the target (default: {DEFAULT_MAX_NEW_TOKENS})", None)
    chat_template_kwargs: dict | None = as_in_training("chat_template_kwargs", metavar="JSON")
    regenerate: bool = as_in_training("regenerate")
    category: str | None = setting("only the rows whose field `category` is this", None, metavar="NAME")

    def __post_init__(self) -> None:
        if self.dtype is None:
            object.__setattr__(self, "dtype", default_dtype())
        check_choices(self)
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
        return is_dataset(self.data)

    def _refuse_for_dataset(self) -> None:
        """Refuse settings of new responses: the held-out ones of a dataset are greedy, and their lengths are given."""
        for name in ("max_new_tokens", "category", "regenerate", "chat_template_kwargs"):
            if getattr(self, name) not in (None, False):
                raise TrainingError(
                    f"{option(name)} does nothing with the dataset {self.data}, whose responses are there already; "
                    "leave it out, or give a file of prompts."
                )
        if any(self.temperature or ()):
            raise TrainingError(
                f"The held-out responses of the dataset {self.data} are greedy: use --temperature 0, or give a file "
                "of prompts."
            )
