"""What `vllm-ctc eval` has measured: its tables and its file."""

import dataclasses
import json
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_ctc_spec
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.files import write_atomically

HEADER = f"{'drafts':<20}{'temperature':>11}{'acceptance length':>20}{'per row':>9}{'prompts':>9}{'steps':>9}"
COMPARED_HEADER = f"{'drafts':<20}{'temperature':>11}{'this':>10}{'other':>10}{'this - other':>20}"
ACCEPTANCE = (
    "Accepted exactly: the text is the target's. A lossy rule (FLy, pivots) changes the text: "
    "benchmarks/quality.py measures its lengths, and what they cost."
)
LAST_TURN = 4  # of the table; it stands for all later ones too


@dataclasses.dataclass(frozen=True)
class Result:
    """Drafts of one kind, measured at one temperature. turns, conversations: of each of the acceptance's entries."""

    drafts: str
    num_drafted: int  # tokens, N
    temperature: float
    acceptance: Acceptance
    turns: Sequence[int]
    conversations: Sequence[Hashable]

    @property
    def by_conversation(self) -> Acceptance:
        return self.acceptance.grouped(self.conversations)

    def by_turn(self) -> dict[str, Acceptance]:
        """Empty where all prompts are first turns."""
        last = max(self.turns, default=1)
        if last == 1:
            return {}
        found = {}
        for number in range(1, min(last, LAST_TURN) + 1):
            rows = [row for row, turn in enumerate(self.turns) if min(turn, LAST_TURN) == number]
            tokens, steps = (
                [values[row] for row in rows] for values in (self.acceptance.tokens, self.acceptance.steps)
            )
            if rows:
                groups = [self.conversations[row] for row in rows]
                name = f"turn {number}{' and later' if number == LAST_TURN < last else ''}"
                found[name] = Acceptance(tokens, steps).grouped(groups)
        return found

    def rows(self) -> list[str]:
        """Of the table: all prompts, then each turn."""
        total = self._row(self.drafts, self.by_conversation, len(self.turns))
        turns = self.by_turn().items()
        return [total, *(self._row(f"  {name}", acceptance, len(acceptance.steps)) for name, acceptance in turns)]

    def per_row(self, acceptance: Acceptance) -> float:
        """Tokens that one verified row brings: the target computes 1 + N rows a step, whatever is accepted. Rows are
        what a step of a large batch costs, as acceptance length is what a step of a small one brings."""
        return acceptance.length / (1 + self.num_drafted)

    def _row(self, name: str, acceptance: Acceptance, num_prompts: int) -> str:
        length = f"{acceptance.length:.3f} +- {acceptance.half_width:.3f}"
        counts = f"{self.per_row(acceptance):>9.3f}{num_prompts:>9}{sum(acceptance.steps):>9.0f}"
        return f"{name:<20}{self.temperature:>11g}{length:>20}{counts}"

    def compared_with(self, other: "Result") -> str:
        """A row of the second table: two drafters on the same responses."""
        mine, theirs = self.by_conversation, other.by_conversation
        difference, half_width = mine.minus(theirs)
        name = self.drafts if self.drafts == other.drafts else f"{self.drafts} / {other.drafts.split()[-1]}"
        interval = f"{difference:+.3f} +- {half_width:.3f}"
        return f"{name:<20}{self.temperature:>11g}{mine.length:>10.3f}{theirs.length:>10.3f}{interval:>20}"

    def to_dict(self) -> dict[str, Any]:
        numbers = {conversation: number for number, conversation in enumerate(dict.fromkeys(self.conversations))}
        return {
            "drafts": self.drafts,
            "temperature": self.temperature,
            "acceptance_length": self.acceptance.length,
            "acceptance_per_verified_row": self.per_row(self.acceptance),
            "half_width": _finite(self.by_conversation.half_width),
            "tokens": self.acceptance.tokens,
            "steps": self.acceptance.steps,
            "turns": list(self.turns),
            "conversations": [numbers[conversation] for conversation in self.conversations],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(results: Sequence[Result], others: Sequence[Result], against: str | None) -> str:
    """others: of the drafter `against`, for the same drafts in the same order, or none."""
    lines = [HEADER, *(row for result in results for row in result.rows())]
    if others:
        lines += ["", f"Against {against}, on the same responses; the interval is of the difference:", COMPARED_HEADER]
        lines += [mine.compared_with(theirs) for mine, theirs in zip(results, others, strict=True)]
    return "\n".join([*lines, ACCEPTANCE])


def write(path: Path, config: EvalConfig, report: str, results: Sequence[Result], others: Sequence[Result]) -> None:
    content = {
        "settings": dataclasses.asdict(config),
        "data": report,
        "acceptance": "exact",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vllm_ctc_spec": vllm_ctc_spec.__version__,
        },
        "results": [result.to_dict() for result in results],
    }
    if others:
        content["against"] = [result.to_dict() for result in others]
        content["differences"] = [_difference(mine, theirs) for mine, theirs in zip(results, others, strict=True)]
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _difference(mine: Result, theirs: Result) -> dict[str, Any]:
    difference, half_width = mine.by_conversation.minus(theirs.by_conversation)
    return {
        "drafts": mine.drafts,
        "temperature": mine.temperature,
        "difference": difference,
        "half_width": _finite(half_width),
    }
