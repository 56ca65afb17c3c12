"""A request on its way: what it asks, what came of it, and what happens to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

#: Why an answer ended, in OpenAI's words; "timeout" and "cancelled" are ours.
Reason = Literal["stop", "length", "timeout", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at a temperature of 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Used:
    """What an answer took: tokens, bytes of its share of the packed cache and of a dense one, tokens per second."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_bytes: int
    dense_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class Text:
    """Some more of an answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer."""

    reason: Reason
    used: Used


@dataclass(frozen=True)
class Failed:
    """No answer: the model raised."""

    error: str


Event = Text | Done | Failed


@dataclass(eq=False)
class Job:
    """One prompt and its answer.

    Attributes:
        inputs: what `generate` takes for it, a batch of one.
        sampling: how tokens are chosen.
        new_tokens: the longest answer.
        stop: texts that end the answer, and are not part of it.
        deadline: by `time.monotonic`, when it is given up.
        tell: called in the engine's thread with every event, the last of which is `Done` or `Failed`.
        cancelled: set from any thread by whoever does not want the answer any longer.
    """

    inputs: dict[str, Tensor]
    sampling: Sampling
    new_tokens: int
    stop: tuple[str, ...]
    deadline: float
    tell: Callable[[Event], None]
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        """How many tokens the prompt has."""
        return self.inputs["input_ids"].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return sum(each.nbytes for each in self.inputs.values())

    @property
    def kind(self) -> tuple[object, ...]:
        """What jobs of one batch have in common: shapes of all inputs, and how tokens are chosen."""
        shapes = tuple((name, tuple(each.shape), each.dtype) for name, each in sorted(self.inputs.items()))
        # One generator of random numbers serves a batch: what has a seed of its own is alone.
        alone = None if self.sampling.seed is None else id(self)
        return shapes, self.sampling, alone

    def over(self) -> Reason | None:
        """Why it is to be given up, if it is."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if time.monotonic() > self.deadline else None
