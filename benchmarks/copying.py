"""Prompts whose answers copy a lot, for `serve.py`: texts to repeat with an edit, and texts to extract JSON of.

    python benchmarks/copying.py --output FOLDER        # writes edit.jsonl and json.jsonl
    python benchmarks/serve.py --data gsm8k=gsm8k_test.jsonl --data edit=FOLDER/edit.jsonl \\
        --data json=FOLDER/json.jsonl \\
        --methods "none (V2 runner)" ngram "ctc tree 16" "cache 16" "ctc+cache 16"

The same for every seed, on every machine. Where copies are rare (GSM8K) a cache should cost nothing; where they are
frequent (these) it should pay: that is what the comparison is for.
"""

import argparse
import json
import random
from pathlib import Path

NAMES = ("Amara", "Bruno", "Chiara", "Diego", "Emre", "Farah", "Goran", "Hana", "Ivo", "Jelena", "Kofi", "Lena")
CITIES = ("Oslo", "Lima", "Porto", "Kyoto", "Quito", "Tunis", "Varna", "Galway", "Izmir", "Bergen")
JOBS = ("baker", "teacher", "sailor", "gardener", "nurse", "carpenter", "painter", "farmer")
THINGS = ("apples", "books", "eggs", "pencils", "plums", "tickets", "stamps", "marbles")
SENTENCES = (
    "{name} is a {job} from {city} and is {age} years old.",
    "Every week {name} buys {count} {thing} at the market in {city}.",
    "Last year {name} sold {count} {thing} and moved to {city}.",
    "The {job} {name} has lived in {city} for {count} years.",
)


def person(draws: random.Random) -> dict[str, str | int]:
    return {
        "name": draws.choice(NAMES), "city": draws.choice(CITIES), "job": draws.choice(JOBS),
        "thing": draws.choice(THINGS), "age": draws.randint(19, 80), "count": draws.randint(3, 60),
    }  # fmt: skip


def edit(draws: random.Random) -> str:
    people = [person(draws) for _ in range(5)]
    text = " ".join(draws.choice(SENTENCES).format(**one) for one in people)
    other = draws.choice([name for name in NAMES if name not in text])
    return f"Repeat this text word for word, but write {other} in place of {people[0]['name']}.\n\n{text}"


def extraction(draws: random.Random) -> str:
    people = [person(draws) for _ in range(4)]
    text = " ".join(SENTENCES[0].format(**one) for one in people)
    example = json.dumps([{"name": "Max", "job": "driver", "city": "Rome", "age": 33}])
    return f"List the people in this text as JSON, in the form {example}.\n\n{text}"


SETS = {"edit": edit, "json": extraction}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--num-prompts", type=int, default=40, metavar="N", help="of each set (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, make in SETS.items():
        draws = random.Random(f"{name} {args.seed}")
        rows = [json.dumps({"prompt": make(draws)}) + "\n" for _ in range(args.num_prompts)]
        (args.output / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
