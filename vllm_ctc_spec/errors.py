"""Errors that a user can mend. Each message is one sentence that says what is wrong and what to do."""

import reprlib
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Shown as it is, without a traceback."""


class DrafterConfigError(UserError):
    """A drafter's folder cannot be used, or `--speculative-config` or the engine cannot serve it."""


class TrainingError(UserError):
    """A run of `vllm-ctc` cannot start or go on."""


class EdgeError(UserError):
    """An edge client cannot start or go on."""


_abridged = reprlib.Repr()
_abridged.maxstring = _abridged.maxother = 100


def shown(value: Any) -> str:
    """A value from a file that may hold anything, as a sentence quotes it: one line, abridged."""
    return _abridged.repr(value)


def path_given(option: str, value: Any, wanted: str) -> Path:
    """The path that an option of `--speculative-config` names (DrafterConfigError). wanted: what is to be given."""
    if not isinstance(value, str | Path) or not str(value).isprintable():
        raise DrafterConfigError(f"{option} is {shown(value)}; give {wanted}.")
    return Path(value)
