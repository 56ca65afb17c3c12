"""Random problems for operators on the device, and memory that shows what is read without having been written."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attnpack_fx.kernels.parts import E4M3, E5M2, RowForm
from benchmarks.gpu.judging import seeded
from benchmarks.gpu.machine import Machine
from tests.kernels.inputs import Shapes, attention_arguments

#: Sizes of the poisoned blocks: the allocator serves what it is asked from the freed block that fits.
_POISONED = tuple(1 << power for power in range(9, 28))


def attention_shapes(dry: bool) -> list[Shapes]:
    """Each thing an attention problem can differ in, alone and together; a dry run takes a few."""
    base = Shapes(batch=2, segments=(70,), key_dim=64, value_dim=64, key_rank=16, value_rank=16)
    variants: list[dict[str, Any]] = [
        {},
        *({"key_dim": dim, "value_dim": dim} for dim in (16, 24, 32, 80, 96, 128, 256)),
        {"key_dim": 128, "value_dim": 64},
        *({"key_rank": key, "value_rank": value} for key, value in ((1, 1), (7, 13), (33, 17), (64, 64), (5, 64))),
        *({"group": group, "heads": heads} for group, heads in ((4, 2), (7, 1), (8, 4))),
        *({"queries": queries, "group": group} for queries, group in ((2, 1), (9, 4), (65, 2))),
        {"segments": (33, 29)},
        {"segments": (0, 40)},
        {"segments": (1,)},
        {"segments": ()},
        {"segments": (), "kept": 0, "appended": 1},
        {"kept": 0, "appended": 0},
        {"kept": 130, "appended": 70},
        {"padding": 5, "mask": "bool"},
        *({"mask": mask, "mask_shape": shape} for mask in ("bool", "additive") for shape in _MASK_SHAPES),
        {"ragged": True},
        {"ragged": True, "segments": (33, 29), "group": 4, "queries": 3, "mask": "additive"},
        {"ragged": True, "mask": "bool", "padding": 3},
        {"cap": 1.5},
        *({"sinks": sinks, "group": 4} for sinks in ("one", "each")),
        {"cap": 1.5, "sinks": "each", "queries": 9, "mask": "bool", "ragged": True},
        {"cap": 1.5, "sinks": "one", "segments": (2100,), "key_rank": 64, "value_rank": 64, "rotary": 64},
        {"cap": 1.5, "sinks": "each", "key_cuts": ((1.0, 4),), "value_cuts": ((1.0, 4),), "group": 4},
        *({"rotary": size, "interleaved": pairs} for size in (64, 32) for pairs in (False, True)),
        {"rotary": 64, "segments": (33, 29), "group": 4, "queries": 3, "mask": "bool", "ragged": True},
        *({"key_cuts": ((1.0, how),), "value_cuts": ((1.0, how),)} for how in _FORMATS),
        {"key_cuts": ((1.0, 8), (0.5, 4)), "value_cuts": ((1.0, 0), (0.3, 2)), "segments": (33, 29), "group": 4},
        {"key_cuts": ((1.0, 4),), "shared": True, "queries": 3, "mask": "bool", "ragged": True},
        *(
            {"segments": (), "key_rows": ((70, keys),), "value_rows": ((70, values),), "group": group}
            for group, (keys, values) in zip((1, 4, 1, 4), _ROWS, strict=True)
        ),
        {
            **{"key_cuts": ((1.0, 4),), "value_cuts": ((1.0, 4),), "mask": "additive", "ragged": True},
            **{"key_rows": ((50, _ROWS[0][0]),), "value_rows": ((50, _ROWS[0][1]),)},
        },
        {"key_rows": ((60, RowForm(4, group=32, rank=2)),), "value_rows": ((50, RowForm(2, group=32, outliers=True)),)},
        {
            **{"batch": 4, "heads": 8, "group": 4, "segments": (2100,), "key_dim": 128, "value_dim": 128},
            **{"key_rank": 64, "value_rank": 64, "key_cuts": ((1.0, 4),), "value_cuts": ((1.0, 4),)},
        },
        {"batch": 1, "heads": 8, "group": 4, "segments": (2100,), "key_dim": 128, "value_dim": 128, "key_rank": 64},
        {
            "batch": 5,
            "heads": 8,
            "segments": (577,),
            "key_dim": 128,
            "value_dim": 128,
            "key_rank": 64,
            "value_rank": 48,
        },
    ]
    return [replace(base, **variant) for variant in (variants[::6] if dry else variants)]


#: Of coefficients and bases: symmetric, one factor alone, floats, with zero points.
_FORMATS = (8, 4, 2, (4, 0, False), (0, 8, False), (E4M3, E4M3, False), (E5M2, 0, False), (4, 2, True), (8, 8, True))
#: Of keys and values: as KIVI's, floats, codebooks, numbers as they are.
_ROWS = (
    (RowForm(2, channel=True, zero=True), RowForm(2, group=32, zero=True)),
    (RowForm(E4M3, group=256), RowForm(E5M2, group=8, norm=True)),
    (RowForm(4, channel=True, codebook=True), RowForm(4, group=64, codebook=True, norm=True)),
    (RowForm(0), RowForm(8, group=24, zero=True)),
)

_MASK_SHAPES = (
    (True, True, True, True),
    (True, False, False, True),
    (False, False, True, True),
    (False, False, False, True),
    (True, False, True, False),
)


def on(machine: Machine, arguments: Any) -> Any:
    """Copies of all tensors on the device; what an operator changes in one is seen in no other."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(machine.device, copy=True), arguments)


def poison(machine: Machine) -> None:
    """Leave NaN in freed memory of many sizes, which the next allocations are served from."""
    sizes = _POISONED[:10] if machine.dry else _POISONED
    blocks = [torch.full((size // 4,), torch.nan, device=machine.device) for size in sizes for _ in range(2)]
    del blocks


def attention_problems(
    machine: Machine, dtype: torch.dtype, seed: int, shapes: Sequence[Shapes] = ()
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any], Shapes]]:
    """Number, arguments, the same on the device, and shapes: those given, or all."""
    for number, shape in enumerate(shapes or attention_shapes(machine.dry)):
        shape = replace(shape, dtype=dtype, seed=seed + number)
        arguments = attention_arguments(shape)
        here = on(machine, arguments)
        # Rows beyond the length are spare: what stands there must not matter.
        for parts in (here["keys"], here["values"]):
            parts.tail[parts.length :] = torch.nan
        yield number, arguments, here, shape


def prompts(machine: Machine, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor, tuple[Any, ...]]]:
    """Prompts whose attention is observed: a description, which tokens are real, bool `[B, T]`, and query, key, mask,
    scale and is_causal.
    """
    random = seeded(seed)
    sizes = ((2, 2, 2, 40, 16, 0), (2, 4, 7, 300, 64, 60), (1, 8, 4, 1100, 128, 0))
    for batch, heads, group, tokens, dim, past in sizes[:2] if machine.dry else sizes:
        query = torch.randn((batch, heads * group, tokens - past, dim), generator=random).to(dtype)
        key = torch.randn((batch, heads, tokens, dim), generator=random).to(dtype)
        real = torch.arange(tokens)[None] >= torch.arange(batch)[:, None] * 5
        sees = torch.ones((tokens - past, tokens), dtype=torch.bool).tril(past) & real[:, None, None]
        for is_causal in (False,) if past else (False, True):
            what = f"{(batch, heads, group, tokens, dim)}, causal {is_causal}"
            yield what, real, (query, key, None if is_causal else sees, dim**-0.5, is_causal)
