"""Ray for the length of one command: a running cluster's, or one that is started on this machine and stopped again."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from types import ModuleType

from vllm_ctc_spec.errors import TrainingError

OBJECT_STORE_BYTES = 200 * 2**20  # of a local Ray: prompts, responses and token ids are small
CONNECT_SECONDS = 10


@contextlib.contextmanager
def ray_cluster(address: str | None, num_cpus: int | None = None) -> Iterator[ModuleType]:
    """address: None starts Ray here, with `num_cpus` places for processes without a GPU (default: one per core)."""
    options: dict = {"address": address}
    if address is not None:
        _check_address(address)
    else:
        # Keeps Ray on the loopback interface, as Ray itself does on a Mac; read when Ray is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        import ray
    except ImportError as error:
        raise TrainingError(f"Ray cannot be imported ({error}): pip install 'ray[data,train]'.") from error
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level="ERROR", log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        where = f"No Ray cluster answers at --ray-address {address}" if address else "Ray cannot start on this machine"
        raise TrainingError(f"{where} ({reason}).") from error
    signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process, not the processes that it has started
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address that does not answer at once: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise TrainingError(f"--ray-address must be HOST:PORT of a cluster's head node, or auto, not {address!r}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise TrainingError(f"No Ray cluster answers at --ray-address {address} ({error}).") from error
