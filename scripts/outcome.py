"""What a check of `gpu_check.py` says."""

from typing import Any, NamedTuple

OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"


class Settings(NamedTuple):
    quick: bool
    seed: int
    pair: str = "tiny"  # that vLLM serves


class Outcome(NamedTuple):
    part: str
    check: str
    status: str  # OK, FAILED or NOT_RUN
    detail: str = ""
    figures: dict[str, Any] = {}  # noqa: RUF012 - never written to


def verdict(part: str, check: str, holds: bool, detail: str, **figures: Any) -> Outcome:
    return Outcome(part, check, OK if holds else FAILED, detail, figures)
