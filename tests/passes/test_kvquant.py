"""KVQuant by its formula in float64, with and without a calibration; its bytes, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.kernels.aten.codebook import normal_levels
from attnpack_fx.passes import codebook_file
from attnpack_fx.passes.codebook_file import Codebooks
from attnpack_fx.passes.kvquant import KVQuant
from tests.kernels.coded import decoded, random_rows, stored_bytes
from tests.kernels.inputs import SEEDS, relative_error

HEADS, DIM = 2, 6


def nuq(vector: Tensor, outlier: Tensor, low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
    """Numbers of one vector, float64, by the levels between thresholds; outliers as they are."""
    middle, half = (high + low) / 2, (high - low) / 2
    normalised = (vector - middle) / (half if half > 0 else 1)
    nearest = (normalised[:, None] - levels.double()).abs().argmin(1)
    return torch.where(outlier, vector, levels.double()[nearest] * half + middle)


def outermost(vector: Tensor, share: float) -> Tensor:
    side = math.floor(len(vector) * share / 2 + 0.5)
    found = torch.zeros(len(vector), dtype=torch.bool)
    order = vector.argsort()
    found[order[:side]] = found[order[len(order) - side :]] = True
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    """But where rounding decides between two levels."""
    assert ((found - expected).abs() > 1e-4 * expected.abs().max()).sum() <= 1


def codebooks(bits: int = 4, heads: int = HEADS) -> Codebooks:
    random = torch.Generator().manual_seed(bits)
    key, value = (torch.rand(2**bits, generator=random).mul(2).sub(1).sort().values for _ in range(2))
    low = -torch.rand(heads, DIM, generator=random) * 3 - 1
    return Codebooks(key, value, low, low + 8)


@given(seed=SEEDS, n=st.integers(3, 20), bits=st.sampled_from([2, 4, 8]), share=st.sampled_from([0.0, 0.1, 0.3]))
@settings(max_examples=20, deadline=None)
def test_without_calibration(seed, n, bits, share):
    method = KVQuant(bits, share)
    rows = random_rows(seed, 2, n, HEADS, DIM)
    levels = {"key": normal_levels(bits, share), "value": normal_levels(bits, max(share, 4 / DIM))}
    keys, values = (decoded(method.encode(rows, kind, None, True), DIM) for kind in ("key", "value"))
    for x, key, value in zip(rows.double(), keys, values, strict=True):
        for number, channel in enumerate(x.flatten(1).T):
            outlier = outermost(channel, share)
            rest = channel[~outlier]
            assert_same(key.flatten(1)[:, number], nuq(channel, outlier, rest.min(), rest.max(), levels["key"]))
        for number, token in enumerate(x):
            outlier = outermost(token.flatten(), share).view_as(token)
            for own, mark, found in zip(token, outlier, value[number], strict=True):
                rest = own[~mark] if not mark.all() else torch.zeros(1).double()
                assert_same(found, nuq(own, mark, rest.min(), rest.max(), levels["value"]))


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_thresholds_and_levels_of_a_file(share, tmp_path):
    path = str(tmp_path / "codebooks.safetensors")
    own, other = codebooks(4), codebooks(2)
    codebook_file.save(path, {0: Codebooks(own.value.clone(), own.key.clone(), other.low, other.high), 3: own})
    method = KVQuant(4, share, codebooks=path)
    rows = random_rows(0, 2, 12, HEADS, DIM)
    rows[1, 9:] = 0
    for n, prefill in ((12, True), (5, False)):
        coded = method.encode(rows[:, :n], "key", 3, prefill)
        assert coded.scale.shape == (2, 1, HEADS, DIM)
        found = decoded(coded, DIM)
        beyond = (rows[:, :n] < own.low) | (rows[:, :n] > own.high)
        beyond &= (rows[:, :n] != 0).flatten(2).any(2)[:, :, None, None]
        assert 0 < beyond.sum() < beyond.numel()
        assert (coded.places is not None) == (share > 0)
        if share:
            assert (coded.places >= 0).sum() == beyond.sum()
        for h in range(HEADS):
            for d in range(DIM):
                x, outlier = rows[0, :n, h, d].double(), beyond[0, :n, h, d] & (share > 0)
                expected = nuq(x, outlier, own.low[h, d].double(), own.high[h, d].double(), own.key)
                assert_same(found[0, :, h, d], expected)
    assert torch.equal(method.encode(rows, "value", 3, True).codebook, own.value)
    assert torch.equal(method.encode(rows, "value", 0, True).codebook, own.key)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_bytes_of_four_bits_and_one_percent(kind):
    n, H, D = 800, 4, 100
    rows = random_rows(0, 1, n, H, D, torch.float16)
    coded = KVQuant().encode(rows, kind, None, True)
    outliers = n * H * D / 100
    thresholds = 2 * 2 * H * (D if kind == "key" else n)
    numbering = 4 * n if kind == "key" else 0
    assert coded.outliers.shape == (1, outliers)
    assert stored_bytes(coded) == n * H * D / 2 + thresholds + numbering + (2 + 4) * outliers + 4 * 16
    assert 3.3 < 2 * n * H * D / stored_bytes(coded) < 3.6


@pytest.mark.parametrize("kind", ["key", "value"])
def test_settings_that_lose_nothing(kind):
    rows = random_rows(1, 2, 40, 2, 10)
    rows[1, 25:] = 0
    for method, limit in ((KVQuant(8), 2e-2), (KVQuant(outliers=1.0), 1e-6)):
        found = decoded(method.encode(rows, kind, None, True), 10)[rows != 0]
        assert relative_error(found, rows[rows != 0]) < limit, method


def test_normal_numbers_lose_less_than_in_equal_steps():
    rows = torch.randn(1, 400, 2, 128, generator=torch.Generator().manual_seed(0))
    for kind in ("key", "value"):
        coded = KVQuant().encode(rows, kind, None, True)
        error = relative_error(decoded(coded, 128), rows)
        equal = float(coded.scale.double().mean()) * 2 / 15 / 12**0.5
        assert error < 0.95 * equal < 0.11


def test_schedule_and_one_form(tmp_path):
    path = str(tmp_path / "codebooks.safetensors")
    codebook_file.save(path, {0: codebooks()})
    for method in (KVQuant(residual=16), KVQuant(residual=16, codebooks=path)):
        assert method.unrotated
        for kind in ("key", "value"):
            assert [method.due(kind, n, True) for n in (0, 5, 130)] == [0, 5, 130]
            assert [method.due(kind, n, False) for n in (5, 15, 16, 40)] == [0, 0, 16, 32]
            coded = [method.encode(random_rows(0, 1, n, HEADS, DIM), kind, 0, n > 16) for n in (1, 16, 100)]
            assert len({each.form for each in coded}) == 1
            assert all(torch.equal(each.codebook, coded[0].codebook) for each in coded)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_refuses_nan(kind, tmp_path):
    path = str(tmp_path / "codebooks.safetensors")
    codebook_file.save(path, {0: codebooks()})
    rows = random_rows(0, 1, 8, HEADS, DIM)
    rows[0, 3, 0, 0] = math.nan
    for method in (KVQuant(), KVQuant(outliers=0), KVQuant(codebooks=path)):
        with pytest.raises(ValueError, match="NaN or Inf"):
            method.encode(rows, kind, 0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"bits: got 3, expected 2, 4 or 8, e\.g\. KVQuant\(bits=4\)"),
        ({"outliers": 1.5}, r"outliers: got 1.5, expected a share in \[0, 1\]"),
        ({"residual": 0}, "residual: got 0, expected an int >= 1"),
        ({"codebooks": 4}, "codebooks: got 4, expected a path as a str, or None"),
        ({"codebooks": "nowhere.safetensors"}, "codebooks: cannot read nowhere.safetensors.*calibrate_codebooks"),
    ],
    ids=repr,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KVQuant(**options)


def test_files_that_do_not_fit(tmp_path):
    path = str(tmp_path / "codebooks.safetensors")
    codebook_file.save(path, {1: codebooks(4, heads=3)})
    with pytest.raises(ValueError, match=r"with 16 levels in layer 1, expected 2\^bits = 4; calibrate it with bits=2"):
        KVQuant(2, codebooks=path)
    method = KVQuant(codebooks=path)
    rows = random_rows(0, 1, 8, HEADS, DIM)
    with pytest.raises(ValueError, match=r"which has layers \[1\] and not 2"):
        method.encode(rows, "key", 2, True)
    with pytest.raises(ValueError, match=r"number of this layer is not known.*codebooks=None"):
        method.encode(rows, "value", None, True)
    with pytest.raises(ValueError, match=r"thresholds of \[3, 6\] heads and channels, expected \[2, 6\]"):
        method.encode(rows, "key", 1, True)
    (tmp_path / "other.safetensors").write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"cannot read .*other\.safetensors"):
        KVQuant(codebooks=str(tmp_path / "other.safetensors"))
