"""Carry wheels to a machine that reaches no package index, in parts of a limited size.

    python scripts/pack_wheels.py pack --python 3.12 --output PARTS vllm==0.32.0 torch==2.13.0     # where there is one
    python scripts/pack_wheels.py unpack PARTS --target SITE                                       # there
    PYTHONPATH=SITE python scripts/gpu_check.py

`pack` downloads the wheels for Linux on x86-64, leaves out what a check of this plugin does not need (DROPPED), writes
parts of at most --size MiB and a list of their checksums; `unpack` needs all parts in one folder. Dependencies are not
followed: name each one that the machine lacks. What is unpacked is on a path and not installed: its metadata are there,
so that entry points are found, and pip does not know it.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

# FlashAttention 2 (FlashAttention 3 and Triton's attention stay), what compiles or serves only other GPUs, headers, the
# front end in Rust.
DROPPED = (
    "vllm/vllm_flash_attn/_vllm_fa2_C*", "vllm/third_party/deep_gemm/*", "vllm/third_party/fmha_sm100/*",
    "vllm/vllm-rs", "*.h", "*.hpp", "*.cuh", "*.a", "torch/test/*", "torch/share/*", "torch/include/*",
)  # fmt: skip
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # minor versions that wheels are made for; pip takes each by its exact name
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in GLIBC) + ("manylinux2014_x86_64",)
MANIFEST, ARCHIVE, CHUNK = "parts.json", "wheels.zip", 2**20


class PackError(Exception):
    """One sentence for the user."""


def download(requirements: list[str], python: str, folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder]
    command += ["--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    if subprocess.run([*map(str, command), *requirements]).returncode:
        raise PackError("pip could not download all of these wheels; its messages above say which and why.")
    return sorted(folder.glob("*.whl"))


def is_dropped(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in DROPPED)


def merge(wheels: list[Path], archive: Path) -> None:
    """One archive of all files that stay, in the layout of site-packages."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as source:
                entries = [
                    entry for entry in source.infolist() if not entry.is_dir() and not is_dropped(entry.filename)
                ]
                for entry in tqdm(entries, desc=wheel.name, unit="file"):
                    with source.open(entry) as file, out.open(installed_name(entry), "w", force_zip64=True) as copy:
                        shutil.copyfileobj(file, copy, CHUNK)


def installed_name(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """A wheel's `NAME.data/purelib/x` and `platlib/x` are installed as `x`."""
    folder, _, rest = entry.filename.partition("/")
    name = entry.filename
    if folder.endswith(".data") and rest.partition("/")[0] in ("purelib", "platlib"):
        name = rest.partition("/")[2]
    renamed = zipfile.ZipInfo(name, entry.date_time)
    renamed.external_attr, renamed.compress_type = entry.external_attr, zipfile.ZIP_DEFLATED
    return renamed


def split(archive: Path, output: Path, size: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    parts = {}
    with archive.open("rb") as file:
        while data := file.read(size):
            name = f"part-{len(parts):03d}"
            (output / name).write_bytes(data)
            parts[name] = hashlib.sha256(data).hexdigest()
    (output / MANIFEST).write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")  # last: now it is complete


def pack(args: argparse.Namespace) -> None:
    if args.output.exists() and any(args.output.iterdir()):
        raise PackError(f"{args.output} is not empty; use another --output.")
    with tempfile.TemporaryDirectory(dir=args.output.absolute().parent) as folder:
        wheels = args.wheels or download(args.requirements, args.python, Path(folder))
        archive = Path(folder) / ARCHIVE
        merge(wheels, archive)
        split(archive, args.output, args.size * 2**20)
    print(f"==> {args.output}: {len(list(args.output.glob('part-*')))} parts of at most {args.size} MiB")


def unpack(args: argparse.Namespace) -> None:
    manifest = args.parts / MANIFEST
    if not manifest.is_file():
        raise PackError(f"{manifest} is missing; give the folder that `pack` wrote.")
    parts = json.loads(manifest.read_text(encoding="utf-8"))
    missing = [name for name in parts if not (args.parts / name).is_file()]
    if missing:
        raise PackError(f"{args.parts} lacks {', '.join(missing)}; bring them along.")
    args.target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.target) as archive:
        for name, checksum in tqdm(parts.items(), desc="parts"):
            data = (args.parts / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != checksum:
                raise PackError(f"{args.parts / name} is damaged; bring it along again.")
            archive.write(data)
        with zipfile.ZipFile(archive) as files:
            files.extractall(args.target)
    print(f"==> export PYTHONPATH={args.target}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("pack", help="download, and write parts")
    one.add_argument("requirements", nargs="*", metavar="NAME==VERSION")
    one.add_argument("--wheels", nargs="+", type=Path, metavar="FILE.whl", help="these files, and no download")
    one.add_argument("--python", default="3.12", help="version of the machine's Python (default: %(default)s)")
    one.add_argument("--size", type=int, default=60, help="MiB of a part (default: %(default)s)")
    one.add_argument("--output", type=Path, required=True, help="folder of the parts")
    one.set_defaults(run=pack)
    other = commands.add_parser("unpack", help="check the parts and put their files into a folder")
    other.add_argument("parts", type=Path, help="folder of the parts")
    other.add_argument("--target", type=Path, required=True, help="folder for PYTHONPATH")
    other.set_defaults(run=unpack)
    args = parser.parse_args(argv)
    if args.run is pack and bool(args.requirements) == bool(args.wheels):
        one.error("name the packages, or the files by --wheels")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        args.run(args)
    except PackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
