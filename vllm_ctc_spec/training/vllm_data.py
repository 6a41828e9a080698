"""`vllm-ctc data`: the target's own responses by vLLM's offline engine, and its hidden states beside them."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_ctc_spec.config import default_aux_layer_ids
from vllm_ctc_spec.training.data import Prompts, read_prompts
from vllm_ctc_spec.training.dataset import (
    Responses,
    Shard,
    check_folder,
    dataset_settings,
    plan_shards,
    read_shard,
    write_responses,
    write_states,
)
from vllm_ctc_spec.training.settings import TrainingError, option
from vllm_ctc_spec.training.target import AuxHiddenStates, Target, TargetText

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}
STATES_TOKENS = 8192  # of one forward, padding included, whose hidden states are kept at the same time


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

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "held_out"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{option(name)} must be more than 0, not {getattr(self, name)}.")
        if not 0 <= self.temperature < float("inf"):
            raise TrainingError(f"--temperature must be 0 (greedy) or more, not {self.temperature}.")
        if not 0 <= self.seed < 2**32:
            raise TrainingError(f"--seed must be between 0 and 2**32 - 1, not {self.seed}.")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """One vLLM engine and what it generates; sent to Ray's workers."""

    target: str
    dtype: str
    max_length: int  # positions of the target
    max_model_len: int  # positions that these prompts can need
    max_new_tokens: int
    seed: int


class Engine:
    """vLLM with one target."""

    def __init__(self, config: EngineConfig):
        self._config = config
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default asks for nearly all memory
        check_vllm()
        from vllm import LLM

        try:
            self._llm = LLM(
                config.target,
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                enforce_eager=on_cpu,  # where compiling takes longer than it saves
            )
        except Exception as error:  # of any kind: what vLLM cannot load fails in its own or the model's code
            raise TrainingError(
                f"vLLM cannot serve the target at {config.target} ({_reason(error)}); try `vllm serve {config.target} "
                f"--dtype {config.dtype}`, which says more."
            ) from error

    def responses(self, shard: Shard) -> Responses:
        """One response per prompt, end token included. Sampled ones depend on seed and row alone."""
        from vllm import SamplingParams

        config = self._config
        params = [
            SamplingParams(
                temperature=shard.temperature,
                max_tokens=min(config.max_new_tokens, config.max_length - len(prompt)),
                seed=config.seed * 1_000_003 + row if shard.temperature else None,
                detokenize=False,
            )
            for row, prompt in zip(shard.rows, shard.prompts)
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in shard.prompts]
        try:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:  # as above
            raise TrainingError(
                f"vLLM failed while it generated responses of {config.target} ({_reason(error)}); "
                "the same command continues."
            ) from error
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """End the engine's process now: the target that computes hidden states needs its memory."""
        self._llm.llm_engine.engine_core.shutdown()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"


def check_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            f"`vllm-ctc data` generates with vLLM, which cannot be imported ({error}); install vLLM, or give the "
            "prompts to `vllm-ctc train --data`, which generates without it."
        ) from error


def generate_here(config: EngineConfig, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Responses]]:
    with contextlib.closing(Engine(config)) as engine:
        for shard in shards:
            yield shard, engine.responses(shard)


Generate = Callable[[EngineConfig, Sequence[Shard]], Iterable[tuple[Shard, Responses]]]


def make_dataset(config: DataConfig, overwrite: bool, generate: Generate = generate_here) -> str:
    """Write or continue the dataset; returns the report to print."""
    text = TargetText.load(config.target)
    prompts = read_prompts(config.prompts, text, config.max_new_tokens, config.held_out)
    shards = plan_shards(prompts, config.temperature)
    settings = dataset_settings(config.target, prompts, config.max_new_tokens, config.temperature, config.seed)
    settings["dtype"] = config.dtype
    check_folder(config.output, settings, overwrite)
    print(prompts.report())
    engine = _engine_config(config, text, prompts)
    write_responses(config.output, settings, shards, lambda missing: generate(engine, missing), overwrite)
    if config.hidden_states:
        layer_ids = default_aux_layer_ids(text.num_layers)
        write_states(config.output, shards, layer_ids, lambda missing: compute_states(config, missing, layer_ids))
    return f"{config.output}: {len(prompts.train)} responses for training, {len(prompts.held_out)} held out."


def _engine_config(config: DataConfig, text: TargetText, prompts: Prompts) -> EngineConfig:
    longest = max(map(len, prompts.train + prompts.held_out))
    return EngineConfig(
        target=config.target,
        dtype=config.dtype,
        max_length=text.max_length,
        # A cache for the target's own maximum may need more memory than there is.
        max_model_len=min(text.max_length, longest + config.max_new_tokens),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )


def compute_states(
    config: DataConfig, shards: Sequence[Shard], layer_ids: tuple[int, ...]
) -> Iterator[tuple[Shard, Tensor]]:
    """The frozen target's auxiliary hidden states, bfloat16 `[tokens of a shard, A * H]`.

    They come from transformers: vLLM's `ExampleHiddenStatesConnector` reports the same values, but copies them into
    pinned memory, which a machine without an accelerator does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = AuxHiddenStates(Target.load(config.target, device, TORCH_DTYPES[config.dtype]), layer_ids)
    for shard in shards:
        examples = read_shard(shard.path(config.output))
        at_once = max(1, STATES_TOKENS // max(map(len, examples)))
        rows = []
        for start in range(0, len(examples), at_once):
            part = examples[start : start + at_once]
            tokens = [torch.tensor(example.prompt + example.response) for example in part]
            states = run(pad_sequence(tokens, batch_first=True).to(device))
            rows += [states[row, : len(example)].bfloat16().cpu() for row, example in enumerate(part)]
        yield shard, torch.cat(rows)
