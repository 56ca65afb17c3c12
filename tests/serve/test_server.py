"""`attnpack serve` as a process, on the trained model, with OpenAI's own client."""

import base64
import random
import signal
import struct
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from attnpack_fx.demo.digits import Question, held_out_questions
from benchmarks.serving import KEY, MODEL, data_url, messages, serving

IMAGES = 4
TOKENS = 12
TOLD = ("--memory", "2G", "--images", str(IMAGES), "--size", "64x64", "--max-new-tokens", "40")


@pytest.mark.slow
def test_a_server():
    """One for all, since it takes long to begin; the last check ends it."""
    with (
        serving(*TOLD, "--queue", "40") as served,
        openai.OpenAI(base_url=f"{served.address}/v1", api_key=KEY, max_retries=0, timeout=300) as client,
    ):
        check_answers_are_right_whole_and_as_they_come(client, served)
        check_many_at_once_some_of_which_go_away(client, served)
        check_what_cannot_be_answered_is_refused(client, served)
        check_told_to_stop_it_answers_what_was_asked(client, served)


def questions(count: int, seed: int = 0) -> list[Question]:
    return held_out_questions("read", images=IMAGES, count=count, seed=seed)


def asked(client: openai.OpenAI, question: Question, **given):
    return client.chat.completions.create(model=MODEL, messages=messages(question), max_tokens=TOKENS, **given)


def check_answers_are_right_whole_and_as_they_come(client, served):
    assert [each.id for each in client.models.list()] == [MODEL]
    for question in questions(3):
        whole = asked(client, question)
        parts = list(asked(client, question, stream=True, stream_options={"include_usage": True}))
        text = "".join(each.choices[0].delta.content or "" for each in parts if each.choices)
        assert whole.choices[0].message.content.strip() == question.answer and text.strip() == question.answer
        assert whole.choices[0].finish_reason == parts[-2].choices[0].finish_reason == "stop"
        assert len([each for each in parts if each.choices and each.choices[0].delta.content]) > 4
        assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 9
        assert parts[-1].attnpack["cache_bytes"] < 0.6 * parts[-1].attnpack["dense_bytes"]
        # Its images are known by now.
        again = asked(client, question)
        assert again.usage.prompt_tokens_details.cached_tokens > 64 * IMAGES
        assert again.choices[0].message.content.strip() == question.answer
    found = served.metrics()
    assert found["attnpack_prefixes"] == 3 and 0 < found["attnpack_prefix_cache_bytes"] < 3e6
    assert found["attnpack_cache_ratio"] > 1.7


def check_many_at_once_some_of_which_go_away(client, served):
    first = questions(32, seed=1)
    held = []
    for _ in range(2):
        gone, right = at_once(client, first)
        served.rest()
        assert gone == 8 and right >= 22, (gone, right)
        held.append(served.resident())
    assert held[1] < 1.1 * held[0]
    found = served.metrics()
    assert found["attnpack_queue"] == found["attnpack_running"] == 0


def at_once(client: openai.OpenAI, asking: list[Question]) -> tuple[int, int]:
    """How many of the clients went away, and how many others were answered right."""

    def one(number: int) -> str:
        question = asking[number]
        if number % 4:
            return "right" if asked(client, question).choices[0].message.content.strip() == question.answer else "wrong"
        with asked(client, question, stream=True) as stream:
            next(iter(stream))
        return "gone"

    with ThreadPoolExecutor(32) as pool:
        found = Counter(pool.map(one, range(len(asking))))
    return found["gone"], found["right"]


def large_png() -> bytes:
    """A PNG that says it has 30,000 x 30,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 90_001 * 10)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def check_what_cannot_be_answered_is_refused(client, served):
    address = served.address
    image = data_url(questions(1)[0].images[0])
    base = {"model": MODEL, "messages": [{"role": "user", "content": "read"}], "max_tokens": 4}

    def with_image(url: str, count: int = 1) -> dict:
        content = [{"type": "image_url", "image_url": {"url": url}}] * count
        return {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": "read"}]}]}

    table = [
        ({"model": "gpt-4o"}, 404),
        ({"messages": []}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
        (with_image("data:image/png;base64,%%%"), 400),
        (with_image("data:image/png;base64," + base64.b64encode(random.Random(0).randbytes(999)).decode()), 400),
        (with_image("data:image/png;base64," + base64.b64encode(large_png()).decode()), 400),
        (with_image(image[: len(image) // 2]), 400),
        (with_image("file:///etc/passwd"), 400),
        (with_image("/etc/passwd"), 400),
        (with_image("http://127.0.0.1:22/x.png"), 400),
        (with_image("http://10.0.0.1/x.png"), 400),
        (with_image("https://example.com/x.png"), 400),
        (with_image(image, 17), 400),
        ({"n": 2}, 400),
        ({"max_tokens": -1}, 400),
        ({"temperature": 9}, 400),
        ({"tools": [{"type": "function"}]}, 400),
        ({"messages": [{"role": "user", "content": "1 " * 300_000}]}, 400),
    ]
    headers = {"Authorization": f"Bearer {KEY}"}
    for given, status in table:
        response = httpx.post(f"{address}/v1/chat/completions", json=base | given, headers=headers, timeout=60)
        assert (response.status_code, bool(response.json()["error"]["message"])) == (status, True), given
    assert httpx.post(f"{address}/v1/chat/completions", json=base).status_code == 401
    long = httpx.post(f"{address}/v1/chat/completions", content=b" " * (65 << 20), headers=headers, timeout=60)
    assert long.status_code == 413
    served.rest()
    assert asked(client, questions(1)[0]).choices[0].message.content.strip() == questions(1)[0].answer


def check_told_to_stop_it_answers_what_was_asked(client, served):
    answers = []
    threads = [
        threading.Thread(
            target=lambda each=each: answers.append(asked(client, each).choices[0].message.content.strip())
        )
        for each in questions(4, seed=2)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    served.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(120)
    assert len(answers) == 4 and served.process.wait(120) in (0, -signal.SIGTERM)
