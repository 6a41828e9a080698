"""The frozen target: a Hugging Face causal language model, its tokenizer and its auxiliary hidden states."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from vllm_ctc_spec.drafter.config import positions_of
from vllm_ctc_spec.errors import TrainingError

UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError)
"""Errors that transformers raises for folders that it can make no model of."""


@contextlib.contextmanager
def loading(folder: str) -> Iterator[None]:
    """Turn the error for a folder that transformers can make no model of into a TrainingError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNLOADABLE as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        remedy = "give the folder of a Hugging Face causal language model"
        if isinstance(error, ImportError):  # quantised weights raise it: their kernels are packages of their own
            remedy = (
                "install what it names, or let vLLM run the target: train with --features stored on what "
                "`vllm-ctc data --hidden-states` wrote"
            )
        raise TrainingError(
            f"The target at {folder} cannot be loaded ({type(error).__name__}: {reason}); {remedy}."
        ) from error


@dataclasses.dataclass(frozen=True)
class TargetText:
    """Everything that prompts are built with. No weights are loaded for it."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    max_length: int
    num_layers: int

    @classmethod
    def load(cls, folder: str) -> "TargetText":
        if not (Path(folder) / "config.json").is_file():
            if folder.endswith(".gguf") or any(Path(folder).glob("*.gguf")):
                raise TrainingError(
                    f"The target at {folder} is a GGUF file, which cannot be read here; give a Hugging Face folder of "
                    "the model."
                )
            raise TrainingError(f"No Hugging Face model at {folder}: config.json is missing; give the target's folder.")
        with loading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            text = config.get_text_config()  # of a multimodal model its language model's, else the same
        if not tokenizer.chat_template:
            raise TrainingError(
                f"The tokenizer at {folder} has no chat template, so its prompts cannot be built; "
                "use a chat model or add chat_template.jinja to the folder."
            )
        return cls(tokenizer, config, max_length(config, tokenizer), text.num_hidden_layers)

    def check_layers(self, folder: str) -> None:
        """Refuse a target whose layers a drafter cannot read, before weights load (TrainingError)."""
        with loading(folder), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        _check_layers(folder, model)

    def refuse_quantised(self, folder: str, remedy: str) -> None:
        """Transformers and vLLM do not compute the same with quantised weights, and only vLLM's results are served
        (TrainingError)."""
        if (quantised := getattr(self.config, "quantization_config", None)) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
            raise TrainingError(
                f"The target at {folder} is quantised ({method}), and only vLLM computes with its weights as a server "
                f"does: {remedy}."
            )


@dataclasses.dataclass(frozen=True)
class Target:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def decoder(self) -> torch.nn.Module:
        return self.model.get_decoder()

    @property
    def embedding(self) -> Tensor:  # [V, H]
        return self.model.get_input_embeddings().weight

    @property
    def head(self) -> Tensor:  # [V, H]
        return self.model.get_output_embeddings().weight

    @property
    def max_length(self) -> int:
        return max_length(self.config, self.tokenizer)

    @classmethod
    def load(cls, folder: str, device: torch.device, dtype: torch.dtype) -> "Target":
        tokenizer = TargetText.load(folder).tokenizer
        with loading(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
        _check_layers(folder, model)
        eos = model.generation_config.eos_token_id
        # As vLLM ends an answer: at each of these, and at the tokenizer's own.
        eos_ids = frozenset([*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]) - {None}
        model.generation_config = GenerationConfig()  # penalties and the like are a request's, not the target's
        model.requires_grad_(False)
        return cls(model.to(device).eval(), tokenizer, eos_ids)


def max_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Positions of a prompt and its answer together: a tokenizer may allow fewer than the model."""
    return positions_of(config.get_text_config(), tokenizer.model_max_length)


def _check_layers(folder: str, model: PreTrainedModel) -> None:
    if not hasattr(model.get_decoder(), "layers"):
        raise TrainingError(
            f"The target at {folder} is a {type(model).__name__}, whose layers cannot be read from; "
            "CTC drafters need a decoder with `layers`, as Llama and Qwen have."
        )


@dataclasses.dataclass(frozen=True)
class TargetTables:
    """The part of a target that a run on stored hidden states needs. The whole target may be too large for this
    machine, or one that only vLLM can run."""

    config: PreTrainedConfig
    embedding: Tensor  # [V, H]
    head: Tensor  # [V, H]

    @classmethod
    def load(cls, folder: str, device: torch.device, dtype: torch.dtype) -> "TargetTables":
        """The tables alone where the weights' files name them, else out of the whole model."""
        config = TargetText.load(folder).config
        names = _table_names(config)
        with loading(folder):
            found = {name: _read_table(Path(folder), name) for name in names or ()}
        if names is not None and all(table is not None for table in found.values()):
            tables = {name: table.to(device, dtype) for name, table in found.items()}
            return cls(config, *(tables[name] for name in names))
        target = Target.load(folder, device, dtype)
        return cls(config, target.embedding, target.head)


def _table_names(config: PreTrainedConfig) -> tuple[str, str] | None:
    """Names of the embedding's and the head's weights in the model, the same if they are tied; None where transformers
    does not know the model."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except UNLOADABLE:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return None
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names[id(embedding)], names[id(embedding if head.weight is embedding.weight else head)]


def _read_table(folder: Path, name: str) -> Tensor | None:
    """This weight out of safetensors files; None if they do not have it, or not as plain numbers. Files of multimodal
    models may name the same module by another path."""
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif whole.is_file():
        with safe_open(whole, "pt") as file:
            files = dict.fromkeys(file.keys(), whole.name)
    else:
        return None
    ending = "." + ".".join(name.split(".")[-2:])
    names = [name] if name in files else [other for other in files if other.endswith(ending)]
    if len(names) != 1:
        return None
    with safe_open(folder / files[names[0]], "pt") as file:
        table = file.get_tensor(names[0])
    return table if table.dtype in (torch.float32, torch.float16, torch.bfloat16) else None


class AuxHiddenStates:
    """Runs the target and returns its hidden states after the layers that the drafter reads.

    Ids count layers already run. The states come from hooks on the decoder layers: Hugging Face's own list of hidden
    states has the final norm in its last entry, so it lacks the last layer's plain output.
    """

    def __init__(self, target: Target, layer_ids: tuple[int, ...]):
        self._decoder = target.decoder
        self._states: dict[int, Tensor] = {}
        self._layer_ids = layer_ids
        for layer_id in layer_ids:
            self._decoder.layers[layer_id - 1].register_forward_hook(self._keep(layer_id))

    def _keep(self, layer_id: int):
        def hook(module, inputs, output):
            self._states[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, S], padded on the right, to [B, S, A * H]; padding is behind every causal context."""
        self._decoder(input_ids=token_ids, use_cache=False)
        return torch.cat([self._states.pop(layer_id) for layer_id in self._layer_ids], -1)
