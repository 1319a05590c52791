"""The OpenAI-compatible judge against a real server: well, slow, wrong, angry, gone."""

import email.utils
import json
import socket
import time

import pytest

from saejax.base.errors import JudgeError
from saejax.judging.endpoint import KEY, Endpoint, Patience
from saejax.judging.questions import Question
from tests.judging.server import completion, serving

QUICK = Patience(timeout=0.5, tries=3, wait=0.01, longest_wait=0.3)


def questions(n: int = 1) -> list[Question]:
    return [Question(f"id{i}", "rubric", i, f"prompt {i}. Answer with one digit alone") for i in range(n)]


def asked(script=None, n: int = 1, **options) -> tuple[dict, list[dict]]:
    """({question id: reply}, the requests)."""
    with serving(script) as server:
        judge = Endpoint(server.url, "judge-1", **{"patience": QUICK} | options)
        return {question.id: reply for question, reply in judge.ask(questions(n))}, server.requests


def test_a_conversation():
    replies, requests = asked(n=9)
    assert {reply.text for reply in replies.values()} == {"3"} and len(replies) == len(requests) == 9
    assert replies["id0"].usage == {"prompt_tokens": 7, "completion_tokens": 1}
    assert {r["path"] for r in requests} == {"/v1/chat/completions"}
    body = requests[0]["body"]
    assert body["model"] == "judge-1" and body["temperature"] == 0 and [m["role"] for m in body["messages"]] == ["user"]


def test_no_more_requests_at_a_time_than_allowed():
    running, most = [], []

    def slow(prompt, n):
        running.append(n)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(n)
        return "3"

    assert len(asked(slow, n=20, concurrency=3)[0]) == 20
    assert 1 < max(most) <= 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_pass_are_waited_for(status):
    replies, requests = asked(lambda prompt, n: (status, {}, b"later") if n < 3 else "2")
    assert replies["id0"].text == "2" and len(requests) == 3


@pytest.mark.parametrize("header", ["0.2", lambda: email.utils.formatdate(time.time() + 5, usegmt=True)])
def test_retry_after_is_heeded(header):
    value = header if isinstance(header, str) else header()
    replies, requests = asked(lambda prompt, n: (429, {"Retry-After": value}, b"") if n == 1 else "1")
    waited = requests[1]["at"] - requests[0]["at"]
    assert replies["id0"].text == "1" and 0.19 < waited < 1.5, "longest_wait bounds what a server may ask for"


def test_retry_after_of_years_is_bounded():
    _, requests = asked(lambda prompt, n: (429, {"Retry-After": "99999999"}, b"") if n == 1 else "1")
    assert requests[1]["at"] - requests[0]["at"] < 2


@pytest.mark.parametrize("nonsense", [
    (200, {}, b"<html>"), (200, {}, b"{}"), (200, {}, b"[]"), (200, {}, b'{"choices": []}'), (200, {}, completion(None)),
    (200, {}, b'{"choices": [{"message": {"content": 3}}]}'), (200, {}, b"[" * 100_000), (200, {}, b"\xff\x00")])
def test_what_is_no_completion_is_tried_again_then_given_up(nonsense):
    replies, requests = asked(lambda prompt, n: nonsense)
    assert replies["id0"].text is None and "no chat completion" in replies["id0"].trouble and len(requests) == 3


def hang(handler):
    handler.send_response(200)
    handler.end_headers()
    time.sleep(1.2)


def trickle(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass


def drop(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("behaviour", [hang, trickle, drop])
def test_hanging_and_broken_connections(behaviour):
    began = time.monotonic()
    replies, requests = asked(lambda prompt, n: behaviour if n < 3 else "0")
    assert replies["id0"].text == "0" and len(requests) == 3 and time.monotonic() - began < 20


def test_a_flood_is_not_read():
    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(20):
                handler.wfile.write(b" " * (1 << 20))
        except OSError:
            pass
    replies, _ = asked(lambda prompt, n: flood, patience=Patience(timeout=10, tries=1))
    assert replies["id0"].text is None and "more than" in replies["id0"].trouble


def test_an_endpoint_that_is_down_ends_the_job_after_a_few_questions():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    replies = []
    with pytest.raises(JudgeError, match="5 questions in a row got no answer.*refused.*the same command goes on"):
        for _, reply in Endpoint(url, "m", patience=QUICK, concurrency=2).ask(questions(100)):
            replies.append(reply)
    assert 5 <= len(replies) <= 9 and all(reply.text is None and reply.trouble for reply in replies)


def test_a_question_that_is_refused_does_not_end_the_others():
    def some(prompt, n):
        return (400, {}, b'{"error": "context length exceeded"}') if int(prompt.split()[1][:-1]) % 2 else "3"
    replies, requests = asked(some, n=20)
    assert len(requests) == 20, "a refusal is not tried again"
    assert sum(reply.text == "3" for reply in replies.values()) == 10
    assert "context length" in replies["id1"].trouble


@pytest.mark.parametrize("status, message", [(401, "key"), (403, "key"), (404, "no such model")])
def test_what_no_question_can_pass_ends_the_job_at_once(status, message):
    with serving(lambda prompt, n: (status, {}, b"no")) as server:
        with pytest.raises(JudgeError, match=f"{message}.*HTTP {status}: no"):
            list(Endpoint(server.url, "m", patience=QUICK, concurrency=1).ask(questions(50)))
        assert len(server.requests) <= 2


def test_parameters_that_a_model_refuses_are_replaced():
    with serving(None) as server:
        def strict(prompt, n):
            body = server.requests[-1]["body"]
            for name in ("max_tokens", "temperature"):
                if name in body:
                    return 400, {}, json.dumps({"error": {"message": f"Unsupported parameter: '{name}'"}}).encode()
            return "2"
        server._script = strict
        judge = Endpoint(server.url, "m", patience=QUICK, concurrency=1)
        assert [reply.text for _, reply in judge.ask(questions(3))] == ["2"] * 3
    assert len(server.requests) == 5 and server.requests[-1]["body"]["max_completion_tokens"] == 1024


def test_answers_that_were_cut_off_say_so():
    replies, _ = asked(lambda prompt, n: (200, {}, completion("I think 3", "length")))
    assert replies["id0"].text == "I think 3" and "cut off" in replies["id0"].trouble


def test_the_key_goes_to_the_endpoint_only(monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret")
    with serving() as other, serving(lambda prompt, n: (307, {"Location": other.url + "/chat/completions"}, b"")) as server:
        judge = Endpoint(server.url, "m", patience=QUICK)
        [(_, reply)] = judge.ask(questions(1))
        assert reply.text is None and "307" in reply.trouble and not other.requests, "redirects are not followed"
        assert server.requests[0]["headers"]["Authorization"] == "Bearer sk-secret"
        server._script = lambda prompt, n: (401, {}, b"bad key sk-secret")
        with pytest.raises(JudgeError) as error:
            list(judge.ask(questions(1)))
    assert "sk-secret" not in str(error.value) + json.dumps(judge.describe())


@pytest.mark.parametrize("url, message", [
    ("ftp://x", "no address"), ("http://", "no address"), ("http://me:pw@host/v1", "more than scheme"),
    ("http://host/v1?key=1", "more than scheme")])
def test_addresses_are_checked(url, message):
    with pytest.raises(JudgeError, match=message) as error:
        Endpoint(url, "m")
    assert "pw" not in str(error.value) and "key=1" not in str(error.value)
    with pytest.raises(JudgeError, match="judge_model"):
        Endpoint("http://host/v1", "")
