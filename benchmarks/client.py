"""Requests to a running server, and its counters for them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from openai import OpenAI
from prompts import read_prompts
from server import Endpoint

# Between two measurements everything gets this long to come to rest: vLLM's worker keeps polling for about a second
# after its last step, and counters follow the last response a little later.
SETTLE_SECONDS = 2.0


@dataclass
class Answer:
    """One greedy completion."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    seconds: float  # from sending the request to the last byte of its answer


@dataclass
class Drafting:
    """The counts of `/metrics` between two moments."""

    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: list[int] = field(default_factory=list)  # drafts whose token at this depth was accepted

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per target forward, the target's own token included; None without drafts."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else None


def read_questions(path: Path, limit: int) -> list[str]:
    return read_prompts(path)[:limit]


def ask(client: OpenAI, model: str, question: str, max_tokens: int) -> Answer:
    """One greedy chat request, answered in one piece."""
    started = time.perf_counter()
    response = client.chat.completions.create(**_greedy(model, question, max_tokens))
    token_ids = response.choices[0].model_extra["token_ids"]
    return Answer(response.model_extra["prompt_token_ids"], token_ids, time.perf_counter() - started)


def ask_streaming(client: OpenAI, model: str, question: str, max_tokens: int, on_text: Callable[[str], None]) -> Answer:
    """The same request, streamed; `on_text` sees the text as it arrives."""
    started = time.perf_counter()
    prompt_token_ids: list[int] = []
    token_ids: list[int] = []
    for chunk in client.chat.completions.create(**_greedy(model, question, max_tokens), stream=True):
        prompt_token_ids += chunk.model_extra.get("prompt_token_ids") or []
        for choice in chunk.choices:
            token_ids += choice.model_extra.get("token_ids") or []
            if choice.delta.content:
                on_text(choice.delta.content)
    return Answer(prompt_token_ids, token_ids, time.perf_counter() - started)


def _greedy(model: str, question: str, max_tokens: int) -> dict:
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "extra_body": {"return_token_ids": True},
    }


def first_difference(left: list[int], right: list[int]) -> int | None:
    """The first position at which two token sequences differ; None where they are equal."""
    if left == right:
        return None
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def logit_gap(client: OpenAI, model: str, context: list[int], left: int, right: int) -> float:
    """Distance between the logits of two tokens after `context`; infinite unless both are among the largest."""
    response = client.completions.create(
        model=model,
        prompt=context,
        max_tokens=1,
        temperature=0,
        logprobs=5,
        extra_body={"return_tokens_as_token_ids": True},
    )
    top = response.choices[0].logprobs.top_logprobs[0]
    if f"token_id:{left}" not in top or f"token_id:{right}" not in top:
        return math.inf
    return abs(top[f"token_id:{left}"] - top[f"token_id:{right}"])


def drafting_since(server: Endpoint, before: dict[str, float] | None = None) -> Drafting:
    """The speculative-decoding counters of a server at rest, less those of an earlier `metrics()`."""
    now, before = server.metrics(), before or {}

    def counted(key: str) -> int:
        return int(now.get(key, 0) - before.get(key, 0))

    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    position = "vllm:spec_decode_num_accepted_tokens_per_pos_total[{}]".format
    depth = next(depth for depth in count() if position(depth) not in now)
    per_position = [counted(position(i)) for i in range(depth)]
    return Drafting(*(counted(f"vllm:spec_decode_{name}_total") for name in names), per_position)
