"""A target that thinks: some letters of the tiny target's are markers of reasoning and of tool calls."""

import shutil
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer

from .conftest import CHARACTERS, SPECIAL, Pair, save_tokenizer

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
