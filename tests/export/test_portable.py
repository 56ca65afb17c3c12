"""What exported steps compute, against the float64 specification and the operator it replaces."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attnpack_fx.export.portable import attention, numbers, rotated, segments, turned_back
from attnpack_fx.kernels import ops, reference
from attnpack_fx.kernels.aten.quantize import dequantize_basis, dequantize_coefficient
from attnpack_fx.kernels.parts import Angles, PackedParts, RowForm, Rows, formats, kind
from attnpack_fx.kernels.rotary import pairs
from tests.kernels.inputs import (
    ATTENTION_FLOOR,
    SEEDS,
    Cuts,
    Shapes,
    attention_arguments,
    map_blocks,
    operands,
    relative_error,
)

#: Softmax is in fp32 whatever the dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 2e-3}
#: Rows as they are.
ROWS_FORM = RowForm(0)


@st.composite
def cuts(draw: st.DrawFn) -> Cuts:
    """Blocks that cover all tokens, as those of exports do."""

    def stored() -> int | tuple[int, int, bool]:
        bits, basis_bits = (draw(st.sampled_from([0, 8, 4, 2])) for _ in range(2))
        return bits, basis_bits, draw(st.booleans()) and bool(bits or basis_bits)

    return tuple((1.0, draw(st.sampled_from([0, stored()]))) for _ in range(draw(st.integers(1, 3))))


@st.composite
def shapes(draw: st.DrawFn, **fixed: Any) -> Shapes:
    dims = st.sampled_from([6, 16, 24, 64])
    key_dim = draw(dims)
    rows = tuple((draw(st.integers(0, 20)), ROWS_FORM) for _ in range(draw(st.integers(0, 2))))
    drawn = {
        "seed": draw(SEEDS),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "batch": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 3)),
        "group": draw(st.sampled_from([1, 2, 4])),
        "queries": draw(st.integers(1, 6)),
        "key_dim": key_dim,
        "value_dim": draw(dims),
        "segments": tuple(draw(st.lists(st.integers(0, 30), max_size=2))),
        "key_rank": draw(st.integers(1, 20)),
        "value_rank": draw(st.integers(1, 20)),
        "kept": 0,
        "appended": draw(st.integers(0, 9)),
        "key_cuts": draw(cuts()),
        "value_cuts": draw(cuts()),
        "rotary": draw(st.sampled_from([0, key_dim // 2 // 2 * 2, key_dim])),
        "key_rows": rows,
        "value_rows": rows,
    }
    return Shapes(**drawn | fixed)


def exported_arguments(shape: Shapes, turned: int = 0) -> dict[str, Any]:
    """Arguments of `attention_arguments` for slots in logical order, an additive mask and a tail without spare rows.

    turned: how many segments hold keys before rotary embedding, the first ones.
    """
    # Numbers are coded from at most fp32.
    given = attention_arguments(shape if shape.dtype != torch.float64 else replace(shape, dtype=torch.float32))
    del given["cap"], given["sinks"]  # of no decoder that is exported
    keys, values = given["keys"], given["values"]
    slots = shape.key_slots + keys.length
    random = torch.Generator().manual_seed(shape.seed + 1)
    allowed = torch.rand((shape.batch, 1, shape.queries, slots), generator=random) < 0.7
    mask = torch.zeros(allowed.shape, dtype=shape.dtype).masked_fill(~allowed, torch.finfo(shape.dtype).min / 2)
    # A query sees itself, if anything.
    mask[..., -1:] = 0
    angles = keys.angles
    if angles is not None:
        sizes = [*shape.segments, *(tokens for tokens, _ in shape.key_rows)]
        # As models make them, in their own dtype.
        cos, sin = (each[:, : sum(sizes[:turned])].to(shape.dtype) for each in (angles.cos, angles.sin))
        angles = Angles(cos, sin, None, angles.interleaved)
    for name, parts in (("keys", keys), ("values", values)):
        tail = parts.tail[: parts.length]
        given[name] = replace(parts, tail=tail, index=parts.index[:, :0], ragged=False)
    given |= {"keys": replace(given["keys"], angles=angles), "mask": mask}
    return tree_map_only(Tensor, _double, given) if shape.dtype == torch.float64 else given


def _double(part: Tensor) -> Tensor:
    return part.double() if part.is_floating_point() else part


def signed(parts: PackedParts[Tensor]) -> PackedParts[Tensor]:
    """With symmetric codes of 8 bits as int8, as exports have them."""

    def changed(block: Any) -> Any:
        if isinstance(block, Rows) or block.asymmetric:
            return block
        factors = zip((block.coefficient, block.basis), formats(kind(block)), strict=True)
        coefficient, basis = (each.view(torch.int8) if bits == 8 else each for each, bits in factors)
        return replace(block, coefficient=coefficient, basis=basis)

    return map_blocks(parts, changed)


def exported(given: dict[str, Any]) -> Tensor:
    return attention(*operands(given | {name: signed(given[name]) for name in ("keys", "values")}))


def check(given: dict[str, Any], dtype: torch.dtype) -> None:
    out = exported(given)
    assert out.dtype == dtype
    expected = reference.attention(**given)
    assert relative_error(out, expected, ATTENTION_FLOOR) < TOLERANCE[dtype]
    if dtype != torch.float64:  # which the operator does not know
        assert relative_error(out, ops.attention(*operands(given)), ATTENTION_FLOOR) < 2 * TOLERANCE[dtype]


@given(shape=shapes(), turned=st.integers(0, 4))
@example(shape=Shapes(segments=(), kept=0, appended=1), turned=0)
@example(shape=Shapes(segments=(0, 0), kept=0, appended=1, rotary=16), turned=2)
@settings(max_examples=120, deadline=None)
def test_matches_the_reference_and_the_operator(shape, turned):
    if shape.key_slots + shape.appended == 0:
        shape = replace(shape, appended=1)
    check(exported_arguments(shape, turned), shape.dtype)


@pytest.mark.parametrize("turned", [0, 1, 2, 3])
@pytest.mark.parametrize("bits", [0, 8, 4, 2, (8, 4, True), (0, 2, False), (4, 0, True)])
def test_keys_before_rotary_embedding_in_leading_segments(bits, turned):
    shape = Shapes(batch=2, group=2, queries=3, segments=(9, 7), kept=0, rotary=16, key_cuts=((1.0, bits),))
    shape = replace(shape, key_rows=((5, ROWS_FORM),), value_rows=((5, ROWS_FORM),))
    given = exported_arguments(shape, turned)
    check(given, torch.float32)
    # That they are rotated is seen.
    if turned:
        plain = exported(given | {"keys": replace(given["keys"], angles=None)})
        assert relative_error(plain, reference.attention(**given)) > 0.01


@given(
    seed=SEEDS,
    size=st.integers(1, 40),
    bits=st.sampled_from([8, 4, 2]),
    asymmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_numbers_are_those_of_quantize(seed, size, bits, asymmetric, dtype):
    """Every byte, in coefficients and in bases, for sizes that fill no whole byte."""
    random = torch.Generator().manual_seed(seed)
    width = -(-size * bits // 8)
    codes = torch.stack([torch.randperm(256, generator=random) for _ in range(width)], -1).to(torch.uint8)
    own = codes.view(torch.int8) if bits == 8 and not asymmetric else codes
    scale = torch.randn((1, 4 if asymmetric else 2, size), generator=random)
    zero = scale[:, 2, None] if asymmetric else None
    found = numbers(own[None], size, bits, scale[:, 0, None], zero, dtype)
    assert torch.equal(found, dequantize_coefficient(codes[None], scale, size, bits, dtype))

    scale = torch.randn((1, 4 if asymmetric else 2, 256), generator=random)
    rows, own_rows = codes[None, None], own[None, None]
    zero = scale[:, 3, None, :, None] if asymmetric else None
    found = numbers(own_rows, size, bits, scale[:, 1, None, :, None], zero, dtype)
    assert torch.equal(found, dequantize_basis(rows, scale, size, bits, dtype))


def test_blocks_of_a_segment_are_one_matrix():
    shape = Shapes(segments=(9, 4), kept=0, key_rank=6, key_cuts=((1.0, 8), (1.0, 0), (1.0, 4)))
    found = segments(signed(exported_arguments(shape)["keys"]))
    assert [tuple(each.shape for each in segment) for segment in found] == [
        ((1, 9, 6), (1, 2, 6, 16)),
        ((1, 4, 4), (1, 2, 4, 16)),
        ((1, 2, 2, 16),),
    ]


def angles(seed: int, batch: int, tokens: int, size: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, N, E]`, times `scale` as in YaRN."""
    angle = 100 * torch.rand((batch, tokens, size // 2), generator=torch.Generator().manual_seed(seed)).repeat(1, 1, 2)
    return angle.cos() * scale, angle.sin() * scale


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(0, 9),
    dim=st.sampled_from([4, 6, 16]),
    turning=st.sampled_from([2, 4]),
    scale=st.sampled_from([0.1, 1.0, 1.4, 20.0]),
)
@settings(max_examples=60, deadline=None)
def test_turned_back_inverts_rotated(seed, batch, heads, tokens, dim, turning, scale):
    x = torch.randn((batch, heads, tokens, dim), generator=torch.Generator().manual_seed(seed))
    cos, sin = angles(seed, batch, tokens, turning, scale)
    turned = rotated(x, cos, sin)
    expected = reference.rotate(x.double(), *(pairs(each.double(), False)[0] for each in (cos, sin)), False)
    assert relative_error(turned, expected, floor=0.1) < 1e-6
    assert torch.equal(turned[..., turning:], x[..., turning:])
    assert relative_error(turned_back(turned, cos, sin), x, floor=0.1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_of_half_precision_are_turned_back_in_fp32(dtype):
    x = torch.randn((2, 2, 50, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = (each.to(dtype) for each in angles(0, 2, 50, 16))
    turned = reference.rotate(x.double(), *(pairs(each.double(), False)[0] for each in (cos, sin)), False).to(dtype)
    # Two roundings of the dtype, and no more.
    back = turned_back(turned, cos, sin)
    assert back.dtype == dtype and relative_error(back, x) < torch.finfo(dtype).eps
