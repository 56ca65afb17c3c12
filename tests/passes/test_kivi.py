"""KIVI by its formula in float64, its schedule, its bytes, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.passes.kivi import KIVI
from attnpack_fx.passes.method import Stage, conflict
from tests.kernels.coded import decoded, random_rows, stored_bytes
from tests.kernels.inputs import SEEDS, relative_error


def kivi(x: Tensor, bits: int) -> Tensor:
    """The paper's formula for groups in the last dim: q = round((x - min) / s), s = (max - min) / (2^b - 1)."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return ((x - low) / scale).nan_to_num(0).round() * scale + low


@given(
    seed=SEEDS,
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([4, 8]),
    groups=st.integers(1, 5),
    channels=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_keys_by_channel_and_values_by_token(seed, bits, group, groups, channels):
    method = KIVI(bits, group, residual=group)
    rows = random_rows(seed, 2, group * groups, 2, group * channels)
    x = rows.double()
    keys = kivi(x.unflatten(1, (groups, group)).movedim(2, -1), bits).movedim(-1, 2).flatten(1, 2)
    values = kivi(x.unflatten(3, (channels, group)), bits).flatten(3)
    for kind, expected in (("key", keys), ("value", values)):
        found = decoded(method.encode(rows, kind, 0, True), rows.shape[3])
        # Codes of ties may differ by rounding; of others none does.
        assert relative_error(found, expected) < 1e-5 or (found - expected).abs().gt(1e-4).sum() <= 2


@pytest.mark.parametrize("kind", ["key", "value"])
def test_schedule(kind):
    method = KIVI(group=4, residual=8)
    dense, coded = 0, 0
    for new, prefill in [(21, True)] + [(1, False)] * 40:
        dense += new
        due = method.due(kind, dense, prefill)
        dense, coded = dense - due, coded + due
        if kind == "key":
            assert dense == (coded + dense) % 8 and due % 8 == 0
        else:
            assert (dense == 8 and due == 13) if prefill else (8 <= dense <= 11 and due in (0, 4))
    assert method.due(kind, 3, True) == method.due(kind, 3, False) == 0


@pytest.mark.parametrize(("bits", "stored", "times"), [(2, 3, 16 / 3), (4, 5, 3.2)])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_bytes_of_the_paper(bits, stored, times, kind):
    rows = random_rows(0, 2, 256, 2, 64, torch.float16)
    coded = KIVI(bits).encode(rows, kind, 0, True)
    numbering = 0 if coded.group_of is None else coded.group_of.numel() * 4
    held = stored_bytes(coded) - numbering
    assert held * 8 / rows.numel() == stored
    assert rows.numel() * 2 / held == pytest.approx(times)


def test_eight_bits_are_almost_lossless_and_every_block_has_one_form():
    method = KIVI(8)
    forms = set()
    for kind in ("key", "value"):
        for n, prefill in ((128, True), (256, True), (32, False)):
            rows = random_rows(n, 2, n, 2, 48)
            coded = method.encode(rows, kind, None, prefill)
            assert relative_error(decoded(coded, 48), rows) < 1e-2
            forms.add((kind, coded.form))
    assert len(forms) == 2


@pytest.mark.parametrize("kind", ["key", "value"])
def test_refuses_nan(kind):
    rows = random_rows(0, 1, 32, 1, 32)
    rows[0, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        KIVI().encode(rows, kind, 0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"bits: got 3, expected 2, 4 or 8, e\.g\. KIVI\(bits=4\)"),
        ({"bits": True}, "bits: got True"),
        ({"bits": "4"}, "bits: got '4'"),
        ({"group": 0}, "group: got 0, expected an int >= 1"),
        ({"group": 1.5}, "group: got 1.5"),
        ({"residual": 0}, "residual: got 0, expected an int >= 1"),
        ({"residual": 48}, "residual: got 48, expected a multiple of group=32.*residual=128"),
    ],
    ids=repr,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KIVI(**options)


def test_stands_alone_among_codes():
    assert KIVI().stages == {Stage.ROWS} and not KIVI().unrotated
    reason = conflict(KIVI(), KIVI(4))
    assert reason is not None and "twice" in reason
