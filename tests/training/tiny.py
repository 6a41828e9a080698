"""A target small enough to train a drafter for in seconds: random weights, a character tokenizer, a chat template."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_ctc_spec.training.conversations import answer_all
from vllm_ctc_spec.training.dataset import Shard
from vllm_ctc_spec.training.dataset_writer import Advance, Answers
from vllm_ctc_spec.training.engine import EngineConfig
from vllm_ctc_spec.training.generate import respond
from vllm_ctc_spec.training.prompts import PromptBuilder
from vllm_ctc_spec.training.target import Target

CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
TEMPLATE = (
    "{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }}{{ m['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def make_target(folder: Path, template: str | None = TEMPLATE, head_dim: int = 16) -> Path:
    """vLLM's attention on a CPU needs a `head_dim` of 32 or more."""
    vocabulary = {token: i for i, token in enumerate(["<p>", "<u>", "<a>", "<e>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<p>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<p>", "<u>", "<a>", "<e>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<p>", eos_token="<e>", chat_template=template
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=None, eos_token_id=vocabulary["<e>"], pad_token_id=vocabulary["<p>"],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.update(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 24) -> Path:
    """No two are the same."""
    again = [CHARACTERS[i // 910] * (i >= 910) for i in range(count)]  # 26 * 5 * 7 rows are different without it
    texts = [again[i] + CHARACTERS[i % 26] * (1 + i % 5) + CHARACTERS[i % 7 : i % 7 + 3] for i in range(count)]
    rows = [{"question": text} for text in texts]
    assert len(set(texts)) == count
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_transformers(
    config: EngineConfig, shards: Sequence[Shard], advance: Advance
) -> Iterator[tuple[Shard, Answers]]:
    """Answers in the place of vLLM's, whose engine takes long to start."""
    target = Target.load(config.target, torch.device("cpu"), getattr(torch, config.dtype))
    build = PromptBuilder(target, config.max_model_len, config.max_new_tokens, config.chat_template_kwargs)
    for shard in shards:

        def answer(asked, shard=shard):
            prompts = [each.prompt for each in asked]
            examples = respond(target, prompts, config.max_new_tokens, shard.temperature, config.seed)
            return [example.response for example in examples]

        yield shard, answer_all(shard.conversations, answer, build.follow)


def answers_of(shard: Shard, answer) -> Answers:
    """Given answers, answer(prompt), in the place of a target's."""
    return answer_all(shard.conversations, lambda asked: [answer(each.prompt) for each in asked], lambda *_: None)
