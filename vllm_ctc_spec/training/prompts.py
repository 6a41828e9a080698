"""Prompts from rows, as the target reads them: the usable ones, and the held-out ones among them."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from tqdm import tqdm

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.rows import FIELD_NAMES, Messages, Row, read_rows
from vllm_ctc_spec.training.target import TargetText

# The date for chat templates that print it: a run that is continued on another day has the same prompts.
TODAY = datetime.datetime(2026, 1, 1)


@dataclasses.dataclass
class Skipped:
    """Rows of which no prompt can be made, by reason."""

    unusable: int = 0  # without any known field
    too_long: int = 0  # no room for a response in the target's positions
    refusals: list[str] = dataclasses.field(default_factory=list)  # why the target refused each

    def __str__(self) -> str:
        text = ""
        if self.unusable:
            text += f"; {self.unusable} rows skipped: none of the fields {FIELD_NAMES}"
        if self.refusals:
            text += (
                f"; {len(self.refusals)} rows skipped: refused by the target's chat template or vocabulary (the first: "
                f"{self.refusals[0]})"
            )
        if self.too_long:
            text += f"; {self.too_long} rows skipped: longer than the target's positions"
        return text


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids of the usable rows, in file order."""

    train: list[list[int]]
    held_out: list[list[int]]
    skipped: Skipped = dataclasses.field(default_factory=Skipped)
    chat_template_kwargs: dict[str, Any] | None = None

    def report(self) -> str:
        return f"{len(self.train)} prompts for training, {len(self.held_out)} held out{self.skipped}."


class RefusedRow(ValueError):
    """The target's chat template, its tokenizer or its embedding has no room for a dialogue; the message says why."""


def token_ids(messages: Messages, target: TargetText, chat_template_kwargs: dict[str, Any] | None = None) -> list[int]:
    """The prompt after which the target answers the dialogue (RefusedRow)."""
    try:
        text = target.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            strftime_now=TODAY.strftime,
            **chat_template_kwargs or {},
        )
        ids: list[int] = target.tokenizer(text, add_special_tokens=False).input_ids
    except (TemplateError, TypeError) as error:  # such as roles in another order, or a content that is no text
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RefusedRow(f"{type(error).__name__}: {reason.rstrip('.')}") from error
    vocab_size = target.config.get_text_config().vocab_size
    unknown = next((token for token in ids if token >= vocab_size), None)
    if unknown is not None:  # such as a token that somebody has added to the tokenizer alone
        token = target.tokenizer.convert_ids_to_tokens(unknown)
        raise RefusedRow(f"it has the token {token!r}, number {unknown}, and the model has {vocab_size}")
    return ids


def fits(ids: Sequence[int], target: TargetText, max_new_tokens: int) -> bool:
    """Whether there is room for a response in the target's positions."""
    return 0 < len(ids) <= target.max_length - min(max_new_tokens, target.max_length // 2)


def usable_prompts(
    rows: Sequence[Row],
    target: TargetText,
    max_new_tokens: int,
    chat_template_kwargs: dict[str, Any] | None = None,
    limit: int | None = None,
) -> tuple[list[list[int]], Skipped]:
    """Token ids of the usable rows, at most `limit` of them; nothing behind the last of these is counted as skipped."""
    prompts, skipped = [], Skipped()
    for row in tqdm(rows, desc="tokens of the prompts", unit="row", delay=2):
        if len(prompts) == limit:
            break
        if row.messages is None:
            skipped.unusable += 1
            continue
        try:
            ids = token_ids(row.messages, target, chat_template_kwargs)
        except RefusedRow as reason:
            skipped.refusals.append(str(reason))
            continue
        if fits(ids, target, max_new_tokens):
            prompts.append(ids)
        else:
            skipped.too_long += 1
    return prompts, skipped


def read_prompts(
    path: str,
    target: TargetText,
    max_new_tokens: int,
    held_out: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Prompts:
    """Prompts of `path`; the last `held_out` usable rows, at most a tenth of them, are never trained on."""
    rows = read_rows(path)
    prompts, skipped = usable_prompts(rows, target, max_new_tokens, chat_template_kwargs)
    if len(prompts) < 2:
        raise TrainingError(
            f"{path} has {len(prompts)} usable rows of {len(rows)}, and training needs two or more; each row needs one "
            f"of the fields {FIELD_NAMES} and must fit the target's {target.max_length} positions{skipped}."
        )
    split = len(prompts) - max(1, min(held_out, len(prompts) // 10))
    return Prompts(prompts[:split], prompts[split:], skipped, chat_template_kwargs)
