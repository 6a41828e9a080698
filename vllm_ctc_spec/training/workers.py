"""How the processes of one run share a step: each takes its rows of the batch, and all apply the same update."""

import contextlib
import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Workers:
    """One process by default. The methods that communicate are called by all processes, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, count: int) -> range:
        """The rows of a batch of `count` that are this process's."""
        return range(self.rank, count, self.size)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over the processes."""
        return module if self.size == 1 else nn.parallel.DistributedDataParallel(module)

    def without_averaging(self, module: nn.Module) -> contextlib.AbstractContextManager:
        """For all but the last part of a step."""
        return contextlib.nullcontext() if self.size == 1 else module.no_sync()

    def total(self, values: list[float], device: torch.device) -> list[float]:
        """Sums over the processes."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The whole module's weights, on the CPU."""
        return {name: weight.detach().cpu().clone() for name, weight in module.state_dict().items()}


ALONE = Workers()
