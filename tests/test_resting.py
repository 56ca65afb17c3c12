"""Resting tokens go through every operation whole."""

from dataclasses import replace

import torch

from attnpack_fx.resting import Resting
from attnpack_fx.selecting import select
from tests.layer_inputs import mirrored, saved
from tests.stored_inputs import Way
from tests.test_selecting import Some, everything


def resting(bits: int = 0) -> Resting:
    random = torch.Generator().manual_seed(0)
    coefficient = torch.randn((2, 3, 4), generator=random)
    if bits:
        coefficient = (coefficient * 9).to(torch.uint8)
    return Resting(
        (coefficient,),
        torch.randn((2, 2, 1, 8), generator=random),
        torch.tensor([[4, 2, 9, 11, -1], [3, -1, 5, 7, 8]]),
        (3, 2),
        torch.arange(6).view(2, 1, 3),
        torch.rand((2, 5), generator=random),
        6,
        (torch.rand((2, 2, 8), generator=random), torch.rand((2, 2, 8), generator=random)),
    )


def test_samples_are_chosen_in_every_tensor():
    whole, rows = resting(), torch.tensor([1, 1, 0])
    chosen = whole.select(rows)
    assert torch.equal(chosen.coefficients[0], whole.coefficients[0][rows])
    assert torch.equal(chosen.tail, whole.tail[:, rows])
    for name in ("index", "axes", "importance"):
        assert torch.equal(getattr(chosen, name), getattr(whole, name)[rows])
    assert all(torch.equal(new, old[rows]) for new, old in zip(chosen.turns, whole.turns, strict=True))
    assert (chosen.counts, chosen.started) == (whole.counts, whole.started)


def test_numbers_are_mapped_and_codes_are_not():
    half = resting().map(lambda each: each.to(torch.bfloat16))
    assert half.coefficients[0].dtype == half.tail.dtype == torch.bfloat16
    assert half.index.dtype == torch.int64 and half.importance.dtype == half.turns[0].dtype == torch.float32
    codes = resting(bits=8)
    assert torch.equal(codes.map(lambda each: each + 1).coefficients[0], codes.coefficients[0])
    moved = resting().map(lambda each: each.to("meta"), torch.device("meta"))
    assert {each.device.type for each in moved.tensors} == {"meta"}


def test_what_a_crop_drops_is_filler():
    cropped = resting().crop(8)
    assert cropped.index.tolist() == [[4, 2, -1, -1, -1], [3, -1, 5, 7, -1]]


def test_every_tensor_is_counted():
    whole = resting()
    assert len(whole.tensors) == 7 and sum(each.numel() for each in whole.tensors) == 24 + 32 + 10 + 6 + 10 + 2 * 32
    bare = replace(whole, axes=None, importance=None, turns=None)
    assert len(bare.tensors) == 3
    assert bare.select(torch.tensor([0])).turns is None


def test_through_a_file():
    mirror = mirrored(Way(angles="rows", padding=1), factors=False, angles=True)
    select(mirror.layer, Some())
    assert mirror.layer.key.held.resting.turns is not None and mirror.layer.value.held.resting.turns is None
    before = everything(mirror)
    mirror.map(saved)
    mirror.follow()
    after = everything(mirror)
    after.check()
    assert torch.equal(after.layer.key.dense(), before.layer.key.dense())
    assert torch.equal(after.layer.key.importance, before.layer.key.importance)
