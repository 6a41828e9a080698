"""`scripts/pack_wheels.py` with a wheel made here."""

import random
import zipfile
from pathlib import Path

import pytest


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    noise = random.Random(0).randbytes(3 * 2**20)  # does not compress: more than one part of 1 MiB
    files = {
        "thing/__init__.py": b"WORD = 'here'\n",
        "thing/data.bin": noise,
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": noise,
        "thing/include/x.h": b"header",
        "thing-1.0.data/purelib/other.py": b"WORD = 'there'\n",
        "thing-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
    }
    with zipfile.ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def test_parts_make_the_packages_again_without_what_is_dropped(run_script, wheel, tmp_path):
    parts, site = tmp_path / "parts", tmp_path / "site"
    done = run_script("pack_wheels.py", "pack", "--wheels", str(wheel), "--size", "1", "--output", str(parts))
    assert done.returncode == 0, done.stderr
    found = sorted(path.name for path in parts.iterdir())
    assert found == ["part-000", "part-001", "part-002", "part-003", "parts.json"]
    assert max(path.stat().st_size for path in parts.iterdir()) == 2**20
    done = run_script("pack_wheels.py", "unpack", str(parts), "--target", str(site))
    assert done.returncode == 0 and done.stdout == f"==> export PYTHONPATH={site}\n", done.stderr
    files = sorted(str(path.relative_to(site)) for path in site.rglob("*") if path.is_file())
    assert files == ["other.py", "thing-1.0.dist-info/METADATA", "thing/__init__.py", "thing/data.bin"]
    with zipfile.ZipFile(wheel) as original:
        assert (site / "thing/data.bin").read_bytes() == original.read("thing/data.bin")
    done = run_script("\nimport other, thing\nfrom importlib.metadata import version\n"
                      "print(thing.WORD, other.WORD, version('thing'))", PYTHONPATH=str(site))  # fmt: skip
    assert done.stdout == "here there 1.0\n", done.stderr

    (parts / "part-001").write_bytes(b"damaged")
    done = run_script("pack_wheels.py", "unpack", str(parts), "--target", str(site))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1, f"error: {parts}/part-001 is damaged; bring it along again."
    )  # fmt: skip
    (parts / "part-001").unlink()
    done = run_script("pack_wheels.py", "unpack", str(parts), "--target", str(site))
    assert (done.returncode, done.stderr) == (1, f"error: {parts} lacks part-001; bring them along.\n")
    done = run_script("pack_wheels.py", "pack", "--wheels", str(wheel), "--output", str(parts))
    assert (done.returncode, done.stderr) == (1, f"error: {parts} is not empty; use another --output.\n")


def test_packages_or_files_must_be_named(run_script, tmp_path):
    for options in ([], ["vllm==0.32.0", "--wheels", "x.whl"]):
        done = run_script("pack_wheels.py", "pack", "--output", str(tmp_path / "parts"), *options)
        assert done.returncode == 2 and "name the packages, or the files by --wheels" in done.stderr


def test_no_folder_of_parts(run_script, tmp_path):
    done = run_script("pack_wheels.py", "unpack", str(tmp_path), "--target", str(tmp_path / "site"))
    expected = f"error: {tmp_path}/parts.json is missing; give the folder that `pack` wrote.\n"
    assert (done.returncode, done.stderr) == (1, expected)
