"""An HTTP server on the loopback interface that says what `fake.says` says, as vLLM's API server would."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .fake import END, answer

MODEL, MAX_MODEL_LEN = "fake", 64


@dataclass
class Behaviour:
    """What the server does; tests change it while it runs."""

    refuses_drafts: bool = False  # with a reason
    refuses_in_the_stream: bool = False
    ignores_drafts: bool = False
    status: int = 200  # of completions
    finish_reason: str | None = None  # in place of the true one
    dies_after: int | None = None  # parts of a stream
    error_after: int | None = None
    silent_seconds: float = 0.0  # before each part
    hides_token_ids: bool = False
    encode: Callable[[str], list[int]] = lambda text: [1 + byte % 3 for byte in text.encode()]
    bodies: list[dict] = field(default_factory=list)
    connections: list[socket.socket] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)  # how requests authorised themselves


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.behaviour.connections.append(self.connection)

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.behaviour.keys.append(self.headers["Authorization"])
        self.json({"data": [{"id": MODEL, "max_model_len": MAX_MODEL_LEN}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body, does = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.behaviour
        if self.path == "/tokenize":
            text = body["prompt"] if "prompt" in body else "".join(message["content"] for message in body["messages"])
            return self.json({"tokens": does.encode(text)})
        does.bodies.append(body)
        if does.status != 200:
            return self.json({"error": {"message": "as it was told"}}, does.status)
        if does.refuses_drafts and "vllm_xargs" in body:
            refusal = {"error": {"message": "unknown key ctc_draft", "code": 400}}
            if does.refuses_in_the_stream and body.get("stream"):
                return self.stream_of([refusal])
            return self.json(refusal, 400)
        if not does.ignores_drafts and min(body.get("vllm_xargs", {}).get("ctc_draft") or [0]) < 0:
            return self.json({"error": {"message": "no such id"}}, 400)
        if not body.get("stream"):
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            answers = [answer(prompt, body["max_tokens"]) for prompt in prompts]
            choices = [self.choice(tokens, index, True) for index, tokens in enumerate(answers)]
            return self.json({"choices": choices[::-1]})
        return self.stream(answer(body["prompt"], body["max_tokens"]))

    def choice(self, tokens: list[int], index: int, is_last: bool) -> dict:
        reason = ("stop" if tokens[-1] == END else "length") if is_last else None
        reason = self.behaviour.finish_reason if is_last and self.behaviour.finish_reason else reason
        ids = {} if self.behaviour.hides_token_ids else {"token_ids": tokens}
        return {"index": index, "text": "", "finish_reason": reason, **ids}

    def stream(self, tokens: list[int]) -> None:
        parts = [tokens[start : start + 2] for start in range(0, len(tokens), 2)]
        contents = [{"choices": [self.choice(part, 0, part is parts[-1])]} for part in parts]
        if self.behaviour.error_after is not None:
            contents[self.behaviour.error_after] = {"error": {"message": "the engine is dead"}}
        self.stream_of(contents)

    def stream_of(self, contents: list[dict]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, content in enumerate(contents):
            time.sleep(self.behaviour.silent_seconds)
            if number == self.behaviour.dies_after:
                self.close_connection = True
                return
            self.chunk(f"data: {json.dumps(content)}\n\n")
        self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())

    def json(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """A client that has gone is what some tests are about."""


@contextmanager
def running() -> Iterator[tuple[str, Behaviour]]:
    behaviour = Behaviour()
    handler = type("Told", (Handler,), {"behaviour": behaviour})
    server = Quiet(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", behaviour
    finally:
        server.shutdown()
        server.server_close()
        for connection in behaviour.connections:  # their threads would go on answering
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()
