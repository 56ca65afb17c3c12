"""The next token from logits: the most likely one, or one drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: as transformers' warpers of the same names do it, in the order temperature, top_k, top_p.

    temperature: above 0; top_k: None, or how many of the most likely tokens count; top_p: the least probability that
    those that count have together, in (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature!r}, expected a number > 0; do_sample=False is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k!r}, expected a number of tokens >= 1, or None")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p!r}, expected a share in (0, 1]")

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Tokens `[B]` by logits `[B, V]`."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.masked_fill((before >= self.top_p).gather(1, order.argsort(1)), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()


def most_likely(logits: Tensor) -> Tensor:
    return logits.argmax(-1)
