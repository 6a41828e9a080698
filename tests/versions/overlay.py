"""To run tests on a vLLM without a CPU build: its Python sources, with the operations of the installed CPU build.

    pip download --no-deps vllm==X.Y.Z && unzip -q vllm-X.Y.Z-*.whl -d WHEEL
    python tests/versions/overlay.py WHEEL OVERLAY
    PYTHONPATH=OVERLAY make test

Scheduler, runner, samplers, models and server are then those of X.Y.Z; attention and the other compiled operations are
the CPU build's. Kernels of the runner whose sources are new to `cpu/table.py` are refused when an engine starts.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {}+cpu\n"


def lay_over(wheel: Path, build: Path, overlay: Path) -> None:
    """Write `overlay/`, which must not exist. `wheel` and `build` are folders that hold `vllm/`."""
    (description,) = wheel.glob("vllm-*.dist-info")
    release = description.name.removeprefix("vllm-").removesuffix(".dist-info")
    shutil.copytree(wheel / "vllm", overlay / "vllm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in (build / "vllm").glob("*.so"):
        shutil.copy2(library, overlay / "vllm")
    # vLLM takes its platform from the version in its metadata.
    metadata = overlay / f"vllm-{release}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(METADATA.format(release))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, metavar="WHEEL", help="an unpacked wheel of vLLM")
    parser.add_argument("overlay", type=Path, metavar="OVERLAY", help="a new folder, for PYTHONPATH")
    arguments = parser.parse_args()
    build = Path(importlib.util.find_spec("vllm").submodule_search_locations[0]).parent
    lay_over(arguments.wheel, build, arguments.overlay)


if __name__ == "__main__":
    main()
