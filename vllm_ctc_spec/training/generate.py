"""Responses by the target in this process: batched decoding with a cache, for a machine without vLLM's help."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from vllm_ctc_spec.training.data import Prompts
from vllm_ctc_spec.training.dataset import (
    Example,
    Shard,
    dataset_settings,
    plan_shards,
    read_examples,
    write_responses,
)
from vllm_ctc_spec.training.settings import TrainConfig
from vllm_ctc_spec.training.target import Target

CACHE_BLOCK = 64  # tokens by which a layer's cache grows


class BlockLayer(DynamicLayer):
    """A cache layer that grows by blocks: concatenating for each token copies the whole cache once a step."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = key_states.new_empty(2, *key_states.shape[:2], 0, key_states.shape[3])
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._room.shape[3]:
            grown = self._room.new_empty(*self._room.shape[:3], end + CACHE_BLOCK, self._room.shape[4])
            grown[:, :, :, :start] = self._room[:, :, :, :start]
            self._room = grown
        self._room[0, :, :, start:end] = key_states
        self._room[1, :, :, start:end] = value_states
        self.keys, self.values = self._room[:, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._room = self._room[:, indices]
        self.keys, self.values = self._room[:, :, :, : self.get_seq_length()]


@torch.no_grad()
def decode(
    target: Target,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The target's responses, end token included; temperature 0 is greedy. Finished rows leave the batch."""
    device, width = target.model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = Cache(layer_class_to_replicate=BlockLayer)
    responses: list[list[int]] = [[] for _ in prompts]
    rows, running = list(range(len(prompts))), set(range(len(prompts)))
    for _ in range(min(max_new_tokens, target.max_length - width)):
        output = target.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(-1, keepdim=True)
        for row, token_id in zip(rows, token[:, 0].tolist()):
            if row in running:
                responses[row].append(token_id)
                if token_id in target.eos_ids:
                    running.discard(row)
        if not running:
            break
        ids, positions = token, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        if len(running) <= 0.75 * len(rows):
            keep = torch.tensor([i for i, row in enumerate(rows) if row in running], device=device)
            rows = [row for row in rows if row in running]
            ids, positions, mask = ids[keep], positions[keep], mask[keep]
            cache.batch_select_indices(keep)
    return responses


def make_labels(
    config: TrainConfig, target: Target, prompts: Prompts, folder: Path, overwrite: bool
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, decoded in this process."""

    def respond(shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[list[int]]]]:
        for shard in shards:
            generator = torch.Generator(target.model.device).manual_seed(config.seed * 1_000_003 + shard.index)
            yield shard, decode(target, shard.prompts, config.max_new_tokens, shard.temperature, generator)

    settings = dataset_settings(config.target, prompts, config.max_new_tokens, config.temperature, config.seed)
    write_responses(folder, settings, plan_shards(prompts, config.temperature), respond, overwrite)
    return read_examples(folder, "train"), read_examples(folder, "held-out")
