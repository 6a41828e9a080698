"""Stands in for a vLLM server that the soak asks; the first argument is the one thing that is wrong with it, or "".

    wrong    every 10th answer has another second token
    hang     every 10th request is never answered
    leak     a KV block stays in use
    falls    a counter loses most of what it has counted
    fails    every 10th request ends with status 500
    idle     no drafted token is accepted
    accepts  what vLLM refuses
    cut      every 10th answer lacks its last token

It prints its port.
"""

import hashlib
import itertools
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULT = sys.argv[1]
CHOICES = range(5, 25)
count = itertools.count(1)
done = 0


def tokens_of(body: dict) -> list[int]:
    """The same for the same request, as long as it may be; no two neighbours are equal."""
    digest = hashlib.sha256(body["prompt"].encode()).digest()
    return [CHOICES[digest[k % 32] % 20] for k in range(min(body["max_tokens"], 40))]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/v1/models":
            return self.reply({"data": [{"id": "fake", "max_model_len": 1024}]})
        counted = done // 10 if FAULT == "falls" and done > 30 else done
        samples = {
            "vllm:kv_cache_usage_perc": 0.02 if FAULT == "leak" and done > 30 else 0,
            "vllm:num_requests_running": 0,
            "vllm:num_requests_waiting": 0,
            "vllm:spec_decode_num_drafts_total": counted,
            "vllm:spec_decode_num_accepted_tokens_total": 0 if FAULT == "idle" else 2 * counted,
        }
        text = "".join(
            f"# TYPE {name.removesuffix('_total')} {kind(name)}\n{name} {value}\n" for name, value in samples.items()
        )
        self.send(200, text.encode(), "text/plain")

    def do_POST(self):
        global done
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_tenth = next(count) % 10 == 0
        if "min_p" in body and FAULT != "accepts":
            return self.reply({"error": "min_p"}, 400)
        if FAULT == "hang" and is_tenth:
            threading.Event().wait()
        if FAULT == "fails" and is_tenth:
            return self.reply({"error": "cheese"}, 500)
        tokens = tokens_of(body)
        if FAULT == "wrong" and is_tenth and len(tokens) > 1:
            tokens[1] += 100
        if FAULT == "cut" and is_tenth and len(tokens) > 1:
            tokens.pop()
        time.sleep(0.01)
        done += 1
        if body.get("stream"):
            return self.send(200, "".join(f"data: {token}\n\n" for token in tokens).encode(), "text/event-stream")
        top = [{f"token_id:{token}": -0.1, "token_id:1": -3.0} for token in tokens]
        choice = {"token_ids": tokens, "text": " ".join(map(str, tokens)), "logprobs": {"top_logprobs": top}}
        self.reply({"choices": [choice] * body.get("n", 1)})

    def reply(self, content: dict, status: int = 200):
        self.send(status, json.dumps(content).encode(), "application/json")

    def send(self, status: int, content: bytes, kind: str):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def kind(name: str) -> str:
    return "counter" if name.endswith("_total") else "gauge"


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 128  # of 5, a burst overflows on a busy machine, and clients are reset
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
