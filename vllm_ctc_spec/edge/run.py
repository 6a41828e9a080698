"""`vllm-ctc edge`: one answer, drafted on this device and verified by a server."""

import json
import os
import random
import sys
from collections.abc import Sequence
from typing import TextIO

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vllm_ctc_spec.edge.config import MODEL, PROMPTS, EdgeConfig
from vllm_ctc_spec.edge.devices import ModelDevice, NgramDevice
from vllm_ctc_spec.edge.loop import Client, Watcher
from vllm_ctc_spec.edge.protocol import Device, ServerAway, Text
from vllm_ctc_spec.edge.server import DraftRounds, PromptRounds, Refused, Server
from vllm_ctc_spec.errors import EdgeError
from vllm_ctc_spec.training.config import DTYPES, default_dtype
from vllm_ctc_spec.training.target import UNLOADABLE

MAX_SEED = 2**31
PROBES = 512  # tokens of the vocabulary by which tokenizers are compared
# Where tokenizers of one family differ: digits, white space, other scripts, signs that are no text.
PROBE_TEXT = 'The  quick\tbrown fox\'s 1234567890 jumps…\n\n  être 東京 Ω мир עולם 🙂 {"a": [1, -2.5e3]}\r\n'


def run(config: EdgeConfig) -> str:
    """Write the answer to standard output; returns a line about who said what."""
    prompt = sys.stdin.read() if config.prompt is None else config.prompt
    if not prompt.strip():
        raise EdgeError("the prompt is empty: give --prompt TEXT, or the text on standard input.")
    tokenizer = load_tokenizer(config.model)
    server = Server(config.server, config.api_key or os.environ.get("OPENAI_API_KEY"), config.timeout)
    try:
        check_tokenizer(tokenizer, server)
        tokens = prompt_tokens(config, server, prompt)
        seed = random.randrange(MAX_SEED) if config.seed is None else config.seed
        rounds = start_rounds(config, server, tokens, seed)
    except ServerAway as error:
        reason = f"the server at {config.server} does not answer ({error})"
        raise EdgeError(f"{reason}: start again when it does.") from error
    device = load_device(config, tokenizer, seed)
    printer = Printer(tokenizer, sys.stdout)
    text = Text(tokens, min(config.max_tokens, server.max_model_len - len(tokens)), end_tokens(tokenizer))
    try:
        Client(device, rounds, config.policy, config.patience, printer).complete(text)
    except Refused as refusal:
        raise EdgeError(f"the server at {config.server} refuses to go on ({refusal}).") from refusal
    finally:
        printer.finish(text)
    if config.json:
        config.json.write_text(json.dumps(record(text, tokenizer, config, seed), indent=1) + "\n", encoding="utf-8")
    return summary(text, server.model, getattr(rounds, "refusal", None))


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except UNLOADABLE as error:
        raise EdgeError(unloadable(folder, "tokenizer", error)) from error


def load_device(config: EdgeConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Device:
    if config.draft_with != MODEL:
        return NgramDevice()
    try:
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, DTYPES[default_dtype()]))
    except UNLOADABLE as error:
        raise EdgeError(unloadable(config.model, "causal language model", error)) from error
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return ModelDevice(model, len(tokenizer), config.temperature, seed)


def unloadable(folder: str, what: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"--model {folder} holds no {what} that can be loaded ({type(error).__name__}: {reason})."


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, server: Server) -> None:
    """Both sides speak of tokens by their ids.

    Raises:
        EdgeError: the server's tokenizer is another one.
    """
    step = max(len(tokenizer) // PROBES, 1)
    sample = tokenizer.decode(sorted({*range(0, len(tokenizer), step), len(tokenizer) - 1}))
    for probe in (PROBE_TEXT, sample):
        if tokenizer.encode(probe, add_special_tokens=False) != server.tokenize(prompt=probe, add_special_tokens=False):
            raise EdgeError(
                f"--model {tokenizer.name_or_path} has another vocabulary than {server.model}, which {server.url} "
                "serves: drafts are token ids, so take a small model of the same family."
            )


def prompt_tokens(config: EdgeConfig, server: Server, prompt: str) -> list[int]:
    if config.completion:
        tokens = server.tokenize(prompt=prompt)
    else:
        tokens = server.tokenize(messages=[{"role": "user", "content": prompt}])
    if len(tokens) >= server.max_model_len:
        raise EdgeError(f"the prompt has {len(tokens)} tokens, and {server.model} takes {server.max_model_len} in all.")
    return tokens


def start_rounds(config: EdgeConfig, server: Server, tokens: Sequence[int], seed: int) -> DraftRounds | PromptRounds:
    if config.rounds == PROMPTS:
        return PromptRounds(server, sampling(config, seed))
    rounds = DraftRounds(server, sampling(config, seed))
    rounds.probe(tokens)
    return rounds


def sampling(config: EdgeConfig, seed: int) -> dict[str, float | int]:
    return {"temperature": config.temperature} | ({"seed": seed} if config.temperature > 0 else {})


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}


class Printer(Watcher):
    """Writes verified text as it comes. On a terminal the device's own words, while the server is away, are in
    brackets; if the server comes back, what it says follows them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO):
        self.tokenizer, self.out = tokenizer, out
        self._verified = ""  # that was written
        self._alone: str | None = None  # what is written in open brackets

    def verified(self, text: Text) -> None:
        self._close()
        whole = decode(self.tokenizer, text.verified)
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # the middle of a character
            self._verified = self._write(whole, self._verified)

    def alone(self, text: Text, reason: str) -> None:
        if self._alone is None:
            print(f"vllm-ctc: the server is away ({reason}); unverified from here on.", file=sys.stderr, flush=True)
            self._alone = ""
            if self.out.isatty():
                self.out.write("[")
        if self.out.isatty():
            self._alone = self._write(decode(self.tokenizer, text.unverified), self._alone)

    def finish(self, text: Text) -> None:
        self._close()
        self._write(decode(self.tokenizer, text.verified), self._verified)
        if text.drafts and not self.out.isatty():
            self.out.write(f"[{decode(self.tokenizer, text.unverified)}]")
        self.out.write("\n")
        self.out.flush()

    def _close(self) -> None:
        if self._alone is not None and self.out.isatty():
            self.out.write("]")
        self._alone = None

    def _write(self, whole: str, written: str) -> str:
        self.out.write(whole[len(written) :])
        self.out.flush()
        return whole


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def summary(text: Text, model: str, refusal: str | None) -> str:
    counts, alone = text.counts, len(text.drafts)
    said = f"{len(text.verified) + alone} tokens, {len(text.verified)} verified by {model}"
    said += f", the last {alone} by this device alone" if alone else ""
    said += f"; {counts.rounds} rounds, {counts.accepted} of {counts.drafted} drafts accepted."
    if refusal:
        said += f" The server takes no drafts ({refusal}) and streamed: see --rounds {PROMPTS}."
    return said


def record(text: Text, tokenizer: PreTrainedTokenizerBase, config: EdgeConfig, seed: int) -> dict:
    return {
        "verified_text": decode(tokenizer, text.verified),
        "unverified_text": decode(tokenizer, text.unverified),
        "prompt_tokens": list(text.prompt),
        "verified_tokens": text.verified,
        "unverified_tokens": text.unverified,
        "finished": text.finished,
        "seed": seed if config.temperature > 0 else None,
        "rounds": text.counts.rounds,
        "lost_rounds": text.counts.lost_rounds,
        "drafted": text.counts.drafted,
        "accepted": text.counts.accepted,
    }
