"""What `attnpack serve` answers in a second, against calls of `generate` one after another, and how it bears load.

    python -m benchmarks.serving                  # 8 clients, 64 questions
    python -m benchmarks.serving --minutes 10     # then load: clients that ask on and on, some of which go away

The model is the trained LLaVA of this repository; every question has images of its own. Contenders take turns: eager
and compiled calls in this process, the server in another, which is idle meanwhile.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import attnpack_fx
from attnpack_fx.demo.digits import Question, held_out_questions
from attnpack_fx.demo.load import Loaded, load
from attnpack_serve.prompts import Prompts
from benchmarks.trained import ASSETS

MODEL = "digits-llava"
KEY = "secret"
_TOKENS = 12


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    address: str

    def get(self, path: str) -> str:
        """Return what a route says."""
        asked = urllib.request.Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked, timeout=60) as response:
            text: str = response.read().decode()
        return text

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        lines = (line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if line and line[0] != "#")
        return {name: float(value) for name, value in lines}

    def resident(self) -> int:
        """Return the bytes of memory that the process has."""
        with open(f"/proc/{self.process.pid}/status") as status:
            (kilobytes,) = (line.split()[1] for line in status if line.startswith("VmRSS"))
        return int(kilobytes) * 1024

    def rest(self) -> None:
        """Wait until nothing is answered and nothing waits."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            state = json.loads(self.get("/health"))
            if not state["running"] and not state["waiting"]:
                return
            time.sleep(0.1)
        raise RuntimeError(f"the server is not at rest: {state}")


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Start a server of the trained model, and stop it afterwards. arguments: of `attnpack serve`."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    command = [sys.executable, "-m", "attnpack_cli", "serve", str(ASSETS / MODEL), "--port", str(port), *arguments]
    process = subprocess.Popen(command, env=os.environ | {"ATTNPACK_API_KEY": KEY})
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        until = time.monotonic() + 900
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(OSError):
                server.get("/health")
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"the server did not begin; it ended with {process.poll()}")
        yield server
    finally:
        process.kill()
        process.wait()


def messages(question: Question) -> list[dict[str, Any]]:
    """A question with its images, as OpenAI's clients send it."""
    text = question.prompt.split("question : ")[1].removesuffix(" answer :")
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images
    ]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def data_url(image: Any) -> str:
    """A picture as a PNG in a `data:` URL."""
    written = io.BytesIO()
    image.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def ask(server: Server, question: Question, leave: bool = False) -> str:
    """What the server says. leave: go away after the first event of the answer."""
    body = {"model": MODEL, "messages": messages(question), "max_tokens": _TOKENS, "stream": leave}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    asked = urllib.request.Request(f"{server.address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=300) as response:
        if leave:
            response.readline()
            return "left"
        content: str = json.load(response)["choices"][0]["message"]["content"]
    return "right" if content.strip() == question.answer else "wrong"


def in_turn(loaded: Loaded, asked: Sequence[Question]) -> int:
    """How many answers of `generate`, one call after another, are right."""
    prompts, right = Prompts(loaded), 0
    for question in asked:
        text = messages(question)[0]["content"][-1]
        content = [*({"type": "image"} for _ in question.images), text]
        inputs = prompts.prepare([{"role": "user", "content": content}], question.images)
        output = loaded.model.generate(**inputs, max_new_tokens=_TOKENS, do_sample=False)
        said = loaded.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said.strip() == question.answer
    return right


def compare(server: Server, clients: int, asked: Sequence[Question], rounds: int) -> None:
    """Print requests a second of all contenders."""
    eager, packed = (load(str(ASSETS / MODEL)) for _ in range(2))
    attnpack_fx.compile(packed.model)

    def together() -> int:
        with ThreadPoolExecutor(clients) as pool:
            return sum(said == "right" for said in pool.map(lambda question: ask(server, question), asked))

    contenders: dict[str, Callable[[], int]] = {
        "generate, eager, one call after another": lambda: in_turn(eager, asked),
        "generate, packed, one call after another": lambda: in_turn(packed, asked),
        f"attnpack serve, {clients} clients": together,
    }
    in_turn(eager, asked[:1])
    in_turn(packed, asked[:2])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    right: dict[str, int] = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            right[name] = run()
            seconds[name].append(time.perf_counter() - began)
    first = statistics.median(next(iter(seconds.values())))
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(
            f"{name:<44}{len(asked) / median:8.2f} requests/s  {first / median:5.2f}x  "
            f"{right[name]} of {len(asked)} right"
        )


def load_it(server: Server, clients: int, asked: Sequence[Question], minutes: float) -> None:
    """Ask on and on, and print what came of it, and the server's memory at the beginning and once a minute."""
    until, found, lock = time.monotonic() + 60 * minutes, Counter[str](), threading.Lock()

    def client(number: int) -> None:
        for turn in itertools.count():
            if time.monotonic() >= until:
                return
            try:
                # One answer of eight is left after its first event, by every client in its turn.
                said = ask(server, asked[(number + turn * clients) % len(asked)], leave=(number + turn) % 8 == 0)
            except urllib.error.HTTPError as error:
                said = f"status {error.code}"
                time.sleep(1)
            except OSError as error:
                said = type(error).__name__
            with lock:
                found[said] += 1

    server.rest()
    memory, first, began = [server.resident()], server.metrics(), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = [pool.submit(client, number) for number in range(clients)]
        while wait(answers, timeout=60).not_done:
            memory.append(server.resident())
        for answer in answers:
            answer.result()
    seconds = time.monotonic() - began
    server.rest()
    memory.append(server.resident())
    last = server.metrics()
    tokens, kept = 'attnpack_tokens_total{kind="completion"}', "attnpack_prefix_cache_bytes"
    print(
        f"{seconds / 60:.1f} minutes, {clients} clients: {sum(found.values())} requests, "
        f"{sum(found.values()) / seconds:.2f} a second; "
        + ", ".join(f"{count} {said}" for said, count in sorted(found.items()))
        + f"; {last[tokens] - first[tokens]:.0f} tokens\n"
        + f"prompts kept MB: {first[kept] / 1e6:.0f} before, {last[kept] / 1e6:.0f} after; "
        + "resident MB, before, once a minute, at rest: "
        + " ".join(f"{each / 1e6:.0f}" for each in memory)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--images", type=int, default=16, help="of a question, 64 vision tokens each (16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=0.0, help="of load after it (0)")
    given = parser.parse_args()
    asked = held_out_questions("read", images=given.images, count=given.questions, seed=0)
    told = ("--batch", str(given.clients), "--images", str(given.images), "--size", "64x64", "--memory", "4G")
    with serving(*told) as server:
        compare(server, given.clients, asked, given.rounds)
        if given.minutes:
            load_it(server, given.clients, asked, given.minutes)


if __name__ == "__main__":
    main()
