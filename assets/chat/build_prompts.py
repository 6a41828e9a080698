"""Prompts for the chat pair's drafter: instructions made of templates and subjects, questions and documents that the
target itself invents, and the questions of files that the caller gives.

    python assets/chat/build_prompts.py --target TARGET --output prompts.jsonl [--maths gsm8k_train.jsonl]

Nothing is downloaded. A drafter must see the kinds of text that it will draft, and no test prompt.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from vllm import LLM, SamplingParams

SUBJECTS = """
the water cycle; a small bakery; solar panels; the French Revolution; learning to swim; black holes; a lost dog;
chess openings; the human heart; city gardens; coral reefs; a night train; electric cars; the Roman Empire;
bees; coffee; earthquakes; an old lighthouse; public libraries; a job interview; volcanoes; jazz music; the
stock market; recycling; mountain climbing; vaccines; a school play; the Silk Road; robots; sleep; the Great
Wall of China; renewable energy; a family dinner; photosynthesis; time management; space travel; a broken
bicycle; world trade; the Amazon rainforest; cooking pasta; artificial intelligence; a snowstorm; gravity; the
printing press; wolves; online privacy; the piano; marathon running; DNA; a farmers' market; inflation; ancient
Egypt; migrating birds; a new neighbour; the Olympic Games; antibiotics; wind power; a surprise party; the moon
landing; healthy breakfasts; the Industrial Revolution; dolphins; remote work; a haunted house; magnets;
photography; the printing of money; a first day at school; climate change; the Renaissance; a broken phone;
football; nutrition; whales; a camping trip; democracy; the internet; a rainy afternoon; plate tectonics; hand
washing; trees in cities; a museum visit; supply and demand; the speed of light; a wedding speech; meditation;
honey; the bicycle; a long flight; dinosaurs; savings accounts; an apology to a friend; rivers; stage fright;
the periodic table; a used car; glaciers; a charity run; shadows; the violin; keeping a diary; tides; a power
cut; cheese; learning Spanish; comets; a leaking roof"""
TEMPLATES = """
Write a short story about {}.|Explain {} to a ten-year-old.|Give me five interesting facts about {}.| Write a
poem about {}.|What should everyone know about {}?|Write an engaging blog post about {}.| List the pros and cons
of {}.|Draft a polite email to a colleague about {}.|Write a dialogue between two friends about {}.| Why does {}
matter?|Describe {} in three paragraphs.|Write a speech about {} for a general audience.| Imagine you are a
journalist. Report on {}.|Act as a teacher and prepare a short lesson about {}.| Make a list of ten questions
that a student could ask about {}, and answer the first three.| Write a product description that has to do with
{}.|Compare {} with something similar.| You are a tour guide. Tell visitors about {}.|What are common
misunderstandings about {}?|Give step-by-step advice on {}.| Write a persuasive paragraph about {}.|Tell me a
joke about {} and explain it.| Summarize what is known about {} in four sentences.|Write a letter to a friend
that mentions {}.| What would happen if there were no such thing as {}?|Write a short scene of a film about {}.|
How has our view of {} changed over time?|Create a quiz with answers about {}.|Make a plan for one week around
{}.| Answer as a scientist: what is the most important open question about {}?"""
CODE = """
reverses a string; finds the largest number in a list; checks whether a word is a palindrome; computes
factorials; counts the vowels of a sentence; sorts a list of numbers; merges two sorted lists; removes
duplicates from a list; reads a CSV file and sums a column; computes Fibonacci numbers; checks whether a number
is prime; counts words in a text file; finds the common elements of two lists; converts Celsius to Fahrenheit;
computes the average of a list; implements a stack; implements binary search; flattens a nested list; rotates a
list by k places; validates an email address; builds a histogram of letters; finds the longest word; transposes
a matrix; computes the greatest common divisor; simulates rolling two dice; parses a date; implements a queue;
prints a multiplication table; computes compound interest; finds all pairs with a given sum"""
CODE_TEMPLATES = """
Write a Python function that {}.|Write a program in JavaScript that {}, with comments.| Write a C++ program that
{}.|Explain step by step how a program {}, then show the code in Python.| Write a Python class with a method
that {}, and unit tests for it."""
NAMES = (
    "Anna Ben Carla David Elena Farid Grace Hugo Ines Jamal Kira Leo Maya Noah Olga Pedro Rosa Sam Tara Viktor"
).split()
THINGS = "apples books candles marbles pencils stamps cookies tickets shells flowers cards bottles".split()
SUMS = (
    "{a} has {x} {t}. {b} has {y} times as many. How many {t} do they have together?",
    "{a} buys {x} {t} at ${y} each and pays with ${z}. How much change does {a} get?",
    "A box holds {x} {t}. {a} packs {y} boxes and has {z} {t} left over. How many {t} did {a} have?",
    "{a} reads {x} pages a day. How many pages does {a} read in {y} weeks?",
    "If 3x + {x} = {z}, what is x?",
    "What is {x} percent of {z}?",
    "{a} drives {z} miles at {x} miles per hour. How long does the trip take?",
    "A rectangle is {x} cm long and {y} cm wide. What are its area and its perimeter?",
    "{a} earns ${x} an hour and works {y} hours a day for {w} days. {b} earns ${z} in all. Who earns more?",
)
ARTICLE = "Write a newspaper article of about 300 words about {}. Name people, places and numbers."
TASKS = (
    "Summarize: {}", "Summarize the following article in three sentences:\n\n{}", "{}\n\nTL;DR",
    "What are the main points of this text?\n\n{}", "Read this text and list the people and places in it:\n\n{}",
    "Write a headline and a two-sentence summary for this article:\n\n{}",
)  # fmt: skip
USER_TURN = "<|im_start|>user\n"
"""A beginning that the target continues with a question."""


def items(text: str, separator: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(separator)]


def instructions(dice: random.Random) -> list[dict]:
    chat = [t.format(s) for t, s in itertools.product(items(TEMPLATES, "|"), items(SUBJECTS, ";"))]
    code = [t.format(s) for t, s in itertools.product(items(CODE_TEMPLATES, "|"), items(CODE, ";"))]
    return rows("chat", dice.sample(chat, 1400)) + rows("code", dice.sample(code, 130))


def sums(dice: random.Random, count: int) -> list[dict]:
    def one() -> str:
        a, b = dice.sample(NAMES, 2)
        x, y, w = dice.randint(2, 60), dice.randint(2, 12), dice.randint(2, 6)
        return dice.choice(SUMS).format(a=a, b=b, t=dice.choice(THINGS), x=x, y=y, w=w, z=x * y + dice.randint(5, 99))

    return rows("maths", [one() for _ in range(count)])


def invented(llm: LLM, count: int) -> list[dict]:
    """Questions that the target writes where a user would, sampled."""
    system = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False
    ).partition(USER_TURN)[0]  # fmt: skip
    params = SamplingParams(temperature=0.9, max_tokens=200, stop="<|im_end|>")
    outputs = llm.generate([system + USER_TURN] * count, params)
    texts = {output.outputs[0].text.strip() for output in outputs if output.outputs[0].finish_reason == "stop"}
    return rows("invented", sorted(text for text in texts if len(text) > 15))


def summaries(llm: LLM, dice: random.Random, count: int) -> list[dict]:
    """Tasks about articles that the target writes, sampled."""
    subjects = [s for s, _ in zip(itertools.cycle(items(SUBJECTS, ";")), range(count))]
    messages = [[{"role": "user", "content": ARTICLE.format(subject)}] for subject in subjects]
    params = SamplingParams(temperature=0.8, max_tokens=420)
    outputs = llm.chat(messages, params)
    return rows("summary", [dice.choice(TASKS).format(output.outputs[0].text.strip()) for output in outputs])


def questions(path: Path, count: int, dice: random.Random) -> list[dict]:
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return rows("maths", [json.loads(line)["question"] for line in dice.sample(lines, min(count, len(lines)))])


def rows(category: str, prompts: list[str]) -> list[dict]:
    return [{"category": category, "prompt": prompt} for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="folder of the chat model")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--maths", type=Path, metavar="FILE.jsonl", help="rows with `question`, never those of a test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    llm = LLM(args.target, dtype="float32", max_model_len=1024, max_num_seqs=128, enforce_eager=True, seed=args.seed)
    found = instructions(dice) + sums(dice, 250) + invented(llm, 900) + summaries(llm, dice, 450)
    if args.maths:
        found += questions(args.maths, 1100, dice)
    dice.shuffle(found)  # the last rows are held out
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    print(f"{args.output}: {len(found)} prompts")


if __name__ == "__main__":
    main()
