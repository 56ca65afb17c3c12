"""Codes of exported steps are those of `kernels/aten/quantize.py`, byte for byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.export.coding import coded
from attnpack_fx.export.layout import BlockSpec
from attnpack_fx.export.steps import _block
from attnpack_fx.kernels.aten.quantize import quantize
from tests.kernels.inputs import SEEDS

DTYPES = st.sampled_from([torch.float32, torch.float16])


def factors(seed: int, batch: int, n: int, heads: int, r: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Coefficients that carry a spectrum over four decades, and a basis."""
    random = torch.Generator().manual_seed(seed)
    coefficient = torch.randn(batch, n, r, generator=random) * 10 ** torch.linspace(2, -2, r)
    basis = torch.randn(batch, heads, r, dim, generator=random) / (heads * dim) ** 0.5
    return coefficient.to(dtype), basis.to(dtype)


def specification(bits: int, basis_bits: int, asymmetric: bool, rank: int) -> BlockSpec:
    return BlockSpec(
        "coefficient", "basis", "scale" if bits or basis_bits else None, rank, bits, basis_bits, asymmetric
    )


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    n=st.integers(0, 20),
    filler=st.integers(0, 20),
    heads=st.integers(1, 3),
    r=st.integers(1, 9),
    dim=st.sampled_from([2, 7, 16]),
    bits=st.sampled_from([0, 8, 4, 2]),
    basis_bits=st.sampled_from([0, 8, 4, 2]),
    asymmetric=st.booleans(),
    dtype=DTYPES,
)
@settings(max_examples=120, deadline=None)
def test_a_block_has_the_bytes_of_quantize(seed, batch, n, filler, heads, r, dim, bits, basis_bits, asymmetric, dtype):
    if not bits and not basis_bits:
        bits = 8
    coefficient, basis = factors(seed, batch, n, heads, r, dim, dtype)
    # Samples are of different lengths; the first has all tokens.
    places = torch.arange(n)[None, :, None]
    nothing = places >= (n - filler * (torch.arange(batch) > 0))[:, None, None]
    coefficient = coefficient.masked_fill(nothing, 0)
    made = _block(specification(bits, basis_bits, asymmetric, r), coefficient, basis, nothing)
    # With the row of filler that the step adds, since sums over other numbers of rows round in other ways.
    padded = torch.nn.functional.pad(coefficient, (0, 0, 0, 1))
    codes, basis_codes, scale = quantize(padded, basis, bits, basis_bits, asymmetric)
    codes = codes[:, :-1]
    for name, expected, how in (("coefficient", codes, bits), ("basis", basis_codes, basis_bits)):
        assert made[name].dtype == (torch.int8 if how == 8 and not asymmetric else torch.uint8 if how else dtype)
        found = made[name].view(torch.uint8) if how else made[name]
        if asymmetric or how == 2:
            # Filler holds anything.
            hidden = nothing if name == "coefficient" else torch.zeros((), dtype=torch.bool)
            found, expected = found.masked_fill(hidden, 0), expected.masked_fill(hidden, 0)
        assert torch.equal(found, expected), name
    assert made["scale"].dtype == torch.float32 and torch.equal(made["scale"], scale)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_without_tokens_shapes_are_as_ever(bits, asymmetric):
    coefficient, basis = factors(0, 2, 0, 2, 5, 7, torch.float32)
    made = _block(
        specification(bits, bits, asymmetric, 5), coefficient, basis, torch.zeros((2, 0, 1), dtype=torch.bool)
    )
    assert made["coefficient"].shape == (2, 0, -(-5 * bits // 8))
    assert made["basis"].shape == (2, 2, 5, -(-7 * bits // 8))
    assert made["scale"].shape == (2, 4 if asymmetric else 2, 5) and made["scale"].isfinite().all()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_sample_without_tokens_has_a_scale_of_zero(bits, asymmetric):
    coefficient, basis = factors(0, 2, 6, 2, 5, 7, torch.float32)
    nothing = torch.tensor([[False], [True]]).expand(2, 6)[..., None]
    made = _block(specification(bits, bits, asymmetric, 5), coefficient.masked_fill(nothing, 0), basis, nothing)
    assert made["scale"][1, 0].eq(0).all() and made["scale"].isfinite().all()
    alone = _block(specification(bits, bits, asymmetric, 5), coefficient[:1], basis[:1], nothing[:1])
    assert all(torch.equal(made[name][:1], alone[name]) for name in made)


def test_no_bits_leave_numbers_as_they_are():
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    codes, scale, zero = coded(x, (1,), 0, False, None)
    assert codes is x and torch.equal(scale, torch.ones(2, 1, 5)) and torch.equal(zero, torch.zeros(2, 1, 5))


def test_blocks_as_they_are_have_no_scale():
    coefficient, basis = factors(0, 2, 6, 2, 5, 7, torch.float32)
    made = _block(specification(0, 0, False, 5), coefficient, basis, torch.zeros((2, 6, 1), dtype=torch.bool))
    assert made.keys() == {"coefficient", "basis"} and made["basis"] is basis
