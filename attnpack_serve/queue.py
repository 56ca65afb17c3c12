"""Jobs that wait, and which of them are answered together."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from attnpack_serve.capacity import Capacity
from attnpack_serve.job import Job
from attnpack_serve.limits import Limits

#: Seconds to wait for more of a kind before a batch begins: clients that ask together do not arrive together.
_GATHER = 0.02


class FullError(Exception):
    """There is no room for another job; it may be tried again."""


class TooLargeError(ValueError):
    """A job takes more than there is, however long it waits."""


class Queue:
    """Jobs in the order of their arrival, from any thread.

    Args:
        limits: how many may wait, and how many bytes of inputs.
        capacity: of those that are answered together.
    """

    def __init__(self, limits: Limits, capacity: Capacity) -> None:
        self._limits, self._capacity = limits, capacity
        self._waiting: deque[Job] = deque()
        self._coming = 0
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting) + self._coming

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Count a job among those that wait while its prompt is made. Raises `FullError` where too many do."""
        self._check(self._coming + 1)
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    def _check(self, coming: int) -> None:
        if self._closed:
            raise FullError("the server is shutting down")
        if len(self._waiting) + coming > self._limits.queue:
            raise FullError(f"{len(self._waiting) + coming - 1} requests are waiting, and no more may")

    def put(self, job: Job) -> None:
        """Append a job; its answer is no longer than the model's positions reach.

        Raises:
            TooLargeError: for one that would not fit alone, or leaves no position for an answer.
            FullError: where too many wait, or too large ones, or the queue is closed.
        """
        context = self._capacity.context
        if context is not None:
            if job.tokens >= context:
                raise TooLargeError(
                    f"got {job.tokens} tokens, expected fewer than the {context} that the model was made for: send a "
                    "shorter prompt, or fewer or smaller images"
                )
            job.new_tokens = min(job.new_tokens, context - job.tokens)
        needed = self._capacity.bytes(job.tokens, job.new_tokens)
        if needed > self._capacity.free:
            raise TooLargeError(
                f"got {job.tokens} tokens and an answer of up to {job.new_tokens}, which take about {needed:,} bytes; "
                f"expected at most {self._capacity.free:,}: send fewer or smaller images, or a smaller max_tokens"
            )
        with self._changed:
            self._check(self._coming + 1)
            if self._waiting and sum(each.nbytes for each in self._waiting) + job.nbytes > self._limits.waiting:
                raise FullError(f"{len(self._waiting)} requests with many images are waiting")
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Take no more jobs; those that wait are still given out."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self) -> list[Job]:
        """Wait for jobs, and remove the oldest with others of its kind; none once closed and empty.

        As many are given as fit, or fewer, so that they are a power of two: a model may be compiled for every size of a
        batch, as LLaVA is for the number of its images.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
        time.sleep(_GATHER)
        with self._changed:
            chosen: list[Job] = []
            room = self._capacity.free
            for job in list(self._waiting):
                needed = self._capacity.bytes(job.tokens, job.new_tokens)
                if chosen and (job.kind != chosen[0].kind or needed > room or len(chosen) >= self._limits.batch):
                    continue
                chosen.append(job)
                room -= needed
            del chosen[1 << len(chosen).bit_length() - 1 :]
            for job in chosen:
                self._waiting.remove(job)
            return chosen
