"""Programs of `scripts/` import each other by file name; here they run in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_script(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """run_script(program, *arguments, **environment): a program of `scripts/`, or with a line break in it source code
    that imports those."""

    def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = ROOT / "scripts" / program
        if "\n" in program:
            path = tmp_path / "program.py"
            folders = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
            path.write_text(f"import sys\nsys.path += {folders}\n{program}", encoding="utf-8")
        command = [sys.executable, str(path), *arguments]
        settings = os.environ | environment
        return subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run
