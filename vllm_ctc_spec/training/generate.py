"""Labels by the target itself: batched decoding with a cache, in shards that a rerun continues."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from vllm_ctc_spec.training.data import Prompts
from vllm_ctc_spec.training.settings import (
    TrainConfig,
    TrainingError,
    differing_settings,
    record_settings,
    write_atomically,
)
from vllm_ctc_spec.training.target import Target

SHARD_ROWS = 128  # prompts decoded and written together: what a kill can lose
CACHE_BLOCK = 64  # tokens by which a layer's cache grows
SETTINGS_NAME = "settings.json"


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of one prompt and of the target's response, its end token included."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


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


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Tells a target retrained in the same folder: the first values of every parameter."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def label_settings(config: TrainConfig, target: Target, prompts: Prompts) -> dict:
    rows = json.dumps([prompts.train, prompts.held_out]).encode()
    return {
        "prompts": hashlib.sha256(rows).hexdigest()[:16],
        "target_weights": fingerprint(target.model.state_dict()),
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed if config.temperature else None,
    }


def make_labels(
    config: TrainConfig, target: Target, prompts: Prompts, folder: Path, overwrite: bool
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. Held-out responses are greedy: they measure greedy acceptance."""
    settings = label_settings(config, target, prompts)
    differing = differing_settings(folder / SETTINGS_NAME, settings)
    if differing and not overwrite:
        raise TrainingError(
            f"The labels in {folder} were generated with other settings ({', '.join(differing)}); "
            "use --overwrite or another folder."
        )
    if differing:
        for stale in folder.glob("*.jsonl"):
            stale.unlink()
    record_settings(folder / SETTINGS_NAME, settings)
    shards = []
    for part, rows, temperature in (("held-out", prompts.held_out, 0.0), ("train", prompts.train, config.temperature)):
        ordered = sorted(rows, key=len)  # like lengths together: little padding
        for start in range(0, len(ordered), SHARD_ROWS):
            name = f"{part}-{start // SHARD_ROWS:05d}.jsonl"
            shards.append((part, folder / name, ordered[start : start + SHARD_ROWS], temperature))
    examples: dict[str, list[Example]] = {"train": [], "held-out": []}
    with tqdm(total=len(prompts.train) + len(prompts.held_out), desc="labels", unit="prompt") as bar:
        for index, (part, path, rows, temperature) in enumerate(shards):
            if not path.is_file():
                generator = torch.Generator(target.model.device).manual_seed(config.seed * 1_000_003 + index)
                responses = decode(target, rows, config.max_new_tokens, temperature, generator)
                _write_shard(path, [Example(p, r) for p, r in zip(rows, responses)])
            examples[part] += _read_shard(path)
            bar.update(len(rows))
    return examples["train"], examples["held-out"]


def _write_shard(path: Path, examples: list[Example]) -> None:
    write_atomically(path, "".join(json.dumps(dataclasses.asdict(example)) + "\n" for example in examples))


def _read_shard(path: Path) -> list[Example]:
    return [Example(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
