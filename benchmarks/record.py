"""The output of every benchmark: OUTPUT.json, everything, and OUTPUT.md, its table; and the one description of a run.

Needs nothing but Python.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = {"vllm": "vllm", "torch": "torch", "triton": "triton", "vllm_ctc_spec": "vllm-ctc-spec"}  # key: distribution


def write_record(output: Path, record: dict, table: str) -> None:
    """Write both and print the table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def describe_run(program: str, argv: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Everything needed to repeat the run of `program`, a path in the repository; no path of this machine."""
    shown = [word if "://" in word else re.sub(r'[^\s="]*/', "", word) for word in argv]
    return {
        "command": shlex.join(["python", program, *shown]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **settings,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """Versions of PACKAGES, None if not installed, and the hardware."""
    return {
        **{key: installed(distribution) for key, distribution in PACKAGES.items()},
        "python": platform.python_version(),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu(),
    }


def machine_line(run: dict[str, Any]) -> str:
    """A table's line on the machine of its run."""
    names = {"vllm": "vLLM", "triton": "Triton", "vllm_ctc_spec": "vllm-ctc-spec"}
    found = [f"{names.get(key, key)} {run[key]}" for key in PACKAGES if run.get(key)]
    hardware = run["gpu"] or f"{run['cpu']}, {run['cores']} cores"
    return f"{', '.join(found)}, Python {run['python']}, {hardware}; {run['date'][:10]}"


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def processor() -> str:
    match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else platform.processor()


def gpu() -> str | None:
    """The GPU's name by its driver: torch would take memory of the device for it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return ", ".join(done.stdout.split("\n")).strip(", ") if done.returncode == 0 else None
