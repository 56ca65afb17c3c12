"""A placement says where tokens are, shared by every layer packed alike."""

import weakref

import torch

from attnpack_fx.placement import Placement

CPU = torch.device("cpu")
INDEX = torch.tensor([[2, 3, 0, 1], [4, -1, 0, 2]])
SLOT = torch.tensor([[2, 3, 0, 1, -1], [2, -1, 3, -1, 0]])


def placement() -> Placement:
    return Placement(INDEX, 5, ragged=True)


def test_segments_and_dense_tokens_stand_in_slot_order():
    made = Placement.from_plan([INDEX[:, :2], INDEX[:, 2:]], SLOT)
    assert torch.equal(made.index, INDEX)
    assert torch.equal(made.slot, SLOT)
    assert made.ragged


def test_a_plan_of_one_part_is_not_copied():
    made = Placement.from_plan([INDEX[:1]], SLOT[:1])
    assert made.index.data_ptr() == INDEX.data_ptr()
    assert not made.ragged


def test_a_plan_without_prompt_tokens_is_not_ragged():
    assert not Placement.from_plan([INDEX[:, :0]], SLOT[:, :0]).ragged


def test_selecting_samples():
    selected = placement().select(torch.tensor([1, 1, 0]))
    assert torch.equal(selected.index, INDEX[[1, 1, 0]])
    assert torch.equal(selected.slot, SLOT[[1, 1, 0]])


def test_cropping_forgets_later_tokens_and_keeps_slot_numbers():
    cropped = placement().crop(2)
    assert cropped.index.tolist() == [[-1, -1, 0, 1], [-1, -1, 0, -1]]
    assert cropped.slot.tolist() == [[2, 3], [2, -1]] and cropped.tokens == 2
    assert cropped.ragged


def test_the_same_derivation_is_the_same_object_while_somebody_holds_it():
    shared, rows = placement(), torch.tensor([1, 0])
    selected, cropped = shared.select(rows), shared.crop(3)
    assert shared.select(rows) is selected
    assert shared.crop(3) is cropped
    assert shared.to(CPU) is shared
    gone = weakref.ref(selected.index)
    del selected
    assert gone() is None


def test_another_derivation_is_another_object():
    shared, rows = placement(), torch.tensor([1, 0])
    first = shared.select(rows)
    assert shared.select(rows.clone()) is not first
    assert shared.crop(3) is not shared.crop(2)
    rows.copy_(torch.tensor([0, 0]))
    assert torch.equal(shared.select(rows).index, INDEX[[0, 0]])


def test_moving_keeps_the_object_shared():
    shared, meta = placement(), torch.device("meta")
    moved = shared.to(meta)
    assert moved.index.device == meta
    assert moved.ragged
    assert shared.to(meta) is moved


def test_placements_are_compared_by_content():
    shared = placement()
    assert shared.same_as(shared)
    assert shared.same_as(Placement(INDEX.clone(), 5, True))
    assert not shared.same_as(Placement(INDEX.flip(0), 5, True))
    assert not shared.same_as(Placement(INDEX, 6, True))
    assert not shared.same_as(shared.crop(3))
    assert not shared.same_as(shared.select(torch.tensor([0])))
