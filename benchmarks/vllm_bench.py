"""`vllm bench serve` in this process: the options and the code of the command, without its ten seconds of imports for
every run."""

import gc
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from server import Endpoint

# Set before vLLM is imported: tokenizers are local folders.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class BenchError(RuntimeError):
    """Requests failed."""


@dataclass(frozen=True)
class Load:
    """The requests to a server."""

    prompts: Path  # in the format of vLLM's dataset `custom`
    num_prompts: int
    max_tokens: int
    concurrency: int
    temperature: float


class VllmBench:
    """`vllm bench serve` for servers of one target."""

    def __init__(self, target: Path, log_path: Path):
        from transformers import AutoTokenizer
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.target = target
        self.tokenizer = AutoTokenizer.from_pretrained(target)
        self.log_path = log_path
        self._parser = FlexibleArgumentParser()
        add_cli_args(self._parser)
        self._main = main

    def run(self, server: Endpoint, load: Load, result: Path) -> dict:
        """One run, saved as `result`; the command's output goes to the log."""
        args = self._parser.parse_args(self.arguments(server, load, result))
        bypass_proxy(server.base_url)
        with self.log_path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                figures = self._main(args)
            finally:
                gc.unfreeze()  # vLLM freezes all objects; at exit, libraries would report them as leaked
        if figures["failed"]:
            reason = next(error for error in figures["errors"] if error).strip().splitlines()[-1]
            failed = f"{figures['failed']} of {load.num_prompts} requests"
            raise BenchError(f"{failed} to {server.base_url} failed, the first with: {reason}")
        return figures

    def arguments(self, server: Endpoint, load: Load, result: Path) -> list[str]:
        """Arguments of `vllm bench serve`. Prompts go to the chat endpoint as they are: the server applies the chat
        template, once. They keep their order, so that answers can be compared across runs."""
        return [
            "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", server.base_url,
            "--model", server.model, "--tokenizer", str(self.target),
            "--dataset-name", "custom", "--dataset-path", str(load.prompts), "--skip-chat-template",
            "--disable-shuffle", "--num-prompts", str(load.num_prompts), "--custom-output-len", str(load.max_tokens),
            "--max-concurrency", str(load.concurrency), "--temperature", f"{load.temperature:g}",
            "--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name,
            "--disable-tqdm",
        ]  # fmt: skip


def bypass_proxy(url: str) -> None:
    """vLLM's client heeds the environment's proxies; none may stand between a benchmark and its server."""
    hosts = [*filter(None, os.environ.get("no_proxy", "").split(",")), urlsplit(url).hostname]
    os.environ["no_proxy"] = ",".join(dict.fromkeys(hosts))
