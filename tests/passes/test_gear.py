"""GEAR by its formula in float64: integers of what outliers leave, outliers, a low-rank matrix of the rest."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.passes.gear import GEAR
from tests.kernels.coded import decoded, random_rows, stored_bytes
from tests.kernels.inputs import SEEDS, relative_error


def quantised(vector: Tensor, bits: int, group: int, outlier: Tensor) -> Tensor:
    """One vector in groups, min and max without outliers; outliers as they are."""
    found = vector.clone()
    for start in range(0, len(vector), group):
        own = slice(start, start + group)
        rest = vector[own][~outlier[own]]
        if len(rest):
            scale = (rest.max() - rest.min()) / (2**bits - 1)
            codes = ((rest - rest.min()) / (scale if scale else 1)).round()
            found[own][~outlier[own]] = codes * scale + rest.min()
    return found


def gear(x: Tensor, method: GEAR, kind: str, rank: int) -> tuple[Tensor, Tensor]:
    """X' and the least squared error that a residual of this rank leaves, `[H]`; x: float64 `[n, H, D]`."""
    n, H, D = x.shape
    vectors = x.flatten(1).T if kind == "key" else x.flatten(1)
    found = []
    for vector in vectors:
        side = math.floor(len(vector) * method.outliers / 2 + 0.5)
        outlier = torch.zeros(len(vector), dtype=torch.bool)
        order = vector.argsort()
        outlier[order[:side]] = outlier[order[len(order) - side :]] = True
        if kind == "key":
            found.append(quantised(vector, method.bits, method.group, outlier))
        else:
            heads = zip(vector.view(H, D), outlier.view(H, D), strict=True)
            found.append(torch.cat([quantised(own, method.bits, min(method.group, D), mark) for own, mark in heads]))
    plain = torch.stack(found)
    plain = (plain.T if kind == "key" else plain).view(n, H, D)
    singular = torch.linalg.svdvals((x - plain).transpose(0, 1))
    return plain, singular[:, rank:].square().sum(1)


@given(
    seed=SEEDS,
    n=st.integers(4, 24),
    bits=st.sampled_from([2, 4]),
    share=st.sampled_from([0.0, 0.1, 0.5]),
    kind=st.sampled_from(["key", "value"]),
    prefill=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_as_the_formula(seed, n, bits, share, kind, prefill):
    method = GEAR(bits, group=8, outliers=share, rank=3, flush_rank=1)
    rows = random_rows(seed, 2, n, 2, 12)
    coded = method.encode(rows, kind, None, prefill)
    rank = 3 if prefill else 1
    lean = replace(method, rank=0, flush_rank=0).encode(rows, kind, None, prefill)
    for sample, (x, found, backbone) in enumerate(
        zip(rows.double(), decoded(coded, 12), decoded(lean, 12), strict=True)
    ):
        plain, least = gear(x, method, kind, rank)
        assert ((backbone - plain).abs() > 1e-4).sum() <= 1, sample  # where rounding decides a tie
        total = (x - plain).square().sum((0, 2))
        error = (found - x).square().sum((0, 2))
        assert (error >= least * (1 - 1e-3) - 1e-7).all(), sample
        # How close three iterations come is tests/kernels/aten/test_residual.py.
        assert (error <= total * (1 - 1e-3) + 1e-9).all()
    assert coded.form.rank == 3 and not coded.left[..., rank:].any()


def test_outliers_are_their_share_of_keys_and_values_however_many_tokens():
    for n in (50, 100, 400):
        rows = random_rows(n, 1, n, 2, 50)
        for kind in ("key", "value"):
            coded = GEAR(outliers=0.04).encode(rows, kind, None, True)
            assert coded.outliers.shape[1] == 0.04 * rows.numel()


@pytest.mark.parametrize("kind", ["key", "value"])
def test_bytes(kind):
    n, H, D = 512, 2, 128
    rows = random_rows(0, 1, n, H, D, torch.float16)
    coded = GEAR().encode(rows, kind, None, True)
    side = round((n if kind == "key" else H * D) * 0.01)
    outliers = 2 * side * (H * D if kind == "key" else n)
    expected = {
        "codes": n * H * D * 2 / 8,
        "scale and zero": 2 * 2 * n * H * D / 64,
        "outliers and places": (2 + 4) * outliers,
        "factors": 2 * 4 * H * (n + D),
        "numbering": 4 * n * (2 if kind == "key" else 1),
    }
    assert stored_bytes(coded) == sum(expected.values())
    lite = GEAR(outliers=0).encode(rows, kind, None, True)
    assert stored_bytes(lite) == sum(expected.values()) - expected["outliers and places"]


@pytest.mark.parametrize("kind", ["key", "value"])
def test_settings_that_lose_nothing(kind):
    rows = random_rows(1, 2, 30, 2, 10)
    rows[1, 20:] = 0
    for method in (GEAR(8), GEAR(outliers=1.0), GEAR(rank=10, flush_rank=10), GEAR(8, backbone="kcvt")):
        error = (decoded(method.encode(rows, kind, None, True), 10) - rows.double())[rows != 0]
        assert error.norm() / rows.double().norm() < 4e-3, method


@pytest.mark.parametrize("kind", ["key", "value"])
def test_kcvt_has_one_range_for_a_vector(kind):
    rows = random_rows(1, 2, 30, 2, 10)
    coded = GEAR(backbone="kcvt", group=4).encode(rows, kind, None, True)
    assert coded.scale.shape == ((2, 1, 2, 10) if kind == "key" else (2, 30, 2, 1))
    finer = GEAR(group=4).encode(rows, kind, None, True)
    assert relative_error(decoded(finer, 10), rows) < relative_error(decoded(coded, 10), rows)


def test_schedule_and_one_form():
    method = GEAR()
    for kind in ("key", "value"):
        assert [method.due(kind, n, True) for n in (0, 5, 130)] == [0, 5, 130]
        assert [method.due(kind, n, False) for n in (5, 63, 64, 130)] == [0, 0, 64, 128]
        forms = {method.encode(random_rows(0, 1, n, 2, 8), kind, 0, n > 64).form for n in (1, 64, 100)}
        assert len(forms) == 1


def test_refuses_inf():
    rows = random_rows(0, 1, 8, 1, 8)
    rows[0, 3, 0, 0] = math.inf
    for outliers in (0, 0.5):
        with pytest.raises(ValueError, match="NaN or Inf"):
            GEAR(outliers=outliers).encode(rows, "key", 0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"bits: got 5, expected 2, 4 or 8, e\.g\. GEAR\(bits=4\)"),
        ({"group": 0}, "group: got 0, expected an int >= 1"),
        ({"outliers": -0.1}, r"outliers: got -0.1, expected a share in \[0, 1\]"),
        ({"outliers": math.nan}, "outliers: got nan"),
        ({"outliers": "2%"}, "outliers: got '2%'"),
        ({"rank": -1}, "rank: got -1, expected an int >= 0"),
        ({"flush_rank": 5}, "flush_rank: got 5, expected at most rank=4"),
        ({"residual": 0}, "residual: got 0, expected an int >= 1"),
        ({"backbone": "kvquant"}, "backbone: got 'kvquant', expected 'kivi' or 'kcvt'"),
    ],
    ids=repr,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GEAR(**options)
