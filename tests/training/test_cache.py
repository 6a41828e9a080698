"""The frozen table of a dataset, against a count in plain Python; the command that writes it."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch

from vllm_ctc_spec import cli
from vllm_ctc_spec.draft.cache_table import CacheTable
from vllm_ctc_spec.training.cache import common_followers
from vllm_ctc_spec.training.dataset import Example


@pytest.mark.parametrize("seed", range(6))
def test_followers_are_the_most_frequent_ones(seed: int) -> None:
    draws = random.Random(seed)
    examples = [
        Example([draws.randrange(5) for _ in range(3)], [draws.randrange(5) for _ in range(draws.randrange(12))])
        for _ in range(8)
    ]
    number, length = 1 + seed % 3, 1 + seed % 4
    counts: Counter[tuple[int, ...]] = Counter()
    for example in examples:
        text = [*example.prompt[-1:], *example.response]
        counts.update(tuple(text[at : at + 1 + length]) for at in range(len(text) - length))
    table = common_followers(examples, number, length)
    assert table.dtype == np.int32 and table.shape[1:] == (number, length)
    for leader in range(len(table)):
        of_leader = sorted(((-count, gram[1:]) for gram, count in counts.items() if gram[0] == leader))[:number]
        expected = [list(follower) for _, follower in of_leader]
        assert table[leader].tolist() == expected + [[-1] * length] * (number - len(expected))


def test_the_command(tmp_path, capsys) -> None:
    data, output = tmp_path / "data", tmp_path / "table.safetensors"
    data.mkdir()
    rows = [{"prompt": [1, 2], "response": [3, 4, 5, 3, 4, 6]}]
    (data / "train-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["cache", "--data", str(data), "--output", str(output), "--length", "2", "--followers", "2"]
    assert cli.main(command) == 0
    assert "followers of 4 tokens" in capsys.readouterr().out
    followers = CacheTable.load(output).followers
    assert followers.dtype == torch.int32
    assert followers[2].tolist() == [[3, 4], [-1, -1]] and followers[3].tolist() == [[4, 5], [4, 6]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--followers", "0"], "--followers must be 1 to 64"),
        (["--length", "17"], "--length must be 1 to 16"),
        ([], "holds no answers for a table"),
    ],
)
def test_one_sentence_for_what_is_wrong(tmp_path, capsys, arguments, says) -> None:
    command = ["cache", "--data", str(tmp_path), "--output", str(tmp_path / "t.safetensors"), *arguments]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
