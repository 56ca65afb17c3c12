"""Generators of packed problems, and how close an implementation must come to the reference.

Hypothesis draws the shapes; the numbers come from a seeded generator. Keys, values and queries have unit scale, so that
scores do too, as in a model.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

#: Largest relative root-mean-square error against the float64 reference on the same (rounded) inputs.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 2.5e-2}

DTYPES = st.sampled_from(list(TOLERANCE))
SEEDS = st.integers(0, 2**16)


#: RMS of attention outputs below which errors count as absolute: values of unit scale may cancel in the weighted sum.
ATTENTION_FLOOR = 0.2


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """`|actual - expected| / |expected|` in Frobenius norm, the RMS of the divisor at least `floor`; shapes must
    agree.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    least = max(1e-12, floor * expected.numel() ** 0.5)
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp(min=least))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, floor: float = 0.0) -> None:
    limit = TOLERANCE[dtype or actual.dtype]
    error = relative_error(actual, expected, floor)
    assert error <= limit, f"relative error {error:.2e} over {limit:.1e}"


@dataclass(frozen=True)
class Shapes:
    """Everything that decides the shapes of an attention problem over packed parts."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    group: int = 1
    queries: int = 1
    key_dim: int = 16
    value_dim: int = 16
    segments: tuple[int, ...] = (12,)
    key_rank: int = 4
    value_rank: int = 4
    kept: int = 3
    appended: int = 2
    padding: int = 0
    ragged: bool = False
    mask: str = "none"
    mask_shape: tuple[bool, bool, bool, bool] = (True, False, True, True)
    rotary: int = 0
    interleaved: bool = False


@st.composite
def shapes(draw: st.DrawFn, **fixed: Any) -> Shapes:
    """A `Shapes`, with some fields fixed."""
    dims = st.sampled_from([16, 24, 64, 128, 256])
    drawn = Shapes(
        seed=draw(SEEDS),
        dtype=draw(DTYPES),
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        group=draw(st.sampled_from([1, 2, 4])),
        queries=draw(st.integers(1, 9)),
        key_dim=draw(dims),
        value_dim=draw(dims),
        segments=tuple(draw(st.lists(st.integers(0, 40), max_size=2))),
        key_rank=draw(st.integers(1, 20)),
        value_rank=draw(st.integers(1, 20)),
        kept=draw(st.integers(0, 9)),
        appended=draw(st.integers(0, 9)),
        padding=draw(st.integers(0, 5)),
        ragged=draw(st.booleans()),
        mask=draw(st.sampled_from(["none", "bool", "additive"])),
        mask_shape=draw(st.tuples(*[st.booleans()] * 4)),
    )
    return dataclasses.replace(drawn, **fixed)


def attention_arguments(shape: Shapes) -> dict[str, Any]:
    """Arguments of `ops.attention`. Prompt positions are spread over slots at random, as after packing two
    modalities.
    """
    random = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(shape.dtype)

    def factors(rank: int, dim: int) -> tuple[list[Tensor], list[Tensor]]:
        ranks = [min(rank, n, shape.heads * dim) for n in shape.segments]
        coefficients = [normal(shape.batch, n, r) for n, r in zip(shape.segments, ranks, strict=True)]
        bases = [(normal(shape.batch, shape.heads, r, dim) / max(r, 1) ** 0.5).to(shape.dtype) for r in ranks]
        return coefficients, bases

    slots, length = sum(shape.segments) + shape.kept, shape.kept + shape.appended
    prompt = slots + shape.padding
    index = torch.stack([torch.randperm(prompt, generator=random)[:slots] for _ in range(shape.batch)])
    if shape.ragged:
        index[torch.rand(index.shape, generator=random) < 0.3] = -1
    tokens = prompt + shape.appended
    key_coefficients, key_bases = factors(shape.key_rank, shape.key_dim)
    value_coefficients, value_bases = factors(shape.value_rank, shape.value_dim)
    rows = length + int(torch.randint(4, (), generator=random))
    angles = torch.rand((shape.batch, sum(shape.segments), shape.rotary), generator=random) * 6.28
    if shape.rotary and shape.interleaved:
        angles[..., 1::2] = angles[..., ::2]
    elif shape.rotary:
        angles[..., shape.rotary // 2 :] = angles[..., : shape.rotary // 2]
    return {
        "query": normal(shape.batch, shape.heads * shape.group, shape.queries, shape.key_dim),
        "key_coefficients": key_coefficients,
        "key_bases": key_bases,
        "value_coefficients": value_coefficients,
        "value_bases": value_bases,
        "key_tail": normal(rows, shape.batch, shape.heads, shape.key_dim),
        "value_tail": normal(rows, shape.batch, shape.heads, shape.value_dim),
        "length": length,
        "index": index,
        "mask": _mask(shape, tokens, random),
        "scale": shape.key_dim**-0.5,
        "ragged": shape.ragged,
        "cos": angles.cos() if shape.rotary else None,
        "sin": angles.sin() if shape.rotary else None,
        "interleaved": shape.interleaved,
        "axes": None,
        "key_blocks": [],
        "value_blocks": [],
        "key_scales": [],
        "value_scales": [],
        "key_owners": [],
        "value_owners": [],
    }


def _mask(shape: Shapes, tokens: int, random: torch.Generator) -> Tensor | None:
    if shape.mask == "none":
        return None
    full = (shape.batch, shape.heads * shape.group, shape.queries, tokens)
    size = [extent if kept else 1 for extent, kept in zip(full, shape.mask_shape, strict=True)]
    allowed = torch.rand(size, generator=random) < 0.7
    if shape.mask == "bool":
        return allowed
    return torch.randn(size, generator=random).masked_fill(~allowed, float("-inf")).to(shape.dtype)
