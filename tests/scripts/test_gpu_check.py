"""`scripts/gpu_check.py` on a machine without a GPU: it selects tests, says what it skips, and fails as they do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the program runs its GPU checks there")


@pytest.fixture
def check(tmp_path):
    """check(*options): status, record, table and messages."""

    def run(*options: str) -> tuple[int, dict, str, str]:
        command = [sys.executable, str(ROOT / "scripts/gpu_check.py"), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        record = json.loads((tmp_path / "gpu_check.json").read_text())
        table = (tmp_path / "gpu_check.md").read_text()
        assert table in done.stdout
        return done.returncode, record, table, done.stderr

    return run


@without_gpu
def test_tests_are_selected_and_what_needs_a_gpu_is_said(check) -> None:
    status, record, table, _ = check("--only", "graphs", "trainer", "budgets", "step_time", "--quick", "--seed", "5")
    assert status == 0
    assert record["run"]["seed"] == 5 and record["run"]["gpu"] is None
    assert record["run"]["command"].startswith("python scripts/gpu_check.py --only graphs")
    by_part = {part: [o["status"] for o in record["outcomes"] if o["part"] == part] for part in ("graphs", "trainer")}
    assert set(by_part["graphs"]) == {"passed"} and by_part["trainer"] == ["passed"] * 4
    assert "- budgets, 1 skipped: it needs a GPU" in table and "| graphs |" in table


@without_gpu
def test_nothing_that_could_run_is_an_error(check) -> None:
    status, record, _, messages = check("--only", "budgets", "step_time")
    assert status == 1 and "nothing of this can run here" in messages
    assert {o["status"] for o in record["outcomes"]} == {"skipped"}


def test_a_part_that_hangs_is_a_failure_and_not_the_end(check) -> None:
    status, _, table, _ = check("--only", "graphs", "trainer", "--timeout", "1")
    assert status == 1
    for part in ("graphs", "trainer"):
        assert f"- FAILED {part}: pytest: nothing after 1 seconds" in table


@without_gpu
@pytest.mark.slow
def test_kernels_in_the_interpreter_without_what_is_not_needed(check, tmp_path, monkeypatch) -> None:
    """A minute. vLLM, hypothesis, numba and transformers need not be installed."""
    missing = ["vllm", "hypothesis", "numba", "transformers", "tqdm", "safetensors"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n\nsys.modules |= dict.fromkeys({missing})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    status, record, table, _ = check("--only", "kernels", "--quick")
    assert status == 0, table
    names = [o["name"] for o in record["outcomes"] if o["status"] == "passed"]
    assert len(names) > 300 and any("test_a_kernel_is_exact[tree_attention" in name for name in names)
