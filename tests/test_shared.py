"""What is derived, and copies of one tensor, stay one for as long as somebody holds them, and no longer."""

import gc
import weakref

import pytest
import torch

from attnpack_fx.shared import Alike, Copies, Memo, lasting, made_of, version_of
from tests.live_storages import live_storages


def zeros() -> torch.Tensor:
    return torch.zeros(1)


def test_a_memo_finds_what_somebody_holds_and_keeps_nothing():
    memo, argument = Memo(), torch.zeros(2)
    made = memo.derive("made", (argument, 3), zeros)
    assert memo.derive("made", (argument, 3), zeros) is made
    assert memo.derive("made", (argument, 3), zeros) is made
    assert not live_storages(memo)
    gone = weakref.ref(made), weakref.ref(argument)
    del made, argument
    assert gone[0]() is None and gone[1]() is None


@pytest.mark.parametrize("other", [(torch.zeros(2), 3), (3,), (torch.zeros(2), (4, 5)), ()])
def test_other_arguments_derive_anew(other):
    memo, argument = Memo(), torch.zeros(2)
    made = memo.derive("made", (argument, 3), zeros)
    assert memo.derive("made", other, zeros) is not made
    assert memo.derive("other", (argument, 3), zeros) is not made


def test_an_argument_that_is_gone_is_no_other():
    """Python gives its id to the next object."""
    memo = Memo()
    made = memo.derive("made", (torch.zeros(2),), zeros)
    assert all(memo.derive("made", (torch.zeros(2),), zeros) is not made for _ in range(10))


def test_plain_results_are_kept():
    memo, argument = Memo(), torch.zeros(2)
    assert memo.derive("same", (argument,), lambda: False) is False
    assert memo.derive("same", (argument,), lambda: True) is False


def test_what_is_derived_lasts_for_a_call():
    memo = Memo()
    with lasting():
        first = weakref.ref(memo.derive("made", (), zeros))
        assert memo.derive("made", (), zeros) is first()
    assert first() is None


def test_what_layers_select_by_lives_as_long_as_what_it_is_made_of():
    rows = torch.tensor([1, 0])
    made = weakref.ref(made_of(rows, "twice", lambda: rows * 2))
    assert made_of(rows, "twice", lambda: rows * 3) is made()
    assert torch.equal(made_of(rows, "thrice", lambda: rows * 3), rows * 3)
    rows += 1
    assert torch.equal(made_of(rows, "twice", lambda: rows * 2), rows * 2)


def test_nothing_that_was_selected_by_is_kept():
    rows = torch.tensor([1, 0])
    gone = weakref.ref(rows), weakref.ref(made_of(rows, "zero", zeros))
    del rows
    assert gone[0]() is None and gone[1]() is None


class Number:
    def __init__(self, number: int) -> None:
        self.number = number

    def same_as(self, other: "Number") -> bool:
        return self.number == other.number


def test_the_first_of_those_alike_stands_for_all_of_its_call():
    alike = Alike()
    first = alike.one(Number(1))
    assert alike.one(Number(1)) is first and alike.one(Number(2)) is not first
    assert Alike().one(Number(1)) is not first
    gone = weakref.ref(first)
    del first
    assert gone() is None


def test_what_earlier_graphs_have_made_is_told_apart():
    alike = Alike()
    first = alike.one(Number(1))
    assert alike.one(Number(1), earlier=True) is not first  # both are of this graph
    alike.next_graph()
    assert alike.one(Number(1), earlier=True) is first


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
