"""The wheel that `make dist` builds, installed into an environment of its own: `pytest -m slow tests/test_wheel.py`."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import importlib.metadata, importlib.resources, pkgutil
import vllm_ctc_spec, vllm_ctc_spec.kernels
print(vllm_ctc_spec.__file__)
print(*sorted(m.name for m in pkgutil.walk_packages(vllm_ctc_spec.__path__, "vllm_ctc_spec.")))
print((importlib.resources.files("vllm_ctc_spec") / "py.typed").is_file())
print(*sorted(f"{e.group}:{e.name}" for e in importlib.metadata.distribution("vllm-ctc-spec").entry_points))
"""


def run(*command: str | Path, **environment: str) -> str:
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(list(map(str, command)), env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules_of(folder: Path, package: str) -> set[str]:
    """The names of all modules of a source folder."""
    files = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py") if path.name != "__init__.py")
    packages = (path.parent.relative_to(folder) for path in folder.rglob("__init__.py") if path.parent != folder)
    return {".".join((package, *path.parts)) for path in (*files, *packages)}


@pytest.mark.slow
def test_an_installed_wheel_is_complete(tmp_path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    run(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    # What it depends on is this environment's; the wheel's own folder comes first.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    path = os.pathsep.join([site, sysconfig.get_path("purelib")])
    file, modules, typed, entry_points = run(python, "-P", "-c", PROBE, PYTHONPATH=path).splitlines()
    assert file.startswith(site) and typed == "True"
    expected = modules_of(ROOT / "vllm_ctc_spec", "vllm_ctc_spec")
    expected |= modules_of(ROOT / "kernels", "vllm_ctc_spec.kernels")
    assert set(modules.split()) | {"vllm_ctc_spec.kernels"} == expected | {"vllm_ctc_spec.kernels"}
    assert entry_points == "console_scripts:vllm-ctc vllm.general_plugins:ctc"
    assert "train" in run(tmp_path / "venv/bin/vllm-ctc", "--help", PYTHONPATH=path)
