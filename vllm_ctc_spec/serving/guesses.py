"""A request's guess of its answer, `"vllm_xargs": {"ctc_draft": [ids]}` or `{"ctc_draft_text": "..."}`, judged where
the request comes in: a wrong one is an error of that request (HTTP 400), and workers get token ids only."""

from typing import Any

from vllm.exceptions import VLLMValidationError

TOKENS, TEXT = "ctc_draft", "ctc_draft_text"
KEYS = frozenset({TOKENS, TEXT})
# Of a text, for each token of the context: four times as many as usual. Other requests wait while it is tokenised.
MOST_CHARACTERS = 16


def check(params: Any, model_config: Any, options: Any, tokenizer: Any) -> None:
    """Put the guess's token ids into `params.extra_args` (VLLMValidationError: a sentence).

    params: vLLM's SamplingParams; options: `ServingOptions`, None where the server does not draft by this plugin, which
    then has no say about the request.
    """
    if options is None:
        return
    if "client" not in options.source_names:
        raise _error(
            f'This server takes no guess of an answer: start it with "ctc_sources": "{options.sources}+client".'
        )
    given = dict(params.extra_args)
    if KEYS <= given.keys():
        raise _error(f"{TOKENS} and {TEXT} both guess the answer; give one of them.")
    guess = _tokens_of(given.pop(TEXT), model_config, tokenizer) if TEXT in given else given[TOKENS]
    most, vocab_size = model_config.max_model_len, model_config.get_vocab_size()
    if not isinstance(guess, list) or any(type(token) is not int for token in guess):
        raise _error(f"{TOKENS} must be a list of token ids.")
    if len(guess) > most:
        raise _error(f"{TOKENS} has {len(guess)} token ids, and the context at most {most}; shorten the guess.")
    if guess and not (min(guess) >= 0 and max(guess) < vocab_size):
        raise _error(f"{TOKENS} holds ids that the vocabulary of {vocab_size} tokens does not have.")
    params.extra_args = {**given, TOKENS: guess}


def _tokens_of(text: Any, model_config: Any, tokenizer: Any) -> list[int]:
    if not isinstance(text, str):
        raise _error(f"{TEXT} must be a text.")
    if len(text) > MOST_CHARACTERS * model_config.max_model_len:
        raise _error(f"{TEXT} is longer than the context of {model_config.max_model_len} tokens; shorten the guess.")
    if tokenizer is None:
        raise _error(f"This server has no tokenizer; give token ids as {TOKENS} in place of {TEXT}.")
    return list(tokenizer.encode(text, add_special_tokens=False))


def _error(sentence: str) -> VLLMValidationError:
    return VLLMValidationError(sentence, parameter="vllm_xargs")
