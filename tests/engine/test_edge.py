"""Edge clients and a server that takes their drafts: the text is the server's own, whatever they draft."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from server import Server
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_ctc_spec.edge.devices import ModelDevice, NgramDevice
from vllm_ctc_spec.edge.loop import Client, Patience, Watcher
from vllm_ctc_spec.edge.protocol import Drafted, Policy, Text
from vllm_ctc_spec.edge.run import check_tokenizer
from vllm_ctc_spec.edge.server import DraftRounds, PromptRounds, Refused
from vllm_ctc_spec.edge.server import Server as EdgeServer
from vllm_ctc_spec.errors import EdgeError
from vllm_ctc_spec.serving import plugin

pytestmark = pytest.mark.slow
QUESTIONS = (
    "Mira picks 12 plums and eats 4 of them. How many plums are left?",
    "A box holds 6 eggs. How many eggs are in 7 boxes?",
    "Omar walks 3 miles a day for 2 weeks. How many miles does he walk?",
    "Lena has $50. She buys 3 books for $9 each. How much money does she have left?",
)
MAX_TOKENS, SEED = 64, 11


@pytest.fixture(scope="module", params=["ctc+client", "client"])
def server(request, demo_pair, tmp_path_factory):
    config = {"method": "ctc", "ctc_sources": request.param, "num_speculative_tokens": 8}
    if "ctc" in request.param.split("+"):
        config["model"] = str(demo_pair.drafter)
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    with pytest.MonkeyPatch.context() as environment:
        for name in (plugin.V2_VARIABLE, "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
            environment.delenv(name, raising=False)
        args = ("--max-num-seqs", "16", "--max-model-len", "512")
        starting = Server(demo_pair.target, config, log_path=log_path, extra_args=args)
    with starting as running:
        yield running


@pytest.fixture
def edge(server):
    edge = EdgeServer(server.base_url, timeout=60)
    yield edge
    edge.close()


@pytest.fixture(scope="module")
def model(demo_pair):
    return AutoModelForCausalLM.from_pretrained(demo_pair.target, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(demo_pair):
    return AutoTokenizer.from_pretrained(demo_pair.target)


def sampling(temperature: float) -> dict:
    return {"temperature": temperature, "seed": SEED}


def own(edge: EdgeServer, prompt: list[int], temperature: float) -> list[int]:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "return_token_ids": True, **sampling(temperature)}
    return edge.complete(body)["choices"][0]["token_ids"]


def chat(edge: EdgeServer, question: str) -> list[int]:
    return edge.tokenize(messages=[{"role": "user", "content": question}])


class Noisy:
    """The target itself, wrong now and then: with any token, or with those at the ends of the vocabulary."""

    one_at_a_time = threading.Lock()  # devices share a model, and each has a cache of its own

    def __init__(self, device: ModelDevice, agreement: float, seed: int):
        self.device, self.agreement, self.rng = device, agreement, random.Random(seed)

    def draft(self, tokens):
        if self.rng.random() < self.agreement:
            with self.one_at_a_time:
                return self.device.draft(tokens)
        last = self.device.vocab_size - 1
        return Drafted(self.rng.choice([0, last, self.rng.randint(0, last)]), 1.0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rounds", [DraftRounds, PromptRounds])
def test_the_text_is_the_servers_own(edge, model, tokenizer, rounds, temperature):
    """Several devices at once, from one that is always right to one that never is."""
    prompts = [chat(edge, question) for question in QUESTIONS]
    expected = [own(edge, prompt, temperature) for prompt in prompts]

    def answer(number: int) -> Text:
        device = Noisy(ModelDevice(model, len(tokenizer), temperature, SEED), (1.0, 0.9, 0.6, 0.0)[number], number)
        verifier = rounds(edge, sampling(temperature))
        client = Client(device, verifier, Policy(5, 0.0, 6), Patience(60))
        text = client.complete(Text(prompts[number], MAX_TOKENS, {tokenizer.eos_token_id}))
        assert rounds is PromptRounds or verifier.refusal is None
        return text

    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(answer, range(len(prompts))))
    assert [text.verified for text in texts] == expected
    perfect, *_, hopeless = counts = [text.counts for text in texts]
    assert perfect.accepted == perfect.drafted > 0 and hopeless.accepted < hopeless.drafted / 4
    assert all(count.lost_rounds == 0 for count in counts)


def test_drafts_save_the_server_steps(request, server, edge, model, tokenizer):
    """A perfect draft of eight is confirmed in two steps."""
    if request.node.callspec.params["server"] != "client":
        pytest.skip("with a drafter the server needs few steps by itself")
    prompt = chat(edge, QUESTIONS[0])
    text = Text(prompt, MAX_TOKENS, {tokenizer.eos_token_id})
    before = server.metrics()["vllm:iteration_tokens_total_count"]
    Client(ModelDevice(model, len(tokenizer)), DraftRounds(edge, sampling(0.0)), Policy(8, 0.0, 9)).complete(text)
    steps = server.metrics()["vllm:iteration_tokens_total_count"] - before
    assert text.counts.accepted == text.counts.drafted and steps < len(text.verified) / 2


def test_drafts_that_no_vocabulary_has_are_refused_and_do_no_harm(edge):
    class Huge:
        def draft(self, tokens):
            return Drafted(2**31, 1.0)

    prompt, verifier = chat(edge, QUESTIONS[1]), DraftRounds(edge, sampling(0.0))
    text = Client(Huge(), verifier, Policy(4, 0.0, 5)).complete(Text(prompt, MAX_TOKENS))
    assert text.verified == own(edge, prompt, 0.0) and "the vocabulary of" in verifier.refusal


def test_a_client_that_leaves_in_mid_round_leaves_nothing_behind(server, edge, model, tokenizer):
    prompt = chat(edge, QUESTIONS[2])
    expected = own(edge, prompt, 0.0)
    for _ in range(4):
        reply = DraftRounds(edge, sampling(0.0)).ask(prompt, expected[:8], MAX_TOKENS)
        assert reply.next(60) is not None
        reply.close()
    text = Text(prompt, MAX_TOKENS)
    Client(
        Noisy(ModelDevice(model, len(tokenizer)), 0.5, 1), DraftRounds(edge, sampling(0.0)), Policy(4, 0.0, 5)
    ).complete(text)
    assert text.verified == expected


def test_another_tokenizer_is_noticed(edge, tokenizer, tiny_pair):
    check_tokenizer(tokenizer, edge)
    with pytest.raises(EdgeError, match="has another vocabulary than target"):
        check_tokenizer(AutoTokenizer.from_pretrained(tiny_pair.target), edge)


def test_what_the_server_refuses_is_no_absence(edge):
    with pytest.raises(Refused, match="HTTP 400"):
        Client(NgramDevice(), DraftRounds(edge, {"temperature": -1.0})).complete(Text([1], 5))


def test_a_server_that_is_killed_leaves_the_device_alone(demo_pair, model, tokenizer, tmp_path):
    """What it had verified stays; what follows is the device's, and says so."""

    class Killing(Watcher):
        reasons: list[str] = []

        def verified(self, text: Text) -> None:
            if len(text.verified) >= 16:
                for process in running.processes():
                    process.kill()

        def alone(self, text: Text, reason: str) -> None:
            self.reasons.append(reason)

    starting = Server(demo_pair.target, log_path=tmp_path / "server.log", env={plugin.V2_VARIABLE: "1"})
    with starting as running:
        edge = EdgeServer(running.base_url, timeout=60)
        prompt = chat(edge, QUESTIONS[0])
        expected, watcher = own(edge, prompt, 0.0), Killing()
        device = ModelDevice(model, len(tokenizer))
        client = Client(device, DraftRounds(edge, sampling(0.0)), Policy(4, 0.0, 5), Patience(5, 0.1), watcher)
        text = client.complete(Text(prompt, len(expected)))
    assert 16 <= len(text.verified) < len(expected) and not text.finished and watcher.reasons
    assert text.verified + text.unverified == expected  # the device is the target itself
