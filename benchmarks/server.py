"""A real `vllm serve` as a context manager: started, waited for, measured, and always stopped.

    with Server("assets/target", speculative_config={"method": "ctc", "model": "assets/drafter"}) as server:
        client = server.client()

A CPU build of vLLM gets the flags that such a machine needs; on a GPU vLLM's own defaults hold.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psutil
from openai import DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from vllm_ctc_spec.serving.cpu.threads import VARIABLE, threads_of

HOST = "127.0.0.1"
# Float32: without AMX, bfloat16 is several times slower as soon as a step verifies more than one token.
# Eager: compiling costs more start-up time than a benchmark of a small model gets back.
CPU_ARGS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4")
# The cache size is in GiB; unset, vLLM asks for nearly all memory.
CACHE_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}
ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

LINES_SHOWN_ON_FAILURE = 30
PORT_TAKEN = "Address already in use"
PROGRESS_LINE_SECONDS = 15  # where there is no terminal to animate
# A proxy from the environment must never stand between a benchmark and its own machine.
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class StartupError(RuntimeError):
    """A server did not become healthy (with the last lines of its log), or none answers where one should run."""


def on_cpu() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def cpu_env(target: Path) -> dict[str, str]:
    return {**CACHE_ENV, **threads_of(target)}


def threads_record(target: Path) -> str | None:
    """The thread binding of this target's servers, for a record."""
    return {**cpu_env(target), **os.environ}.get(VARIABLE, "vLLM's choice") if on_cpu() else None


def stop_on_sigterm() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that servers are stopped before this process ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Endpoint:
    """A server that answers: its model and its counters."""

    def __init__(self, base_url: str, model: str):
        self.base_url = base_url
        self.model = model  # the name that requests use

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.base_url}/v1", api_key="unused", http_client=DefaultHttpxClient(trust_env=False))

    def metrics(self) -> dict[str, float]:
        """`/metrics` by sample name, summed over labels, e.g. `vllm:spec_decode_num_drafts_total`; samples with a label
        `position` also by position, e.g. `vllm:spec_decode_num_accepted_tokens_per_pos_total[0]`."""
        sums: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(get(f"{self.base_url}/metrics")):
            for sample in family.samples:
                sums[sample.name] += sample.value
                if "position" in sample.labels:
                    sums[f"{sample.name}[{sample.labels['position']}]"] += sample.value
        return dict(sums)

    def max_model_len(self) -> int:
        return self._card()["max_model_len"]

    def version(self) -> str:
        return json.loads(get(f"{self.base_url}/version"))["version"]

    def processes(self) -> list[psutil.Process]:
        """Every living process of the server, as far as we know them."""
        return []

    def _card(self) -> dict:
        return json.loads(get(f"{self.base_url}/v1/models"))["data"][0]


class RunningServer(Endpoint):
    """A server that somebody else started and stops."""

    def __init__(self, base_url: str):
        super().__init__(base_url.rstrip("/").removesuffix("/v1"), model="")
        try:
            self.model = self._card()["id"]
        except (OSError, ValueError, LookupError) as error:
            raise StartupError(f"no vLLM server answers at {self.base_url} ({error}).") from error


class Server(Endpoint):
    """`vllm serve TARGET` on a free port of this machine, in its own session."""

    def __init__(
        self,
        target: str | Path,
        speculative_config: Mapping | None = None,
        env: Mapping[str, str] | None = None,
        extra_args: Sequence[str] = (),
        *,
        log_path: str | Path,
        label: str = "vllm serve",
        startup_seconds: float = 900,
        grace_seconds: float = 20,
        console: Console | None = None,
    ):
        self.target = Path(target)
        self.port = free_port()
        super().__init__(f"http://{HOST}:{self.port}", self.target.name)
        self.log_path = Path(log_path)
        self.label = label
        self.startup_seconds = startup_seconds
        self.grace_seconds = grace_seconds
        self.console = console or Console()
        # The console script, not `python -m`: that would put the working directory on sys.path in every process.
        self.command = [str(Path(sys.executable).parent / "vllm"), "serve", str(self.target)]
        self.command += ["--host", HOST, "--port", str(self.port), "--served-model-name", self.model]
        self.command += [*(CPU_ARGS if on_cpu() else ()), *extra_args]
        if speculative_config is not None:
            self.command += ["--speculative-config", json.dumps(dict(speculative_config))]
        # The caller's shell wins over our defaults, and `env` over both.
        self.env = {**ENV, **(cpu_env(self.target) if on_cpu() else {}), **os.environ, **(env or {})}
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log_path.open("wb") as log:
                self.process = subprocess.Popen(
                    self.command,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # one group to signal, and Ctrl-C in the terminal reaches only us
                )
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def processes(self) -> list[psutil.Process]:
        """Every living process of the server: API server, engine core, workers."""
        return [p for p in psutil.process_iter() if self.process and in_group(p, self.process.pid)]

    def stop(self) -> None:
        """SIGTERM to the whole group, SIGKILL to the rest after the grace period; returns when all are gone."""
        if self.process is None:
            return
        try:
            self._signal(signal.SIGTERM)
            self._wait_until_gone(self.grace_seconds)
        finally:  # also when a second Ctrl-C interrupts the grace period
            self._signal(signal.SIGKILL)
            self._wait_until_gone(self.grace_seconds)
            self.process = None

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass  # the group is empty: all have ended

    def _wait_until_gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None and not self.processes():
                return
            time.sleep(0.1)

    def _wait_until_healthy(self) -> None:
        started = time.monotonic()
        announced = 0.0
        with self.console.status(f"{self.label}: starting") as status:
            while not self._healthy():
                elapsed = time.monotonic() - started
                if self.process.poll() is not None:
                    if PORT_TAKEN in "\n".join(self.last_lines(LINES_SHOWN_ON_FAILURE)):
                        raise StartupError(f"{self.label}: another program has taken port {self.port}; start it again.")
                    raise StartupError(self._failure(f"ended with status {self.process.returncode}"))
                if elapsed > self.startup_seconds:
                    raise StartupError(self._failure(f"was not healthy after {elapsed:.0f} s"))
                last = (self.last_lines(1) or [""])[-1]
                line = f"{self.label}: starting, {elapsed:.0f} s  {last}"
                if self.console.is_terminal:
                    # One row: a wrapped status cannot be redrawn in place. Brackets would be read as markup.
                    status.update(line[: self.console.width - 4].replace("[", r"\["))
                elif elapsed - announced >= PROGRESS_LINE_SECONDS:
                    announced = elapsed
                    self.console.print(line, markup=False, highlight=False, soft_wrap=True)
                time.sleep(0.25)
        self.console.print(f"{self.label}: ready after {time.monotonic() - started:.0f} s", highlight=False)

    def _healthy(self) -> bool:
        try:
            with LOCAL.open(f"{self.base_url}/health", timeout=5) as response:
                return response.status == 200 and self._listens()
        except (urllib.error.URLError, ConnectionError, TimeoutError, psutil.NoSuchProcess):
            return False

    def _listens(self) -> bool:
        """Whether the port is our server's: a program that took it since it was found free would answer as well."""
        connections = [c for process in self.processes() for c in process.net_connections("tcp")]
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in connections)

    def last_lines(self, count: int) -> list[str]:
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-count:]

    def _failure(self, what: str) -> str:
        tail = "\n".join(self.last_lines(LINES_SHOWN_ON_FAILURE))
        return f"{self.label} {what}; {self.log_path} ends with:\n{tail}"


def get(url: str) -> str:
    with LOCAL.open(url, timeout=10) as response:
        return response.read().decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def in_group(process: psutil.Process, group: int) -> bool:
    """A zombie does not count: it holds nothing, and where no init reaps orphans it stays for ever."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
