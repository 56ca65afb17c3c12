"""An answer as the client sees it: whole, or in events as it comes."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from attnpack_serve.job import Done, Event, Failed, Job, Text, Used
from attnpack_serve.refusals import RefusedError, body

_TIMEOUT = "no answer within the time that the server grants; ask for fewer tokens, or later"


class Answer:
    """The events of one job, for the event loop that made it.

    Args:
        model: its name, for the response.
    """

    def __init__(self, model: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def tell(self, event: Event) -> None:
        """Take an event from any thread; nobody listens after the loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def whole(self) -> tuple[dict[str, Any], Used]:
        """Wait for the end, and return the response.

        Raises:
            RefusedError: where there is no answer.
        """
        texts: list[str] = []
        while True:
            event = await self._events.get()
            if isinstance(event, Text):
                texts.append(event.text)
            else:
                break
        done = _answered(event)
        message = {"role": "assistant", "content": "".join(texts)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.reason}
        about = {**self._about, "object": "chat.completion", "choices": [choice]}
        return about | _usage(done.used), done.used

    async def events(self, usage: bool) -> AsyncIterator[tuple[str, Used | None]]:
        """Give server-sent events, and with the last of them what the answer took.

        Args:
            usage: whether an event before the last says what the answer took.
        """
        yield self._chunk({"role": "assistant", "content": ""}), None
        while True:
            event = await self._events.get()
            if isinstance(event, Text):
                yield self._chunk({"content": event.text}), None
                continue
            try:
                done = _answered(event)
            except RefusedError as error:
                yield f"data: {json.dumps(body(error.status, error.message, error.code))}\n\n", None
                return
            yield self._chunk({}, done.reason), None
            if usage:
                about = {**self._about, "object": "chat.completion.chunk", "choices": []}
                yield f"data: {json.dumps(about | _usage(done.used))}\n\n", None
            yield "data: [DONE]\n\n", done.used
            return

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return f"data: {json.dumps({**self._about, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


def _answered(event: Event) -> Done:
    if isinstance(event, Failed):
        raise RefusedError(500, f"the model raised {event.error}; the server's log says where")
    assert isinstance(event, Done)
    if event.reason == "timeout":
        raise RefusedError(504, _TIMEOUT, "timeout")
    return event


def _usage(used: Used) -> dict[str, Any]:
    counted = asdict(used)
    prompt, completion = counted.pop("prompt_tokens"), counted.pop("completion_tokens")
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": counted.pop("cached_tokens")},
    }
    return {"usage": usage, "attnpack": counted}


async def abandon_when(gone: Any, job: Job) -> None:
    """Cancel a job as soon as its client has gone. gone: a coroutine function that says so."""
    while not await gone():
        await asyncio.sleep(0.1)
    job.cancelled = True
