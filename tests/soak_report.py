"""What the soak found: one table, and the same as a dictionary."""

import statistics
from collections import Counter
from dataclasses import dataclass, field

from rich.table import Table

# Of the idle server, between the second quarter of the run and the last. Allocators and caches of vLLM fill up in the
# first thousands of requests, without a drafter too; a leak of 10 KiB a request is more than this in an hour.
MAX_GROWTH_MIB = 128.0


@dataclass
class Report:
    seed: int
    draft: str
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)  # by kind of request
    compared: int = 0
    faults: list[str] = field(default_factory=list)
    idle_mib: list[tuple[float, float]] = field(default_factory=list)  # (second, memory)
    acceptance_length: float = 0.0

    def growth_mib(self) -> float | None:
        """Between the medians of the second and the last quarter of the run; None where it was not measured."""
        quarter = self.seconds / 4
        second = [mib for at, mib in self.idle_mib if quarter <= at < 2 * quarter]
        last = [mib for at, mib in self.idle_mib if at >= 3 * quarter]
        return statistics.median(last) - statistics.median(second) if second and last else None

    def to_dict(self) -> dict:
        return {**vars(self), "growth_mib": self.growth_mib()}

    def table(self) -> Table:
        table = Table("", "", title=f"soak, {self.draft}, seed {self.seed}", show_header=False)
        growth = self.growth_mib()
        rows = {
            "seconds": f"{self.seconds:.0f}",
            "answers": f"{self.answers.total()}, of them compared {self.compared}",
            **{f"  {kind}": str(count) for kind, count in self.answers.most_common()},
            "acceptance length": f"{self.acceptance_length:.2f}",
            "idle memory, MiB": f"{self.idle_mib[0][1]:.0f} to {self.idle_mib[-1][1]:.0f}"
            if self.idle_mib
            else "unknown",
            "growth, MiB": "not measured" if growth is None else f"{growth:.1f} (at most {MAX_GROWTH_MIB:g})",
            "faults": str(len(self.faults)),
        }
        for name, value in rows.items():
            table.add_row(name, value)
        return table
