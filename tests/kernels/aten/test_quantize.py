"""The spec, in float64. Symmetric: fields of b bits in two's complement, plus an offset, times a component's scale.

8 bits have -127 .. 127, 4 bits -8 .. 7, 2 bits -3/2, -1/2, 1/2, 3/2. A code is the nearest level of its scale, and
scales are almost as good as the best of a fine search.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.quantize import dequantize_basis, dequantize_coefficient, quantize
from attnpack_fx.kernels.parts import E4M3, E5M2

from ..inputs import DTYPES, SEEDS, relative_error

LEVELS = {
    8: torch.arange(-127, 128, dtype=torch.float64),
    4: torch.arange(-8, 8, dtype=torch.float64),
    2: torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64),
}
BITS = st.sampled_from(list(LEVELS))


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """Levels of packed codes, float64 `[..., 8 / bits * bytes]`."""
    fields = torch.stack([codes.long() // 2**low % 2**bits for low in range(0, 8, bits)], -1).flatten(-2)
    signed = torch.where(fields < 2 ** (bits - 1), fields, fields - 2**bits)
    return signed.double() + (0.5 if bits == 2 else 0)


def nearest(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Distance of x to the nearest level times scale (broadcast), float64."""
    return (x.double()[..., None] - scale.double()[..., None] * LEVELS[bits]).abs().amin(-1)


def best_error(x: Tensor, bits: int) -> Tensor:
    """Squared error of each column of x `[n, r]` at the best of many scales of either sign."""
    x, levels = x.double(), LEVELS[bits]
    errors = []
    for sign in (1, -1):
        scale = sign * x.abs().amax(0) / levels.abs().max() * 2 ** torch.linspace(0.2, -3, 100)[:, None, None]
        place = (x / scale - levels[0]).round().clamp(0, len(levels) - 1)
        errors.append((x - (levels[0] + place) * scale).square().sum(1))
    return torch.cat(errors).amin(0)


def factors(seed: int, batch: int, n: int, heads: int, r: int, dim: int, dtype=torch.float32, shared=False):
    """Coefficients that carry a spectrum over six decades, and a basis."""
    random = torch.Generator().manual_seed(seed)
    coefficient = torch.randn(batch, n, r, generator=random) * 10 ** torch.linspace(3, -3, r)
    basis = torch.randn(1 if shared else batch, heads, r, dim, generator=random) / (heads * dim) ** 0.5
    return coefficient.to(dtype), basis.to(dtype)


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    n=st.integers(0, 40),
    heads=st.integers(1, 3),
    r=st.integers(0, 9),
    dim=st.sampled_from([1, 2, 7, 16, 24]),
    bits=BITS,
    dtype=DTYPES,
    shared=st.booleans(),
)
@example(seed=0, batch=2, n=0, heads=1, r=5, dim=7, bits=2, dtype=torch.float32, shared=True)
@settings(max_examples=80, deadline=None)
def test_codes_are_the_nearest_levels_and_come_back_as_the_spec_says(
    seed, batch, n, heads, r, dim, bits, dtype, shared
):
    coefficient, basis = factors(seed, batch, n, heads, r, dim, dtype, shared)
    codes_c, codes_b, scale = quantize(coefficient, basis, bits)
    assert codes_c.dtype == codes_b.dtype == torch.uint8 and scale.dtype == torch.float32
    assert codes_c.shape == (batch, n, -(-r * bits // 8)) and scale.shape == (batch, 2, r)
    assert codes_b.shape == (*basis.shape[:3], -(-dim * bits // 8))

    across = scale[: basis.shape[0], 1, None, :, None]
    parts = [
        (coefficient, dequantize_coefficient(codes_c, scale, r, bits, dtype), codes_c, scale[:, 0, None]),
        (basis, dequantize_basis(codes_b, scale, dim, bits, dtype), codes_b, across),
    ]
    for x, back, codes, by in parts:
        assert back.dtype == dtype and back.is_contiguous()
        stored = unpacked(codes, bits)[..., : x.shape[-1]] * by.double()
        assert torch.equal(back, stored.float().to(dtype))
        distance = nearest(x, by.expand_as(x), bits)
        assert ((x.double() - stored).abs() <= distance + 1e-5 * by.abs()).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("shape", ["gaussian", "laplacian", "outlier", "one side"])
def test_scales_are_close_to_the_best(bits, shape):
    random = torch.Generator().manual_seed(3)
    x = torch.randn(500, 12, generator=random)
    if shape == "laplacian":
        x = x.sign() * torch.empty_like(x).exponential_(generator=random)
    elif shape == "outlier":
        x[7] = 12
    elif shape == "one side":
        x = x.abs()
    codes, codes_b, scale = quantize(x[None], x.T.reshape(1, 1, 12, 500), bits)
    best = best_error(x, bits)
    error = (dequantize_coefficient(codes, scale, 12, bits, x.dtype)[0].double() - x).square().sum(0)
    assert (error <= 1.15 * best).all() and error.sum() <= 1.05 * best.sum()
    # Rows of the basis are quantised as columns of coefficients are.
    error = (dequantize_basis(codes_b, scale, 500, bits, x.dtype)[0, 0].T.double() - x).square().sum(0)
    assert (error <= 1.15 * best).all() and error.sum() <= 1.05 * best.sum()


def test_layout_of_a_byte():
    # The scale is 1, and -1 where the larger side is positive.
    column = torch.tensor([-127.0, 1, 127])
    codes, *_ = quantize(column[None, :, None], torch.ones(1, 1, 1, 1), 8)
    assert codes.flatten().tolist() == [129, 1, 127]
    row = torch.tensor([-8.0, 7, 1, -1, 3])
    for sign in (1, -1):
        _, codes, scale = quantize(torch.ones(1, 1, 1), sign * row[None, None, None], 4)
        assert codes.flatten().tolist() == [0x78, 0xF1, 0x03] and scale[0, 1].item() == pytest.approx(sign)
    row = torch.tensor([-1.5, -0.5, 0.5, 1.5, 1.5])
    _, codes, _ = quantize(torch.ones(1, 1, 1), -row[None, None, None], 2)
    assert codes.flatten().tolist() in ([0b01001110, 0b01], [0b10110001, 0b10])


@given(seed=SEEDS, bits=BITS, filler=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_filler_changes_nothing_and_zero_columns_stay_zero(seed, bits, filler):
    coefficient, basis = factors(seed, 1, 12, 2, 4, 8)
    coefficient[..., 2] = 0
    basis[:, :, 1] = 0
    padded = torch.cat([coefficient, torch.zeros(1, filler, 4)], 1)
    codes, codes_b, scale = quantize(coefficient, basis, bits)
    more, more_b, same = quantize(padded, basis, bits)
    assert torch.equal(scale, same) and torch.equal(codes, more[:, :12]) and torch.equal(codes_b, more_b)
    assert scale[0, 0, 2] == 0 and scale[0, 1, 1] == 0
    back = dequantize_coefficient(more, same, 4, bits, torch.float32)
    assert back[..., 2].eq(0).all() and dequantize_basis(codes_b, scale, 8, bits, torch.float32)[:, :, 1].eq(0).all()
    if bits != 2:
        assert back[:, 12:].eq(0).all()


@given(seed=SEEDS, bits=BITS)
@settings(max_examples=10, deadline=None)
def test_every_component_is_quantised_as_if_alone(seed, bits):
    coefficient, basis = factors(seed, 2, 20, 2, 5, 8)
    codes, codes_b, scale = quantize(coefficient, basis, bits)
    whole = dequantize_coefficient(codes, scale, 5, bits, torch.float32)
    rows = dequantize_basis(codes_b, scale, 8, bits, torch.float32)
    for sample in range(2):
        c, b, s = quantize(coefficient[sample : sample + 1, :, 3:4], basis[sample : sample + 1, :, 3:4], bits)
        assert relative_error(dequantize_coefficient(c, s, 1, bits, torch.float32)[0], whole[sample, :, 3:4]) < 1e-5
        assert relative_error(dequantize_basis(b, s, 8, bits, torch.float32)[0], rows[sample, :, 3:4]) < 1e-5


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_magnitudes_stay_finite(bits, dtype):
    for magnitude in (torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        x = torch.linspace(-1, 0.98, 9).mul(magnitude).to(dtype)[None, :, None]
        codes, _, scale = quantize(x, torch.ones(1, 1, 1, 1, dtype=dtype), bits)
        back = dequantize_coefficient(codes, scale, 1, bits, dtype)
        assert back.isfinite().all()
        assert relative_error(back.double() / magnitude, x.double() / magnitude) < {8: 0.02, 4: 0.1, 2: 0.45}[bits]


def test_reads_any_strides():
    coefficient, basis = factors(0, 1, 12, 2, 4, 8)
    strided = quantize(coefficient.mT.contiguous().mT, basis.transpose(1, 2).contiguous().transpose(1, 2), 4)
    for one, other in zip(strided, quantize(coefficient, basis, 4), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-5)
    codes, _, scale = strided
    spread = torch.stack([codes, codes], -1)[..., 0]
    assert torch.equal(
        dequantize_coefficient(spread, scale, 4, 4, torch.float32),
        dequantize_coefficient(codes, scale, 4, 4, torch.float32),
    )


def test_refuses_what_it_cannot_mean():
    coefficient, basis = factors(0, 2, 6, 2, 4, 8)
    with pytest.raises(ValueError, match="bits: got 3, expected 8, 4 or 2"):
        quantize(coefficient, basis, 3)
    with pytest.raises(ValueError, match="same components"):
        quantize(coefficient[..., :3], basis, 4)
    with pytest.raises(ValueError, match="same components"):
        quantize(coefficient[:1], basis, 4)
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(coefficient * float("nan"), basis, 4)
    codes, codes_b, scale = quantize(coefficient, basis, 4)
    with pytest.raises(ValueError, match="got 2 bytes for 4 numbers of 8 bits, expected 4"):
        dequantize_coefficient(codes, scale, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="bits: got 0"):
        dequantize_basis(codes_b, scale, 8, 0, torch.float32)
    with pytest.raises(ValueError, match="got 0 for coefficients and basis"):
        quantize(coefficient, basis, 0)
    with pytest.raises(ValueError, match="floats have no zero point"):
        quantize(coefficient, basis, E4M3, 0, asymmetric=True)


FORMATS = st.sampled_from([8, 4, 2, E4M3, E5M2, 0])


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    n=st.integers(0, 30),
    r=st.integers(0, 9),
    dim=st.sampled_from([1, 7, 16]),
    formats=st.tuples(FORMATS, FORMATS).filter(any),
    asymmetric=st.booleans(),
    dtype=DTYPES,
    shared=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_pair_of_formats(seed, batch, n, r, dim, formats, asymmetric, dtype, shared):
    """Every number is within half a step of its code: of fields with zero points, and of floats, whose step grows."""
    coefficient, basis = factors(seed, batch, n, 2, r, dim, dtype, shared)
    asymmetric = asymmetric and bool({*formats} & {8, 4, 2})
    codes_c, codes_b, scale = quantize(coefficient, basis, *formats, asymmetric)
    assert scale.shape == (batch, 4 if asymmetric else 2, r) and scale.dtype == torch.float32
    rows = scale[: basis.shape[0], :, None, :, None]
    for x, codes, bits, place in ((coefficient, codes_c, formats[0], 0), (basis, codes_b, formats[1], 1)):
        by = scale[:, place, None] if place == 0 else rows[:, 1]
        if not bits:
            assert codes is x and by.eq(1).all() and (not asymmetric or scale[:, 2 + place].eq(0).all())
            continue
        back = (dequantize_coefficient, dequantize_basis)[place](codes, scale, x.shape[-1], bits, torch.float32)
        assert back.shape == x.shape and codes.dtype == torch.uint8
        signed, by = by, by.double().abs()
        distance = (back.double() - x.double()).abs()
        if bits in (E4M3, E5M2):
            # Half a unit in the last place of a normal float, or of a subnormal one.
            relative, least = {E4M3: (2**-4, 2**-10), E5M2: (2**-3, 2**-17)}[bits]
            assert (distance <= torch.maximum(x.double().abs() * relative, by * least) * (1 + 1e-5)).all()
        elif asymmetric:
            zero = (scale[:, 2, None] if place == 0 else rows[:, 3]).double()
            assert (distance <= by / 2 + 1e-6 * (zero.abs() + 256 * by)).all()
            assert reference.decoded(codes, x.shape[-1], bits, signed=False).amax() < 2**bits if x.numel() else True
        else:
            assert (distance <= nearest(x, signed.expand_as(x), bits) + 1e-4 * by).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_zero_points_are_the_least_numbers_of_real_tokens(bits):
    coefficient, basis = factors(0, 1, 12, 2, 4, 8)
    coefficient = coefficient.abs() + 1
    coefficient[..., 2] = 3
    padded = torch.cat([coefficient, torch.zeros(1, 5, 4)], 1)
    codes, _, scale = quantize(padded, basis, bits, 0, asymmetric=True)
    assert torch.equal(scale[:, 2], coefficient.amin(1))
    top = scale[:, 2] + (2**bits - 1) * scale[:, 0]
    assert torch.allclose(top, coefficient.amax(1))
    assert dequantize_coefficient(codes, scale, 4, bits, torch.float32)[:, :12, 2].eq(3).all()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_magnitudes_of_floats_and_zero_points_stay_finite(dtype, asymmetric):
    for magnitude in (torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        ends = (-0.4, 0.5) if asymmetric else (-0.9, 1.0)
        x = torch.linspace(*ends, 9).mul(magnitude).to(dtype)[None, :, None]
        for bits in (8, 4) if asymmetric else (E4M3, E5M2):
            codes, _, scale = quantize(x, torch.ones(1, 1, 1, 1, dtype=dtype), bits, 0, asymmetric)
            back = dequantize_coefficient(codes, scale, 1, bits, dtype)
            assert back.isfinite().all()
            assert relative_error(back.double() / magnitude, x.double() / magnitude) < 0.15
