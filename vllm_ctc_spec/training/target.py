"""The frozen target: a Hugging Face causal language model, its tokenizer and its auxiliary hidden states."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_ctc_spec.training.settings import TrainingError


@contextlib.contextmanager
def _loading(folder: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"The target at {folder} cannot be loaded ({type(error).__name__}: {reason}); "
            "give the folder of a Hugging Face causal language model."
        ) from error


@dataclasses.dataclass(frozen=True)
class TargetText:
    """What prompts are built with: no weights are loaded for it."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    num_layers: int

    @classmethod
    def load(cls, folder: str) -> "TargetText":
        if not (Path(folder) / "config.json").is_file():
            raise TrainingError(f"No Hugging Face model at {folder}: config.json is missing; give the target's folder.")
        with _loading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if not tokenizer.chat_template:
            raise TrainingError(
                f"The tokenizer at {folder} has no chat template, so its prompts cannot be built; "
                "use a chat model or add chat_template.jinja to the folder."
            )
        return cls(tokenizer, config.max_position_embeddings, config.num_hidden_layers)


@dataclasses.dataclass(frozen=True)
class Target:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]

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
        return self.model.config.max_position_embeddings

    @classmethod
    def load(cls, folder: str, device: torch.device, dtype: torch.dtype) -> "Target":
        tokenizer = TargetText.load(folder).tokenizer
        with _loading(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
        if not hasattr(model.get_decoder(), "layers"):
            raise TrainingError(
                f"The target at {folder} is a {type(model).__name__}, whose layers cannot be read from; "
                "CTC drafters need a decoder with `layers`, as Llama and Qwen have."
            )
        eos = model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        eos_ids = frozenset(eos if isinstance(eos, list) else [eos]) - {None}
        model.requires_grad_(False)
        return cls(model.to(device).eval(), tokenizer, eos_ids)


class AuxHiddenStates:
    """Runs the target and returns its hidden states after the layers that the drafter reads.

    Ids count layers already run. The states come from hooks on the decoder layers: Hugging Face's own list of hidden
    states has the final norm in its last entry, so that the last layer's plain output is not in it.
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
