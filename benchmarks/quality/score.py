"""One policy on many questions: what it answers, how far its logits are from the dense model's, what it holds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.policy import PackPolicy
from benchmarks.quality.data import Batch, follow
from benchmarks.quality.packing import Decoders, cache_of, packed, vision_bytes

_RESAMPLES = 4000


@torch.no_grad()
def score(model: Any, decoders: Decoders, batches: Sequence[Batch], policy: PackPolicy, seed: int) -> dict[str, Any]:
    """A row of the table.

    Accuracies are shares of right tokens among those generated from the cache; exact: of answers that are right as a
    whole. difference: packed minus dense accuracy, paired by question, with a 95 % bootstrap interval. kl: mean over
    tokens of KL(dense || packed) in nats, both fed the dense answer. agree: share of answers with the same tokens as
    the dense model's; first_divergence: among the others, mean place (from 1) of the first token that differs, counted
    from the first that the cache gives. Bytes are of all batches, at the end of the answer.
    """
    decode = decoders.of(policy)
    right, dense_right, exact, dense_exact, kl, places = [], [], [], [], [], []
    held = {"vision_bytes": 0, "cache_bytes": 0, "dense_vision_bytes": 0, "dense_cache_bytes": 0}
    for batch in batches:
        pairs = packed(batch, policy)
        cache = cache_of(model, batch, pairs)
        reference = batch.tokens[:, -batch.from_cache :]
        logits = follow(decode, cache, batch.start, batch.from_cache, reference)
        held["vision_bytes"] += vision_bytes(hf.keys_and_values(cache), batch)
        held["cache_bytes"] += cache_bytes(cache)
        held["dense_vision_bytes"] += batch.dense_vision_bytes
        held["dense_cache_bytes"] += batch.dense_bytes
        kl.append(_kl(batch.logits, logits).mean(1))
        tokens = logits.argmax(-1)
        if not torch.equal(tokens, reference):  # Otherwise the free answer is the forced one.
            free = follow(decode, cache_of(model, batch, pairs), batch.start, batch.from_cache, None)
            tokens = free.argmax(-1)
        expected = batch.answers[:, -batch.from_cache :]
        # What is not generated from the cache is the same for all.
        given = (batch.tokens == batch.answers)[:, : -batch.from_cache].all(1)
        right.append((tokens == expected).double().mean(1))
        dense_right.append((reference == expected).double().mean(1))
        exact.append((tokens == expected).all(1) & given)
        dense_exact.append((reference == expected).all(1) & given)
        places.append(_first_difference(tokens, reference))
    accuracy, dense, divergence = torch.cat(right), torch.cat(dense_right), torch.cat(places)
    differing = divergence[divergence > 0].double()
    return {
        "questions": len(accuracy),
        "accuracy": float(accuracy.mean()),
        "dense_accuracy": float(dense.mean()),
        "difference": float((accuracy - dense).mean()),
        "difference_interval": interval((accuracy - dense).numpy(), seed),
        "exact": float(torch.cat(exact).double().mean()),
        "dense_exact": float(torch.cat(dense_exact).double().mean()),
        "kl": float(torch.cat(kl).mean()),
        "agree": float((divergence == 0).double().mean()),
        "first_divergence": float(differing.mean()) if len(differing) else None,
        **held,
        "vision_ratio": held["dense_vision_bytes"] / held["vision_bytes"],
        "cache_ratio": held["dense_cache_bytes"] / held["cache_bytes"],
    }


def interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over questions."""
    random = np.random.default_rng(seed)
    drawn = random.integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _kl(dense: Tensor, other: Tensor) -> Tensor:
    """`[B, n]` of logits `[B, n, V]`."""
    left, right = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1)


def _first_difference(tokens: Tensor, reference: Tensor) -> Tensor:
    """int64 `[B]`: place of the first difference, from 1; 0 for none."""
    differs = tokens != reference
    return torch.where(differs.any(1), differs.int().argmax(1) + 1, 0)
