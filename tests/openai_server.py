"""`python -m tests.openai_server FOLDER`: a small OpenAI-compatible server, as a process of its own.

It prints its port, logs every request to FOLDER/log.jsonl, and answers "echo SEED: PROMPT". A file FOLDER/busy with a
number makes it answer 503 so many times; the word `toolong` in a prompt is a context that is too long, `refuse` a
request that it does not take, `odd` an answer in another form; FOLDER/models holds the names of its models.

Asked for `logprobs` it says A with 0.6, " A" with 0.1, B with 0.2 and The with 0.1; a prompt with `neither` leaves the
letters out, one with `onlyA` the B, and one with `silent` all probabilities.
"""

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    folder: Path

    def do_GET(self) -> None:
        names = (self.folder / "models").read_text().split() if (self.folder / "models").exists() else ["tiny"]
        self.answer(200, {"data": [{"id": name} for name in names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            busy = self.folder / "busy"
            left = int(busy.read_text()) if busy.exists() else 0
            if left:
                busy.write_text(str(left - 1))
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({**body, "key": self.headers.get("Authorization"), "busy": left > 0}) + "\n")
        text = body["messages"][-1]["content"]
        if left:
            self.answer(503, {"error": "busy"})
        elif "toolong" in text:
            self.answer(400, {"error": {"message": "This model's maximum context length is 10 tokens"}})
        elif "refuse" in text:
            self.answer(422, {"error": {"message": "no such parameter"}})
        elif "odd" in text:
            self.answer(200, {"answer": "hello"})
        else:
            self.answer(200, self.completion(body, f"echo {body.get('seed', 0) % 7}: {text}".split()))

    def completion(self, body: Any, words: list[str]) -> dict[str, Any]:
        kept = words[: body["max_tokens"]]
        why = "stop" if len(kept) == len(words) else "length"
        usage = {"prompt_tokens": 11, "completion_tokens": len(kept)}
        choice = {"message": {"role": "assistant", "content": " ".join(kept)}, "finish_reason": why}
        text = body["messages"][-1]["content"]
        if body.get("logprobs") and "silent" not in text:
            said = {"A": 0.6, " A": 0.1, "B": 0.2, "The": 0.1}
            left_out = {"A", " A", "B"} if "neither" in text else {"B"} if "onlyA" in text else set()
            tokens = [{"token": token, "logprob": math.log(p)} for token, p in said.items() if token not in left_out]
            choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens[: body["top_logprobs"]]}]}
        return {"choices": [choice], "usage": usage}

    def answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
