"""Jobs that are generated for together: their tokens as they come, and when each is done."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from attnpack_fx import cache_bytes, hf
from attnpack_serve.job import Done, Job, Reason, Text, Used

#: What a tokenizer gives for bytes that are no character yet.
_UNFINISHED = "\ufffd"


class Batch(StoppingCriteria):
    """What `generate` asks after every step whether a row is done; what each row has said so far is told on the way.

    Args:
        jobs: by row.
        tokenizer: of the model.
        ends: ids of tokens that end an answer.
        cache: what the rows are generated from.
        cached: tokens of each prompt that were not read again.
    """

    def __init__(self, jobs: Sequence[Job], tokenizer: Any, ends: frozenset[int], cache: Any, cached: int = 0) -> None:
        self._cache, self._cached = cache, cached
        self._rows = [_Row(job, tokenizer, ends) for job in jobs]
        self._began = time.monotonic()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        for row, token in zip(self._rows, tokens, strict=True):
            if not row.done:
                reason = row.add(token)
                if reason is not None:
                    row.finish(reason, self._used(row))
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)

    def _used(self, row: "_Row") -> Used:
        """A row's share of the cache, which has as much of each."""
        seconds = time.monotonic() - self._began
        return Used(
            prompt_tokens=row.job.tokens,
            completion_tokens=len(row.tokens),
            cached_tokens=self._cached,
            cache_bytes=cache_bytes(self._cache) // len(self._rows),
            dense_bytes=dense_bytes(self._cache) // len(self._rows),
            tokens_per_second=len(row.tokens) / max(seconds, 1e-9),
        )


class _Row:
    def __init__(self, job: Job, tokenizer: Any, ends: frozenset[int]) -> None:
        self.job, self.tokens, self.done = job, list[int](), False
        self._tokenizer, self._ends = tokenizer, ends
        self._told = 0  # characters
        self._longest = max((len(each) for each in job.stop), default=0)

    def add(self, token: int) -> Reason | None:
        """Take one more token, tell what can be told, and say why the answer ends, if it does."""
        self.tokens.append(token)
        if token in self._ends:
            self._tell(self._text())
            return "stop"
        text = self._text()
        found = [place for stop in self.job.stop if (place := text.find(stop)) >= 0]
        if found:
            self._tell(text[: min(found)])
            return "stop"
        reason = "length" if len(self.tokens) >= self.job.new_tokens else self.job.over()
        # What may be the beginning of a stop text, or of a character, is told when it is known not to be.
        self._tell(text if reason else text[: max(self._told, len(text) - self._longest)].rstrip(_UNFINISHED))
        return reason

    def finish(self, reason: Reason, used: Used) -> None:
        self.done = True
        self.job.tell(Done(reason, used))

    def _text(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _tell(self, text: str) -> None:
        if len(text) > self._told:
            self.job.tell(Text(text[self._told :]))
            self._told = len(text)


def dense_bytes(cache: Any) -> int:
    """Return what the same keys and values take in a dense cache."""
    return sum(each.numel() * each.dtype.itemsize for pair in hf.keys_and_values(cache) for each in pair)
