"""The target's responses in this process, by transformers' own `generate`, for an evaluation of drafts."""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from vllm_ctc_spec.training.conversations import Asked, Conversation, Follow, answer_all
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.target import Target

ROWS_AT_ONCE = 32
TOKENS_AT_ONCE = 65_536  # of prompts and responses in a batch: 10 GB of cache for an 8B model in bf16
MOST_PADDING = 2  # a batch's longest prompt and response against its shortest: every step reads the padding


def respond(
    target: Target, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[Example]:
    """The prompts with the target's responses, end token included, in their order; temperature 0 is greedy.

    Like lengths are decoded together, for little padding. Sampled responses depend on the seed and on all prompts.
    """
    torch.manual_seed(seed)
    examples = {}
    with tqdm(total=len(prompts), desc=f"responses at temperature {temperature:g}", unit="prompt") as bar:
        for num_tokens, rows in _batches(list(map(len, prompts)), max_new_tokens, target.max_length):
            responses = _generate(target, [prompts[row] for row in rows], num_tokens, temperature)
            examples |= {row: Example(prompts[row], ids) for row, ids in zip(rows, responses)}
            bar.update(len(rows))
    return [examples[row] for row in range(len(prompts))]


def _batches(lengths: Sequence[int], max_new_tokens: int, max_length: int) -> list[tuple[int, list[int]]]:
    """Rows of prompts of these lengths, each once, in batches with the number of tokens that their responses may have.

    One number a batch: no row is decoded behind the target's last position.
    """
    batches: list[tuple[int, list[int]]] = []
    shortest = 0  # of the last batch, response included
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        num_tokens = min(max_new_tokens, max_length - lengths[row])
        whole = lengths[row] + num_tokens
        if batches:
            of_batch, rows = batches[-1]
            most = min(ROWS_AT_ONCE, TOKENS_AT_ONCE // whole)
            if num_tokens == of_batch and len(rows) < most and whole <= MOST_PADDING * shortest:
                rows.append(row)
                continue
        batches.append((num_tokens, [row]))
        shortest = whole
    return batches


def converse(
    target: Target,
    conversations: Sequence[Conversation],
    follow: Follow,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Example]:
    """The target's answers in all conversations, turn by turn."""

    def answer(asked: Sequence[Asked]) -> list[list[int]]:
        prompts = [each.prompt for each in asked]
        return [example.response for example in respond(target, prompts, max_new_tokens, temperature, seed)]

    answers = answer_all(conversations, answer, follow)
    return [
        Example(each.prompt, each.response, each.turn, conversation=row)
        for row, of_row in enumerate(answers)
        for each in of_row
    ]


def _generate(target: Target, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float) -> list[list[int]]:
    """One batch, padded on the left."""
    device, width = target.model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # The law at this temperature itself: transformers' default keeps the 50 most probable tokens.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(target.eos_ids) or None, pad_token_id=0, **sampling
    )
    output = target.model.generate(ids, attention_mask=mask, generation_config=config)
    return [_up_to_end(response, target.eos_ids) for response in output[:, width:].tolist()]


def _up_to_end(response: list[int], eos_ids: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(response) if token in eos_ids), len(response))
    return response[: end + 1]
