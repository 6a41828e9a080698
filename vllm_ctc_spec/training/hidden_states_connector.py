"""vLLM's connector that writes a request's hidden states to a file, also where there is no memory to pin.

vLLM imports this module in its workers, by the name that `extract_hidden_states.compute_states` gives it. The module
can go when vLLM's own class runs on a CPU.
"""

import os
from functools import partial

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class Done:
    """Takes the place of the CUDA event behind a copy to the host."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class HiddenStatesConnector(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: PendingSave) -> None:
        """On a device vLLM's own way; on a CPU there is nothing to copy to the host."""
        if self._kv_cache is None or self._kv_cache.device.type != "cpu":
            super()._submit_async_write(pending)
        elif self._is_tp_rank_zero:
            first = torch.tensor(pending.block_ids) * self._block_size
            slots = (first[:, None] + torch.arange(self._block_size)).flatten()
            states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
            tensors = {"hidden_states": states, "token_ids": pending.token_ids}
            os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
            lock = self._lock_fds.pop(pending.req_id, None)
            future = self._executor.submit(self._write_tensors, tensors, Done(), pending.filename, lock)
            self._req_copy_events[pending.req_id], self._req_futures[pending.req_id] = Done(), future
            future.add_done_callback(partial(self._on_write_done, pending.req_id))
