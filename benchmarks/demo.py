"""Serve an embedded target with and without its CTC drafter, ask both the same questions, and compare.

    python benchmarks/demo.py                # what `make demo` runs: the chat pair, or the tiny one where it cannot
    python benchmarks/demo.py --pair tiny    # what `make demo PAIR=tiny` runs
    python benchmarks/demo.py --serve        # what `make serve` runs: the server with the drafter, until Ctrl-C

Exits with a status other than 0 if a server fails or if the drafter changes a single token.
"""

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass

from client import (
    SETTLE_SECONDS,
    Answer,
    Drafting,
    ask,
    ask_streaming,
    drafting_since,
    first_difference,
    logit_gap,
    read_questions,
)
from pair import CHAT, RESULTS, TINY, Pair, add_pair_arguments, choose_pair, is_model, obstacle, read_pair, ready
from pair_servers import with_drafter, without_drafter
from rich.console import Console
from rich.table import Table
from server import Server, StartupError, stop_on_sigterm

QUESTIONS = 4
MAX_TOKENS = 128
# float32 cannot tell two logits this close apart. The order of a sum may swap them, and one target forward over several
# tokens does not add in the order of several forwards over one.
TIE = 1e-4

console = Console()


@dataclass
class Run:
    answers: list[Answer]
    drafting: Drafting

    @property
    def tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(answer.seconds for answer in self.answers)


def print_piece(text: str) -> None:
    print(text, end="", flush=True)


def ask_all(server: Server, questions: list[str]) -> Run:
    """Ask every question, one after the other, and print the answers as they come."""
    client = server.client()
    ask(client, server.model, questions[0], MAX_TOKENS)  # the first request pays for lazy initialisation
    time.sleep(SETTLE_SECONDS)
    before = server.metrics()
    answers = []
    for question in questions:
        console.print(f"\n[bold]Q[/bold] {question}", highlight=False)
        console.print("[bold]A[/bold] ", end="")
        answers.append(ask_streaming(client, server.model, question, MAX_TOKENS, print_piece))
        console.print()
    console.print()
    time.sleep(SETTLE_SECONDS)
    return Run(answers, drafting_since(server, before))


def differences(server: Server, plain: Run, drafted: Run) -> list[tuple[int, int, float]]:
    """Question, position and logit gap of every first difference; `server` is the one without drafter."""
    found = []
    for number, (left, right) in enumerate(zip(plain.answers, drafted.answers, strict=True), start=1):
        position = first_difference(left.token_ids, right.token_ids)
        if position is None:
            continue
        gap = math.inf  # where one answer is the beginning of the other, no two tokens can tie
        if position < min(len(left.token_ids), len(right.token_ids)):
            context = left.prompt_token_ids + left.token_ids[:position]
            tokens = left.token_ids[position], right.token_ids[position]
            gap = logit_gap(server.client(), server.model, context, *tokens)
        found.append((number, position, gap))
    return found


def report(plain: Run, drafted: Run, found: list[tuple[int, int, float]]) -> bool:
    """Print the table and the verdict; returns whether the drafter left the output alone."""
    table = Table(title=f"{len(plain.answers)} questions, greedy, one at a time")
    for column in ("", "tokens", "tokens/s", "acceptance length"):
        table.add_column(column, justify="right" if column else "left")
    for name, run in (("without drafter", plain), ("with CTC drafter", drafted)):
        length = run.drafting.acceptance_length
        table.add_row(name, f"{run.tokens}", f"{run.tokens_per_second:.0f}", f"{length:.2f}" if length else "-")
    console.print(table)
    console.print(f"speed: {drafted.tokens_per_second / plain.tokens_per_second:.2f} x", highlight=False)
    console.print(f"tokens identical under greedy: {'no' if found else 'yes'}", highlight=False)
    for number, position, gap in found:
        verdict = "a tie that rounding decides" if gap <= TIE else "not a tie: the drafter changed the output"
        console.print(
            f"  question {number} differs from token {position} on, where the target's logits of the two tokens "
            f"are {gap:.1e} apart: {verdict}",
            highlight=False,
        )
    if not drafted.drafting.drafts:
        console.print("error: the server with the drafter made no drafts", style="red")
    return drafted.drafting.drafts > 0 and all(gap <= TIE for *_, gap in found)


def served_pair(args: argparse.Namespace) -> Pair:
    """The pair that was asked for. A target or a drafter alone is completed from the tiny pair."""
    if args.pair is None:
        args.pair = default_pair() if args.target is None and args.drafter is None else TINY
    return ready(choose_pair(args).pair)


def default_pair() -> str:
    """The chat pair, or the tiny one if the chat pair has no drafter or its target cannot be fetched."""
    chat = read_pair(CHAT)
    if not is_model(chat.drafter):
        return TINY
    if (why := obstacle(chat)) is None:
        return CHAT
    console.print(f"The tiny pair takes the place of the chat pair: {why}", markup=False, highlight=False)
    return TINY


def demo(pair: Pair) -> bool:
    questions = read_questions(pair.prompts, QUESTIONS)
    if pair.note:
        console.print(f"{pair.note}\n", markup=False, highlight=False)
    log, label = RESULTS / "demo-ctc.log", "server with CTC drafter"
    with with_drafter(pair.target, pair.drafter, log_path=log, label=label) as server:
        drafted = ask_all(server, questions)
    with without_drafter(pair.target, log_path=RESULTS / "demo-none.log", label="server without drafter") as server:
        plain = ask_all(server, questions)
        found = differences(server, plain, drafted)
    return report(plain, drafted, found)


def serve(pair: Pair) -> bool:
    """Run the server with the drafter until Ctrl-C; returns whether it was running until then."""
    log = RESULTS / "serve.log"
    with with_drafter(pair.target, pair.drafter, log_path=log, label="server with CTC drafter") as server:
        messages = [{"role": "user", "content": read_questions(pair.prompts, 1)[0]}]
        body = json.dumps({"model": server.model, "messages": messages, "temperature": 0})
        console.print(f"\nserving {server.base_url} (log: {log}); try:\n", highlight=False, soft_wrap=True)
        url = f"{server.base_url}/v1/chat/completions"
        print(f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}\n")
        console.print("Ctrl-C stops it.")
        try:
            server.process.wait()
        except KeyboardInterrupt:
            console.print("stopping")
            return True
        console.print(f"error: the server ended by itself; see {log}", style="red")
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="only serve, with the drafter, until Ctrl-C")
    add_pair_arguments(parser, default=None)
    args = parser.parse_args()
    stop_on_sigterm()
    try:
        passed = (serve if args.serve else demo)(served_pair(args))
    except StartupError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
