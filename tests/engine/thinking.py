"""A target that thinks: some letters of the tiny target's are markers of reasoning and of tool calls."""

import json
import random
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaForCausalLM

from .conftest import CHARACTERS, SPECIAL, Pair, save_drafter, save_tokenizer

# What stands for which letter. What ends something is said every 30 to 60 tokens, and the end of the text hardly
# ever, unless a grammar asks for it. Like those of real targets, markers are added tokens and no special ones:
# they stay in the text, where parsers look for them.
MARKERS = {"W": "<think>", "Q": "</think>", "G": "<tool_call>", "F": "</tool_call>"}
EOS = "V"
TOKENS = ["<pad>", "<unused>", *({**MARKERS, EOS: "<eos>"}.get(character, character) for character in CHARACTERS)]
TEMPLATE = """\
{%- for tool in tools or [] %}can {{ tool.function.name }}
{% endfor %}
{%- for document in documents or [] %}{{ document.title }}: {{ document.text }}
{% endfor %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}
{%- if reasoning_effort %}effort {{ reasoning_effort }}
{% endif %}
{%- if add_generation_prompt %}assistant:{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"""


def save_thinking_pair(pair: Pair, folder: Path) -> Pair:
    """`pair`, which speaks ASCII, with another tokenizer."""
    target = shutil.copytree(pair.target, folder / "target")
    assert save_tokenizer(target, TOKENS) == len(SPECIAL + CHARACTERS)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS.values()])
    assert len(tokenizer) == len(TOKENS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    return Pair(target, pair.drafter)


def text_of(tokens: list[int]) -> str:
    return "".join(TOKENS[token] for token in tokens).replace("\u0120", " ").replace("\u010a", "\n")


def said(dice: random.Random, names: list[str]) -> str:
    """What a target thinks and calls in the end."""
    thought = dice.choice(["So be it.", "They may want that,", "No."])
    calls = [
        json.dumps({"name": dice.choice(names), "arguments": {"count": dice.randrange(100), "to": dice.choice("abc")}})
        for _ in range(dice.randint(1, 3))
    ]
    return f"{thought}</think>Now.\n" + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls) + "<eos>"


def save_calling_pair(pair: Pair, folder: Path, prompts: list[str], names: list[str], steps: int = 400) -> Pair:
    """`pair`, taught for some seconds to think and to call tools unasked. prompts: as they are rendered."""
    model = LlamaForCausalLM.from_pretrained(pair.target)
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    dice, losses = random.Random(0), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        texts = [dice.choice(prompts) + said(dice, names) for _ in range(16)]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        logits = model(tokens[:, :-1]).logits
        answered = tokens[:, 1:].masked_fill(tokens[:, 1:] == tokenizer.pad_token_id, losses.ignore_index)
        optimizer.zero_grad()
        losses(logits.flatten(0, 1), answered.flatten()).backward()
        optimizer.step()
        schedule.step()
    taught = Pair(shutil.copytree(pair.target, folder / "target"), folder / "drafter")
    model.save_pretrained(taught.target)
    save_drafter(taught.drafter, model, seed=4)
    return taught
