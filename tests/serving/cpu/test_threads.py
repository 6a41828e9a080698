"""A large target's vLLM gets every core of this process."""

import os

import pytest

from vllm_ctc_spec.serving.cpu import threads


@pytest.mark.parametrize("sizes, large", [((), False), ((60, 39), False), ((60, 40), True)])
def test_the_weights_decide(tmp_path, monkeypatch, sizes, large):
    monkeypatch.setattr(threads, "LARGE_TARGET", 100)
    for number, size in enumerate(sizes):
        (tmp_path / f"model-{number}.safetensors").write_bytes(b"0" * size)
    (tmp_path / "tokenizer.json").write_bytes(b"0" * 200)
    assert threads.is_large(tmp_path) == large
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert threads.threads_of(tmp_path) == ({threads.VARIABLE: cores} if large else {})
