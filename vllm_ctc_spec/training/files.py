"""Files that appear whole or not at all, and files of settings: those that a run records, those that a user writes."""

import contextlib
import dataclasses
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.config import MAY_CHANGE, TrainConfig, kind_of, option


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
    """Turn the error of a disk that is full, or does not answer, into a TrainingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors turns an OSError into its own
        raise TrainingError(
            f"{path.name} cannot be written to {path.parent} ({error}); when there is room, the same command continues."
        ) from error


def write_atomically(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def record_settings(path: Path, settings: dict) -> None:
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


def differing_settings(path: Path, settings: dict, absent: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """`--name then -> now` for each setting that differs from the recorded run at `path` and may not; empty if there
    is none. absent: the values of settings that an earlier version did not record."""
    if not path.is_file():
        return []
    try:
        recorded = {**absent, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} is damaged ({error}); restore it from a copy, or use another folder.") from error
    settings = json.loads(json.dumps(settings))  # as read back from a file: a tuple is a list there
    names = [*settings, *(name for name in recorded if name not in settings)]
    return [
        f"{option(name)} {recorded.get(name)} -> {settings.get(name)}"
        for name in names
        if name not in MAY_CHANGE and recorded.get(name) != settings.get(name)
    ]


def read_settings(path: Path) -> dict[str, Any]:
    """Settings from a TOML file, keys as the fields of `TrainConfig`."""
    try:
        with path.open("rb") as file:
            given = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"The configuration {path} cannot be read ({error}).") from error
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, value in given.items():
        if name not in fields:
            raise TrainingError(f"{path} has an unknown setting {name!r}; the settings are {', '.join(fields)}.")
        if not _fits(value, kind_of(fields[name])):
            raise TrainingError(f"{path}: {name} must be {fields[name].type}, not {value!r}.")
    return given


TOML_TYPES = {int | str: (int, str), float: (int, float), tuple[int, ...]: list}


def _fits(value: Any, kind: Any) -> bool:
    return isinstance(value, TOML_TYPES.get(kind, kind)) and isinstance(value, bool) == (kind is bool)
