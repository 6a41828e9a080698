"""A request's guess of its answer is token ids when it leaves the API server, or an error of that request."""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_ctc_spec.serving import guesses
from vllm_ctc_spec.serving.options import ServingOptions

MODEL = SimpleNamespace(max_model_len=8, get_vocab_size=lambda: 10)
CLIENT = ServingOptions(draft="tree", sources="ctc+client")


class Tokenizer:
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [int(character) for character in text]


def check(extra_args: dict, options=CLIENT, tokenizer=None) -> dict:
    params = SamplingParams(extra_args=extra_args)
    guesses.check(params, MODEL, options, tokenizer)
    return params.extra_args


def test_ids_are_kept_and_texts_become_ids():
    assert check({"ctc_draft": [0, 9], "other": 1}) == {"ctc_draft": [0, 9], "other": 1}
    assert check({"ctc_draft": []}) == {"ctc_draft": []}
    assert check({"ctc_draft_text": "123"}, tokenizer=Tokenizer()) == {"ctc_draft": [1, 2, 3]}


def test_the_callers_dictionary_stays_as_it_is():
    given = {"ctc_draft_text": "12"}
    check(given, tokenizer=Tokenizer())
    assert given == {"ctc_draft_text": "12"}


@pytest.mark.parametrize(
    ("extra_args", "says"),
    [
        ({"ctc_draft": "12"}, "must be a list of token ids"),
        ({"ctc_draft": [1.0]}, "must be a list of token ids"),
        ({"ctc_draft": [True]}, "must be a list of token ids"),
        ({"ctc_draft": None}, "must be a list of token ids"),
        ({"ctc_draft": [10]}, "holds ids that the vocabulary of 10 tokens does not have"),
        ({"ctc_draft": [3, -1]}, "holds ids that the vocabulary"),
        ({"ctc_draft": [1] * 9}, "has 9 token ids, and the context at most 8"),
        ({"ctc_draft": [1], "ctc_draft_text": "1"}, "give one of them"),
        ({"ctc_draft_text": 5}, "must be a text"),
        ({"ctc_draft_text": "1" * 9}, "has 9 token ids"),
        ({"ctc_draft_text": "1" * 129}, "is longer than the context"),
    ],
)
def test_one_sentence_for_what_is_wrong(extra_args, says):
    with pytest.raises(VLLMValidationError, match=says):
        check(extra_args, tokenizer=Tokenizer())


def test_servers_that_take_no_guess_say_so():
    with pytest.raises(VLLMValidationError, match='start it with "ctc_sources": "ctc\\+client"'):
        check({"ctc_draft": [1]}, ServingOptions(draft="chain"))
    with pytest.raises(VLLMValidationError, match="has no tokenizer"):
        check({"ctc_draft_text": "1"})


def test_a_server_that_does_not_draft_by_this_plugin_is_left_alone():
    assert check({"ctc_draft": "anything"}, options=None) == {"ctc_draft": "anything"}


def test_vllm_asks_for_every_request():
    from vllm_ctc_spec.serving import plugin

    seen = []
    verify = plugin._checking_guess(lambda self, *args: seen.append(args))
    speculative = SimpleNamespace(ctc_options=CLIENT)
    verify(SamplingParams(), MODEL, speculative, None, None)
    params = SamplingParams(extra_args={"ctc_draft": [3]})
    verify(params, MODEL, speculative, None, None)
    assert len(seen) == 2 and params.extra_args == {"ctc_draft": [3]}
    with pytest.raises(VLLMValidationError):
        verify(SamplingParams(extra_args={"ctc_draft": [30]}), MODEL, speculative, None, None)
