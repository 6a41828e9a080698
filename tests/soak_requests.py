"""What the soak asks of a server, and how it judges an answer."""

import math
import random
from dataclasses import dataclass, field

TIE = 1e-4  # how far apart in log-probability two tokens may be that rounding exchanges
MAX_TOKENS = 160
# Each with its share. `own` is what the request's body has beyond prompt and length; greedy answers are compared.
KINDS = {
    "greedy": (30, {"temperature": 0}),
    "ignoring the end": (6, {"temperature": 0, "ignore_eos": True}),
    "stop strings": (10, {"temperature": 0, "stop": ["\n", " is ", "$"]}),
    "penalised": (6, {"temperature": 0, "frequency_penalty": 0.6, "repetition_penalty": 1.1}),
    "constrained": (4, {"temperature": 0, "structured_outputs": {"regex": "[a-z ,]{5,60}[.]"}}),
    "long prompt": (5, {"temperature": 0}),
    "sampled": (12, {"temperature": 1.0, "top_p": 0.9}),
    "seeded": (6, {"temperature": 0.7, "seed": 7, "top_k": 20}),
    "several answers": (6, {"temperature": 0.8, "n": 3}),
    "hang up in mid-stream": (9, {"temperature": 0, "ignore_eos": True}),
    "hang up at once": (4, {"temperature": 0.8, "n": 2, "ignore_eos": True}),
    "refused": (2, {"min_p": 0.2}),  # by vLLM, with any drafter
}
HANG_UPS = ("hang up in mid-stream", "hang up at once")


@dataclass(frozen=True)
class Ask:
    """One request of the pool."""

    number: int
    kind: str
    body: dict
    patience: int = 0  # events of the stream before a client that hangs up does so

    @property
    def is_compared(self) -> bool:
        return self.body.get("temperature") == 0 and self.kind not in HANG_UPS


@dataclass
class Answer:
    """Tokens of each choice; of a reference also the best tokens at each place, with their log-probabilities."""

    tokens: list[list[int]] = field(default_factory=list)
    text: str = ""
    best: list[dict[int, float]] = field(default_factory=list)


def make_asks(count: int, seed: int, questions: list[str], max_model_len: int) -> list[Ask]:
    rng = random.Random(seed)
    kinds, shares = list(KINDS), [share for share, _ in KINDS.values()]
    asks = []
    for number in range(count):
        # The first of the pool are one of each kind.
        kind = kinds[number] if number < len(kinds) else rng.choices(kinds, shares)[0]
        prompt = rng.choice(questions)[: rng.choice([1, 12, 60, 500])]
        max_tokens = round(math.exp(rng.uniform(0, math.log(MAX_TOKENS))))
        if kind in ("ignoring the end", *HANG_UPS):
            max_tokens = MAX_TOKENS
        if kind == "long prompt":  # a token has a character at least
            prompt, max_tokens = " ".join(rng.sample(questions, 8))[: max_model_len - 32], 16
        body = {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True}
        asks.append(Ask(number, kind, {**body, **KINDS[kind][1]}, rng.randrange(12)))
    return asks


def read_answer(response: dict) -> Answer:
    choices = response["choices"]
    answer = Answer([choice["token_ids"] for choice in choices], choices[0]["text"])
    for best in (choices[0].get("logprobs") or {}).get("top_logprobs") or []:
        answer.best.append({int(name.removeprefix("token_id:")): value for name, value in best.items()})
    return answer


def problem(ask: Ask, answer: Answer, reference: Answer | None) -> str | None:
    """What is wrong with an answer; None for a right one, and for one that a tie explains."""
    if len(answer.tokens) != ask.body.get("n", 1):
        return f"{len(answer.tokens)} choices"
    if any(not 0 < len(tokens) <= ask.body["max_tokens"] for tokens in answer.tokens):
        return f"{[len(tokens) for tokens in answer.tokens]} tokens, {ask.body['max_tokens']} at most"
    if reference is None or answer.tokens == reference.tokens:
        return None if reference is None or answer.text == reference.text else f"another text: {answer.text!r}"
    given, expected = answer.tokens[0], reference.tokens[0]
    at = next((k for k, (a, b) in enumerate(zip(given, expected)) if a != b), None)
    if at is None:
        return f"{len(given)} tokens, expected {len(expected)}"
    best = reference.best[at]
    if given[at] in best and abs(best[expected[at]] - best[given[at]]) < TIE:
        return None
    return f"token {at} is {given[at]}, expected {expected[at]}"
