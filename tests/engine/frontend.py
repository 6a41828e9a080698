"""vLLM's HTTP server over an engine of this process.

Requests pass through all of vLLM's front end: validation, templates, parsers of reasoning and tools, streaming. Only
the socket and the process border are left out, which cost a start of ten seconds each.
"""

import asyncio
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.outputs import RequestOutput
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient, InprocClient

from .conftest import DRAFTS, Pair, any_scheduling

MODEL = "tiny"


class CoreHere(InprocClient):
    """The engine core as `AsyncLLM` asks for it, stepped in the event loop of the server."""

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)

    def __init__(self, *args):
        super().__init__(*args)
        self.steps: list[list[int]] = []  # the tokens that each step brought to each request

    async def get_supported_tasks_async(self):
        return self.get_supported_tasks()

    async def add_request_async(self, request) -> None:
        self.add_request(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.abort_requests(request_ids)

    async def get_output_async(self):
        while True:
            await asyncio.sleep(0)
            outputs = self.get_output()
            self.steps += [output.new_token_ids for output in outputs.outputs]
            if outputs.outputs or outputs.scheduler_stats:
                return outputs


class Frontend:
    """`vllm serve TARGET`, asked with `ask` and `stream`."""

    def __init__(self, target: Path, speculative: dict | None, options: Sequence[str]):
        self.command = ["serve", str(target), "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"]
        self.command += options
        if speculative:
            self.command += ["--speculative-config", json.dumps(speculative)]
        self.loop = asyncio.new_event_loop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EngineCoreClient, "make_async_mp_client", core_here)
            self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(self._arguments()))
        self.core: CoreHere = self.engine.engine_core
        self.client = self.serve()

    def _arguments(self, *options: str) -> Namespace:
        parser = FlexibleArgumentParser()
        ServeSubcommand().subparser_init(parser.add_subparsers())
        arguments = parser.parse_args([*self.command, *options])
        arguments.model = arguments.model_tag
        return arguments

    def serve(self, reasoning: str = "", tools: str | None = None) -> httpx.AsyncClient:
        """A server with these parsers in front of the engine, which may serve several of them one after the other."""
        manager = self.core.engine_core.structured_output_manager
        manager.reasoner_cls = ReasoningParserManager.get_reasoning_parser(reasoning) if reasoning else None
        options = ["--enable-auto-tool-choice", "--tool-call-parser", tools] if tools else []
        arguments, tasks = self._arguments(*options), self.core.get_supported_tasks()
        arguments.structured_outputs_config.reasoning_parser = reasoning
        app = build_app(arguments, tasks, self.engine.model_config)
        self.loop.run_until_complete(init_app_state(self.engine, app.state, arguments, tasks))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://here", timeout=None)
        return self.client

    def ask(self, path: str, bodies: Sequence[dict]) -> list[httpx.Response]:
        """The answers to requests that come at once."""

        async def all_at_once():
            posts = (self.client.post(f"/v1/{path}", json={"model": MODEL, **body}) for body in bodies)
            return await asyncio.gather(*posts)

        return self.loop.run_until_complete(all_at_once())

    def generate(self, requests: Sequence[tuple[str, SamplingParams]]) -> list[RequestOutput | Exception]:
        """The engine's own answers to requests that come at once, or why it takes one of them not."""

        async def last_output(number: int, prompt: str, parameters: SamplingParams) -> RequestOutput:
            return [output async for output in self.engine.generate(prompt, parameters, f"request {number}")][-1]

        async def all_at_once():
            answers = (last_output(number, *request) for number, request in enumerate(requests))
            return await asyncio.gather(*answers, return_exceptions=True)

        return self.loop.run_until_complete(all_at_once())

    def shutdown(self) -> None:
        self.engine.shutdown()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


SCHEDULING = [
    pytest.param(["--async-scheduling"], id="asynchronous"),  # what GPUs do
    pytest.param([], id="synchronous", marks=pytest.mark.slow),
]


def start(pair: Pair, options: Sequence[str], drafts: Mapping[str, dict] = DRAFTS) -> Iterator[dict]:
    """For a fixture: by kind of draft a front end, and one without a drafter (None)."""
    started: dict[str | None, Frontend] = {}
    with any_scheduling():
        for draft in (None, *drafts):
            drafter = {"method": "ctc", "model": str(pair.drafter), **drafts[draft]} if draft else None
            started[draft] = Frontend(pair.target, drafter, options)
    yield started
    for frontend in started.values():
        frontend.shutdown()


def core_here(vllm_config, executor_class, log_stats, **_) -> CoreHere:
    return CoreHere(vllm_config, executor_class, log_stats)


def chunks(response: httpx.Response) -> list[dict]:
    """What a stream brought."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", response.text
    return [json.loads(line) for line in lines[:-1]]


def of_engine(output: RequestOutput) -> dict:
    named = getattr(output, "prompt_token_id_logprobs", None)
    samples = [{**vars(sample), "routed_experts": None, "spec_decode_metrics": None} for sample in output.outputs]
    return {
        "samples": [{**sample, "logprobs": scores(sample["logprobs"])} for sample in samples],
        "prompt_logprobs": scores(output.prompt_logprobs),
        "prompt_token_id_logprobs": None if named is None else named.tolist(),
    }


def scores(positions: Any) -> Any:
    """Lists of {token: Logprob}, or flat ones, whose order of ties is free."""
    if positions is None:
        return None
    return type(positions).__name__, [
        position and sorted((token, score.logprob, score.rank) for token, score in position.items())
        for position in positions
    ]


def of_server(response: httpx.Response) -> tuple[int, dict]:
    is_stream = response.headers["content-type"].startswith("text/event-stream")
    answer = joined(chunks(response)) if is_stream else response.json()
    if "choices" in answer:
        for name in ("created", "system_fingerprint"):
            answer.pop(name, None)
        if not answer["id"].endswith("mine"):
            answer.pop("id")
        for choice in answer["choices"]:
            for call in (choice.get("message") or choice.get("delta") or {}).get("tool_calls") or ():
                call.pop("id", None)
    return response.status_code, answer


def joined(parts: list[dict]) -> dict:
    """A stream as one answer: in which pieces it came is free."""
    choices: dict[int, dict] = {}
    for choice in (choice for part in parts for choice in part["choices"]):
        append(choices.setdefault(choice["index"], {}), choice)
    usage = {"usage": parts[-1].get("usage"), "each has a usage": parts[0].get("usage") is not None}
    return {**parts[0], **usage, "choices": [choices[index] for index in sorted(choices)]}


def append(one: dict, other: dict) -> None:
    """Add texts and lists to those before them; of anything else the last value counts."""
    for name, value in other.items():
        before = one.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            append(before, value)
        elif isinstance(value, str | list) and isinstance(before, str | list) and name not in ("role", "id"):
            one[name] = before + value
        elif value is not None or before is None:
            one[name] = value


def alike(one: Any, other: Any) -> bool:
    """Equal, except that log probabilities are rounded by the width of a step."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) < 2e-3
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if hasattr(one, "tolist") and hasattr(other, "tolist"):
        return alike(one.tolist(), other.tolist())
    return one == other
