"""Edge clients (`vllm-ctc edge`) against plain streaming, from servers with and without a drafter of their own.

    python benchmarks/edge.py                                  # the tiny embedded pair
    python benchmarks/edge.py --agreement 0.8 --device-ms 20   # another small model on another device

Servers by their `ctc_sources`: `ctc+client` drafts by itself and takes the devices' drafts, `client` does the latter
only.

Devices are simulated: they know the server's own answer, draft each token of it rightly with probability `agreement`
(behind a wrong token all are wrong), and take `device-ms` a token, on no core of this machine. A relay adds the round
trip. So the figures say how good a small model must be, not how good one is. Ways to get an answer:

    stream        one streamed request, no drafts of the device
    drafts        rounds: a request for K + 1 tokens carries K drafts (`ctc_draft`)
    prompts       rounds: one request of 1 + K prompts verifies K drafts in one step
    whole draft   one streamed request that carries the device's draft of the whole answer

Every answer is compared with the server's own. Speeds are medians of repeats; cells that a figure compares take turns,
on servers that all run from the beginning, because machines are not always equally fast. Writes OUTPUT.json, OUTPUT.md
and OUTPUT.png.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import psutil
from delay import delay
from pair import RESULTS, add_pair_arguments, choose_pair, ctc_config, ready
from prompts import read_prompts
from record import describe_run, machine_line, write_record
from server import HOST, Endpoint, on_cpu, stop_on_sigterm
from server import Server as Process
from step_time import BUSY_SECONDS

from vllm_ctc_spec.edge.loop import Client
from vllm_ctc_spec.edge.protocol import Drafted, Policy, Text
from vllm_ctc_spec.edge.server import DraftRounds, PromptRounds, Server

STREAM, DRAFTS, PROMPTS, WHOLE = "stream", "drafts", "prompts", "whole draft"
WAYS = (STREAM, DRAFTS, PROMPTS, WHOLE)
STEPS = "vllm:iteration_tokens_total_count"
SETTLE_SECONDS = 0.2  # the API server counts a step a moment after its tokens
LEAST_ANSWERS = 8  # of all clients together
# Whole blocks are cached. This is the shortest that vLLM has on a CPU; on a GPU it is 16 by default.
CPU_BLOCK_SIZE = 32


class SimulatedDevice:
    def __init__(self, prompt: Sequence[int], answer: Sequence[int], agreement: float, seconds: float, seed: int):
        self.prompt, self.answer, self.seconds = list(prompt), list(answer), seconds
        rng = random.Random(seed)
        self.right = [rng.random() < agreement for _ in self.answer]

    def draft(self, tokens: Sequence[int]) -> Drafted | None:
        said = list(tokens[len(self.prompt) :])
        position = len(said)
        if position == len(self.answer):
            return None
        time.sleep(self.seconds)
        right = self.right[position] and said == self.answer[:position]
        return Drafted(self.answer[position] if right else self.answer[position] ^ 1, 1.0)


@dataclass(frozen=True)
class Cell:
    sources: str  # of the server
    way: str
    agreement: float | None  # None: no drafts
    clients: int
    round_trip_ms: float


@dataclass
class Measurement:
    """One repeat, or the sum of several, of which `seconds` has one figure each."""

    cell: Cell
    seconds: list[float]
    tokens: int
    steps: int  # of the engine
    rounds: int
    drafted: int
    accepted: int
    same: int  # answers that are the server's own
    answers: int

    @classmethod
    def of_repeats(cls, parts: Sequence["Measurement"]) -> "Measurement":
        seconds = [second for part in parts for second in part.seconds]
        names = ("tokens", "steps", "rounds", "drafted", "accepted", "same", "answers")
        return cls(parts[0].cell, seconds, *(sum(getattr(part, name) for part in parts) for name in names))

    @property
    def tokens_per_second(self) -> float:
        """All repeats have the same texts."""
        return self.tokens / len(self.seconds) / statistics.median(self.seconds)

    def row(self, stream: "Measurement | None") -> list[str]:
        """stream: what the speed is compared with."""
        cell = self.cell
        agreement = "" if cell.agreement is None else f"{cell.agreement:g}"
        accepted = f"{self.accepted / self.drafted:.2f}" if self.drafted else ""
        ratio = f"{self.tokens_per_second / stream.tokens_per_second:.2f}" if stream else ""
        return [
            cell.sources, f"{cell.round_trip_ms:g}", str(cell.clients), cell.way, agreement,
            f"{self.tokens_per_second:.0f}", ratio, f"{self.steps / self.tokens:.3f}",
            f"{self.tokens / self.rounds:.1f}", accepted, f"{self.same}/{self.answers}",
        ]  # fmt: skip


HEADER = (
    "server", "round trip, ms", "clients", "way", "agreement", "tokens/s", "of the stream's", "server steps a token",
    "tokens a round", "of drafts accepted", "same answer",
)  # fmt: skip


def stream_of(rows: Sequence[Measurement], cell: Cell) -> Measurement | None:
    """The plain stream to as many clients over the same way from the first server, which drafts by itself."""
    found = [
        row for row in rows
        if row.cell.way == STREAM and row.cell.sources == rows[0].cell.sources
        and (row.cell.clients, row.cell.round_trip_ms) == (cell.clients, cell.round_trip_ms)
    ]  # fmt: skip
    return found[0] if found else None


def policy_of(way: str, draft_tokens: int, max_tokens: int) -> Policy:
    drafts = {STREAM: 0, WHOLE: max_tokens}.get(way, draft_tokens)
    return Policy(drafts, 0.0, max_tokens if way in (STREAM, WHOLE) else draft_tokens + 1)


class Fleet:
    """Clients at once, each with its share of the questions, every one of them a connection of its own."""

    def __init__(self, cell: Cell, args: argparse.Namespace, asked: list[tuple[list[int], list[int]]], port: int):
        self.cell, self.args, self.asked = cell, args, asked
        self.url = f"http://{HOST}:{port}"
        self.texts: list[Text] = []
        self.errors: list[BaseException] = []

    def run(self) -> float:
        """Seconds until the last client has its last answer."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(self.cell.clients)]
        self.servers = [Server(self.url, timeout=self.args.timeout) for _ in threads]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        for server in self.servers:
            server.close()
        if self.errors:
            raise self.errors[0]
        return seconds

    def _client(self, number: int) -> None:
        turns = max(self.args.answers, -(-LEAST_ANSWERS // self.cell.clients))
        try:
            for turn in range(turns):
                self._answer(number, self.asked[(number * turns + turn) % len(self.asked)], turn)
        except BaseException as error:  # noqa: BLE001 - raised again in `run`
            self.errors.append(error)

    def _answer(self, number: int, question: tuple[list[int], list[int]], turn: int) -> None:
        prompt, answer = question
        cell, args = self.cell, self.args
        # A salt of its own for each text: no other text's blocks may help it.
        sampling = {"temperature": 0.0, "cache_salt": uuid.uuid4().hex}
        rounds = (PromptRounds if cell.way == PROMPTS else DraftRounds)(self.servers[number], sampling)
        device = SimulatedDevice(prompt, answer, cell.agreement or 0, args.device_ms / 1e3, number * 1000 + turn)
        client = Client(device, rounds, policy_of(cell.way, args.draft_tokens, args.max_tokens))
        self.texts.append(client.complete(Text(prompt, args.max_tokens)))


def own_answers(server: Endpoint, args: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers, in tokens."""
    edge = Server(server.base_url, timeout=args.timeout)
    asked = []
    for question in read_prompts(args.pair.prompts)[: args.num_prompts]:
        prompt = edge.tokenize(messages=[{"role": "user", "content": question}])
        body = {"prompt": prompt, "max_tokens": args.max_tokens, "temperature": 0.0, "return_token_ids": True}
        asked.append((prompt, edge.complete(body)["choices"][0]["token_ids"]))
    return asked


def measure(server: Process, cell: Cell, args: argparse.Namespace, asked: list) -> Measurement:
    before = server.metrics()
    with delay(server.port, cell.round_trip_ms / 1e3) as port:
        fleet = Fleet(cell, args, asked, port)
        seconds = fleet.run()
    time.sleep(SETTLE_SECONDS)
    steps = server.metrics()[STEPS] - before[STEPS]
    expected = {tuple(prompt): answer for prompt, answer in asked}
    same = sum(text.verified == expected[tuple(text.prompt)] for text in fleet.texts)
    counts = [text.counts for text in fleet.texts]
    return Measurement(
        cell, [seconds], sum(len(text.verified) for text in fleet.texts), int(steps), sum(c.rounds for c in counts),
        sum(c.drafted for c in counts), sum(c.accepted for c in counts), same, len(fleet.texts),
    )  # fmt: skip


def cells(args: argparse.Namespace) -> list[Cell]:
    """Those that are compared with each other stand together."""
    return [
        Cell(sources, way, agreement, clients, round_trip)
        for round_trip in args.round_trip_ms
        for clients in args.clients
        for sources in args.sources
        for way in args.ways
        for agreement in ([None] if way == STREAM else args.agreement)
    ]


def measure_all(servers: dict[str, Process], args: argparse.Namespace) -> list[Measurement]:
    asked = own_answers(servers[args.sources[0]], args)
    rows: list[Measurement] = []
    for _, group in groupby(cells(args), lambda cell: (cell.round_trip_ms, cell.clients)):
        compared = list(group)
        parts: dict[Cell, list[Measurement]] = {cell: [] for cell in compared}
        for _ in range(args.repeats):
            for cell in compared:
                parts[cell].append(measure(servers[cell.sources], cell, args, asked))
        rows += [Measurement.of_repeats(parts[cell]) for cell in compared]
        for row in rows[-len(compared) :]:
            print(" ".join(row.row(stream_of(rows, row.cell))), flush=True)
    return rows


def speculative_config(args: argparse.Namespace, sources: str) -> dict:
    """A drafter is named only where it drafts."""
    config = ctc_config(args.drafter) if "ctc" in sources.split("+") else {"method": "ctc"}
    return config | {"ctc_sources": sources, "num_speculative_tokens": args.nodes} | json.loads(args.speculative_config)


def table(run: dict, rows: list[Measurement]) -> str:
    lines = [f"`{run['command']}`, {machine_line(run)}", "", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    lines += [f"| {' | '.join(row.row(stream_of(rows, row.cell)))} |" for row in rows]
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument(
        "--sources", nargs="+", default=["ctc+client", "client"],
        help="a server for each of them; speeds are compared with the first one's stream",
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, default=16, help="of a tree, at most (default: 16)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--round-trip-ms", type=float, nargs="+", default=[0, 20, 100])
    parser.add_argument("--agreement", type=float, nargs="+", default=[0.7, 0.9])
    parser.add_argument("--device-ms", type=float, default=10, help="of a device for a token (default: 10)")
    parser.add_argument("--draft-tokens", type=int, default=8, help="K (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--num-prompts", type=int, default=16, help="of the file (default: 16)")
    parser.add_argument(
        "--answers", type=int, default=2, help=f"of each client, and {LEAST_ANSWERS} at least of all (default: 2)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="speeds are their medians (default: 3)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds (default: 60)")
    parser.add_argument("--speculative-config", default="{}", metavar="JSON", help="more options")
    parser.add_argument("--output", type=Path, default=RESULTS / "edge", help="path without suffix")
    return choose_pair(parser.parse_args(argv))


def main(argv: list[str]) -> int:
    args = parse(argv)
    stop_on_sigterm()
    ready(args.pair)
    # Every prefix of a draft is a request of its own in `prompts`.
    most = max(args.clients) * (1 + args.draft_tokens)
    busy = psutil.cpu_percent(BUSY_SECONDS)
    run = describe_run(
        "benchmarks/edge.py", argv, machine_busy_percent_before=busy, pair=args.pair.name
    )  # fmt: skip
    extra = ["--max-num-seqs", str(most), *(["--block-size", str(CPU_BLOCK_SIZE)] if on_cpu() else [])]
    with ExitStack() as running:
        servers = {}
        for sources in args.sources:
            log_path = args.output.with_name(f"{args.output.name}-{sources}.log")
            config = speculative_config(args, sources)
            servers[sources] = running.enter_context(Process(args.target, config, extra_args=extra, log_path=log_path))
        rows = measure_all(servers, args)
    write_record(args.output, {"run": run, "measurements": [asdict(row) for row in rows]}, table(run, rows))
    import plots

    plots.edge(args.output.with_suffix(".png"), rows, f"{args.pair.name}, {run['gpu'] or run['cpu']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
