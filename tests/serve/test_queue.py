"""Which jobs wait, which are refused, and which are answered together."""

import threading
import time

import pytest
import torch

from attnpack_serve.capacity import Capacity
from attnpack_serve.job import Done, Event, Job, Sampling
from attnpack_serve.limits import Limits
from attnpack_serve.queue import FullError, Queue, TooLargeError

#: Ten tokens of a prompt are 1,000 bytes, and an answer of ten 100.
CAPACITY = Capacity(free=5000, per_token=100.0, per_new_token=10.0)


def limits(**given) -> Limits:
    return Limits(**{"batch": 4, "memory": 10**6, "prefixes": 0, **given})


def job(tokens: int = 10, images: int = 1, **given) -> Job:
    inputs = {"input_ids": torch.ones(1, tokens, dtype=torch.int64), "pixel_values": torch.zeros(images, 3, 4, 4)}
    told: list[Event] = []
    return Job(**{
        "inputs": inputs,
        "sampling": Sampling(),
        "new_tokens": 10,
        "stop": (),
        "deadline": time.monotonic() + 60,
        "tell": told.append,
        **given,
    })  # fmt: skip


def test_jobs_of_a_kind_are_taken_together_and_the_oldest_first():
    queue = Queue(limits(), CAPACITY)
    first, other, second, drawn = job(), job(tokens=11), job(), job(sampling=Sampling(0.7))
    for each in (first, other, second, drawn):
        queue.put(each)
    assert [queue.take() for _ in range(3)] == [[first, second], [other], [drawn]]
    assert len(queue) == 0


def test_a_prompt_and_its_answer_are_no_longer_than_the_model_was_made_for():
    queue = Queue(limits(), Capacity(free=10**9, per_token=1.0, per_new_token=1.0, context=25))
    fits, cut = job(tokens=15), job(tokens=20)
    queue.put(fits)
    queue.put(cut)
    assert (fits.new_tokens, cut.new_tokens) == (10, 5)
    with pytest.raises(TooLargeError, match="got 25 tokens, expected fewer than the 25 that the model was made for"):
        queue.put(job(tokens=25))


def test_batches_are_powers_of_two():
    queue = Queue(limits(batch=16), CAPACITY)
    jobs = [job(tokens=1) for _ in range(11)]
    for each in jobs:
        queue.put(each)
    assert [queue.take(), queue.take(), queue.take()] == [jobs[:8], jobs[8:10], jobs[10:]]


def test_no_more_are_taken_than_fit():
    queue = Queue(limits(), CAPACITY)
    jobs = [job() for _ in range(6)]
    for each in jobs:
        queue.put(each)
    assert [len(queue.take()), len(queue.take())] == [4, 2]
    larger = [job(tokens=20) for _ in range(3)]
    for each in larger:
        queue.put(each)
    assert [queue.take(), queue.take()] == [larger[:2], larger[2:]]  # 2,100 bytes each, of 5,000


def test_what_has_a_seed_of_its_own_is_alone():
    queue = Queue(limits(), CAPACITY)
    for _ in range(2):
        queue.put(job(sampling=Sampling(0.7, seed=3)))
    assert [len(queue.take()), len(queue.take())] == [1, 1]


def test_what_never_fits_is_refused_at_once():
    queue = Queue(limits(), CAPACITY)
    with pytest.raises(TooLargeError, match=r"got 50 tokens .* about 5,100 bytes; expected at most 5,000: send fewer"):
        queue.put(job(tokens=50))


def test_a_full_queue_refuses():
    queue = Queue(limits(queue=2), CAPACITY)
    queue.put(job())
    queue.put(job())
    with pytest.raises(FullError, match="2 requests are waiting"):
        queue.put(job())
    queue = Queue(limits(waiting=job(images=3).nbytes), CAPACITY)
    queue.put(job(images=4))  # however large, it is the only one
    with pytest.raises(FullError, match="with many images"):
        queue.put(job())


def test_a_closed_queue_gives_out_what_it_has():
    queue = Queue(limits(), CAPACITY)
    kept = job()
    queue.put(kept)
    queue.close()
    with pytest.raises(FullError, match="shutting down"):
        queue.put(job())
    assert queue.take() == [kept] and queue.take() == []


def test_taking_waits_for_a_job():
    queue, taken = Queue(limits(), CAPACITY), []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    late = job()
    queue.put(late)
    thread.join(10)
    assert taken == [[late]]


def test_why_a_job_is_given_up():
    assert job().over() is None
    assert job(deadline=time.monotonic() - 1).over() == "timeout"
    assert job(cancelled=True).over() == "cancelled"
    assert Done("stop", None).reason == "stop"
