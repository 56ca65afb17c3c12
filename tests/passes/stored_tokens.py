"""Stored tokens as rules of eviction are shown them, drawn at random, and a cache that applies a rule."""

import math
from dataclasses import replace
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.passes.eviction import Eviction, Tokens

SEEDS = st.integers(0, 2**16)


def drawn(
    seed: int, rows: int, seen: int, padding: int, filler: int, vision: bool, prefill: bool, layer: int | None = 3
) -> Tokens:
    """Slots in no order; the first row has most padding, on the left; scores have ties; later many are evicted."""
    random = torch.Generator().manual_seed(seed)
    modality = torch.rand(seen, generator=random) < 0.6
    stored = []
    for row in range(rows):
        least = max(0, padding - row)
        kept = [p for p in range(least, seen) if prefill or torch.rand((), generator=random) < 0.7]
        stored.append([kept[i] for i in torch.randperm(len(kept), generator=random)])
    longest = max(map(len, stored)) + filler
    for kept in stored:
        for _ in range(longest - len(kept)):
            kept.insert(int(torch.randint(0, len(kept) + 1, (), generator=random)), -1)
    position = torch.tensor(stored, dtype=torch.int64).reshape(rows, longest)
    return Tokens(
        position=position,
        score=torch.randint(0, 6, position.shape, generator=random) / 4,
        vision=modality[position] if vision else None,
        seen=seen,
        real=torch.tensor([seen - max(0, padding - row) for row in range(rows)]),
        prefill=prefill,
        layer=layer,
    )


TOKENS = st.builds(
    drawn,
    seed=SEEDS,
    rows=st.integers(1, 4),
    seen=st.integers(6, 40),
    padding=st.integers(0, 5),
    filler=st.integers(0, 3),
    vision=st.booleans(),
    prefill=st.booleans(),
)
TARGETS = st.sampled_from(["all", "vision", "text"])
BUDGETS = st.one_of(st.integers(1, 30), st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9, 1.0]))


def slots(tokens: Tokens, row: int, target: str) -> tuple[list[int], list[int]]:
    """Slots of one row that hold tokens of the target, oldest first, and those that hold others."""
    mine, others = [], []
    for slot, position in enumerate(tokens.position[row].tolist()):
        if position >= 0:
            seen = tokens.vision is not None and bool(tokens.vision[row, slot])
            (mine if target == "all" or seen == (target == "vision") else others).append(slot)
    return sorted(mine, key=lambda slot: int(tokens.position[row, slot])), others


def share(part: float, of: int) -> int:
    """`ceil(part * of)` in exact arithmetic."""
    return math.ceil(Fraction(str(part)) * of)


def most_seen(tokens: Tokens, target: str) -> int:
    """Tokens of the target that there have been, in the row with most."""
    return max(int(tokens.real[row]) - len(slots(tokens, row, target)[1]) for row in range(len(tokens.real)))


def most_stored(tokens: Tokens, target: str) -> int:
    return max(len(slots(tokens, row, target)[0]) for row in range(len(tokens.real)))


def mask(tokens: Tokens, kept: list[list[int]]) -> Tensor:
    """True at the slots kept of every row."""
    out = torch.zeros(tokens.position.shape, dtype=torch.bool)
    for row, chosen in enumerate(kept):
        out[row, chosen] = True
    return out


def generated(rule: Eviction, weights: Tensor, prompt: int) -> list[Tokens]:
    """A cache of one head while weights `[n, n]` (row q: what query q gives every token) come in; after every call.

    Weights of evicted tokens go nowhere. Scores are sums over queries.
    """
    held = weights.shape[0]
    tokens = Tokens(
        position=torch.arange(prompt)[None],
        score=weights[:prompt, :prompt].sum(0)[None],
        vision=None,
        seen=prompt,
        real=torch.tensor([prompt]),
        prefill=True,
        layer=0,
    )
    history = []
    for step in range(prompt, held + 1):
        if step > prompt:
            position = torch.cat([tokens.position, torch.tensor([[step - 1]])], 1)
            score = torch.cat([tokens.score, torch.zeros(1, 1, dtype=weights.dtype)], 1)
            score = score + weights[step - 1][position]
            real = torch.tensor([step])
            tokens = Tokens(position, score, None, step, real, False, 0)
        kept = rule.keep(tokens)
        if kept is not None:
            tokens = replace(tokens, position=tokens.position[kept][None], score=tokens.score[kept][None])
        history.append(tokens)
    return history
