"""`vllm-ctc cache`: from a dataset of the target's answers to the table of what commonly follows each token."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from vllm_ctc_spec.draft.cache_table import CacheTable
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.cache_config import CacheConfig
from vllm_ctc_spec.training.dataset import Example, read_examples
from vllm_ctc_spec.training.files import new_file


def make_table(config: CacheConfig) -> str:
    """Write the table; returns what is to be told (TrainingError)."""
    examples = read_examples(Path(config.data), "train") if Path(config.data).is_dir() else []
    followers = common_followers(examples, config.followers, config.length)
    if not len(followers):
        raise TrainingError(f"{config.data} holds no answers for a table; make them with `vllm-ctc data`.")
    with new_file(config.output) as temporary:
        CacheTable(temporary, torch.from_numpy(followers)).save()
    known = int((followers[:, 0, 0] >= 0).sum())
    return f"{config.output}: followers of {known} tokens, up to {config.followers} of {config.length} tokens each"


def common_followers(examples: Iterable[Example], num_followers: int, length: int) -> np.ndarray:
    """[1 + largest id, F, FL] int32: what most often came after each token in the responses, the last token of the
    prompt being a leader too; ties in the order of ids. -1 where there are fewer."""
    windows = [
        sliding_window_view(np.array([*example.prompt[-1:], *example.response], np.int32), 1 + length)
        for example in examples
        if len(example.prompt[-1:]) + len(example.response) > length
    ]
    if not windows:
        return np.empty((0, num_followers, length), np.int32)
    grams, counts = np.unique(np.concatenate(windows), axis=0, return_counts=True)
    order = np.lexsort((np.arange(len(grams)), -counts, grams[:, 0]))  # by leader, the most frequent first
    grams = grams[order]
    leaders, first = np.unique(grams[:, 0], return_index=True)
    rank = np.arange(len(grams)) - np.repeat(first, np.diff([*first, len(grams)]))
    table = np.full((1 + int(leaders[-1]), num_followers, length), -1, np.int32)
    kept = grams[rank < num_followers]
    table[kept[:, 0], rank[rank < num_followers]] = kept[:, 1:]
    return table
