"""From effects to plans: what ranks and bits cost, which of them to take for a budget, and uniform plans as large.

Bytes are those of factors and scales as they are stored: a row of coefficients in b bits takes whole bytes, which is
why columns of 4 bits come in twos and columns of 2 bits in fours wherever the allocation is rounded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attnpack_fx.calibration.allocate import ERROR, Allocation, Matrix, allocate, allocate_for_error
from attnpack_fx.passes.storage import Columns, KeySpace, LayerPlan, Stored

Role = Literal["key", "value"]
Modality = Literal["vision", "text"]
Prefer = Literal["fidelity", "speed"]

#: With `prefer="speed"`, keys stay rotated where that costs up to so many times the squared error of a layer's keys.
SPEED_FACTOR = 4.0
_SCALES = 8
_STEPS = 12


@dataclass(frozen=True, eq=False)
class Part:
    """Keys or values of one modality in one layer: a matrix to pack.

    tokens: mean number over samples; heads, dim: H and D; effects: what dropping a component does, relative to the
    layer's output, `[R]` by key space (of values: under `"rotated"`, since they have no other).
    """

    layer: int
    modality: Modality
    role: Role
    tokens: float
    heads: int
    dim: int
    dtype_bits: int
    effects: Mapping[KeySpace, Tensor]

    @property
    def dense_bytes(self) -> float:
        return self.tokens * self.heads * self.dim * self.dtype_bits / 8

    def space(self, spaces: Sequence[KeySpace]) -> KeySpace:
        """The key space it is packed in, where `spaces` are those of all layers."""
        return spaces[self.layer] if self.role == "key" and spaces[self.layer] in self.effects else "rotated"

    def matrix(self, space: KeySpace) -> Matrix:
        name = f"layer {self.layer}, {self.modality} {self.role}s"
        width = (self.tokens + self.heads * self.dim) / 8
        return Matrix(name, self.effects[space], width, self.dtype_bits, _SCALES)

    def bytes(self, columns: Columns) -> float:
        """What these columns take, their factors and scales."""
        return sum(self._block_bytes(count, bits) for count, bits in _alike(columns))

    def _block_bytes(self, count: int, bits: int) -> float:
        if not bits:
            return count * (self.tokens + self.heads * self.dim) * self.dtype_bits / 8
        rows = self.tokens * math.ceil(count * bits / 8)
        return rows + count * (self.heads * math.ceil(self.dim * bits / 8) + _SCALES)

    def error(self, columns: Columns, space: KeySpace) -> float:
        """The effects that are left."""
        effect, start, left = self.effects[space], 0, 0.0
        for count, bits in _alike(columns):
            left += float(effect[start : start + count].sum()) * (ERROR[bits] if bits else 0.0)
            start += count
        return left + float(effect[start:].sum())

    def columns(self, blocks: Sequence[tuple[int, int]]) -> Columns:
        """Blocks of an allocation as they are stored, rounded to whole bytes in every row."""
        rounded: list[tuple[int, int]] = []
        rank, wanted, most = 0, 0, len(self.effects["rotated"])
        for count, bits in blocks:
            wanted += count
            unit = 8 // bits if bits < 8 else 1
            taken = unit * round((wanted - rank) / unit)
            if taken > 0:
                rounded.append((min(taken, most - rank), 0 if bits == self.dtype_bits else bits))
                rank += rounded[-1][0]
        if not rounded:
            rounded.append((1, 0 if blocks[0][1] == self.dtype_bits else blocks[0][1]))
        return Columns(tuple(block for block in rounded if block[0]))


@dataclass(frozen=True, eq=False)
class Plan:
    """Columns of every part, and the key space of every layer.

    error: expected, the sum of effects left; bytes: of factors and scales.
    """

    name: str
    columns: tuple[Columns, ...]
    spaces: tuple[KeySpace, ...]
    error: float
    bytes: float

    def layers(self, parts: Sequence[Part]) -> tuple[LayerPlan, ...]:
        """As a policy has it."""
        found = {(p.layer, p.modality, p.role): c for p, c in zip(parts, self.columns, strict=True)}

        def stored(layer: int, modality: Modality) -> Stored | None:
            key = found.get((layer, modality, "key"))
            return None if key is None else Stored(key, found[layer, modality, "value"])

        return tuple(
            LayerPlan(stored(layer, "vision"), stored(layer, "text"), space) for layer, space in enumerate(self.spaces)
        )


def planned(name: str, parts: Sequence[Part], columns: Sequence[Columns], spaces: Sequence[KeySpace]) -> Plan:
    """A plan with what it costs and is expected to lose."""
    pairs = list(zip(parts, columns, strict=True))
    error = sum(part.error(own, part.space(spaces)) for part, own in pairs)
    return Plan(name, tuple(columns), tuple(spaces), error, sum(part.bytes(own) for part, own in pairs))


def fitted(name: str, parts: Sequence[Part], spaces: Sequence[KeySpace], budget: float) -> Plan:
    """The least expected error within `budget` bytes. Raises ValueError where rank 1 of every part takes more."""
    matrices = [part.matrix(part.space(spaces)) for part in parts]

    def at(allocation: Allocation) -> Plan:
        columns = [part.columns(allocation.blocks[m.name]) for part, m in zip(parts, matrices, strict=True)]
        return planned(name, parts, columns, spaces)

    # With few columns in all, rounding may cost more than the allocation gains.
    found = [plan for bits in (0, *ERROR) if (plan := _of_one_rank(parts, spaces, bits, budget)) is not None]
    # Rounding moves the bytes both ways: what is asked of the allocation is turned until they fit.
    low = allocate_for_error(matrices, math.inf).bytes
    high = asked = max(low, budget)
    for _ in range(_STEPS):
        found.append(at(allocate(matrices, asked)))
        if found[-1].bytes <= budget:
            low = asked
        else:
            high = asked
        if low >= high:
            break
        asked = (low + high) / 2
    fits = [plan for plan in found if plan.bytes <= budget]
    if not fits:
        least = planned(name, parts, [Columns(((1, min(ERROR)),))] * len(parts), spaces).bytes
        raise ValueError(
            f"budget: got {budget:.0f} bytes, expected at least {math.ceil(least)}, what rank 1 of every packed matrix "
            "takes; raise the budget"
        )
    best = replace(min(fits, key=lambda plan: plan.error), name=name)
    return _filled(best, parts, budget)


def _filled(plan: Plan, parts: Sequence[Part], budget: float) -> Plan:
    """The plan with what rounding left of the budget spent, step by step where a byte gains most."""
    columns = list(plan.columns)
    used = [part.space(plan.spaces) for part in parts]
    moves = [_moves(part, own, space) for part, own, space in zip(parts, columns, used, strict=True)]
    left = budget - plan.bytes
    while True:
        fits = [
            (gain / cost, number, cost, better)
            for number, own in enumerate(moves)
            for gain, cost, better in own
            if cost <= left
        ]
        if not fits:
            return planned(plan.name, parts, columns, plan.spaces)
        _, number, cost, columns[number] = max(fits, key=lambda each: each[:2])
        left -= cost
        moves[number] = _moves(parts[number], columns[number], used[number])


def _moves(part: Part, columns: Columns, space: KeySpace) -> list[tuple[float, float, Columns]]:
    """Small steps up from these columns: what they gain, what they cost (both > 0), and what comes out."""
    found = []
    error, size = part.error(columns, space), part.bytes(columns)
    blocks = _alike(columns)
    for place, (count, bits) in enumerate(blocks):
        unit = 8 // bits if 0 < bits < 8 else 1
        before, rest = blocks[:place], blocks[place + 1 :]
        if rest:
            moved = min(unit, rest[0][0])
            rest = [(rest[0][0] - moved, rest[0][1]), *rest[1:]]
        else:
            moved = min(unit, len(part.effects[space]) - columns.rank)
        better = Columns(tuple(block for block in (*before, (count + moved, bits), *rest) if block[0]))
        gain, cost = error - part.error(better, space), part.bytes(better) - size
        if gain > 0 and cost > 0:
            found.append((gain, cost, better))
    return found


def fitted_to_error(name: str, parts: Sequence[Part], spaces: Sequence[KeySpace], max_error: float) -> Plan:
    """The fewest bytes whose expected error, rounded to whole bytes, is within `max_error`."""
    matrices = [part.matrix(part.space(spaces)) for part in parts]
    asked = max_error
    for _ in range(_STEPS):
        allocation = allocate_for_error(matrices, asked)
        columns = [part.columns(allocation.blocks[m.name]) for part, m in zip(parts, matrices, strict=True)]
        plan = planned(name, parts, columns, spaces)
        if plan.error <= max_error:
            return plan
        asked *= 0.9 * max_error / plan.error
    whole = [Columns(((len(part.effects[part.space(spaces)]), 0),)) for part in parts]
    return planned(name, parts, whole, spaces)


def chosen_spaces(parts: Sequence[Part], count: int, unrotated: Plan, prefer: Prefer) -> tuple[KeySpace, ...]:
    """The key space of every layer: that of the smaller error of its keys in the bytes the un-rotated ones got."""
    errors: list[dict[KeySpace, float]] = [{"rotated": 0.0, "unrotated": 0.0} for _ in range(count)]
    for part, columns in zip(parts, unrotated.columns, strict=True):
        if part.role == "key" and "unrotated" in part.effects:
            for space, found in errors[part.layer].items():
                matrix = part.matrix(space)
                size = max(part.bytes(columns), allocate_for_error([matrix], math.inf).bytes)
                found += allocate([matrix], size).error
                errors[part.layer][space] = found
    factor = SPEED_FACTOR if prefer == "speed" else 1.0
    return tuple("rotated" if own["rotated"] <= factor * own["unrotated"] else "unrotated" for own in errors)


def uniform(parts: Sequence[Part], count: int, budget: float) -> list[Plan]:
    """Plans of one rank for all matrices within the budget: for every number of bits, in each key space there is."""
    plans = []
    spaces: list[KeySpace] = ["rotated"]
    if any("unrotated" in part.effects for part in parts):
        spaces.append("unrotated")
    for space in spaces:
        for bits in (0, 8, 4, 2):
            plan = _of_one_rank(parts, [space] * count, bits, budget)
            if plan is not None:
                name = f"uniform, rank {max(own.rank for own in plan.columns)}, {bits or 'all'} bits, {space}"
                plans.append(replace(plan, name=name))
    return plans


def _of_one_rank(parts: Sequence[Part], spaces: Sequence[KeySpace], bits: int, budget: float) -> Plan | None:
    """The highest rank within the budget, the same for all parts that have so many components."""
    most = [len(part.effects["rotated"]) for part in parts]
    low, high, found = 1, max(most), None
    while low <= high:
        rank = (low + high) // 2
        plan = planned("uniform", parts, [Columns(((min(rank, own), bits),)) for own in most], spaces)
        if plan.bytes <= budget:
            low, found = rank + 1, plan
        else:
            high = rank - 1
    return found


def padded(effects: Sequence[Tensor]) -> Tensor:
    """The mean of effects of several samples, `[R]` each, where a sample without a component loses nothing by it."""
    total = torch.zeros(max(len(effect) for effect in effects), dtype=torch.float64)
    for effect in effects:
        total[: len(effect)] += effect.double().cpu()
    return total / len(effects)


def _alike(columns: Columns) -> list[tuple[int, int]]:
    """The blocks of columns whose coefficients and basis are in one format each, as calibration makes them."""
    return [(count, bits) for count, bits in columns.blocks if count != "full" and isinstance(bits, int)]
