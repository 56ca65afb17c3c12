"""`Quantize`: the formats it asks of factors, and the tail by its formula in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels.parts import E4M3, E5M2
from attnpack_fx.passes.kivi import KIVI
from attnpack_fx.passes.method import Stage, conflict
from attnpack_fx.passes.quantize import Quantize
from tests.kernels.coded import decoded, numbers, random_rows, stored_bytes
from tests.kernels.inputs import DTYPES, SEEDS, relative_error


@pytest.mark.parametrize(
    ("options", "stages", "factor_bits"),
    [
        ({}, {Stage.FACTORS}, ((None, 4, 4),)),
        ({"bits": 8, "target": "coefficients"}, {Stage.FACTORS}, ((None, 8, 0),)),
        ({"bits": "e4m3", "target": ["bases"]}, {Stage.FACTORS}, ((None, 0, E4M3),)),
        ({"bits": "e5m2", "target": "tail"}, {Stage.ROWS}, ()),
        ({"bits": 2, "target": ("bases", "tail")}, {Stage.FACTORS, Stage.ROWS}, ((None, 0, 2),)),
        ({"bits": ((16, 8), (None, 4))}, {Stage.FACTORS}, ((16, 8, 8), (None, 4, 4))),
        ({"bits": [[16, "e4m3"], [8, 2]]}, {Stage.FACTORS}, ((16, E4M3, E4M3), (8, 2, 2), (None, 0, 0))),
        ({"bits": ((16, 0), (None, 4)), "target": "bases"}, {Stage.FACTORS}, ((16, 0, 0), (None, 0, 4))),
    ],
    ids=repr,
)
def test_what_is_asked_of_factors(options, stages, factor_bits):
    method = Quantize(**options)
    assert method.stages == stages
    assert method.factor_bits == factor_bits
    if len(factor_bits) < 2:
        assert method.formats() == (factor_bits[0][1:] if factor_bits else (0, 0))
    else:
        with pytest.raises(ValueError, match=r"columns in several formats.*take factor_bits"):
            method.formats()
    assert hash(method) == hash(Quantize(**options))
    assert (method.due("key", 500, True) > 0) == (Stage.ROWS in stages)


@given(
    seed=SEEDS,
    n=st.integers(0, 20),
    dim=st.integers(1, 20),
    bits=st.sampled_from([8, 4, 2, "e4m3", "e5m2"]),
    group=st.sampled_from([1, 4, 32]),
    even=st.booleans(),
    dtype=DTYPES,
)
@settings(max_examples=40, deadline=None)
def test_tail_is_the_nearest_level_of_every_group(seed, n, dim, bits, group, even, dtype):
    even = even or isinstance(bits, str)
    rows = random_rows(seed, 2, n, 2, dim, dtype)
    method = Quantize(bits, group, "tail", symmetric=even)
    for kind in ("key", "value"):
        found = decoded(method.encode(rows, kind, None, True), dim)
        for start in range(0, dim, group):
            x, y = (each[..., start : start + group].double() for each in (rows, found))
            error = (x - y).abs()
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            largest = torch.maximum(high, -low)
            if isinstance(bits, str):
                table = numbers(E4M3 if bits == "e4m3" else E5M2)
                table = table[~table.isnan()]
                scale = largest / (448 if bits == "e4m3" else 1.75)
                limit = (x[..., None] - table * scale[..., None]).abs().amin(-1)
            elif even:
                # Half a step, but beyond the last level of the side that has one less.
                step = largest / (1.5 if bits == 2 else 2 ** (bits - 1))
                limit = step * (0.5 if bits == 2 else 1)
                assert (error <= step / 2 + 0.02 * largest).double().mean() > 0.5 if error.numel() else True
            else:
                limit = (high - low) / (2**bits - 1) / 2
            slack = 3 * torch.finfo(dtype).eps * (largest + high - low) + torch.finfo(dtype).smallest_normal
            assert (error <= limit + slack).all()


def test_keeps_the_newest():
    method = Quantize(target="tail", recent=10)
    assert [method.due("key", n, True) for n in (3, 10, 11, 100)] == [0, 0, 1, 90]
    assert [method.due("value", n, False) for n in (3, 41, 42, 73, 74)] == [0, 0, 32, 32, 64]
    assert Quantize(target="tail", recent=0).due("key", 5, True) == 5


@pytest.mark.parametrize(
    ("bits", "even", "stored"), [(4, True, 4.5), (4, False, 5), (8, True, 8.5), (2, False, 3), ("e4m3", True, 8.5)]
)
def test_bytes(bits, even, stored):
    rows = random_rows(0, 2, 64, 2, 64, torch.float16)
    coded = Quantize(bits, target="tail", symmetric=even).encode(rows, "key", 0, True)
    levels = 0 if coded.codebook is None else 4 * coded.codebook.numel()
    assert (stored_bytes(coded) - levels) * 8 / rows.numel() == stored


@pytest.mark.parametrize("even", [True, False])
def test_eight_bits_are_almost_lossless(even):
    rows = random_rows(0, 2, 30, 2, 40)
    assert relative_error(decoded(Quantize(8, 8, "tail", even).encode(rows, "key", 0, True), 40), rows) < 1e-2


def test_refuses_nan():
    rows = random_rows(0, 1, 8, 1, 8)
    rows[0, 3, 0, 0] = math.nan
    for bits in (4, "e5m2"):
        with pytest.raises(ValueError, match="NaN or Inf"):
            Quantize(bits, target="tail").encode(rows, "key", 0, True)


def test_stands_beside_a_code_for_the_tail_unless_it_is_one():
    assert conflict(Quantize(), KIVI()) is None
    reason = conflict(Quantize(target="tail"), KIVI())
    assert reason is not None and "both store the older dense tokens" in reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"bits: got 3, expected 8, 4, 2, 'e4m3' or 'e5m2', or \(columns, bits\) pairs"),
        ({"bits": "fp8"}, "bits: got 'fp8'"),
        ({"bits": 0}, "bits: got 0"),
        ({"bits": ()}, "bits: got no pairs"),
        ({"bits": (16, 8)}, r"bits: got 16 in \(16, 8\), expected \(columns, bits\) pairs"),
        ({"bits": ((0, 8),)}, r"bits: got 0 columns.*e\.g\. \(\(16, 8\), \(None, 4\)\)"),
        ({"bits": ((None, 8), (4, 4))}, "bits: got None columns"),
        ({"bits": ((4, 3),)}, "bits: got 3"),
        (
            {"bits": ((4, 8),), "target": ("bases", "tail")},
            r"for the tail, whose tokens have no columns.*out of target",
        ),
        ({"group": 0}, "group: got 0, expected an int >= 1"),
        ({"target": "values"}, r"target: got 'values', expected some of 'coefficients', 'bases', 'tail'"),
        ({"target": ()}, r"target: got \(\)"),
        ({"target": ("tail", "tail")}, "each once"),
        ({"target": None}, "target: got None"),
        ({"symmetric": 1}, "symmetric: got 1, expected True or False"),
        ({"bits": "e4m3", "symmetric": False}, "floats have a sign of their own"),
        ({"recent": -1}, "recent: got -1, expected an int >= 0"),
    ],
    ids=repr,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Quantize(**options)
