"""A running vLLM server, as an edge client sees it: its OpenAI API, and nothing that only our plugin has.

A round is a completion whose prompt is token ids. Two forms of it give the same tokens:

- `drafts`: `"vllm_xargs": {"ctc_draft": [...]}` beside the prompt. A server whose `ctc_sources` include the client's
  drafts verifies them in its next step; any other ignores or refuses the key, and says the same by itself.
- `prompts`: one request of `1 + K` prompts, each one draft longer than the one before, for one token each. Every
  vLLM server verifies drafts so, all of them in one step, at the cost of `1 + K` short requests.
"""

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx

from vllm_ctc_spec.edge.protocol import Delta, ServerAway
from vllm_ctc_spec.errors import EdgeError, shown

DRAFT_KEY = "ctc_draft"
# An idle connection is not used again after this time: vLLM closes it after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), and a
# round that is on its way then would be lost.
IDLE_SECONDS = 3.0
BUSY = (408, 425, 429)  # statuses below 500 after which a later try may succeed
FAILED = ("abort", "error")  # finish reasons of answers that are not whole


class Refused(Exception):
    """The server understands that a request is wrong: a status from 400 to 499, with its reason."""


class Server:
    """The address of a server, the model that it serves, and connections that stay open between rounds."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 10.0):
        """Raises:
        EdgeError: no vLLM server answers there.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            limits = httpx.Limits(keepalive_expiry=IDLE_SECONDS)
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, limits=limits)
            card = self._json("GET", "/v1/models")["data"][0]
            self.model, self.max_model_len = str(card["id"]), int(card["max_model_len"])
        except (ServerAway, Refused, httpx.InvalidURL, LookupError, TypeError, ValueError) as error:
            raise EdgeError(f"no vLLM server answers at {self.url} ({said(error)}): give the URL of one.") from error

    def close(self) -> None:
        self._http.close()

    def tokenize(self, **text: Any) -> list[int]:
        """The server's token ids of `prompt=` a text or `messages=` a chat, which gets the server's template.

        Raises:
            EdgeError: the server refuses it, or has no such service.
            ServerAway: it does not answer.
        """
        try:
            return [int(token) for token in self._json("POST", "/tokenize", {"model": self.model, **text})["tokens"]]
        except (Refused, LookupError, TypeError, ValueError) as error:
            raise EdgeError(f"the server at {self.url} does not tokenize the prompt ({said(error)}).") from error

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One completion in one piece. Raises as `stream` does."""
        return self._json("POST", "/v1/completions", {"model": self.model, **body})

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The parts of one streamed completion.

        Raises:
            Refused: what the server has against it; before the first part.
            ServerAway: it does not answer to the end.
        """
        request = {"model": self.model, "stream": True, **body}
        try:
            with self._http.stream("POST", "/v1/completions", json=request) as response:
                if response.status_code != 200:
                    response.read()
                check(response)
                for line in response.iter_lines():
                    if not line.startswith("data:") or line == "data: [DONE]":
                        continue
                    part = parsed(line.removeprefix("data:"))
                    if "error" in part:  # some of vLLM's checks come after it has begun to answer
                        raise failure(status_of(part["error"]), part)
                    yield part
        except httpx.HTTPError as error:
            raise ServerAway(said(error)) from error

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body)
            check(response)
            return parsed(response.text)
        except httpx.HTTPError as error:
            raise ServerAway(said(error)) from error


def parsed(text: str) -> dict[str, Any]:
    """Raises: ServerAway."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ServerAway("an answer that is no JSON object")
    return content


def check(response: httpx.Response) -> None:
    """Raises: Refused, ServerAway."""
    if response.status_code != 200:
        try:
            content = response.json()
        except ValueError:
            content = None
        raise failure(response.status_code, content)


def failure(status: int, content: Any) -> Refused | ServerAway:
    """What an error of the server means. content: the body of its answer, if it is JSON."""
    reason = f"HTTP {status}" + (f": {reason_of(content)}" if content else "")
    refused = 400 <= status < 500 and status not in BUSY
    return Refused(reason) if refused else ServerAway(reason)


def reason_of(content: Any) -> str:
    """The message of an error as vLLM writes it."""
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error["message"]) if isinstance(error, dict) and "message" in error else shown(error)


def status_of(error: Any) -> int:
    """The status of an error that came in a stream; that of a failed server if it does not say."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 500


def said(error: Exception) -> str:
    return str(error) or type(error).__name__


class ThreadedReply:
    """An answer that a thread reads, so that the device drafts in the meantime."""

    def __init__(self, parts: Callable[[], Iterator[Delta]]):
        self._queue: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._read, args=(parts,), daemon=True).start()

    def _read(self, parts: Callable[[], Iterator[Delta]]) -> None:
        try:
            for delta in parts():
                self._queue.put(delta)
                # Leaving the iterator closes the connection, and the server ends the request. One that was answered is
                # read to its end instead: its connection is the next round's.
                if self._closed and not delta.closes_round:
                    return
            self._queue.put(ServerAway("the connection was closed before the end of the answer"))
        except Exception as error:  # noqa: BLE001 - raised again in `next`, in the device's thread
            self._queue.put(error)

    def next(self, wait: float) -> Delta | None:
        try:
            part = self._queue.get(timeout=wait) if wait > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(part, Exception):
            raise part
        return part

    def close(self) -> None:
        self._closed = True


class DraftRounds:
    """Rounds that carry their draft beside the prompt. After a refusal of the key they go on without it."""

    def __init__(self, server: Server, sampling: Mapping[str, Any]):
        self.server, self.sampling = server, sampling
        self.refusal: str | None = None  # why the server does not take drafts

    @property
    def takes_drafts(self) -> bool:
        return self.refusal is None

    def probe(self, tokens: Sequence[int]) -> None:
        """Find out whether the server ignores drafts: one that knows them refuses what cannot be one.

        Raises:
            ServerAway: it does not answer.
        """
        body = {"prompt": list(tokens[:1]), "max_tokens": 1, "vllm_xargs": {DRAFT_KEY: [-1]}}
        try:
            self.server.complete(body)
        except Refused:
            return
        self.refusal = "it ignores them"

    def ask(self, tokens: Sequence[int], draft: Sequence[int], num_tokens: int) -> ThreadedReply:
        return ThreadedReply(lambda: self._parts(list(tokens), list(draft), num_tokens))

    def _parts(self, tokens: list[int], draft: list[int], num_tokens: int) -> Iterator[Delta]:
        body = {"prompt": tokens, "max_tokens": num_tokens, "return_token_ids": True, **self.sampling}
        refusal = None
        if draft and self.refusal is None:
            try:
                yield from self._deltas({**body, "vllm_xargs": {DRAFT_KEY: draft}})
                return
            except Refused as refused:  # instead of the first part
                refusal = str(refused)
        for delta in self._deltas(body):
            self.refusal = self.refusal or refusal  # without the key the same request is answered
            yield delta

    def _deltas(self, body: Mapping[str, Any]) -> Iterator[Delta]:
        for part in self.server.stream(body):
            yield from map(delta_of, part.get("choices", ()))


class PromptRounds:
    """Rounds of `1 + K` prompts, each one draft longer, of which every one gets the target's next token."""

    takes_drafts = True

    def __init__(self, server: Server, sampling: Mapping[str, Any]):
        self.server, self.sampling = server, sampling
        self._without_draft = DraftRounds(server, sampling)

    def ask(self, tokens: Sequence[int], draft: Sequence[int], num_tokens: int) -> ThreadedReply:
        if not draft:
            return self._without_draft.ask(tokens, draft, num_tokens)
        return ThreadedReply(lambda: self._parts(list(tokens), list(draft)))

    def _parts(self, tokens: list[int], draft: list[int]) -> Iterator[Delta]:
        prompts = [tokens + draft[:length] for length in range(len(draft) + 1)]
        body = {"prompt": prompts, "max_tokens": 1, "return_token_ids": True, **self.sampling}
        choices = {choice["index"]: delta_of(choice) for choice in self.server.complete(body).get("choices", ())}
        if len(choices) < len(prompts):
            raise ServerAway("an answer that is not whole")
        yield verdict([choices[index] for index in range(len(prompts))], draft)


def verdict(nexts: Sequence[Delta], draft: Sequence[int]) -> Delta:
    """What the target says, from its next token after each prefix of the draft: `len(nexts) == len(draft) + 1`."""
    tokens: list[int] = []
    for index, delta in enumerate(nexts):
        tokens += delta.tokens
        if delta.ends_text:
            return Delta(tokens, True, True)
        if index == len(draft) or list(delta.tokens) != [draft[index]]:
            break
    return Delta(tokens, True)


def delta_of(choice: Mapping[str, Any]) -> Delta:
    """Raises: ServerAway: the server gave this request up. EdgeError: it is not vLLM."""
    reason = choice.get("finish_reason")
    if reason in FAILED:
        raise ServerAway(f"the server gave up ({reason})")
    tokens = choice.get("token_ids")
    if tokens is None:
        raise EdgeError("the server returns no token ids (`return_token_ids`): an edge client needs vLLM's server.")
    return Delta(tokens, reason is not None, reason not in (None, "length"))
