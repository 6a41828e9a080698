"""Mixed traffic on a server with the drafter, for an hour: nothing wrong, nothing lost, nothing left behind.

    python tests/soak.py                                     # the tiny embedded pair, chains
    python tests/soak.py --draft tree --minutes 5
    python tests/soak.py --base-url URL --reference-url URL  # servers of one target that run, with and without drafter

First a server without drafter answers a pool of requests. Then the server with the drafter gets them again and again,
in bursts, one by one and after pauses: short and long, greedy and sampled, several answers each, with stop strings,
penalties and grammars, refused ones, and clients that hang up. Checked are

    answers    every greedy one is that of the server without drafter, ties aside; none takes longer than --hang-seconds
    memory     of the server's processes, idle, does not grow after a warm-up (servers that this program started)
    blocks     when nobody asks, no request is left and no KV block is used
    counters   never fall; drafts were accepted
    log        has no error (servers that this program started)

Progress and the table go to stderr, the report as JSON to stdout, also after Ctrl-C or SIGTERM. The exit status is 1 if
anything was wrong. The seed decides pool and order; --seed repeats a run as far as a network can.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from soak_report import MAX_GROWTH_MIB, Report
from soak_requests import Answer, Ask, make_asks, problem, read_answer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # behind this folder

from pair import add_pair_arguments, choose_pair, ctc_config, ready  # noqa: E402
from pair_servers import without_drafter  # noqa: E402
from prompts import read_prompts  # noqa: E402
from server import Endpoint, RunningServer, Server, StartupError, on_cpu  # noqa: E402

URL = "/v1/completions"
POOL = 120
IN_FLIGHT = 24
SETTLE_SECONDS = 30.0  # between two looks at the idle server, shorter in a short run
IDLE_SECONDS = 20.0  # within which an idle server must have given everything back
MAX_FAULTS = 20
CONTEXT = ("--max-model-len", "1024")  # in which prompts reach the end, and which fits into the cache below
# On a CPU the cache counts as the process's memory once it was used, and used is all of it sooner or later. So small a
# one is used at once, and requests are preempted now and then.
SMALL_CACHE = ("--block-size", "128", "--num-gpu-blocks-override", "32")
USED_BLOCKS = "vllm:kv_cache_usage_perc"
UNFINISHED = ("vllm:num_requests_running", "vllm:num_requests_waiting")
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
DRAFTS = "vllm:spec_decode_num_drafts_total"
IS_COUNTER = re.compile(r"_(total|count|sum|bucket)$")
IS_ERROR = re.compile(r"\bERROR\b|^Traceback|EngineDeadError")


class Soak:
    def __init__(self, server: Endpoint, asks: list[Ask], expected: dict[int, Answer], seconds: float, report: Report):
        self.server, self.asks, self.expected, self.seconds, self.report = server, asks, expected, seconds, report
        self.rng = random.Random(report.seed + 1)
        self.deck = asks[::-1]  # all of them are asked, in the pool's order and then shuffled, before one is again
        self.running: set[asyncio.Task] = set()
        self.counters: dict[str, float] = {}
        self.errors_seen = 0

    async def run(self, hang_seconds: float, bar: tqdm) -> None:
        self.hang_seconds, self.bar = hang_seconds, bar
        self.started = time.monotonic()
        async with client(self.server, hang_seconds) as self.client:
            await self.settle()
            first = self.counters
            try:
                await self.traffic()
            finally:  # interrupted, before requests under way take the client's end for the server's fault
                for task in self.running:
                    task.cancel()
                await asyncio.gather(*self.running, return_exceptions=True)
        drafts, accepted = (self.counters.get(name, 0) - first.get(name, 0) for name in (DRAFTS, ACCEPTED))
        self.report.acceptance_length = 1 + accepted / drafts if drafts else 0.0
        if not accepted:
            self.fault("no drafted token was accepted")
        growth = self.report.growth_mib()
        if growth is not None and growth > MAX_GROWTH_MIB:
            self.fault(f"the idle server's memory grew by {growth:.0f} MiB, {MAX_GROWTH_MIB:.0f} at most")

    async def traffic(self) -> None:
        while (now := self.elapsed()) < self.seconds and len(self.report.faults) < MAX_FAULTS:
            until = min(now + min(SETTLE_SECONDS, self.seconds / 12), self.seconds)
            while self.elapsed() < until:
                await self.phase()
                self.progress()
            await self.settle()

    def body(self, ask: Ask, **more: object) -> dict:
        return {**ask.body, "model": self.server.model, **more}

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def fault(self, what: str) -> None:
        self.report.faults.append(f"{self.elapsed():.1f} s: {what}")
        self.bar.write(f"FAULT at {self.report.faults[-1]}", file=sys.stderr)

    def progress(self) -> None:
        self.report.seconds = self.elapsed()
        self.bar.update(min(self.report.seconds, self.seconds) - self.bar.n)
        mib = f"{self.report.idle_mib[-1][1]:.0f} MiB" if self.report.idle_mib else ""
        self.bar.set_postfix_str(f"{self.report.answers.total()} answers, {len(self.report.faults)} faults, {mib}")

    async def phase(self) -> None:
        """A burst, a few requests one by one, or nothing for a while."""
        kind = self.rng.choices(("burst", "trickle", "pause"), (4, 4, 1))[0]
        if kind == "pause":
            await asyncio.sleep(self.rng.uniform(0, min(3, self.seconds / 20)))
        for _ in range({"burst": self.rng.randint(4, 16), "trickle": self.rng.randint(1, 6), "pause": 0}[kind]):
            self.running.add(asyncio.create_task(self.ask(self.next_ask())))
            if kind == "trickle":
                await asyncio.sleep(self.rng.expovariate(8))
        while len(self.running) > IN_FLIGHT:
            await self.wait(asyncio.FIRST_COMPLETED)

    def next_ask(self) -> Ask:
        if not self.deck:
            self.deck = self.rng.sample(self.asks, len(self.asks))
        return self.deck.pop()

    async def wait(self, when: str) -> None:
        done, self.running = await asyncio.wait(self.running, return_when=when)
        for task in done:
            task.result()

    async def ask(self, ask: Ask) -> None:
        try:
            async with asyncio.timeout(self.hang_seconds):
                wrong = await self.outcome(ask)
        except TimeoutError:
            wrong = f"no answer within {self.hang_seconds:g} s"
        except httpx.HTTPError as error:
            wrong = repr(error)
        self.report.answers[ask.kind] += 1
        if wrong:
            self.fault(f"{ask.kind}: {wrong}; {json.dumps(ask.body)}")

    async def outcome(self, ask: Ask) -> str | None:
        if ask.kind == "hang up at once":
            give_up = httpx.Timeout(self.hang_seconds, read=0.02 * (1 + ask.patience))
            try:
                await self.client.post(URL, json=self.body(ask), timeout=give_up)
            except httpx.ReadTimeout:
                pass  # which closes the connection
            return None
        if ask.kind == "hang up in mid-stream":
            return await self.hang_up(ask)
        response = await self.client.post(URL, json=self.body(ask))
        if ask.kind == "refused":
            return None if response.status_code == 400 else f"status {response.status_code}, expected 400"
        if response.status_code != 200:
            return f"status {response.status_code}: {response.text[:300]}"
        self.report.compared += ask.is_compared
        return problem(ask, read_answer(response.json()), self.expected.get(ask.number))

    async def hang_up(self, ask: Ask) -> str | None:
        async with self.client.stream("POST", URL, json=self.body(ask, stream=True)) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            events = 0
            async for line in response.aiter_lines():
                events += line.startswith("data:")
                if events > ask.patience:
                    break
        return None

    async def settle(self) -> None:
        """Wait for all answers, then look at the idle server."""
        if self.running:
            await self.wait(asyncio.ALL_COMPLETED)
        deadline = time.monotonic() + min(IDLE_SECONDS, self.hang_seconds)
        while True:
            # The gauges are those of the last step, and of an aborted request there is no last step.
            await self.client.post(URL, json=self.body(self.asks[0], max_tokens=1))
            sums = await asyncio.to_thread(self.server.metrics)
            left = {name: sums[name] for name in (*UNFINISHED, USED_BLOCKS) if sums.get(name, 0) > 0}
            if not left or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.25)
        if left:
            self.fault(f"not given back when idle: {left}")
        for name, value in sums.items():
            if IS_COUNTER.search(name) and value < self.counters.get(name, 0):
                self.fault(f"{name} fell from {self.counters[name]} to {value}")
        self.counters = sums
        if processes := self.server.processes():
            self.report.idle_mib.append((self.elapsed(), sum(map(memory, processes)) / 2**20))
        self.read_log()

    def read_log(self) -> None:
        if not hasattr(self.server, "log_path"):
            return
        errors = [
            line for line in self.server.log_path.read_text(errors="replace").splitlines() if IS_ERROR.search(line)
        ]
        for line in errors[self.errors_seen : self.errors_seen + 3]:
            self.fault(f"in the log: {line}")
        self.errors_seen = len(errors)


def memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def client(server: Endpoint, seconds: float) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
    return httpx.AsyncClient(base_url=server.base_url, timeout=seconds, limits=limits, trust_env=False)


async def answer_all(server: Endpoint, asks: list[Ask], seconds: float) -> dict[int, Answer]:
    """Answers of the server without drafter to what is compared, with what ties are told by."""
    told = {"logprobs": 5, "return_tokens_as_token_ids": True}
    answers = {}
    async with client(server, seconds) as asking:
        for ask in tqdm(asks, "reference", file=sys.stderr, disable=None):
            response = await asking.post(URL, json={**ask.body, **told, "model": server.model})
            response.raise_for_status()
            answers[ask.number] = read_answer(response.json())
    return answers


def soak(args: argparse.Namespace, report: Report, folder: Path) -> None:
    console = Console(stderr=True)
    with ExitStack() as stack:
        if args.reference_url:
            reference: Endpoint = RunningServer(args.reference_url)
        else:
            # Ties are told by the scores that tokens are chosen by, penalties and grammars included.
            extra = (*CONTEXT, "--logprobs-mode", "processed_logprobs")
            log_path = folder / "reference.log"
            starting = without_drafter(
                args.target, extra_args=extra, log_path=log_path, label="without drafter", console=console
            )
            reference = stack.enter_context(starting)
        asks = make_asks(POOL, args.seed, read_prompts(args.pair.prompts), reference.max_model_len())
        expected = asyncio.run(answer_all(reference, [ask for ask in asks if ask.is_compared], args.hang_seconds))
    with ExitStack() as stack:
        if args.base_url:
            server: Endpoint = RunningServer(args.base_url)
        else:
            config = {**ctc_config(args.drafter), "ctc_draft": args.draft}
            label = f"with drafter, {args.draft}"
            log_path = folder / "server.log"
            starting = Server(
                args.target,
                config,
                extra_args=(*CONTEXT, *(SMALL_CACHE if on_cpu() else ())),
                log_path=log_path,
                label=label,
                console=console,
            )
            server = stack.enter_context(starting)
        with tqdm(total=round(60 * args.minutes), unit="s", file=sys.stderr, disable=None) as bar:
            asyncio.run(Soak(server, asks, expected, 60 * args.minutes, report).run(args.hang_seconds, bar))


def end_on_signals() -> None:
    """SIGTERM as Ctrl-C, which asyncio takes where nothing is cut in two. Jobs in the background ignore the latter."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--draft", choices=("chain", "tree"), default="chain")
    add_pair_arguments(parser)
    parser.add_argument("--base-url", help="a running server with a drafter; needs --reference-url")
    parser.add_argument("--reference-url", help="a running server of the same target without drafter")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--hang-seconds", type=float, default=120, help="a request that takes longer hangs")
    args = choose_pair(parser.parse_args())
    if (args.base_url is None) != (args.reference_url is None):
        parser.error("--base-url and --reference-url belong together: answers are compared")
    if args.base_url is None:
        ready(args.pair)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(10**6)
    print(f"seed {args.seed}", file=sys.stderr)
    end_on_signals()
    report = Report(args.seed, args.base_url or args.draft)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            soak(args, report, Path(folder))
        except (StartupError, OSError, httpx.HTTPError) as error:
            report.faults.append(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            report.faults.append("interrupted")
    Console(stderr=True).print(report.table())
    print(json.dumps(report.to_dict()))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
