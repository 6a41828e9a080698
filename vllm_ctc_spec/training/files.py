"""Files that appear whole or not at all, and the settings that a run records in one."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.config import MAY_CHANGE, option


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not (TrainingError)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full, or does not answer, is a TrainingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # what safetensors makes of an OSError
        raise TrainingError(
            f"{path.name} cannot be written to {path.parent} ({error}); when there is room, the same command continues."
        ) from error


@contextlib.contextmanager
def fitting_a_gpu(levers: str) -> Iterator[None]:
    """A GPU whose memory is full is a TrainingError; levers: what the user can do about it."""
    import torch  # not at the top: --help needs none

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).strip().split(". ")[:2]).rstrip(".")  # what was asked for; a paragraph follows
        raise TrainingError(f"The GPU's memory is too small ({reason}); {levers}.") from error


def write_atomically(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def record_settings(path: Path, settings: dict) -> None:
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


def differing_settings(path: Path, settings: dict) -> list[str]:
    """`--name then -> now` for each setting in which the recorded run at `path` differs and may not; empty if there is
    none."""
    if not path.is_file():
        return []
    try:
        recorded = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} is damaged ({error}); restore it from a copy, or use another folder.") from error
    settings = json.loads(json.dumps(settings))  # as it would be read back: a tuple is a list there
    names = [*settings, *(name for name in recorded if name not in settings)]
    return [
        f"{option(name)} {recorded.get(name)} -> {settings.get(name)}"
        for name in names
        if name not in MAY_CHANGE and recorded.get(name) != settings.get(name)
    ]
