"""Numbers in answers, and programs that pass tests within limits."""

import os
import subprocess
import time
from fractions import Fraction

import psutil
import pytest

from vllm_ctc_spec.training import grading
from vllm_ctc_spec.training.grading import Task, final_number, passes


@pytest.mark.parametrize(("text", "number"), [
    ("She has 3 left.\n#### 18", 18),
    ("#### 7 is not the end: #### $1,234.50 in all, or 9", Fraction("1234.5")),
    ("First 12, then 30. The answer is 42.", 42),
    ("It is -5 degrees", -5),
    ("2.50 dollars", Fraction(5, 2)),
    ("none at all", None),
    ("#### unknown, 5 at most, 4 rather", 5),
    ("5 ####", None),
    ("", None),
])  # fmt: skip
def test_the_final_number(text, number):
    assert final_number(text) == number


def test_numbers_are_compared_as_numbers():
    assert final_number("#### 18.00") == final_number("eighteen, that is 18") == 18
    task = Task.of({"answer": "9 + 9 = 18\n#### 18"})
    assert task.is_right("It is 18.0") and not task.is_right("It is 1") and not task.is_right("no number")


@pytest.mark.parametrize("fields", [{}, {"answer": "no number"}, {"answer": 4}, {"test_list": []}, {"test_list": [3]}])
def test_rows_without_a_checker(fields):
    assert Task.of(fields) is None


def test_programs_are_right_if_they_pass_their_tests():
    task = Task.of({"test_list": ["assert double(2) == 4", "assert double(-1) == -2"], "answer": "#### 4"})
    right = "def double(x):\n    return 2 * x\n"
    assert task.is_right(right)
    assert task.is_right(f"First:\n```python\nnonsense(\n```\nRather:\n```python\n{right}```\nThat is it.")
    assert task.is_right(f"```\n{right}")  # cut off behind the program
    assert not task.is_right(f"{right}```\n4")
    assert not task.is_right("def double(x):\n    return x * x\n")


@pytest.mark.parametrize("program", [
    "raise SystemExit(0)", "import os; os._exit(0)", "open('file', 'w', 1).write('x\\n')", "x = bytearray(2**31)",
    "1 / 0",
])  # fmt: skip
def test_programs_that_end_early_or_exceed_a_limit_do_not_pass(program):
    assert passes("assert True")
    assert not passes(program)


def test_a_program_ends_in_time_with_what_it_has_started(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(grading, "SECONDS", 0.5)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **options: started.append(start(*a, **options)) or started[0])
    begun = time.perf_counter()
    assert not passes("import os, time\nos.fork()\ntime.sleep(60)")
    assert time.perf_counter() - begun < 10
    time.sleep(0.2)
    states = {process: process.info["status"] for process in psutil.process_iter(["status"]) if of(started[0], process)}
    assert set(states.values()) <= {psutil.STATUS_ZOMBIE}


def of(leader: subprocess.Popen, process: psutil.Process) -> bool:
    """Whether the process is of the session that `leader` led."""
    try:
        return os.getsid(process.pid) == leader.pid
    except ProcessLookupError:
        return False
