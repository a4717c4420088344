"""A server of the OpenAI protocol whose answers a test scripts, right ones included."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kdkit.testing.tiny import tiny_tokenizer

VOCAB = 259
_TOKENIZER = tiny_tokenizer()


def row(token: int, k: int, position: int) -> dict[str, dict[str, float]]:
    """k made-up log-probabilities that sum to less than one, and that of the token that stands there."""
    names = [(token + 7 * i + position) % VOCAB for i in range(1, k + 1)]
    entries = {str(name): {"logprob": math.log(0.5 / k) - 0.01 * i} for i, name in enumerate(dict.fromkeys(names))}
    if str(token) not in entries:
        entries[str(token)] = {"logprob": -9.0 - position}
    return entries


def right(body: dict[str, Any], cap: int = 512) -> dict[str, Any]:
    """The answer of a server that works, in the form that was asked for."""
    if "messages" in body:
        message = {"role": "assistant", "content": f"answer to {body['messages'][-1]['content']}"}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    prompt = body["prompt"]
    if body.get("max_tokens"):
        return {"choices": [{"index": 0, "text": f"more of {prompt}", "finish_reason": "stop"}]}
    ids = _TOKENIZER(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
    if "prompt_logprobs" in body:
        k = min(body["prompt_logprobs"], cap)
        choice["prompt_logprobs"] = [None, *(row(token, k, i) for i, token in enumerate(ids[1:], 1))]
    else:
        rows = [row(token, min(body["logprobs"], cap), i) for i, token in enumerate(ids[1:], 1)]
        tops = [{f"token_id:{name}": entry["logprob"] for name, entry in item.items()} for item in rows]
        choice["logprobs"] = {
            "tokens": [f"token_id:{token}" for token in ids],
            "token_logprobs": [None, *(item[str(i)]["logprob"] for item, i in zip(rows, ids[1:], strict=True))],
            "top_logprobs": [None, *tops],
        }
    return {"choices": [choice]}


@dataclass
class Script:
    """What the server does: ``answer`` gives the JSON of a request, and may send anything itself and return None."""

    answer: Callable[[Handler, dict[str, Any]], Any] = lambda _handler, body: right(body)
    models: Any = field(default_factory=lambda: {"data": [{"id": "m"}]})
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Sends what the script says."""

    protocol_version = "HTTP/1.1"
    script: Script

    def do_GET(self) -> None:
        self.script.headers.append(dict(self.headers))
        if callable(self.script.models):
            self.script.models(self)
        else:
            self.send(self.script.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.script.headers.append(dict(self.headers))
        self.script.requests.append(body)
        answer = self.script.answer(self, body)
        if answer is not None:
            self.send(answer)

    def send(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send_bytes(json.dumps(value).encode(), status, **headers)

    def send_bytes(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: Any) -> None:
        pass


class FaultyServer:
    """Use as a context manager; ``url`` is the base URL."""

    def __init__(self) -> None:
        self.script = Script()
        handler = type("Scripted", (Handler,), {"script": self.script})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        # A client that goes away in the middle is what some tests want.
        self._server.handle_error = lambda *_args: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(self, *_args: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Stop listening; connections that are open stay."""
        self._server.shutdown()
        self._server.server_close()
