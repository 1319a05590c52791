"""A real HTTP server in this process that speaks the chat completions protocol, well or badly, as a test tells it."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """`script(prompt, n)` says what the n-th request is answered with: text, or (status, headers, body), or a callable that is
    given the handler. Without one it answers every task sensibly.
    """

    def __init__(self, script=None):
        self.requests, self._script, self._lock = [], script or (lambda prompt, n: sensible(prompt)), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append({"path": self.path, "headers": dict(self.headers), "body": body,
                                           "at": time.monotonic()})
                    n = len(outer.requests)
                answer = outer._script(body["messages"][0]["content"], n)
                if callable(answer):
                    answer(self)
                    return
                status, headers, data = (200, {}, completion(answer)) if isinstance(answer, str) else answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [request["body"]["messages"][0]["content"] for request in self.requests]


def completion(text, finish: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
                       "usage": {"prompt_tokens": 7, "completion_tokens": 1}}).encode()


def sensible(prompt: str) -> str:
    """An answer of the right form to any of the tasks."""
    if lines := re.search(r"There are (\d+) lines", prompt):
        return json.dumps([i % 10 for i in range(int(lines[1]))])
    if "yes or no" in prompt:
        return "Yes."
    return "3" if "one digit alone" in prompt else "Words that hold the letter z."


@contextmanager
def serving(script=None):
    endpoint = Endpoint(script)
    thread = threading.Thread(target=endpoint._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint._server.shutdown()
        endpoint._server.server_close()
        thread.join()
