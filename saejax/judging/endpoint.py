"""A judge behind an OpenAI-compatible endpoint (`POST URL/chat/completions`): vLLM, Ollama, llama.cpp, or a hosted model."""

import email.utils
import http.client
import itertools
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from saejax.base.errors import JudgeError
from saejax.base.logs import say
from saejax.judging.questions import Question, Reply

KEY = "SAEJAX_JUDGE_KEY"
MOST_BYTES = 4 << 20          # of a response
DOWN_AFTER = 5                # questions in a row without any answer: the endpoint counts as down
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_FATAL = {401: f"the key in {KEY} is missing or refused", 403: f"the key in {KEY} may not do this",
          404: "there is no such model or address"}
# What newer models refuse, and what takes its place.
_REPLACED = {"max_tokens": "max_completion_tokens", "temperature": None}


@dataclass(frozen=True)
class Patience:
    """timeout: seconds of one request, all of it. tries: requests for one question. wait: seconds before the second, doubled each
    time, a random part of it; `Retry-After` counts instead. longest_wait: of both.
    """

    timeout: float = 120.0
    tries: int = 5
    wait: float = 1.0
    longest_wait: float = 120.0


class Endpoint:
    """At most `concurrency` requests at a time. The key comes from the environment variable SAEJAX_JUDGE_KEY, goes to this
    address only (redirects are not followed) and is written nowhere.

    Raises `JudgeError` for an address that is none, or one that holds a password.
    """

    retries = True

    def __init__(self, url: str, model: str, *, concurrency: int = 4, longest_answer: int = 1024,
                 patience: Patience = Patience()):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError("judge: no address of an endpoint; give one as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise JudgeError(f"judge: the address of {parts.hostname} holds more than scheme, host and path; give a "
                             f"key in {KEY}")
        if not model:
            raise JudgeError(f"judge={url}: give judge_model=NAME as the endpoint calls it")
        self.name, self._url = model, url.rstrip("/")
        self._key = os.environ.get(KEY, "").strip()
        if self._key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            say(f"the key in {KEY} goes to {parts.hostname} unencrypted (http)")
        self._concurrency, self._patience = concurrency, patience
        self._request = {"model": model, "temperature": 0, "max_tokens": longest_answer}
        self._open = urllib.request.build_opener(_NoRedirects()).open
        self._stop = threading.Event()

    def describe(self) -> dict:
        return {"kind": "endpoint", "url": self._url, "model": self.name}

    def ask(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Reply]]:
        """Raises `JudgeError` once the endpoint is down, after the replies so far; what was not asked is left out."""
        left, running, failed = iter(questions), {}, 0
        self._stop.clear()
        pool = ThreadPoolExecutor(self._concurrency, "saejax-judge")
        try:
            while True:
                room = 0 if failed >= DOWN_AFTER else 2 * self._concurrency - len(running)
                running |= {pool.submit(self._answer, question): question for question in itertools.islice(left, room)}
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    question = running.pop(done)
                    reply = done.result()
                    failed = failed + 1 if reply.text is None and reply.usage is None else 0
                    if failed == DOWN_AFTER:  # what waits for its turn is not asked any more
                        running = {future: q for future, q in running.items() if not future.cancel()}
                    yield question, reply
            if failed >= DOWN_AFTER:
                raise JudgeError(f"{self._url}: {DOWN_AFTER} questions in a row got no answer ({reply.trouble}); what was "
                                 "answered is kept, and the same command goes on when the endpoint does")
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _answer(self, question: Question) -> Reply:
        """One question, as often as patience allows. Raises `JudgeError` where no question can be answered."""
        trouble = ""
        for attempt in range(self._patience.tries):
            sent = self._request
            status, body, asked_wait = self._post(sent, question)
            if status == 200:
                reply = _reply(body)
                if reply is not None:
                    return reply
                trouble = f"no chat completion: {self._short(body)}"
            else:
                trouble = f"HTTP {status}: {self._short(body)}" if status else self._short(body)
            if status in _FATAL:
                raise JudgeError(f"{self._url}: {_FATAL[status]} ({trouble})")
            if status == 400 and self._adapted(sent, body):
                continue
            if status not in _AGAIN and status not in (0, 200):
                return Reply(None, trouble, usage={})  # of this question; others may fare better
            if attempt + 1 < self._patience.tries and self._stop.wait(self._pause(attempt, asked_wait)):
                break
        return Reply(None, trouble)

    def _pause(self, attempt: int, asked: float | None) -> float:
        p = self._patience
        return min(p.longest_wait, p.wait * 2**attempt * random.uniform(0.5, 1.0) if asked is None else asked)

    def _post(self, sent: dict, question: Question) -> tuple[int, bytes, float | None]:
        """(status or 0, body or what went wrong, seconds to wait that the server asks for)."""
        request = urllib.request.Request(
            f"{self._url}/chat/completions", method="POST",
            data=json.dumps(sent | {"messages": [{"role": "user", "content": question.prompt}]}).encode(),
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {}))
        until = time.monotonic() + self._patience.timeout
        try:
            with self._open(request, timeout=self._patience.timeout) as response:
                return response.status, _read(response, until), None
        except urllib.error.HTTPError as error:
            with error:
                try:
                    body = _read(error, until)
                except (OSError, http.client.HTTPException):
                    body = b""
                return error.code, body, _seconds(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            return 0, (str(reason) or type(reason).__name__).encode(), None

    def _adapted(self, sent: dict, body: bytes) -> bool:
        """True where a parameter was sent that the model refuses by name: from now on its replacement is sent."""
        text = body.decode("utf-8", "replace")
        refused = [name for name in _REPLACED if name in sent and f"'{name}'" in text]
        for name in refused:
            kept = {key: value for key, value in self._request.items() if key != name}
            other = _REPLACED[name]
            if name in self._request:  # another thread may have come first
                self._request = kept | ({other: self._request[name]} if other else {})
        return bool(refused)

    def _short(self, body: bytes) -> str:
        """The beginning of a body for a message; the key never is in it."""
        text = body[:2000].decode("utf-8", "replace")
        text = text.replace(self._key, "***") if self._key else text
        return "".join(c if c.isprintable() else " " for c in text)[:200].strip()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def _read(response, until: float) -> bytes:
    """The body, in all not later than `until`: a server may also hang byte by byte."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > until:
            raise TimeoutError("timed out while the answer was read")
        if size > MOST_BYTES:
            raise http.client.HTTPException(f"an answer of more than {MOST_BYTES} bytes")
    return b"".join(parts)


def _reply(body: bytes) -> Reply | None:
    """The first choice of a chat completion; None where it is none. An answer that was cut off at the limit is no answer."""
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        text, usage = choice["message"]["content"], value.get("usage")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(text, str):
        return None
    counted = {k: v for k, v in usage.items() if isinstance(v, int)} if isinstance(usage, dict) else {}
    return Reply(text, "cut off at its longest length" if choice.get("finish_reason") == "length" else "", counted)


def _seconds(header: str | None) -> float | None:
    """`Retry-After`: seconds or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
