"""Every field of a request, and what it does with a drafter. `tests/versions/test_request_fields.py` holds the tables
to the fields of every supported vLLM; `test_requests.py` sends each case with chains, with trees and without a drafter.

A value may be a function of the usual answer to the prompt, so that it hits something.
"""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from .thinking import TOKENS


class Usual(NamedTuple):
    """The answer to a prompt of which nothing special is asked."""

    text: str
    tokens: list[int]
    prompt_length: int  # tokens


@dataclass(frozen=True)
class Case:
    """fields: what is sent, beside the prompt. outcome: SAME is the answer without a drafter, another one than without
    the field; SILENT is the same answer with and without the field, and `why`; DRAWN is a sample, reproducible with a
    chain and the same with a tree; REFUSED is 400, whose sentence has `why` in it, of that request alone; INSIDE is no
    user's business, and `why`."""

    outcome: str
    fields: dict[str, Any]
    why: str = ""

    def sent(self, usual: Usual, without: str = "") -> dict[str, Any]:
        """The fields, or all but one of them, which may be one of a dictionary among them."""
        fields = {}
        for name, value in self.fields.items():
            value = value(usual) if callable(value) else value
            if isinstance(value, dict) and without in value:
                value = {inner: others for inner, others in value.items() if inner != without}
            if name != without and value != {}:
                fields[name] = value
        return fields


SAME, SILENT, DRAWN, REFUSED, INSIDE = "same", "silent", "drawn", "refused", "inside"


def same(**fields) -> Case:
    return Case(SAME, fields)


def silent(why: str, **fields) -> Case:
    return Case(SILENT, fields, why)


def drawn(**fields) -> Case:
    return Case(DRAWN, {"temperature": 0.9, "seed": 3, **fields})


def refused(why: str, **fields) -> Case:
    return Case(REFUSED, fields, why)


def inside(why: str) -> Case:
    return Case(INSIDE, {}, why)


PAD, END = TOKENS.index("<pad>"), TOKENS.index("<eos>")
BY_VLLM = "not yet supported with speculative decoding"
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "what": {"enum": ["plums", "eggs"]}},
    "required": ["count", "what"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA}}
TAGS = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<order>",
        "content": {"type": "json_schema", "json_schema": SCHEMA},
        "end": "</order>",
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}} for name in ("order", "sell")
]
LETTERS = list(range(70, 80))


def to_score(positions: int) -> list[list[int]]:
    """Tokens for each of a prompt's last positions but the very last, one or two."""
    return [[token, token + 1][: 1 + token % 2] for token in range(40, 39 + positions)]


STOP = {"stop": lambda usual: [usual.text[4:6]]}
REPEATED = {"allowed_token_ids": [70], "max_tokens": 16}
STOPS = {"stop_token_ids": lambda usual: [usual.tokens[3]]}

# Of both kinds of HTTP requests
HTTP = {
    "model": same(model="another"),
    "frequency_penalty": same(frequency_penalty=1.2),
    "presence_penalty": same(presence_penalty=1.5),
    "repetition_penalty": same(repetition_penalty=1.4),
    "logit_bias": refused(BY_VLLM, logit_bias={"70": 5.0}),
    "min_p": refused(BY_VLLM, min_p=0.1, temperature=1.0),
    "n": same(n=3, temperature=1.0, top_k=1),
    "response_format": same(response_format=JSON, max_tokens=60),
    "structured_outputs": same(structured_outputs={"regex": "[a-f]{3}-[0-9]{4}"}),
    "seed": drawn(),
    "temperature": drawn(),
    "top_k": drawn(top_k=4),
    "top_p": drawn(top_p=0.5),
    "stop": same(**STOP),
    "include_stop_str_in_output": same(**STOP, include_stop_str_in_output=True),
    "stop_token_ids": same(**STOPS),
    "min_tokens": same(**STOPS, min_tokens=12),
    "ignore_eos": same(allowed_token_ids=[END], ignore_eos=True),
    "allowed_token_ids": same(allowed_token_ids=LETTERS),
    "bad_words": same(bad_words=lambda usual: [usual.text[4], usual.text[6:8]]),
    "skip_special_tokens": same(allowed_token_ids=[PAD], skip_special_tokens=False),
    "spaces_between_special_tokens": silent(
        "of tokenizers written in Python",
        allowed_token_ids=[PAD], skip_special_tokens=False, spaces_between_special_tokens=False,
    ),
    "stream": same(stream=True),
    "stream_options": same(stream=True, stream_options={"include_usage": True}),
    "stream_interval": silent("the same text in larger pieces", stream=True, stream_interval=5),
    "user": silent("vLLM ignores it", user="somebody"),
    "watermarking": silent("served without a watermark", watermarking=True),
    "use_beam_search": same(use_beam_search=True, n=2),
    "length_penalty": same(use_beam_search=True, n=6, length_penalty=-4.0),
    "truncate_prompt_tokens": same(truncate_prompt_tokens=5),
    "truncation_side": same(truncate_prompt_tokens=5, truncation_side="right"),
    "add_special_tokens": silent("this tokenizer adds none", add_special_tokens=False),
    "prompt_logprobs": same(prompt_logprobs=2),
    "priority": silent("requests are served as they come", priority=1),
    "request_id": same(request_id="mine"),
    "session_id": silent("for routers", session_id="s"),
    "return_token_ids": same(return_token_ids=True),
    "routed_experts_prompt_start": silent("no experts are returned", routed_experts_prompt_start=2),
    "return_token_offsets": silent("of rendered prompts", return_token_offsets=True),
    "return_weight_versions": same(return_weight_versions=True),
    "mm_payload": silent("of rendered prompts", mm_payload="none"),
    "return_mm_kwargs": silent("of rendered prompts", return_mm_kwargs=False),
    "cache_salt": silent("another part of the prefix cache", cache_salt="salt"),
    "kv_transfer_params": silent("there is no connector", kv_transfer_params={"do_remote_decode": False}),
    "ec_transfer_params": silent("there is no connector", ec_transfer_params={"some": "thing"}),
    "vllm_xargs": silent("for logits processors of the user's own", vllm_xargs={"step": 3}),
    "repetition_detection": same(
        **REPEATED, repetition_detection={"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 4}
    ),
}  # fmt: skip

COMPLETION = {
    **HTTP,
    "prompt": same(prompt=["12 + 30 =", "Once"]),
    "echo": same(echo=True),
    "logprobs": same(logprobs=2),
    "max_tokens": same(max_tokens=7),
    "suffix": same(suffix="!"),
    "logprob_token_ids": same(logprobs=3, logprob_token_ids=[70, 71, 72]),
    "return_tokens_as_token_ids": same(logprobs=1, return_tokens_as_token_ids=True),
    "prompt_embeds": same(prompt_embeds="AAAA"),
    "thinking_token_budget": same(prompt="Tom thinks: <think>", thinking_token_budget=3),
}

CHAT = {
    **HTTP,
    "messages": same(messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]),
    "logprobs": same(logprobs=True),
    "top_logprobs": same(logprobs=True, top_logprobs=2),
    "logprob_token_ids": same(logprobs=True, logprob_token_ids=[70, 71, 72]),
    "return_tokens_as_token_ids": same(logprobs=True, return_tokens_as_token_ids=True),
    "max_tokens": same(max_tokens=7),
    "max_completion_tokens": same(max_completion_tokens=7),
    "tools": same(tools=TOOLS),
    "tool_choice": same(tools=TOOLS, tool_choice="required", max_tokens=90),
    "skip_special_tokens": silent(
        "parsers of reasoning and tools keep special tokens", allowed_token_ids=[PAD], skip_special_tokens=False
    ),
    "parallel_tool_calls": silent(
        "the answers have one call", tools=TOOLS, parallel_tool_calls=False, tool_choice="required", max_tokens=180
    ),
    "reasoning_effort": same(reasoning_effort="low"),
    "thinking_token_budget": same(
        messages=[{"role": "user", "content": "Think: <think>"}], thinking_token_budget=3, max_tokens=40
    ),
    "include_reasoning": same(include_reasoning=False),
    "echo": same(
        messages=[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}],
        echo=True, add_generation_prompt=False, continue_final_message=True,
    ),
    "add_generation_prompt": same(add_generation_prompt=False),
    "continue_final_message": same(
        messages=[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}],
        add_generation_prompt=False, continue_final_message=True,
    ),
    "documents": same(documents=[{"title": "Plums", "text": "There are 4."}]),
    "chat_template": same(chat_template="{{ messages }}"),  # refused where the server does not trust it
    "chat_template_kwargs": same(chat_template_kwargs={"enable_thinking": False}),
    "media_io_kwargs": same(media_io_kwargs={"image": {}}),  # the same
    "mm_processor_kwargs": same(mm_processor_kwargs={"size": 1}),  # the same
    "return_prompt_text": same(return_prompt_text=True),
}  # fmt: skip

STRUCTURED = {
    "json": same(structured_outputs={"json": SCHEMA}, max_tokens=60),
    "regex": same(structured_outputs={"regex": "[a-f]{3}-[0-9]{4}"}),
    "choice": same(structured_outputs={"choice": ["left side", "leaves", "right"]}),
    "grammar": same(structured_outputs={"grammar": 'root ::= "buy " [1-9] [0-9]? " plums"'}),
    "json_object": same(structured_outputs={"json_object": True}, max_tokens=60),
    "structural_tag": same(structured_outputs={"structural_tag": json.dumps(TAGS)}, max_tokens=60),
    **{
        name: silent("vLLM heeds the server's own settings", structured_outputs={"json": SCHEMA, name: value})
        for name, value in {
            "disable_any_whitespace": True,
            "disable_additional_properties": True,
            "whitespace_pattern": " ?",
        }.items()
    },
}

REPETITION = {
    name: same(**REPEATED, repetition_detection={"max_pattern_size": 2, "min_pattern_size": 2, "min_count": 3})
    for name in ("max_pattern_size", "min_pattern_size", "min_count")
}

STREAM_OPTIONS = {
    "include_usage": same(stream=True, stream_options={"include_usage": True}),
    "continuous_usage_stats": same(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
}

# Of the engine, for programs that hold one
SAMPLING = {
    "n": same(n=3, temperature=1.0, top_k=1),
    "presence_penalty": same(presence_penalty=1.5),
    "frequency_penalty": same(frequency_penalty=1.2),
    "repetition_penalty": same(repetition_penalty=1.4),
    "temperature": drawn(),
    "watermarking": silent("served without a watermark", watermarking=True),
    "top_p": drawn(top_p=0.5),
    "top_k": drawn(top_k=4),
    "min_p": refused(BY_VLLM, min_p=0.1, temperature=1.0),
    "seed": drawn(),
    "stop": same(**STOP),
    "stop_token_ids": same(**STOPS),
    "ignore_eos": same(allowed_token_ids=[END], ignore_eos=True),
    "max_tokens": same(max_tokens=7),
    "min_tokens": same(**STOPS, min_tokens=12),
    "logprobs": same(logprobs=2),
    "prompt_logprobs": same(prompt_logprobs=2),
    "prompt_logprob_token_ids": same(prompt_logprob_token_ids=lambda usual: to_score(usual.prompt_length)),
    "prompt_logprob_start": same(
        prompt_logprob_token_ids=lambda usual: to_score(usual.prompt_length - 3), prompt_logprob_start=3
    ),
    "logprob_token_ids": same(logprob_token_ids=[70, 71, 72]),
    "flat_logprobs": same(logprobs=2, flat_logprobs=True),
    "detokenize": same(detokenize=False),
    "skip_special_tokens": same(allowed_token_ids=[PAD], skip_special_tokens=False),
    "spaces_between_special_tokens": silent(
        "of tokenizers written in Python",
        allowed_token_ids=[PAD], skip_special_tokens=False, spaces_between_special_tokens=False,
    ),
    "include_stop_str_in_output": same(**STOP, include_stop_str_in_output=True),
    "output_kind": inside("how vLLM's servers and clients ask for pieces or for the whole"),
    "stream_interval": inside("the field of the HTTP requests is sent"),
    "skip_clone": inside("set by vLLM's servers"),
    "output_text_buffer_length": inside("computed of `stop`"),
    "structured_outputs": inside("StructuredOutputsParams"),
    "logit_bias": refused(BY_VLLM, logit_bias={70: 5.0}),
    "allowed_token_ids": same(allowed_token_ids=LETTERS),
    "extra_args": silent("for logits processors of the user's own", extra_args={"step": 3}),
    "bad_words": same(bad_words=lambda usual: [usual.text[4], usual.text[6:8]]),
    "skip_reading_prefix_cache": silent("the prompt is read again", skip_reading_prefix_cache=True),
    "thinking_token_budget": inside("the field of the HTTP requests is sent"),
    "repetition_detection": inside("RepetitionDetectionParams"),
    "routed_experts_prompt_start": silent("no experts are returned", routed_experts_prompt_start=2),
    "trace_decode_token_ids": refused("not supported with speculative decoding", trace_decode_token_ids=[70, 71]),
}  # fmt: skip

# `LLM.beam_search` takes them: `test_matrix_requests.py`
BEAMS = {
    name: inside("of a program that holds an engine, or made of the HTTP request's fields")
    for name in (
        "beam_width", "max_tokens", "ignore_eos", "temperature", "length_penalty", "include_stop_str_in_output",
        "structured_outputs", "skip_special_tokens", "watermarking", "allowed_token_ids",
    )
}  # fmt: skip

TABLES = {
    "SamplingParams": SAMPLING,
    "StructuredOutputsParams": STRUCTURED,
    "RepetitionDetectionParams": REPETITION,
    "BeamSearchParams": BEAMS,
    "StreamOptions": STREAM_OPTIONS,
    "CompletionRequest": COMPLETION,
    "ChatCompletionRequest": CHAT,
}
