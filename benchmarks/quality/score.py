"""One policy on many contexts: what it answers, how far its logits are from the dense model's, what it holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.answering import Answers
from benchmarks.quality.contexts import FIRST, LONG, TASKS, Contexts

_RESAMPLES = 4000


@dataclass
class Tally:
    """Numbers of every context, by task; `add` a batch at a time.

    right: share of right tokens. exact: whether all are. rouge: ROUGE-L with the right answer. kl: mean of KL(dense ||
    this) over tokens, in nats. place: of the first token that differs from the dense model's, from 1; 0 for none. nll:
    mean negative log-likelihood of the right tokens, of the long task.
    """

    right: dict[str, list[float]] = field(default_factory=lambda: {task: [] for task in TASKS})
    exact: dict[str, list[float]] = field(default_factory=lambda: {task: [] for task in TASKS})
    rouge: dict[str, list[float]] = field(default_factory=lambda: {task: [] for task in TASKS})
    kl: dict[str, list[float]] = field(default_factory=lambda: {task: [] for task in TASKS})
    place: dict[str, list[int]] = field(default_factory=lambda: {task: [] for task in TASKS})
    nll: list[float] = field(default_factory=list)
    prompt_bytes: int = 0
    long_bytes: int = 0

    def add(self, batch: Contexts, given: Answers, dense: Answers) -> None:
        for task in TASKS:
            tokens, reference = given.tokens[task], dense.tokens[task]
            expected = batch.turns[task].answer
            if task == FIRST:
                expected = expected[:, 1:]
            right = tokens == expected
            self.right[task] += right.double().mean(1).tolist()
            self.exact[task] += right.all(1).double().tolist()
            self.rouge[task] += [rouge_l(one.tolist(), two.tolist()) for one, two in zip(tokens, expected, strict=True)]
            self.kl[task] += divergence(dense.logits[task], given.logits[task]).mean(1).tolist()
            self.place[task] += first_difference(tokens, reference).tolist()
        likely = given.logits[LONG].double().log_softmax(-1)
        answer = batch.turns[LONG].answer
        self.nll += (-likely.gather(2, answer[:, :, None])[:, :, 0].mean(1)).tolist()
        self.prompt_bytes += given.prompt_bytes
        self.long_bytes += given.long_bytes


def row(own: Tally, dense: Tally, seed: int) -> dict[str, Any]:
    """What is reported of a policy: means over tasks that weigh the same, with 95 % bootstrap intervals over contexts.

    difference: less the dense model's, paired by context. first_divergence: mean over the answers that differ.
    """
    accuracy, other = (np.mean([tally.right[task] for task in TASKS], axis=0) for tally in (own, dense))
    means = {name: float(np.mean([getattr(own, name)[task] for task in TASKS])) for name in ("exact", "rouge", "kl")}
    return {
        "prompt_ratio": dense.prompt_bytes / own.prompt_bytes,
        "accuracy": float(accuracy.mean()),
        "accuracy_interval": interval(accuracy, seed),
        "difference": float((accuracy - other).mean()),
        "difference_interval": interval(accuracy - other, seed),
        "exact": means["exact"],
        "rouge_l": means["rouge"],
        "kl": means["kl"],
        **_divergence([place for task in TASKS for place in own.place[task]]),
        "tasks": {task: _task(own, dense, task, seed) for task in TASKS},
        "long": {
            "perplexity": float(np.exp(np.mean(own.nll))),
            "ratio": dense.long_bytes / own.long_bytes,
        },
    }


def _task(own: Tally, dense: Tally, task: str, seed: int) -> dict[str, Any]:
    right, other = np.array(own.right[task]), np.array(dense.right[task])
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": interval(right, seed),
        "difference": float((right - other).mean()),
        "difference_interval": interval(right - other, seed),
        "exact": float(np.mean(own.exact[task])),
        "rouge_l": float(np.mean(own.rouge[task])),
        "kl": float(np.mean(own.kl[task])),
        **_divergence(own.place[task]),
    }


def _divergence(places: Sequence[int]) -> dict[str, float | None]:
    differing = [place for place in places if place]
    return {
        "agree": 1 - len(differing) / len(places),
        "first_divergence": float(np.mean(differing)) if differing else None,
    }


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over contexts."""
    random = np.random.default_rng(seed)
    drawn = random.integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) `[B, n]` of logits `[B, n, V]`, in nats."""
    left, right = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1)


def first_difference(tokens: Tensor, reference: Tensor) -> Tensor:
    """int64 `[B]`: place of the first difference, from 1; 0 for none."""
    differs = tokens != reference
    return torch.where(differs.any(1), differs.int().argmax(1) + 1, 0)


def rouge_l(given: Sequence[int], expected: Sequence[int]) -> float:
    """F1 of the longest common subsequence (Lin, 2004), of tokens."""
    lengths = np.zeros(len(expected) + 1, dtype=np.int64)
    wanted = np.asarray(expected)
    for token in given:
        longer = np.where(wanted == token, lengths[:-1] + 1, lengths[1:])
        lengths[1:] = np.maximum.accumulate(longer)
    common = int(lengths[-1])
    return 2 * common / (len(given) + len(expected)) if common else 0.0
