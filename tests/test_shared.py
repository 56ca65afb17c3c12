"""Copies of one tensor stay one for as long as somebody holds them."""

import gc

import torch

from attnpack_fx.shared import Copies, version_of


def test_the_same_copy_while_it_is_alive():
    copies, source, rows = Copies(), torch.arange(6).view(3, 2), torch.tensor([2, 0])
    made = copies.of(source, rows, lambda: source.index_select(0, rows))
    assert copies.of(source.view(3, 2), rows, lambda: source.index_select(0, rows)) is made  # the same memory
    assert copies.of(source, rows.clone(), lambda: source.index_select(0, rows)) is not made
    assert copies.of(source.clone(), rows, lambda: source.index_select(0, rows)) is not made
    rows.copy_(torch.tensor([1, 1]))
    assert torch.equal(copies.of(source, rows, lambda: source.index_select(0, rows)), source[[1, 1]])


def test_nothing_is_kept_alive_or_found_again():
    copies, source = Copies(), torch.arange(6)
    made = copies.of(source, "twice", lambda: source * 2)
    assert copies.of(source, "twice", lambda: source * 3) is made
    del made
    gc.collect()
    assert not copies._known
    assert torch.equal(copies.of(source, "twice", lambda: source * 3), source * 3)


def test_inference_tensors_are_told_apart_by_what_they_hold():
    with torch.inference_mode():
        rows = torch.tensor([1, 0])
        before = version_of(rows)
        rows[0] = 0
        assert version_of(rows) != before
    plain = torch.zeros(1)
    before = version_of(plain)
    plain += 1
    assert version_of(plain) != before
