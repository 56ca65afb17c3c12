"""The spec, in float64: numbers of one group share a scale and a zero point, and every code is the nearest level."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.kernels.aten.row_codes import (
    Grouping,
    _nearest,
    bounds,
    by_codebook,
    extremes,
    float8,
    keep_outliers,
    symmetric,
    uniform,
)
from attnpack_fx.kernels.parts import E4M3, E5M2, RowForm

from ..coded import BATCHES, DIMS, HEADS, LENGTHS, decoded, numbers, random_rows, shared, stored_bytes
from ..inputs import DTYPES, SEEDS

BITS = st.sampled_from([8, 4, 2])
GROUPINGS = st.builds(Grouping, st.sampled_from([1, 3, 8, 16, 64]), st.booleans())
SIGNED = {8: torch.arange(-128, 128), 4: torch.arange(-8, 8), 2: torch.tensor([-1.5, -0.5, 0.5, 1.5])}


def alive(rows: Tensor) -> Tensor:
    """Tokens that are no filler, as an index of rows."""
    return (rows != 0).flatten(2).any(2)


def groups(rows: Tensor, grouping: Grouping) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Places of the numbers that share a scale, by where the scale stands; filler left out."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for b, t, h, d in [tuple(place.tolist()) for place in torch.cartesian_prod(*map(torch.arange, rows.shape))]:
        if alive(rows)[b, t]:
            where = (b, t // grouping.size, h, d) if grouping.channel else (b, t, h, d // grouping.size)
            found.setdefault(where, []).append((b, t, h, d))
    return found


def assert_nearest(coded, rows: Tensor, levels: Tensor) -> None:
    """No other level of the stored scale and zero point is nearer to any number of a real token."""
    dim = rows.shape[3]
    scale = shared(coded.scale, coded, dim)
    zero = torch.zeros_like(scale) if coded.zero is None else shared(coded.zero, coded, dim)
    levels = levels.double()[~levels.isnan()]
    best = (rows.double()[..., None] - levels * scale[..., None] - zero[..., None]).abs().amin(-1)
    error = (decoded(coded, dim) - rows.double()).abs()
    rounding = 1e-6 * (rows.double().abs() + zero.abs() + scale.abs() * levels.abs().max())
    assert (error <= best + rounding)[alive(rows)].all()


@given(
    seed=SEEDS,
    batch=BATCHES,
    n=LENGTHS,
    heads=HEADS,
    dim=DIMS,
    dtype=DTYPES,
    bits=BITS,
    grouping=GROUPINGS,
    filler=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_codes_are_the_nearest_levels(seed, batch, n, heads, dim, dtype, bits, grouping, filler):
    rows = random_rows(seed, batch, n, heads, dim, dtype, filler)
    group = 0 if grouping.channel else min(grouping.size, dim)
    integers = uniform(rows, bits, grouping)
    assert integers.form == RowForm(bits, grouping.channel, group, zero=True)
    assert_nearest(integers, rows, torch.arange(2**bits))
    signed = symmetric(rows, bits, grouping)
    assert signed.form == RowForm(bits, grouping.channel, group, codebook=True)
    assert torch.equal(signed.codebook, SIGNED[bits].float())
    assert_nearest(signed, rows, SIGNED[bits])
    for form in (E4M3, E5M2):
        floats = float8(rows, form, grouping)
        assert floats.form == RowForm(form, grouping.channel, group)
        assert_nearest(floats, rows, numbers(form))
    codebook = torch.rand(2**bits, generator=torch.Generator().manual_seed(seed)).sort().values * 2 - 1
    levels = by_codebook(rows, codebook, *bounds(rows, grouping), grouping)
    assert levels.form == RowForm(bits, grouping.channel, group, zero=True, codebook=True)
    assert_nearest(levels, rows, codebook)
    for coded in (integers, signed, levels):
        assert coded.codes.shape == (batch, n, heads, -(-dim * bits // 8)) and coded.scale.dtype == dtype
        assert all(each.is_contiguous() for each in (coded.codes, coded.scale, *coded.extras.values()))


@given(
    seed=SEEDS, batch=BATCHES, n=st.integers(0, 12), heads=st.integers(1, 2), dim=st.integers(1, 9), dtype=DTYPES,
    bits=BITS, grouping=GROUPINGS, filler=st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_scales_span_their_group(seed, batch, n, heads, dim, dtype, bits, grouping, filler):
    rows = random_rows(seed, batch, n, heads, dim, dtype, filler)
    grouping = Grouping(min(grouping.size, max(1, n if grouping.channel else dim)), grouping.channel)
    integers, signed, floats = (
        uniform(rows, bits, grouping),
        symmetric(rows, bits, grouping),
        float8(rows, E4M3, grouping),
    )
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    for where, members in groups(rows, grouping).items():
        group = [float(rows[place]) for place in members]
        assert float(integers.zero[where]) == min(group)
        step = (max(group) - min(group)) / (2**bits - 1)
        assert float(integers.scale[where]) == pytest.approx(step, rel=eps, abs=tiny)
        largest = max(group, key=abs)
        step = largest / float(SIGNED[bits][0])
        assert abs(float(signed.scale[where])) == pytest.approx(abs(step), rel=eps, abs=tiny)
        assert float(floats.scale[where]) == pytest.approx(abs(largest) / 448, rel=eps, abs=tiny)


@given(seed=SEEDS, n=st.integers(1, 20), bits=BITS, grouping=GROUPINGS, share=st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=30, deadline=None)
def test_filler_changes_nothing(seed, n, bits, grouping, share):
    alone = random_rows(seed, 1, n, 2, 6)
    other = random_rows(seed + 1, 1, n + 7, 2, 6)
    together = torch.cat([torch.cat([alone, torch.zeros(1, 7, 2, 6)], 1), other])
    for code in (uniform, symmetric):
        found = []
        for rows in (alone, together):
            left_out = extremes(rows, share, grouping.channel)
            found.append(decoded(keep_outliers(code(rows, bits, grouping, left_out), rows, left_out), 6))
        assert torch.equal(found[0][0], found[1][0, :n])


@given(seed=SEEDS, batch=BATCHES, n=st.integers(0, 30), share=st.floats(0, 1), channel=st.booleans())
@settings(max_examples=30, deadline=None)
def test_outliers_are_the_outermost_of_every_vector(seed, batch, n, share, channel):
    rows = random_rows(seed, batch, n, 2, 5, filler=True)
    found = extremes(rows, share, channel).flatten(2)
    x, real = rows.flatten(2), alive(rows)
    assert not found[~real].any()
    for b in range(batch):
        vectors, marks = x[b, real[b]], found[b, real[b]]
        for vector, mark in zip(*((vectors.T, marks.T) if channel else (vectors, marks)), strict=True):
            side = math.floor(len(vector) * (share / 2) + 0.5)
            order = vector.argsort().tolist()
            expected = {*order[:side], *order[len(order) - side :]}
            assert set(mark.nonzero().flatten().tolist()) == expected


@given(seed=SEEDS, batch=BATCHES, n=st.integers(0, 20), dtype=DTYPES, channel=st.booleans())
@settings(max_examples=30, deadline=None)
def test_outliers_are_exact_and_out_of_every_range(seed, batch, n, dtype, channel):
    rows = random_rows(seed, batch, n, 2, 5, dtype, filler=True)
    rows[:, ::7, 1, 3] = 2.0**14
    left_out = rows == 2.0**14
    if n:
        left_out[-1] = False  # samples with fewer
        rows[-1, :, 1, 3] = 1.0
    coded = keep_outliers(uniform(rows, 8, Grouping(4, channel), left_out), rows, left_out)
    x = decoded(coded, 5)
    assert torch.equal(x[left_out], rows[left_out].double())
    assert (coded.places >= 0).sum(1).tolist() == left_out.flatten(1).sum(1).tolist()
    assert coded.form.outliers and coded.outliers.dtype == dtype
    assert (coded.scale < 2.0**14 / 255 / 4).all()


@pytest.mark.parametrize("grouping", [Grouping(4), Grouping(4, channel=True)])
def test_constant_and_tiny_groups(grouping):
    for rows in (torch.full((1, 8, 1, 8), -7.25), torch.full((1, 8, 1, 8), 6e-8, dtype=torch.float16)):
        for bits in (8, 4, 2):
            error = decoded(uniform(rows, bits, grouping), 8) - rows.double()
            assert error.abs().max() == 0
    wide = torch.tensor([65504.0, -65504.0], dtype=torch.float16).repeat(32).view(1, 8, 1, 8).contiguous()
    for code in (uniform, symmetric):
        assert decoded(code(wide, 4, grouping), 8).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("code", ["uniform", "symmetric", "float8", "codebook", "extremes"])
def test_numbers_that_are_none_are_refused(bad, code):
    rows = random_rows(0, 1, 4, 1, 4)
    low, high = bounds(rows, Grouping(4))
    rows[0, 1, 0, 2] = bad
    with pytest.raises(ValueError, match="1 of 16 numbers to be packed are NaN or Inf"):
        if code == "codebook":
            by_codebook(rows, torch.linspace(-1, 1, 16), low, high, Grouping(4))
        elif code == "extremes":
            extremes(rows, 0.5, False)
        else:
            {"uniform": uniform, "symmetric": symmetric, "float8": float8}[code](
                rows, E4M3 if code == "float8" else 4, Grouping(4)
            )


def test_what_is_no_format():
    rows = random_rows(0, 1, 4, 1, 4)
    for bits in (3, 1, 16, E4M3):
        with pytest.raises(ValueError, match=rf"bits: got {bits}, expected one of 8, 4, 2"):
            uniform(rows, bits, Grouping(4))
    with pytest.raises(ValueError, match=r"bits: got 8, expected one of 9, 10"):
        float8(rows, 8, Grouping(4))
    with pytest.raises(ValueError, match=r"codebook: got shape \[7\], expected \[4\], \[16\] or \[256\]"):
        by_codebook(rows, torch.linspace(-1, 1, 7), *bounds(rows, Grouping(4)), Grouping(4))


def test_places_that_fit_no_int32_are_refused():
    rows = torch.zeros(1).expand(1, 2**16, 2**8, 2**7)
    with pytest.raises(ValueError, match="2147483648 numbers a sample, expected fewer"):
        keep_outliers(uniform(rows[:, :1], 8, Grouping(1)), rows, rows)


@pytest.mark.parametrize(("bits", "expected"), [(8, 8.5), (4, 4.5), (2, 2.5), (E4M3, 8.5)])
def test_bytes_of_one_scale_for_32_numbers(bits, expected):
    rows = random_rows(0, 2, 64, 2, 64, torch.float16)
    coded = (float8 if bits == E4M3 else symmetric)(rows, bits, Grouping(32))
    codebook = 0 if coded.codebook is None else coded.codebook.numel() * 4
    assert (stored_bytes(coded) - codebook) * 8 / rows.numel() == expected


def test_levels_of_rows_in_any_layout_are_found_without_a_warning():
    rows = torch.randn(3, 5, 7).transpose(0, 2)
    levels = torch.linspace(-1, 1, 4)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = _nearest(rows, levels)
    finally:
        torch.set_warn_always(False)
    assert torch.equal(found, (rows[..., None] - levels).abs().argmin(-1).to(torch.uint8))
