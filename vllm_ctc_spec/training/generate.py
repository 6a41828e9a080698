"""Responses by the target in this process: batched decoding with a cache, for a machine without vLLM's help."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from vllm_ctc_spec.training.config import DTYPES, TrainConfig
from vllm_ctc_spec.training.dataset import (
    Advance,
    Example,
    Shard,
    dataset_settings,
    plan_shards,
    read_examples,
    write_responses,
)
from vllm_ctc_spec.training.prompts import Prompts
from vllm_ctc_spec.training.target import Target

TOKENS_AT_ONCE = 65_536  # of prompts and responses in a batch: 10 GB of cache for an 8B model in bf16, and 5 GB of MLP
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


def decode(
    target: Target,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    advance: Advance = lambda _: None,
) -> list[list[int]]:
    """The target's responses, end token included; temperature 0 is greedy. `advance(1)` as each of them ends.

    A row's response does not depend on the rows that it is decoded with: all dice are thrown before they are split.
    """
    dice = torch.rand(
        (len(prompts), max_new_tokens if temperature else 0),
        generator=generator, device=target.model.device, dtype=torch.float64,
    )  # fmt: skip
    at_once = max(1, TOKENS_AT_ONCE // (max(map(len, prompts)) + max_new_tokens))
    responses = []
    for start in range(0, len(prompts), at_once):
        rows = slice(start, start + at_once)
        responses += _decode_batch(target, prompts[rows], max_new_tokens, temperature, dice[rows], advance)
    return responses


@torch.no_grad()
def _decode_batch(
    target: Target,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    dice: Tensor,
    advance: Advance,
) -> list[list[int]]:
    """dice `[B, max_new_tokens]`, for sampling. Finished rows leave the batch."""
    device, width = target.model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = Cache(layer_class_to_replicate=BlockLayer)
    responses: list[list[int]] = [[] for _ in prompts]
    limits = [min(max_new_tokens, target.max_length - len(p)) for p in prompts]
    rows, running = list(range(len(prompts))), set(range(len(prompts)))
    for step in range(max(limits)):
        output = target.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        token = sample(logits / temperature, dice[rows, step]) if temperature else logits.argmax(-1, keepdim=True)
        for row, token_id in zip(rows, token[:, 0].tolist()):
            if row in running:
                responses[row].append(token_id)
                if token_id in target.eos_ids or len(responses[row]) == limits[row]:
                    running.discard(row)
                    advance(1)
        if not running:
            break
        # Finished rows that are still here may have no position left; what they say is not read.
        ids, positions = token, (positions[:, -1:] + 1).clamp_max(target.max_length - 1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        if len(running) <= 0.75 * len(rows):
            keep = torch.tensor([i for i, row in enumerate(rows) if row in running], device=device)
            rows = [row for row in rows if row in running]
            ids, positions, mask = ids[keep], positions[keep], mask[keep]
            cache.batch_select_indices(keep)
    return responses


def sample(logits: Tensor, dice: Tensor) -> Tensor:
    """The tokens `[B, 1]` at which the distribution functions of logits `[B, V]` exceed dice `[B]` in [0, 1)."""
    cumulative = logits.softmax(-1).double().cumsum(-1)
    return torch.searchsorted(cumulative, dice[:, None] * cumulative[:, -1:], right=True)


def make_labels(
    config: TrainConfig, target: Target, prompts: Prompts, folder: Path, overwrite: bool
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, decoded in this process."""

    def respond(shards: Sequence[Shard], advance: Advance) -> Iterator[tuple[Shard, list[list[int]]]]:
        for shard in shards:
            generator = torch.Generator(target.model.device).manual_seed(config.seed * 1_000_003 + shard.index)
            yield shard, decode(target, shard.prompts, config.max_new_tokens, shard.temperature, generator, advance)

    settings = dataset_settings(
        config.target, prompts, config.max_new_tokens, config.temperature, config.seed, DTYPES[config.dtype]
    )
    write_responses(folder, settings, plan_shards(prompts, config.temperature), respond, overwrite)
    return read_examples(folder, "train"), read_examples(folder, "held-out")
