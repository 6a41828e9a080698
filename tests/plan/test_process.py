"""What a function in a process of its own leaves: its result, its sentence, or why there is neither."""

import os
import time

import pytest

from vllm_ctc_spec.errors import DrafterConfigError, TrainingError
from vllm_ctc_spec.plan.process import in_own_process


def test_the_result_comes_from_another_process() -> None:
    assert in_own_process(os.getpid) != os.getpid()
    assert in_own_process(sorted, [3, 1, 2]) == [1, 2, 3]


def test_a_sentence_stays_one(tmp_path) -> None:
    from vllm_ctc_spec.drafter.config import DrafterConfig

    with pytest.raises(DrafterConfigError, match=str(tmp_path)):
        in_own_process(DrafterConfig.load, tmp_path)


def test_anything_else_becomes_one(capfd) -> None:
    with pytest.raises(TrainingError, match=r"^A measurement failed \(ValueError: .*'x'\); see above for where\.$"):
        in_own_process(int, "x")
    assert "Traceback" in capfd.readouterr().err


def test_a_process_that_is_killed_is_a_sentence() -> None:
    with pytest.raises(TrainingError, match="ended with exit code 7 .* smaller --batch-sizes"):
        in_own_process(os._exit, 7)


def test_an_interrupt_does_not_wait_for_it(monkeypatch) -> None:
    from multiprocessing.connection import Connection

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "recv", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_own_process(time.sleep, 60)
    assert time.monotonic() - started < 30
