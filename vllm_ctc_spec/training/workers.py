"""How the processes of one run share a step: each takes its rows of the batch, and all apply the same update."""

import contextlib
import dataclasses
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""State in a form that any number of processes can load: whole tensors, on the main process; the others get nothing."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """One process by default. The methods that communicate are called by all processes, in the same order.

    With "ddp" every process holds the whole drafter; with "fsdp" a shard of each parameter, of its gradient and of the
    optimizer's state, and the whole of one layer at a time.
    """

    rank: int = 0
    size: int = 1
    parallel: str = "ddp"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, count: int) -> range:
        """The rows of a batch of `count` that are this process's."""
        return range(self.rank, count, self.size)

    def wrap(self, module: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
        """The module whose backward averages gradients over the processes; its parameters are the same at first."""
        if self.size == 1:
            return module
        if self.parallel == "ddp":
            # The buffers are the target's tables. Nothing changes them, so they need no broadcast.
            return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
        mesh = init_device_mesh(next(module.parameters()).device.type, (self.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(module, mesh=mesh)

    def without_averaging(self, module: nn.Module) -> contextlib.AbstractContextManager:
        """Context for every accumulation part but the last: DDP skips its all-reduce. FSDP reduces every part, because
        unsharded gradients would not fit."""
        return module.no_sync() if self.size > 1 and self.parallel == "ddp" else contextlib.nullcontext()

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
        """A copy of the whole module's weights, on the main process's CPU; empty on the others."""
        return {name: weight.clone() for name, weight in get_model_state_dict(module, options=FULL_STATE).items()}


SINGLE_PROCESS = Workers()
