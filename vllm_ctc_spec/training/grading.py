"""Whether an answer is right, by its task's own checker: a number, or unit tests of a program."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
MARK = "####"  # GSM8K's, before the final answer
TESTS = "test_list"  # MBPP's field of unit tests
CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
SECONDS, BYTES, PASSED = 10, 2**30, 86  # the limits of a program, and the exit code behind its last test
LIMITED = f"""
import os, resource, sys
for name, most in (("CPU", {SECONDS}), ("AS", {BYTES}), ("FSIZE", 0), ("CORE", 0), ("NPROC", 1)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
exec(compile(sys.stdin.read(), "answer", "exec"), {{"__name__": "__main__"}})
os._exit({PASSED})
"""


def final_number(text: str) -> Fraction | None:
    """The number after the last `####`, or else the last number of the text; thousands' commas and dollars aside."""
    _, mark, after = text.rpartition(MARK)
    found = NUMBER.findall(after)
    if not found:
        return None
    return Fraction((found[0] if mark else found[-1]).replace(",", "").replace("$", ""))


@dataclasses.dataclass(frozen=True)
class Task:
    """What makes an answer right: its final number; or, where there are tests, that its program passes them."""

    number: Fraction | None = None
    tests: tuple[str, ...] = ()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Task | None":
        """Of a row of questions: `test_list`, statements as MBPP has them, or else `answer`, which ends in a number."""
        tests, answer = fields.get(TESTS), fields.get("answer")
        if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
            return cls(tests=tuple(tests))
        number = final_number(answer) if isinstance(answer, str) else None
        return None if number is None else cls(number)

    def is_right(self, text: str) -> bool:
        if not self.tests:
            return final_number(text) == self.number
        blocks = CODE.findall(text)
        return passes("\n".join([blocks[-1] if blocks else text, *self.tests]))


def passes(program: str) -> bool:
    """Whether a program runs to its end, within SECONDS and BYTES, without writing files, in a folder of its own that
    is gone afterwards. A process with limits is no sandbox: it can read files and reach the network."""
    command = [sys.executable, "-I", "-c", LIMITED]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env={},
            start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(program.encode(errors="replace"), timeout=2 * SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it has started belongs to its session
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode == PASSED
