"""How the two servers of a pair are started: the target alone, and the target with its CTC drafter."""

from pathlib import Path

from pair import V2_RUNNER, ctc_config, existing
from server import Server, on_cpu


def without_drafter(target: Path, **options) -> Server:
    """The target alone, under the same model runner as with its drafter."""
    options.setdefault("env", V2_RUNNER if on_cpu() else {})
    return Server(existing(target), **options)


def with_drafter(target: Path, drafter: Path, **options) -> Server:
    return Server(existing(target), speculative_config=ctc_config(existing(drafter)), **options)
