"""The routes, with an engine that repeats words: what is answered, what is refused, and with which status."""

import base64
import io
import json
import socket
import threading
import time

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from attnpack_serve.app import create_app
from attnpack_serve.capacity import Capacity
from attnpack_serve.chat import ChatRequest
from attnpack_serve.images import ImageLimits
from attnpack_serve.job import Done, Failed, Sampling, Text, Used
from attnpack_serve.limits import Limits
from attnpack_serve.prompts import BadPromptError
from attnpack_serve.queue import Queue

USED = Used(10, 2, 0, 100, 400, 20.0)
ASKED = {"model": "words", "messages": [{"role": "user", "content": "hello"}]}


class Prompts:
    """Ten tokens for each message."""

    def prepare(self, messages, images):
        if messages[0]["content"] == [{"type": "text", "text": "break"}]:
            raise RuntimeError("the processor is broken")
        if len(images) > 2:
            raise BadPromptError("the processor takes two images")
        return {"input_ids": torch.ones(1, 10 * len(messages), dtype=torch.int64)}


class Kept(list):
    nbytes = 0


class Engine:
    """Says "one two" to whatever is asked, unless it is told to fail, or to wait for `go`."""

    prefixes = Kept()

    def __init__(self, limits):
        self.queue, self.running, self.alive, self.fail = Queue(limits, Capacity(10_000, 100.0, 1.0)), 0, False, False
        self.go = threading.Event()
        self.go.set()
        self.began = threading.Event()
        self.ended = []
        self.thread = threading.Thread(target=self._work)

    def start(self):
        self.alive = True
        self.thread.start()

    def stop(self):
        self.queue.close()
        self.go.set()
        self.thread.join()
        self.alive = False

    def _work(self):
        while jobs := self.queue.take():
            for job in jobs:
                self.began.set()
                job.tell(Text("one "))
                while not self.go.wait(0.01) and job.over() is None:
                    pass
                reason = job.over()
                self.ended.append(reason)
                if self.fail:
                    job.tell(Failed("RuntimeError"))
                    continue
                job.tell(Text("two"))
                job.tell(Done(reason or "stop", USED))


@pytest.fixture
def served(request):
    limits = Limits(**{"batch": 1, "memory": 0, "prefixes": 0, "seconds": 5.0, "body": 10**6, **_given(request)})
    engine = Engine(limits)
    app = create_app("words", Prompts(), engine, limits, ImageLimits(), api_key="secret", hosts=["testserver"])
    with TestClient(app, headers={"Authorization": "Bearer secret"}) as client:
        yield client, engine


def _given(request) -> dict:
    return getattr(request, "param", {})


def picture() -> str:
    made = io.BytesIO()
    Image.new("RGB", (4, 4)).save(made, "PNG")
    return "data:image/png;base64," + base64.b64encode(made.getvalue()).decode()


def events(response) -> list:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer_as_a_whole(served):
    client, _ = served
    response = client.post("/v1/chat/completions", json=ASKED).json()
    assert response["choices"][0]["message"] == {"role": "assistant", "content": "one two"}
    assert response["choices"][0]["finish_reason"] == "stop" and response["object"] == "chat.completion"
    assert response["usage"]["total_tokens"] == 12
    assert response["attnpack"] == {"cache_bytes": 100, "dense_bytes": 400, "tokens_per_second": 20.0}


@pytest.mark.parametrize("usage", [False, True])
def test_an_answer_as_it_comes(served, usage):
    client, _ = served
    asked = ASKED | {"stream": True, "stream_options": {"include_usage": usage}}
    response = client.post("/v1/chat/completions", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert last == "[DONE]" and ("attnpack" in chunks[-1]) == usage
    told = [each["choices"][0] for each in chunks if each["choices"]]
    assert "".join(each["delta"].get("content", "") for each in told) == "one two"
    assert [each["finish_reason"] for each in told] == [None, None, None, "stop"]
    assert len({each["id"] for each in chunks}) == 1


def test_what_is_refused(served):
    client, engine = served
    image = {"type": "image_url", "image_url": {"url": picture()}}
    many = [{"role": "user", "content": [image] * 3}]
    table = [
        ({"model": "other"}, 404, "expected 'words'"),
        ({"n": 3}, 400, "n: not offered"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "none of the user"),
        ({"messages": many}, 400, "two images"),
        ({"messages": [{"role": "user", "content": [image | {"image_url": {"url": "file:///etc/passwd"}}]}]}, 400, ""),
        ({"messages": [{"role": "user", "content": "word"}] * 11}, 400, "take about 11,"),
        ({"max_tokens": 0}, 400, "max_tokens"),
    ]
    for given, status, told in table:
        response = client.post("/v1/chat/completions", json=ASKED | given)
        error = response.json()["error"]
        assert (response.status_code, told in error["message"]) == (status, True), error
    assert engine.ended == []


def test_a_request_that_is_no_json_or_too_long_is_refused(served):
    client, _ = served
    response = client.post("/v1/chat/completions", content=b'{"model": "secret content')
    assert response.status_code == 400 and "secret content" not in response.text
    long = json.dumps(ASKED | {"user": "x" * 10**6}).encode()
    assert client.post("/v1/chat/completions", content=long).status_code == 413
    in_parts = client.post("/v1/chat/completions", content=(long[at : at + 1000] for at in range(0, len(long), 1000)))
    assert in_parts.status_code == 413 and "more than 1,000,000 bytes" in in_parts.json()["error"]["message"]


def test_a_key_is_needed_for_all_but_the_page_and_health(served):
    client, engine = served
    for headers in (
        {"Authorization": "Bearer other"},
        {"Authorization": ""},
        {"Authorization": "Bearer sécret".encode()},
    ):
        assert client.post("/v1/chat/completions", json=ASKED, headers=headers).status_code == 401
        assert client.get("/v1/models", headers=headers).status_code == 401
        assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/", headers=headers).status_code == client.get("/health", headers=headers).status_code == 200
    assert engine.ended == []
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["words"]


@pytest.mark.parametrize("served", [{"queue": 2}], indirect=True)
def test_more_than_may_wait_are_sent_away(served):
    client, engine = served
    engine.go.clear()
    found = []

    def ask():
        found.append(client.post("/v1/chat/completions", json=ASKED))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    threads[0].start()
    assert engine.began.wait(10)
    for thread in threads[1:]:
        thread.start()
    while sum(each.status_code == 429 for each in list(found)) < 5:
        time.sleep(0.01)
    engine.go.set()
    for thread in threads:
        thread.join()
    assert sorted(each.status_code for each in found) == [200] * 3 + [429] * 5  # one is answered, two wait
    refused = next(each for each in found if each.status_code == 429)
    assert refused.headers["retry-after"] and "2 requests are waiting" in refused.json()["error"]["message"]


@pytest.mark.parametrize("served", [{"seconds": 0.2}], indirect=True)
def test_an_answer_that_takes_too_long_is_ended(served):
    client, engine = served
    engine.go.clear()
    assert client.post("/v1/chat/completions", json=ASKED).status_code == 504
    streamed = events(client.post("/v1/chat/completions", json=ASKED | {"stream": True}))
    assert streamed[-1]["error"]["code"] == "timeout" and engine.ended == ["timeout"] * 2


def test_a_model_that_fails_says_no_more_than_its_error(served):
    client, engine = served
    engine.fail = True
    response = client.post("/v1/chat/completions", json=ASKED)
    assert response.status_code == 500 and "raised RuntimeError" in response.json()["error"]["message"]
    assert client.get("/health").json()["status"] == "ok"


def test_another_name_of_the_machine_is_refused(served):
    """A page elsewhere may let its own name mean this machine, to read what a browser gets here."""
    client, _ = served
    assert client.get("/v1/models", headers={"Host": "elsewhere.example"}).status_code == 400


def test_a_client_that_goes_away_ends_its_answer():
    """On a real connection: the test's client has none that could be closed."""
    limits = Limits(batch=1, memory=0, prefixes=0)
    engine = Engine(limits)
    engine.go.clear()
    app = create_app("words", Prompts(), engine, limits, ImageLimits())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    body = json.dumps(ASKED)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        assert engine.began.wait(10)
    until = time.monotonic() + 10
    while not engine.ended and time.monotonic() < until:
        time.sleep(0.01)
    server.should_exit = True
    thread.join(10)
    assert engine.ended == ["cancelled"] and not engine.thread.is_alive()


def test_what_nobody_foresaw_is_told_in_the_same_form(served):
    client, _ = served
    lenient = TestClient(client.app, headers=client.headers, raise_server_exceptions=False)
    broken = ASKED | {"messages": [{"role": "user", "content": "break"}]}
    response = lenient.post("/v1/chat/completions", json=broken)
    assert response.status_code == 500 and "raised RuntimeError" in response.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=ASKED).status_code == 200


def test_metrics(served):
    client, _ = served
    client.post("/v1/chat/completions", json=ASKED)
    client.post("/v1/chat/completions", json=ASKED | {"model": "other"})
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(lines['attnpack_requests_total{status="200"}']) == float(
        lines['attnpack_requests_total{status="404"}']
    )
    assert float(lines['attnpack_tokens_total{kind="completion"}']) == 2
    assert float(lines["attnpack_cache_ratio"]) == 4 and float(lines["attnpack_queue"]) == 0


def test_the_key_is_asked_for_before_anything_is_read(served):
    client, _ = served
    refused = client.post("/v1/chat/completions", content=b"{", headers={"Authorization": "Bearer wrong"})
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    # Schemes are in any case.
    assert client.get("/v1/models", headers={"Authorization": "bearer secret"}).status_code == 200


def test_of_many_errors_a_few_are_told(served):
    client, _ = served
    for messages in ([0] * 5000, [{"role": "user", "content": [0] * 5000}]):
        refused = client.post("/v1/chat/completions", json=ASKED | {"messages": messages})
        assert refused.status_code == 400 and len(refused.text) < 5000


@pytest.mark.parametrize("field", ["temperature", "top_p", "stream", "seed", "stop", "max_tokens"])
def test_null_is_as_if_it_were_left_out(served, field):
    client, _ = served
    assert client.post("/v1/chat/completions", json=ASKED | {field: None}).status_code == 200


def test_next_to_no_temperature_is_none():
    asked = ChatRequest(**ASKED, temperature=1e-45, seed=3)
    assert asked.sampling() == Sampling()


def test_a_model_is_found_by_its_name(served):
    client, _ = served
    assert client.get("/v1/models/words").json()["id"] == "words"
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize("served", [{"queue": 1}], indirect=True)
def test_prompts_that_are_being_made_wait_in_the_queue_too(served):
    client, engine = served
    with engine.queue.coming():
        refused = client.post("/v1/chat/completions", json=ASKED)
        assert (refused.status_code, client.get("/health").json()["waiting"]) == (429, 1)
    assert client.post("/v1/chat/completions", json=ASKED).status_code == 200
