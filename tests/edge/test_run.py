"""`vllm-ctc edge` from the command line to the last line that it prints."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_ctc_spec import cli
from vllm_ctc_spec.edge.config import EdgeConfig
from vllm_ctc_spec.edge.protocol import Drafted, Text
from vllm_ctc_spec.edge.run import Printer
from vllm_ctc_spec.edge.server import DraftRounds

from .fake import answer
from .fake_http import MAX_MODEL_LEN, running

LETTERS = "xabc"  # tokens 0 to 3 of the fake server; the first ends a text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with the fake server's tokens."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(LETTERS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="x").save_pretrained(folder)
    config = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def encode(text: str) -> list[int]:
    return [LETTERS.index(letter) if letter in LETTERS else 1 for letter in text]


@pytest.fixture
def fake():
    with running() as (url, behaviour):
        behaviour.encode = encode
        yield url, behaviour


PROMPT = next("a" * length for length in range(1, 50) if len(answer([1] * length, 30)) == 30)  # it does not end early


def edge(url, folder, *more: str) -> int:
    return cli.main(["edge", "--server", url, "--model", str(folder), "--prompt", PROMPT, "--max-tokens", "30", *more])


def spoken(tokens: list[int]) -> str:
    return " ".join(LETTERS[token] for token in tokens if token)


@pytest.mark.parametrize("rounds", ["drafts", "prompts"])
@pytest.mark.parametrize("draft_with", ["model", "ngram"])
def test_the_servers_own_text_is_printed(fake, folder, rounds, draft_with, tmp_path, capsys):
    file = tmp_path / "answer.json"
    assert edge(fake[0], folder, "--rounds", rounds, "--draft-with", draft_with, "--json", str(file)) == 0
    expected, said = answer(encode(PROMPT), 30), capsys.readouterr()
    assert said.out == spoken(expected) + "\n"
    assert f"{len(expected)} tokens, {len(expected)} verified by fake; " in said.err
    written = json.loads(file.read_text())
    assert (written["verified_tokens"], written["unverified_tokens"]) == (expected, [])
    assert written["finished"] and written["rounds"] > 0 and written["seed"] is None


@pytest.mark.parametrize(("options", "sampling"), [([], {"temperature": 0.0}), (
    ["--temperature", "0.5", "--seed", "3"], {"temperature": 0.5, "seed": 3})])  # fmt: skip
def test_the_server_is_asked_as_the_options_say(fake, folder, options, sampling):
    edge(fake[0], folder, "--draft-tokens", "2", "--round-tokens", "5", "--min-confidence", "0", *options)
    bodies = fake[1].bodies[1:]  # the first one is the probe
    assert all({key: body[key] for key in body if key in ("temperature", "seed")} == sampling for body in bodies)
    assert {body["max_tokens"] for body in bodies[:-1]} == {5}
    assert max(len(body["vllm_xargs"]["ctc_draft"]) for body in bodies) == 2


@pytest.fixture(autouse=True)
def no_key_of_this_machine(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_a_sampled_answer_has_a_seed_in_any_case(fake, folder):
    edge(fake[0], folder, "--temperature", "1")
    assert len({body["seed"] for body in fake[1].bodies[1:]}) == 1


def test_the_key_comes_from_the_option_or_the_environment(fake, folder, monkeypatch):
    edge(fake[0], folder)
    monkeypatch.setenv("OPENAI_API_KEY", "outside")
    edge(fake[0], folder)
    edge(fake[0], folder, "--api-key", "given")
    assert fake[1].keys == [None, "Bearer outside", "Bearer given"]


def test_the_answer_fits_into_the_servers_context(fake, folder):
    edge(fake[0], folder, "--max-tokens", "1000", "--round-tokens", "1000")
    body = fake[1].bodies[1]
    assert len(body["prompt"]) + body["max_tokens"] == MAX_MODEL_LEN


def test_a_server_that_ignores_drafts_streams(fake, folder, capsys):
    fake[1].ignores_drafts = True
    assert edge(fake[0], folder) == 0
    said = capsys.readouterr()
    assert said.out == spoken(answer(encode(PROMPT), 30)) + "\n" and len(fake[1].bodies) == 2
    assert "The server takes no drafts (it ignores them) and streamed: see --rounds prompts." in said.err


def test_a_server_that_takes_no_drafts_is_named(fake, folder, capsys):
    fake[1].refuses_drafts = True
    assert edge(fake[0], folder, "--min-confidence", "0") == 0
    said = capsys.readouterr()
    assert said.out == spoken(answer(encode(PROMPT), 30)) + "\n"
    assert (
        "The server takes no drafts (HTTP 400: unknown key ctc_draft) and streamed: see --rounds prompts." in said.err
    )


def test_without_the_server_the_device_answers_in_brackets(fake, folder, capsys, monkeypatch):
    monkeypatch.setattr(EdgeConfig, "patience", EdgeConfig("http://h", "m", timeout=0.2).patience.__class__(0.2, 0.01))
    monkeypatch.setattr(DraftRounds, "probe", lambda self, tokens: setattr(fake[1], "status", 503))
    assert edge(fake[0], folder) == 0
    said = capsys.readouterr()
    assert said.out.startswith("[") and said.out.endswith("]\n")
    assert "the server is away (HTTP 503: as it was told); unverified from here on" in said.err
    assert ", 0 verified by fake, the last " in said.err and " by this device alone" in said.err


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"encode": lambda text: [7] + encode(text)}, [], "has another vocabulary than fake"),
        ({}, ["--prompt", " "], "the prompt is empty"),
        ({}, ["--prompt", "a" * MAX_MODEL_LEN], f"the prompt has {MAX_MODEL_LEN} tokens, and fake takes"),
        ({"status": 400}, [], "refuses to go on (HTTP 400: as it was told)"),
        ({"status": 500}, [], "does not answer (HTTP 500: as it was told): start again when it does"),
        ({"hides_token_ids": True}, [], "returns no token ids"),
        ({}, ["--model", "nowhere"], "--model nowhere holds no tokenizer that can be loaded"),
        ({}, ["--server", "localhost:8000"], "--server must be a URL such as http://host:8000"),
        ({}, ["--server", "http://127.0.0.1:1"], "no vLLM server answers at http://127.0.0.1:1"),
        ({}, ["--max-tokens", "0"], "--max-tokens must be 1 or more, not 0"),
        ({}, ["--draft-tokens", "-1"], "--draft-tokens must be 0 or more"),
        ({}, ["--round-tokens", "0"], "--round-tokens must be 1 or more"),
        ({}, ["--temperature", "nan"], "--temperature must be 0 or more"),
        ({}, ["--min-confidence", "1.5"], "--min-confidence must be between 0 and 1"),
        ({}, ["--timeout", "0"], "--timeout must be more than 0"),
    ],
)
def test_bad_input_is_one_sentence(fake, folder, change, options, message, capsys):
    for name, value in change.items():
        setattr(fake[1], name, value)
    assert edge(fake[0], folder, *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


class Letters:
    """A decoder whose token 9 is the half of a character."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join("\N{REPLACEMENT CHARACTER}" if token == 9 else "0123456"[token] for token in tokens)


def test_a_terminal_shows_what_is_not_verified_and_what_became_of_it(capsys):
    out, text = Terminal(), Text([1], 10)
    printer = Printer(Letters(), out)
    text.verified = [1, 2]
    printer.verified(text)
    for token in (3, 4):
        text.drafts.append(Drafted(token, 1.0))
        printer.alone(text, "why")
    text.verified, text.drafts = [1, 2, 3, 5], []
    printer.verified(text)
    text.verified = [1, 2, 3, 5, 9]
    printer.verified(text)
    text.verified = [1, 2, 3, 5, 6]
    text.drafts = [Drafted(1, 1.0)]
    printer.alone(text, "why")
    printer.finish(text)
    assert out.text == "12[34]35[1]6\n"
    assert capsys.readouterr().err.count("the server is away (why)") == 2
