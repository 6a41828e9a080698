"""What rules of acceptance cost in quality, beside what they bring in speed: one table, one plot, exact at the origin.

    python benchmarks/quality.py --data gsm8k_test.jsonl                      # the tiny pair; exact, and FLy's settings
    python benchmarks/quality.py --data gsm8k_test.jsonl --pair chat --num-prompts 1000 --windows 4 --thresholds 0.3
    python benchmarks/quality.py --data gsm8k_test.jsonl --windows --pivots PIVOTS --pivot-thresholds 0.2 0.5
    python benchmarks/quality.py --data gsm8k_test.jsonl --rule 'mine={"rejection_sample_method": "fly", ...}'

DATA has rows {"question": ..., "answer": ...} whose answers end in a number (`#### 42`). Every rule gets a server of
its own and answers the same questions greedily. Measured of each:

    right           answers with the right number; with a sign test of the questions that differ from the exact rule's
    nats a token    the target's own negative log-likelihood of what was written, by a forward of its own
    changed tokens  share of the written tokens that the target would not have written there (its arg-max is another)
    tokens a step   1 + accepted / drafts, by the server's counters
    tokens a second without --no-speed, on a machine that does nothing else

A killed run continues when it is started again; a finished one takes further rules. Writes OUTPUT.json, OUTPUT.md,
OUTPUT.png, and all answers in OUTPUT-raw/.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from client import SETTLE_SECONDS, drafting_since
from methods import named_config
from pair import RESULTS, add_pair_arguments, choose_pair, ctc_config, ready
from record import describe_run, machine_line, write_record
from serve import BUSY_PERCENT, IDLE_SECONDS, SERVE_ARGS, positive, slug
from server import Endpoint, Server, StartupError, on_cpu, stop_on_sigterm, threads_record
from sign_test import sign_test
from tqdm import tqdm

from vllm_ctc_spec.errors import UserError
from vllm_ctc_spec.training.files import differing_settings, record_settings, write_atomically
from vllm_ctc_spec.training.grading import MARK, final_number
from vllm_ctc_spec.training.rows import read_rows
from vllm_ctc_spec.training.target import Target

EXACT = "exact"
QUESTIONS_AT_ONCE = 25  # of a line in the raw file: what a killed run may lose


@dataclass
class Written:
    """Some of a rule's answers, in the order of the questions, and what the server counted for them."""

    texts: list[str]
    prompts: list[list[int]]
    tokens: list[list[int]]
    seconds: float
    drafts: int
    accepted_tokens: int
    fingerprint: str | None  # the responses' system_fingerprint


@dataclass
class Quality:
    """A rule's row. Per question: whether it is right, and of its tokens their number, nats, and those changed."""

    rule: str
    config: dict[str, Any]  # what was added to --speculative-config
    right: list[bool]
    tokens: list[int]
    nats: list[float]
    changed: list[int]
    tokens_per_step: float | None
    tokens_per_second: float | None
    fingerprint: str | None
    lost: int = field(default=0)  # questions that the exact rule answers and this one does not
    gained: int = field(default=0)
    p: float = field(default=1.0)

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def nats_per_token(self) -> float:
        return sum(self.nats) / sum(self.tokens)

    @property
    def changed_share(self) -> float:
        return sum(self.changed) / sum(self.tokens)


@dataclass(frozen=True)
class Task:
    questions: list[str]
    answers: list[str]


def read_task(path: Path, limit: int) -> Task:
    """Questions with a number as their answer."""
    rows = [row.fields for row in read_rows(path, ("question",))][:limit]
    for number, row in enumerate(rows, 1):
        answer = row.get("answer")
        if not isinstance(row.get("question"), str) or not isinstance(answer, str) or final_number(answer) is None:
            raise SystemExit(f"error: row {number} of {path} needs a question, and an answer with a number, {MARK} 42.")
    if not rows:
        raise SystemExit(f"error: {path} is empty.")
    return Task([row["question"] for row in rows], [row["answer"] for row in rows])


class Raw:
    """The answers of one rule on disk, a line for some questions each."""

    def __init__(self, folder: Path, rule: str, config: dict[str, Any]):
        self.path, self.config = folder / f"{slug(rule)}.jsonl", config
        self.parts: list[Written] = []
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if found.pop("config") != config:
                raise SystemExit(f"error: {self.path} has answers of other options than {json.dumps(config)}.")
            self.parts.append(Written(**found))

    def append(self, part: Written) -> None:
        self.parts.append(part)
        lines = [json.dumps({"config": self.config, **asdict(part)}) + "\n" for part in self.parts]
        write_atomically(self.path, "".join(lines))

    def __len__(self) -> int:
        return sum(len(part.texts) for part in self.parts)


def answer_questions(server: Endpoint, questions: Sequence[str], max_tokens: int, concurrency: int) -> Written:
    client = server.client()

    def ask(question: str):
        return client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=max_tokens,
            extra_body={"return_token_ids": True},
        )  # fmt: skip

    before, started = server.metrics(), time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        responses = list(pool.map(ask, questions))
    seconds = time.perf_counter() - started
    time.sleep(SETTLE_SECONDS)
    counted = drafting_since(server, before)
    return Written(
        [response.choices[0].message.content or "" for response in responses],
        [response.model_extra["prompt_token_ids"] for response in responses],
        [response.choices[0].model_extra["token_ids"] for response in responses],
        seconds, counted.drafts, counted.accepted_tokens, responses[0].system_fingerprint,
    )  # fmt: skip


def answer_all(args: argparse.Namespace, task: Task, rule: str, raw: Raw) -> None:
    """Ask what is still missing, a few questions a line."""
    missing = range(len(raw), len(task.questions), QUESTIONS_AT_ONCE)
    if not missing:
        return
    config = {**ctc_config(args.drafter), **args.speculative, **raw.config}
    extra = (*SERVE_ARGS, *(("--max-num-seqs", str(max(args.concurrency, 4))) if on_cpu() else ()))
    log = raw.path.with_suffix(".log")
    with Server(args.target, config, extra_args=extra, log_path=log, label=rule) as server:
        if not args.no_speed:  # the first requests pay for lazy initialisation
            answer_questions(server, task.questions[:1], args.max_tokens, 1)
        for start in tqdm(missing, desc=rule, unit=f"{QUESTIONS_AT_ONCE} questions"):
            asked = task.questions[start : start + QUESTIONS_AT_ONCE]
            raw.append(answer_questions(server, asked, args.max_tokens, args.concurrency))


class Judge:
    """The target, reading what was written: nats and changed tokens of an answer. The same answer is read once."""

    def __init__(self, target: Path):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.target = Target.load(str(target), device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._read: dict[tuple[int, ...], tuple[float, int]] = {}

    @torch.no_grad()
    def __call__(self, prompt: list[int], answer: list[int]) -> tuple[float, int]:
        key = (*prompt, -1, *answer)
        if key not in self._read:
            ids = torch.tensor([prompt + answer[:-1]], device=self.target.model.device)
            logits = self.target.model(input_ids=ids, logits_to_keep=len(answer)).logits[0].float()
            written = torch.tensor(answer, device=ids.device)
            nats = -logits.log_softmax(-1).gather(-1, written[:, None]).double().sum()
            self._read[key] = float(nats), int((logits.argmax(-1) != written).sum())
        return self._read[key]


def judge(rule: str, raw: Raw, task: Task, judged: Judge, with_speed: bool) -> Quality:
    prompts, answers, texts = ([x for part in raw.parts for x in getattr(part, name)] for name in PARTS)
    drafts, accepted = (sum(getattr(part, name) for part in raw.parts) for name in ("drafts", "accepted_tokens"))
    tokens = [len(answer) for answer in answers]
    read = [judged(*pair) for pair in zip(tqdm(prompts, desc=f"reading {rule}", leave=False), answers, strict=True)]
    return Quality(
        rule, {key: Path(value).name if key == "ctc_pivots" else value for key, value in raw.config.items()},
        right=[final_number(text) == final_number(answer) for text, answer in zip(texts, task.answers, strict=True)],
        tokens=tokens, nats=[nats for nats, _ in read], changed=[changed for _, changed in read],
        tokens_per_step=1 + accepted / drafts if drafts else None,
        tokens_per_second=sum(tokens) / sum(part.seconds for part in raw.parts) if with_speed else None,
        fingerprint=raw.parts[0].fingerprint,
    )  # fmt: skip


PARTS = ("prompts", "tokens", "texts")


def compare(rows: Sequence[Quality]) -> None:
    """Fill in what each rule loses and gains against the first."""
    for row in rows[1:]:
        row.lost, row.gained, row.p = sign_test(rows[0].right, row.right)


def to_markdown(run: dict[str, Any], rows: Sequence[Quality]) -> str:
    with_speed = rows[0].tokens_per_second is not None
    head = ["rule", "right", "lost, gained (p)", "nats a token", "changed tokens", "tokens a step"]
    lines = [
        f"Pair {run['pair']}: {len(rows[0].right)} questions of {run['data']}, greedy, at most {run['max_tokens']} "
        f"tokens, {run['concurrency']} at a time; drafts `{json.dumps(run['speculative'])}`. Lost and gained: "
        "questions that only the exact rule, or only this one, answers right; p of a two-sided sign test. Nats and "
        "changed tokens are the target's own judgement of what was written; where a forward of its own and the "
        "server's differ, at ties, the exact rule has changed tokens too.",
        "",
        f"{machine_line(run)}. `{run['command']}`",
        "",
        f"| {' | '.join(head + ['tokens a second'] * with_speed)} |",
        "|---" * (len(head) + with_speed) + "|",
    ]
    for row in rows:
        step = f"{row.tokens_per_step:.2f}" if row.tokens_per_step else "-"
        cells = [
            row.rule, f"{sum(row.right)} ({100 * row.accuracy:.1f} %)",
            "-" if row is rows[0] else f"{row.lost}, {row.gained} ({row.p:.2g})",
            f"{row.nats_per_token:.4f}", f"{100 * row.changed_share:.2f} %", step,
        ]  # fmt: skip
        if with_speed:
            cells.append(f"{row.tokens_per_second:.1f} ({row.tokens_per_second / rows[0].tokens_per_second:.2f} x)")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Options of the rules, and how their responses are marked:", ""]
    lines += [f"- {row.rule}: `{json.dumps(row.config)}`, `{row.fingerprint}`" for row in rows]
    return "\n".join(lines) + "\n"


def rules(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and options; the exact rule first."""
    yield EXACT, {}
    for window in args.windows:
        for threshold in args.thresholds:
            yield f"fly W {window}, entropy {threshold:g}", {
                "rejection_sample_method": "fly", "fly_window_size": window, "fly_entropy_threshold": threshold,
            }  # fmt: skip
    for threshold in args.pivot_thresholds if args.pivots is not None else ():
        yield f"pivots, threshold {threshold:g}", {
            "ctc_acceptance": "pivot", "ctc_pivots": str(args.pivots), "ctc_pivot_threshold": threshold,
        }  # fmt: skip
    for text in args.rule:
        method = named_config(text, "--rule")
        yield method.name, dict(method.speculative_config)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser, overrides=("target", "drafter"))
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl", help="rows of question and answer")
    parser.add_argument("--num-prompts", type=positive, default=200, help="the first questions (default: 200)")
    parser.add_argument("--windows", type=positive, nargs="*", default=[2, 4, 6], help="of FLy (default: 2 4 6)")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.3], help="of FLy, in nats (default: 0.3)")
    parser.add_argument("--pivots", type=Path, metavar="PIVOTS", help="folder of `vllm-ctc pivots`")
    parser.add_argument(
        "--pivot-thresholds", type=float, nargs="*", default=[0.1, 0.3, 0.5, 0.7], help="(default: 0.1 0.3 0.5 0.7)"
    )
    parser.add_argument(
        "--rule", action="append", default=[], metavar="NAME=JSON", help="a row with these options; repeatable"
    )
    parser.add_argument(
        "--speculative", type=json.loads, default={}, metavar="JSON",
        help='options of all rows, such as \'{"ctc_draft": "chain"}\'',
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=positive, default=256, help="of an answer (default: 256)")
    parser.add_argument("--concurrency", type=positive, default=1, help="questions at a time (default: 1)")
    parser.add_argument("--no-speed", action="store_true", help="no seconds: other programs use this machine")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality", help="path without suffix")
    return choose_pair(parser.parse_args(argv))


def measure(args: argparse.Namespace, argv: Sequence[str]) -> str:
    task = read_task(args.data, args.num_prompts)
    folder = args.output.with_name(f"{args.output.name}-raw")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "pair": args.pair.name, "data": args.data.name, "num_prompts": len(task.questions),
        "max_tokens": args.max_tokens, "concurrency": args.concurrency, "speculative": args.speculative,
    }  # fmt: skip
    if differing := differing_settings(folder / "settings.json", settings):
        raise SystemExit(f"error: {folder} has answers of other settings ({differing[0]}); use another --output.")
    record_settings(folder / "settings.json", settings)
    busy = psutil.cpu_percent(IDLE_SECONDS)
    if busy > BUSY_PERCENT and not args.no_speed:
        print(f"warning: other programs use {busy:.0f} % of this machine; do not trust the speeds", file=sys.stderr)
    run = describe_run(
        "benchmarks/quality.py", argv, **settings, threads=threads_record(args.target),
        machine_busy_percent_before=None if args.no_speed else busy,
    )  # fmt: skip
    raws = {name: Raw(folder, name, config) for name, config in rules(args)}
    judged, rows = Judge(args.target), []
    for name, raw in raws.items():
        answer_all(args, task, name, raw)
        rows.append(judge(name, raw, task, judged, not args.no_speed))
        compare(rows)
        table = to_markdown(run, rows)
        write_record(args.output, {"run": run, "rules": [asdict(row) for row in rows]}, table)
    import plots

    plots.quality(args.output.with_suffix(".png"), rows, f"{args.pair.name}, {run['gpu'] or run['cpu']}")
    return table


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    stop_on_sigterm()
    ready(args.pair)
    try:
        measure(args, argv)
    except (StartupError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
