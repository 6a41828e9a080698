"""Stands in for the `vllm` command: the HTTP surface that the benchmarks use, answering at once.

FAKE_BEHAVIOUR chooses how it misbehaves: `crash`, `hang` (never healthy), `stubborn` (ignores SIGTERM), `wrong` (with a
drafter, the third token of every answer is another one) or `refuse` (no request is answered). FAKE_RECORD names a
folder that gets two files per server: one with its arguments and the ids of its processes, and one with all requests.
"""

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BEHAVIOUR = os.environ.get("FAKE_BEHAVIOUR", "")
ARGUMENTS = sys.argv[1:]
SPECULATIVE = "--speculative-config" in ARGUMENTS
TOKENS = [5, 6, 7, 8]
RECORD = Path(os.environ["FAKE_RECORD"], f"{os.getpid()}.json")


class Handler(BaseHTTPRequestHandler):
    answered = 0

    def do_GET(self):
        if self.path == "/health":
            return self.reply(503 if BEHAVIOUR == "hang" else 200, b"")
        if self.path == "/version":
            return self.reply_json({"version": "0.0.fake"})
        if self.path == "/v1/models":
            model = ARGUMENTS[ARGUMENTS.index("--served-model-name") + 1]
            return self.reply_json({"data": [{"id": model, "max_model_len": 256}]})
        drafts = Handler.answered * 2
        counters = {
            "num_drafts": {"": drafts},
            "num_draft_tokens": {"": drafts * 3},
            "num_accepted_tokens": {"": drafts // 2},
            "num_accepted_tokens_per_pos": {',position="0"': drafts // 2, ',position="1"': 0},
        }
        lines = []
        for name, values in counters.items() if SPECULATIVE else ():
            lines += [f"# TYPE vllm:spec_decode_{name} counter"]
            for labels, value in values.items():
                # two engines: the sum over labels is what counts
                lines += [f'vllm:spec_decode_{name}_total{{engine="{i}"{labels}}} {value / 2}' for i in range(2)]
        self.reply(200, "\n".join([*lines, ""]).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with RECORD.with_suffix(".requests").open("a") as requests:
            requests.write(json.dumps(body) + "\n")
        if BEHAVIOUR == "refuse":
            return self.reply(400, b"")
        if self.path == "/v1/completions":
            top = {"token_id:7": -0.5, "token_id:9": -0.5 - float(os.environ.get("FAKE_GAP", "1"))}
            return self.reply_json({"choices": [{"index": 0, "text": "", "logprobs": {"top_logprobs": [top]}}]})
        Handler.answered += 1
        tokens = [*TOKENS]
        if BEHAVIOUR == "wrong" and SPECULATIVE:
            tokens[2] = 9
        if not body.get("stream"):
            message = {"role": "assistant", "content": "x"}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": tokens}
            return self.reply_json({"choices": [choice], "prompt_token_ids": [1, 2]})
        chunks = [{"choices": [{"index": 0, "delta": {"content": ""}}], "prompt_token_ids": [1, 2]}]
        chunks += [{"choices": [{"index": 0, "delta": {"content": f"<{t}>"}, "token_ids": [t]}]} for t in tokens]
        if body.get("stream_options"):
            chunks += [{"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": len(tokens)}}]
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self.reply(200, events.encode(), "text/event-stream")

    def reply_json(self, body: dict):
        self.reply(200, json.dumps(body).encode(), "application/json")

    def reply(self, status: int, body: bytes, content_type: str = "text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main() -> None:
    for number in range(40):
        print(f"starting, line {number}", flush=True)
    if BEHAVIOUR == "crash":
        sys.exit("out of cheese")
    if BEHAVIOUR == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM's engine core
    port = int(ARGUMENTS[ARGUMENTS.index("--port") + 1])
    record = {
        "arguments": ARGUMENTS,
        "environment": dict(os.environ),
        "processes": [os.getpid(), child.pid],
        "port": port,
    }
    # Appears whole: a test waits for the file, and reads it at once.
    RECORD.with_suffix(".new").write_text(json.dumps(record))
    RECORD.with_suffix(".new").rename(RECORD)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
