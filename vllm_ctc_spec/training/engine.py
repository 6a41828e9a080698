"""vLLM's offline engine with one target: its responses and hidden states, its log, and errors as one sentence."""

import contextlib
import dataclasses
import functools
import io
import json
import logging.config
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.serving.cpu.threads import threads_of
from vllm_ctc_spec.training.conversations import Asked, answer_all
from vllm_ctc_spec.training.dataset import Shard
from vllm_ctc_spec.training.dataset_writer import Advance, Answers
from vllm_ctc_spec.training.files import writing
from vllm_ctc_spec.training.prompts import PromptBuilder
from vllm_ctc_spec.training.target import TargetText

# Measured with 135 M weights on two cores: 128 give 1.17 times as many tokens a second, but each response four times
# as late.
CPU_PROMPTS_AT_ONCE = 32
LOGGING_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """One vLLM engine and what it generates; sent to Ray's workers."""

    target: str
    dtype: str
    max_length: int  # positions of the target
    max_model_len: int  # positions that these prompts can need
    max_new_tokens: int
    seed: int
    tensor_parallel_size: int = 1
    log: str | None = None  # file that vLLM's log goes to; None: where vLLM sends it
    chat_template_kwargs: dict[str, Any] | None = None  # of prompts that follow from the target's own answers


class Engine:
    """vLLM with one target."""

    def __init__(self, config: EngineConfig, **options: Any):
        """options: more of vLLM's own, for its constructor."""
        self._config = config
        self._end = contextlib.ExitStack()
        if config.log is not None:
            self._end.enter_context(vllm_logging_to(config.log))
        check_vllm()  # first: importing vLLM lets torch look for GPUs without starting CUDA, in Ray's workers too
        from vllm import LLM

        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default asks for nearly all memory
            for name, value in threads_of(config.target).items():
                os.environ.setdefault(name, value)
            options["max_num_seqs"] = CPU_PROMPTS_AT_ONCE
        try:
            self._llm = LLM(
                config.target,
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                tensor_parallel_size=config.tensor_parallel_size,
                enforce_eager=on_cpu,  # compiling takes longer there than it saves
                **options,
            )
        except Exception as error:  # as in `_generate`
            self._end.close()
            command = f"vllm serve {config.target} --dtype {config.dtype}"
            says_more = f"see {config.log}" if config.log else f"try `{command}`"
            raise TrainingError(
                f"vLLM cannot serve the target at {config.target} ({_reason(error)}); {says_more}, which says more."
            ) from error
        _report_death(self._llm.llm_engine.engine_core)

    def responses(self, shard: Shard, advance: Advance = lambda _: None) -> Answers:
        """The target's answers in each conversation; `advance(1)` as each of them ends. Sampled responses depend on
        seed, row and turn alone."""

        def respond(asked: Sequence[Asked]) -> list[list[int]]:
            return self._respond(shard, asked, advance)

        return answer_all(shard.conversations, respond, lambda *known: self._builder.follow(*known))

    @functools.cached_property
    def _builder(self) -> PromptBuilder:
        """Of prompts that follow from the target's own answers."""
        config = self._config
        text = TargetText.load(config.target)
        return PromptBuilder(text, config.max_model_len, config.max_new_tokens, config.chat_template_kwargs)

    def _respond(self, shard: Shard, asked: Sequence[Asked], advance: Advance) -> list[list[int]]:
        from vllm import SamplingParams

        config = self._config
        params = [
            SamplingParams(
                temperature=shard.temperature,
                max_tokens=min(config.max_new_tokens, config.max_length - len(each.prompt)),
                seed=self._seed(shard.rows[each.row], each.place) if shard.temperature else None,
                detokenize=False,
            )
            for each in asked
        ]
        outputs = self._generate([each.prompt for each in asked], params, "it generated responses", advance)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _seed(self, row: int, place: int) -> int:
        """Of answer number `place` in a row."""
        return self._config.seed * 1_000_003 + row + place * 2**40

    def hidden_states(self, texts: Sequence[list[int]], advance: Advance) -> list[str]:
        """Files into which the connector writes the hidden states of these token ids."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        outputs = self._generate(texts, params, "it computed hidden states", advance)
        return [output.kv_transfer_params["hidden_states_path"] for output in outputs]

    def _generate(self, prompts: Sequence[list[int]], params: Any, doing: str, advance: Advance) -> list[Any]:
        bar = functools.partial(UnseenBar, advance)
        try:
            return self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=bar)
        except Exception as error:  # of any kind: a model that vLLM cannot run fails in its own or vLLM's code
            raise TrainingError(
                f"vLLM failed while {doing} of {self._config.target} ({_reason(error)}); the same command continues"
                f"{f', and {self._config.log} says more' if self._config.log else ''}."
            ) from error

    def close(self) -> None:
        """End the engine's process now: the engine that computes hidden states needs its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        self._end.close()


class UnseenBar(tqdm):
    """vLLM's own bar, of one shard: passes on how many requests have ended. vLLM divides by the time shown, which
    is 0 with TQDM_DISABLE in the environment."""

    def __init__(self, advance: Advance, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})
        self._advance = advance

    def update(self, n: float | None = 1) -> bool | None:
        self._advance(n)
        return super().update(n)


@contextlib.contextmanager
def vllm_logging_to(file: str) -> Iterator[None]:
    """vLLM's log goes to the end of this file, from this process and from those that it starts."""
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(process)d %(levelname)s [%(name)s] %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": file, "formatter": "plain"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    logger = logging.getLogger("vllm")
    handlers = logger.handlers[:]
    with writing(Path(file)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logging.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        os.environ[LOGGING_VARIABLE] = str(path)
        try:
            if "vllm" in sys.modules:  # else it reads the file as it is imported
                logging.config.dictConfig(settings)
            yield
        finally:
            del os.environ[LOGGING_VARIABLE]
            logger.handlers = handlers


def log_is_chosen() -> bool:
    """Whether the user has set a variable of vLLM's for its log."""
    return any(name.startswith("VLLM_LOGGING_") or name == "VLLM_CONFIGURE_LOGGING" for name in os.environ)


def engine_dtype(asked: str, config: PreTrainedConfig) -> str:
    """The meaning of "auto". On a CPU float32: vLLM's own choice there is bf16 even for fp32 weights, slower on most
    CPUs, with other tokens than in fp32. On a GPU vLLM's own choice (`_resolve_auto_dtype` in its
    vllm/config/model.py): the weights' dtype, and bfloat16 for those in fp32."""
    if asked != "auto":
        return asked
    if not torch.cuda.is_available():
        return "float32"
    stored = str(config.get_text_config().dtype or "float32").removeprefix("torch.")
    return "bfloat16" if stored == "float32" else stored


def _report_death(client: Any) -> None:
    """End the wait for a killed engine's output with an error. vLLM's synchronous client sees that the process is gone,
    but goes on waiting (vllm/v1/engine/core_client.py, `SyncMPClient.get_output`)."""
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    if not isinstance(client, SyncMPClient):  # the engine is in this process
        return

    def watch() -> None:
        client.resources.engine_manager.monitor_engine_liveness()
        client.outputs_queue.put_nowait(EngineDeadError())

    threading.Thread(target=watch, daemon=True, name="engine-watch").start()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"


def check_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            f"The target generates with vLLM, which cannot be imported ({error}); install vLLM 0.32 or 0.33, or train "
            "on a dataset that `vllm-ctc data` wrote on a machine that has it."
        ) from error
