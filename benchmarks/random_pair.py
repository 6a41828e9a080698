"""A target's configuration and a random drafter of its shape, for measurements in which only shapes matter.

vLLM fills the target with dummy weights, so that nothing of its size is ever written.
"""

import dataclasses
import json
from pathlib import Path

import torch
from transformers import LlamaConfig

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter

SHAPES = {
    # Llama 3.1 8B.
    "8b": dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=14_336, vocab_size=128_256, max_position_embeddings=8192, dtype="bfloat16",
    ),
    # For trying things out.
    "tiny": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        intermediate_size=128, vocab_size=512, max_position_embeddings=512, dtype="float32",
    ),
}  # fmt: skip
DRAFTER = dict(num_frames=24, num_labels=8, lattice="transitions", transition_rank=64, markov_rank=64, num_layers=2)


LOAD_FORMAT = "random_pair"


def register_load_format() -> None:
    """vLLM's own `dummy` skips the loading of weights, and with it the values that the drafter derives from them."""
    from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader(LOAD_FORMAT)
    class RandomPairLoader(DummyModelLoader):
        """Dummy weights for a folder that has none."""

        def load_weights(self, model: torch.nn.Module, model_config) -> None:
            if not any(Path(model_config.model).glob("*.safetensors")):
                return super().load_weights(model, model_config)
            own = dataclasses.replace(self.load_config, load_format="auto")
            return DefaultModelLoader(own).load_weights(model, model_config)


def make_pair(shape: str, folder: Path) -> tuple[Path, Path]:
    """Folders of a target without weights and of its drafter."""
    target, drafter = save_shape(shape, folder / "target"), folder / "drafter"
    config = LlamaConfig.from_pretrained(target)
    save_random_drafter(DrafterConfig.for_target(config, "target", **DRAFTER), drafter)
    return target, drafter


def save_shape(shape: str, folder: Path) -> Path:
    """A target without weights."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"], tie_word_embeddings=False, **SHAPES[shape])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str), encoding="utf-8")
    return folder


def save_random_drafter(config: DrafterConfig, folder: Path) -> int:
    """Returns its number of parameters. The labels of a draft vocabulary are the target's first tokens."""
    table = torch.zeros(1, 1).expand(config.vocab_size, config.hidden_size)  # shared with the target, not saved
    token_ids = torch.arange(config.draft_vocab_size) if config.has_draft_vocabulary else None
    drafter = CTCDrafter(config, table, table, token_ids)
    drafter.save(folder)
    return sum(parameter.numel() for parameter in drafter.parameters())
