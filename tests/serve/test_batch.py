"""What is told of each row of a batch while it is generated."""

import time

import pytest
import torch
from transformers import DynamicCache

from attnpack_serve.batch import Batch
from attnpack_serve.job import Done, Event, Job, Sampling, Text

END = 0
WORDS = {1: "one ", 2: "two ", 3: "stop", 4: "st", 5: "op", 6: "\ufffd", 7: "x"}


class Tokenizer:
    """Joins words; two halves of a character make it whole."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(WORDS[token] for token in tokens if token != END).replace("\ufffd\ufffd", "é")


@pytest.fixture
def cache():
    held = DynamicCache()
    held.update(torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4), 0)
    return held


def generated(cache, rows, **given):
    """What is told when each row gets these tokens, and after how many steps all are done."""
    told: list[list[Event]] = [[] for _ in rows]
    jobs = [
        Job(**{
            "inputs": {"input_ids": torch.ones(1, 8, dtype=torch.int64)},
            "sampling": Sampling(),
            "new_tokens": 5,
            "stop": (),
            "deadline": time.monotonic() + 60,
            "tell": told[number].append,
            **given,
        })
        for number in range(len(rows))
    ]  # fmt: skip
    batch = Batch(jobs, Tokenizer(), frozenset([END]), cache)
    for step, tokens in enumerate(zip(*rows, strict=True), 1):
        if batch(torch.tensor(tokens)[:, None], None).all():
            return told, step
    return told, None


def text_of(events):
    return "".join(each.text for each in events if isinstance(each, Text))


def test_each_row_ends_by_itself(cache):
    told, steps = generated(cache, [(1, END, 1, 1, 1, 1), (1, 2, 1, 2, 1, 2)])
    assert [text_of(each) for each in told] == ["one ", "one two one two one "]
    assert [each[-1].reason for each in told] == ["stop", "length"] and steps == 5
    used = told[0][-1].used
    assert (used.prompt_tokens, used.completion_tokens, used.cached_tokens) == (8, 2, 0)
    assert used.cache_bytes == used.dense_bytes == 2 * 2 * 8 * 4 * 4 and used.tokens_per_second > 0
    assert sum(isinstance(each, Done) for each in told[0]) == 1


def test_a_stop_text_is_not_told_even_in_parts(cache):
    told, _ = generated(cache, [(1, 4, 5, 1), (1, 4, 7, END)], stop=("stop",))
    assert [text_of(each) for each in told] == ["one ", "one stx"]
    assert [each[-1].reason for each in told] == ["stop", "stop"]


def test_half_a_character_is_not_told(cache):
    told, _ = generated(cache, [(1, 6, 6, END)] * 2)
    assert [each.text for each in told[0] if isinstance(each, Text)] == ["one ", "é"]


def test_a_job_that_is_given_up_ends(cache):
    told, steps = generated(cache, [(1, 1), (2, 2)], cancelled=True)
    assert [each[-1].reason for each in told] == ["cancelled"] * 2 and steps == 1
    told, _ = generated(cache, [(1, 1), (2, 2)], deadline=time.monotonic() - 1)
    assert [each[-1].reason for each in told] == ["timeout"] * 2
