"""Ranges of tokens, added and selected tokens, against the float64 meaning of all of them."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.coded_rows import Decoder, decode, extend, select
from attnpack_fx.kernels.parts import RowForm, row_extras

from ..inputs import SEEDS, Shapes, make_rows, relative_error, row_forms

DIMS = st.sampled_from([8, 16, 64])


def problem(seed, batch, heads, dtype=torch.float32):
    shape = Shapes(seed=seed, batch=batch, heads=heads, dtype=dtype)
    return shape, torch.Generator().manual_seed(seed)


def close(actual, expected):
    assert relative_error(actual, expected, floor=1e-3) < 1e-6


@given(seed=SEEDS, form=row_forms(), batch=st.integers(1, 3), tokens=st.integers(1, 40), dim=DIMS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_range_of_tokens(seed, form, batch, tokens, dim, data):
    shape, random = problem(seed, batch, 2, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    rows = make_rows(form, shape, tokens, dim, random)
    first = data.draw(st.integers(0, tokens - 1))
    end = data.draw(st.integers(first + 1, tokens))
    expected = reference.coded(rows, dim)
    close(decode(rows, dim), expected)
    close(Decoder(rows, dim)(first, end), expected[:, first:end])


@given(seed=SEEDS, form=row_forms(), batch=st.integers(1, 3), sizes=st.tuples(*[st.integers(0, 12)] * 3), dim=DIMS)
@settings(max_examples=60, deadline=None)
def test_flushes_add_up(seed, form, batch, sizes, dim):
    shape, random = problem(seed, batch, 2)
    flushes = [make_rows(form, shape, tokens, dim, random) for tokens in sizes]
    whole = flushes[0]
    for later in flushes[1:]:
        whole = extend(whole, dataclasses.replace(later, codebook=whole.codebook))
    parts = [reference.coded(dataclasses.replace(each, codebook=whole.codebook), dim) for each in flushes]
    assert tuple(whole.extras) == row_extras(form)
    close(decode(whole, dim), torch.cat(parts, 1))
    if form.outliers:
        check_outliers(whole, sum(int((each.places >= 0).sum()) for each in flushes))


def check_outliers(rows, count):
    """That they ascend, and that no sample could do with fewer columns."""
    assert rows.places.dtype == torch.int32 and rows.places.shape == rows.outliers.shape
    assert rows.places.untyped_storage().nbytes() == 4 * rows.places.numel()
    assert (rows.places >= 0).sum() == count
    assert (rows.places.diff(dim=1) > 0)[rows.places[:, 1:] >= 0].all()
    assert rows.places.shape[1] == 0 or (rows.places[:, 0] >= 0).any()


@given(seed=SEEDS, form=row_forms(), batch=st.integers(1, 3), tokens=st.integers(1, 30), dim=DIMS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_tokens_go_where_they_are_sent(seed, form, batch, tokens, dim, data):
    shape, random = problem(seed, batch, 2)
    rows = make_rows(form, shape, tokens, dim, random)
    count = data.draw(st.integers(0, tokens))
    slots = torch.stack([torch.randperm(tokens, generator=random)[:count] for _ in range(batch)])
    slots[torch.rand(slots.shape, generator=random) < 0.2] = -1
    found = select(rows, slots)
    before, after = reference.coded(rows, dim), decode(found, dim)
    assert after.shape == (batch, count, 2, dim) and tuple(found.extras) == row_extras(form) and after.isfinite().all()
    for sample, row in enumerate(slots):
        kept = row >= 0
        close(after[sample, kept], before[sample, row[kept]])
    if form.outliers:
        tokens_of = rows.places.div(2 * dim, rounding_mode="floor")
        kept = [
            int(token) in row.tolist()
            for row, line in zip(slots, tokens_of, strict=True)
            for token in line
            if token >= 0
        ]
        check_outliers(found, sum(kept))


@pytest.mark.parametrize("form", [RowForm(4, group=8, zero=True, rank=2, outliers=True), RowForm(2, channel=True)])
def test_samples_are_taken_along_the_first_dim(form):
    shape, random = problem(0, 3, 2)
    rows = make_rows(form, shape, 9, 16, random)
    order = torch.tensor([2, 0])
    tensors = {"codes": rows.codes, "scale": rows.scale, **rows.extras}
    taken = dataclasses.replace(rows, **{name: tensor.index_select(0, order) for name, tensor in tensors.items()})
    close(decode(taken, 16), reference.coded(rows, 16)[order])


def test_refuses_to_add_what_was_coded_otherwise():
    shape, random = problem(0, 1, 2)
    rows, other = (make_rows(RowForm(4, codebook=True, group=16), shape, 3, 16, random) for _ in range(2))
    with pytest.raises(ValueError, match="got another codebook, expected the same"):
        extend(rows, other)
    with pytest.raises(ValueError, match=r"got RowForm\(bits=2.* expected RowForm\(bits=4"):
        extend(rows, make_rows(RowForm(2, group=16), shape, 3, 16, random))
