"""Prompts and the target's answers that the chat drafter learned from, in one file: `answers.jsonl.xz`.

    python assets/chat/answers.py pack --target TARGET --prompts prompts.jsonl --dataset DATASET --maths TRAIN.jsonl
    python assets/chat/answers.py unpack --target TARGET --folder FOLDER --maths TRAIN.jsonl

`unpack` leaves FOLDER/prompts.jsonl and FOLDER/dataset as `build_prompts.py` and `vllm-ctc data` would, in a minute and
not in an hour. TRAIN.jsonl is the training part of GSM8K. The packed file has its questions' line numbers, not their
text. Without --maths these rows are left out.
"""

import argparse
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_ctc_spec.training.answers import make_dataset
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.conversations import Answer
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import Shard, read_shard
from vllm_ctc_spec.training.dataset_writer import Advance, Answers, plan_shards
from vllm_ctc_spec.training.engine import EngineConfig
from vllm_ctc_spec.training.prompts import PromptBuilder, read_prompts
from vllm_ctc_spec.training.target import TargetText

PACKED = Path(__file__).with_name("answers.jsonl.xz")
MAX_NEW_TOKENS = 192


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def maths_questions(path: Path | None) -> list[str]:
    return [row["question"] for row in read_lines(path)] if path else []


def pack(args: argparse.Namespace) -> None:
    """One line a prompt: its row, or the place of its question in gsm8k_train.jsonl, and the answer's token ids."""
    places = {question: place for place, question in enumerate(maths_questions(args.maths))}
    text = TargetText.load(args.target)
    prompts = read_prompts(
        str(args.prompts), PromptBuilder(text, text.max_length, MAX_NEW_TOKENS), TrainConfig.held_out
    )
    answers: dict[str, dict[int, list[int]]] = {"train": {}, "held-out": {}}
    for shard in plan_shards(prompts, 0.0):
        examples = read_shard(shard.path(args.dataset))
        answers[shard.part] |= {row: example.response for row, example in zip(shard.rows, examples, strict=True)}
    in_order = [answers[part][row] for part in answers for row in range(len(answers[part]))]
    with lzma.open(PACKED, "wt", encoding="utf-8", preset=9) as file:
        for row, answer in zip(read_lines(args.prompts), in_order, strict=True):
            place = places.get(row["prompt"])
            kept = row if place is None else {"category": row["category"], "gsm8k_train": place}
            file.write(json.dumps({**kept, "answer": answer}, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{PACKED}: {len(in_order)} answers, {PACKED.stat().st_size / 1e6:.1f} MB")


def unpack(args: argparse.Namespace) -> None:
    questions = maths_questions(args.maths)
    rows, answers = [], []
    with lzma.open(PACKED, "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            answer, place = line.pop("answer"), line.pop("gsm8k_train", None)
            if place is not None and not questions:
                continue
            rows.append(line if place is None else {**line, "prompt": questions[place]})
            answers.append(answer)
    args.folder.mkdir(parents=True, exist_ok=True)
    prompts = args.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    num_train = len(rows) - min(TrainConfig.held_out, len(rows) // 10)

    def look_up(_: EngineConfig, shards: Sequence[Shard], advance: Advance) -> Iterator[tuple[Shard, Answers]]:
        for shard in shards:
            first = num_train if shard.part == "held-out" else 0
            prompts = [conversation.prompts[0] for conversation in shard.conversations]
            yield shard, [[Answer(prompt, answers[first + row])] for prompt, row in zip(prompts, shard.rows)]

    config = DataConfig(
        target=args.target, prompts=str(prompts), output=args.folder / "dataset", max_new_tokens=MAX_NEW_TOKENS,
        dtype="float32",
    )  # fmt: skip
    print(make_dataset(config, overwrite=False, generate=look_up))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, run in (("pack", pack), ("unpack", unpack)):
        command = commands.add_parser(name)
        command.add_argument("--target", required=True, help="folder of the chat model")
        command.add_argument("--maths", type=Path, metavar="gsm8k_train.jsonl", help="the training part of GSM8K")
        command.set_defaults(run=run)
        if name == "pack":
            command.add_argument("--prompts", required=True, type=Path)
            command.add_argument("--dataset", required=True, type=Path)
        else:
            command.add_argument("--folder", required=True, type=Path)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
