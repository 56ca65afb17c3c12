"""Scores and weighted sums of coded rows against the float64 meaning of the rows; and how far codes put them off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import ops, reference
from attnpack_fx.kernels.aten import coded_attention
from attnpack_fx.kernels.aten.quantize import quantize
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import E4M3, Angles, Block, PackedParts, RowForm, Segment

from ..inputs import SEEDS, Shapes, make_rows, relative_error, row_forms
from .test_attention import LargestTensor

FORMS = [
    RowForm(4, group=8, zero=True, norm=True),
    RowForm(2, channel=True, zero=True),
    RowForm(2, group=16, zero=True, outliers=True, rank=2),
    RowForm(4, group=16, codebook=True, outliers=True),
    RowForm(E4M3, group=16),
]


def check(form, seed, batch, heads, queries, tokens, dim, dtype=torch.float32):
    shape, random = Shapes(seed=seed, batch=batch, heads=heads, dtype=dtype), torch.Generator().manual_seed(seed)
    rows = make_rows(form, shape, tokens, dim, random)
    dense = reference.coded(rows, dim).transpose(1, 2)
    q = torch.randn(batch, heads, queries, dim, generator=random)
    scores = coded_attention.scores(q, rows, None, 0)
    assert relative_error(scores, q.double() @ dense.mT, floor=1.0) < 2e-6
    p = torch.randn(batch, heads, queries, tokens, generator=random).softmax(-1)
    out = coded_attention.weighted(p, rows, dim)
    assert relative_error(out, p.double() @ dense, floor=1.0) < 2e-6
    cos, sin = torch.randn(2, batch, tokens + 3, dim // 4, generator=random)
    turned = coded_attention.scores(q, rows, Angles(cos, sin, None, True), 3)
    keys = reference.rotate(dense, cos[:, 3:].double(), sin[:, 3:].double(), True)
    assert relative_error(turned, q.double() @ keys.mT, floor=1.0) < 2e-6


@given(
    seed=SEEDS,
    form=st.one_of(st.sampled_from(FORMS), row_forms()),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.sampled_from([1, 1, 2, 5, 33]),
    tokens=st.integers(1, 100),
    dim=st.sampled_from([8, 16, 64]),
    tile=st.sampled_from([1, 12_000, 2 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=120, deadline=None)
def test_scores_and_sums(seed, form, batch, heads, queries, tokens, dim, tile, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coded_attention, "TILE_BYTES", {"cpu": tile})
        check(form, seed, batch, heads, queries, tokens, dim, dtype)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("form", FORMS)
def test_no_more_than_a_tile_is_decoded(form, queries, monkeypatch):
    monkeypatch.setattr(coded_attention, "TILE_BYTES", {"cpu": 32 * 8 * 64 * 4})
    rows = make_rows(form, Shapes(heads=8), 640, 64, torch.Generator().manual_seed(0))
    q, p = torch.randn(1, 8, queries, 64), torch.rand(1, 8, queries, 640)
    with LargestTensor() as recorded:
        coded_attention.scores(q, rows, None, 0)
        coded_attention.weighted(p, rows, 64)
    assert 0 < recorded.largest <= max(640 * 8 * 64 // 4, 8 * queries * 640)


@pytest.mark.parametrize("where", ["keys", "values", "both"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@given(seed=SEEDS)
@settings(max_examples=8, deadline=None)
def test_codes_of_factors_put_attention_off_by_no_more_than_their_steps_allow(bits, asymmetric, where, seed):
    """The bound: with `|dC| <= s / 2` in every number of a column (s its step, nothing clipped), and d in place of D,

        |dk_d| = |C dB + dC B + dC dB|_d <= sum over r of |C_r| |dB_rd| + |dC_r| |B_rd| + |dC_r| |dB_rd|
        |da_t| = |scale q dk_t| <= scale sum over d of |q_d| |dk_td| =: e_t
        softmax: exp(-2 e) <= p'_t / p_t <= exp(2 e), e the largest e_t, so that sum |p' - p| <= exp(2 e) - 1
        |do_d| <= sum |p' - p| max over t of |v_td| + max over t of |dv_td|

    Symmetric fields may be clipped, by as much as the farthest number is from its code: there that distance, measured,
    is the least bound the step is replaced by.
    """
    random = torch.Generator().manual_seed(seed)
    tokens, heads, rank, dim = 40, 2, 6, 16

    def factors():
        basis = torch.linalg.qr(torch.randn(heads * dim, rank, generator=random)).Q.T
        c = torch.randn(1, tokens, rank, generator=random) * 2.0 ** -torch.arange(rank)
        return c, basis.view(1, rank, heads, dim).transpose(1, 2).contiguous()

    q = torch.randn(1, heads, 1, dim, generator=random)
    exact, coded, off = [], [], []
    for side in ("keys", "values"):
        c, b = factors()
        exact.append(c.double()[:, None] @ b.double())
        if where not in (side, "both"):
            coded.append(Block(c, b))
            off.append(torch.zeros_like(exact[-1]))
            continue
        *codes, scale = quantize(c, b, bits, None, asymmetric)
        coded.append(Block(*codes, scale, bits, None, bits, asymmetric))
        step = scale.double().abs() / 2 * (1 + 1e-5)
        dc, db = step[:, 0, None].expand_as(c), step[:, 1, None, :, None].expand_as(b)
        if not asymmetric:
            rows = scale.double()
            back = reference.decoded(codes[0], rank, bits) * rows[:, 0, None]
            of_basis = reference.decoded(codes[1], dim, bits) * rows[:, 1, None, :, None]
            dc, db = torch.maximum(dc, (back - c).abs()), torch.maximum(db, (of_basis - b).abs())
        c, b = c.double().abs()[:, None], b.double().abs()
        off.append(c @ db + dc[:, None] @ b + dc[:, None] @ db)
    tail, index = torch.zeros(2, 1, heads, dim), torch.arange(tokens)[None]
    tensors, layouts = flatten(*(PackedParts((Segment((each,)),), tail, 0, index) for each in coded))
    out = ops.attention(q, tensors, *layouts, 0, None, dim**-0.5)
    keys, values = exact
    p = (q.double() @ keys.mT * dim**-0.5).softmax(-1)
    e = (q.double().abs() @ off[0].mT * dim**-0.5).amax(-1, keepdim=True)
    bound = (torch.exp(2 * e) - 1) * values.abs().amax(2, keepdim=True) + off[1].amax(2, keepdim=True)
    difference = (out.double() - p @ values).abs()
    assert (difference <= bound + 1e-6).all()
    # A bound that says something: codes that are worth nothing would put outputs off by as much as values are large.
    if bits == 8:
        assert (bound < values.abs().amax(2, keepdim=True)).all()
