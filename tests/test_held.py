"""The packed part of keys and values: what every operation on it must keep, judged by the dense meaning."""

import dataclasses
import io

import pytest
import torch

from attnpack_fx import PackedTensor, Partial
from attnpack_fx.containers import restored, saved
from attnpack_fx.held import Loss, fake_parts, stacked
from attnpack_fx.kernels.parts import Segment, formats
from tests.packing_inputs import assert_stands_for
from tests.stored_inputs import Way, grouped, stored_pair

WAYS = {
    "as attended": Way(packed_text=True, padding=2),
    "before rotary embedding": Way(angles="rows", padding=2),
    "rotary axes": Way(angles="tables", vision=36, packed_text=True),
    "8 bits": Way(bits=8, packed_text=True),
    "4 bits, before rotary embedding": Way(bits=4, angles="rows", padding=1),
    "2 bits": Way(bits=2, padding=1),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@every_way
def test_counts_and_sizes(way):
    held = stored_pair(way).key.held
    assert held.modalities == (("vision", "text") if way.packed_text else ("vision",))
    text = way.text + way.padding  # of the sample without padding
    assert held.packed == sum(held.counts) == way.vision + (text if way.packed_text else 0)
    assert held.kept == (0 if way.packed_text else text)
    plain, weighed = held.forms
    assert weighed == dataclasses.replace(plain, weighed=True) and not plain.weighed
    assert plain.ragged == bool(way.padding)
    stored = [[formats(kind) for kind in kinds] for kinds in plain.kinds]
    assert stored == [[(way.bits, way.bits)]] * len(held.modalities)


@every_way
def test_fakes_have_the_shapes_of_the_parts(way):
    pair = stored_pair(way)
    for packed in (pair.key, pair.value, pair.key.index_select(0, torch.tensor([1]))):
        held = packed.held
        segments, index, tokens, angles = fake_parts(held.forms[0], packed.lease.buffer.rows, held.sizes)
        fake = dataclasses.replace(
            packed.held,
            segments=segments,
            placement=dataclasses.replace(packed.placement, index=index, tokens=tokens),
            angles=None if angles is None else dataclasses.replace(held.angles, packed=angles),
        )
        described = [{name: (each.shape, each.dtype) for name, each in one.named.items()} for one in (fake, held)]
        assert described[0] == described[1]


def test_fakes_of_shared_bases_and_several_blocks():
    held = grouped(Way(), Partial(keys=True)).key.held
    (segment,) = held.segments
    first = dataclasses.replace(segment.blocks[0], basis=segment.blocks[0].basis[:1])
    held = dataclasses.replace(held, segments=(Segment((first, *segment.blocks[1:])),))
    assert held.forms[0].shared == ((True, False),)
    segments, *_ = fake_parts(held.forms[0], torch.empty(0, 2, 2, 8), held.sizes)
    assert [block.basis.shape[0] for block in segments[0].blocks] == [1, 2]
    assert [block.coefficient.shape for block in segments[0].blocks] == [b.coefficient.shape for b in held.blocks]
    chosen = held.select(torch.tensor([1, 1, 0]))
    assert chosen.blocks[0].basis is first.basis and chosen.blocks[1].basis.shape[0] == 3


@every_way
def test_select(way):
    pair = stored_pair(way)
    before, rows = pair.key.dense(), torch.tensor([1, 0, 1])
    held = pair.key.held.select(rows)
    chosen = PackedTensor(held, pair.key.samples(rows).lease)
    torch.testing.assert_close(chosen.dense(), before[rows])
    for name, loss in held.losses:
        old = dict(pair.key.held.losses)[name]
        assert torch.equal(loss.squares, old.squares[rows]) and torch.equal(loss.bound, old.bound[rows])


@every_way
def test_map_to_another_dtype_keeps_codes_and_places(way):
    pair = stored_pair(way)
    half = pair.key.to(torch.bfloat16)
    assert_stands_for(half.float(), half.dense().float(), tolerance=0.1)
    torch.testing.assert_close(half.dense().float(), pair.key.dense(), atol=0.15, rtol=0.05)
    for block, old in zip(half.held.blocks, pair.key.held.blocks, strict=True):
        assert block.coefficient.dtype == (torch.uint8 if way.bits else torch.bfloat16)
        assert not way.bits or torch.equal(block.scale, old.scale)
    assert half.placement is pair.key.placement


@every_way
def test_state_round_trip(way):
    pair = stored_pair(way)
    file = io.BytesIO()
    torch.save(saved(dataclasses.replace(pair.key.held, closed=True)), file)
    file.seek(0)
    held = restored(torch.load(file, weights_only=True))
    torch.testing.assert_close(PackedTensor(held, pair.key.lease).dense(), pair.key.dense())
    assert held.closed and held.forms == pair.key.held.forms and held.modalities == pair.key.held.modalities
    for (name, loss), (old_name, old) in zip(held.losses, pair.key.held.losses, strict=True):
        assert name == old_name and torch.equal(loss.squares, old.squares) and torch.equal(loss.bound, old.bound)


def test_what_is_in_reserve_goes_along():
    pair = grouped(Way(padding=1), Partial())
    held = pair.value.held
    assert [each.shape[1] for each in held.reserve] == [0, 7]
    assert [each.shape[0] for each in held.select(torch.tensor([0, 1, 1])).reserve] == [3, 3]
    assert {each.dtype for each in held.map(lambda each: each.to(torch.bfloat16)).reserve} == {torch.bfloat16}
    again = restored(saved(held)).reserve
    assert all(map(torch.equal, again, held.reserve))
    assert all(any(each is kept for each in held.tensors) for kept in held.reserve)


@pytest.mark.parametrize("way", [Way(), Way(packed_text=True), Way(angles="rows")], ids=["vision", "both", "rotary"])
def test_join(way):
    ways = [way, dataclasses.replace(way, seed=3, text=6, vision=8), dataclasses.replace(way, seed=4, batch=1)]
    pairs = [stored_pair(each) for each in ways]
    held = pairs[0].key.held.join([pair.key.held for pair in pairs[1:]])
    assert held is not None and held.counts[0] == 9
    assert_stands_for(torch.cat([pair.key for pair in pairs]), torch.cat([pair.dense_key for pair in pairs]))


def test_joined_samples_keep_their_losses():
    """Without them a later fold would state a bound that leaves out what was dropped before."""
    pairs = [stored_pair(Way(packed_text=True, rank=3, seed=seed)) for seed in (0, 1)]
    first, second = (pair.key.held for pair in pairs)
    joined = first.join([second])
    assert joined is not None and not joined.closed
    for name, loss in joined.losses:
        alike = dict(first.losses)[name], dict(second.losses)[name]
        assert torch.equal(loss.bound, torch.cat([each.bound for each in alike]))
        assert torch.equal(loss.squares, torch.cat([each.squares for each in alike]))
    assert [name for name, _ in joined.losses] == ["vision", "text"]
    closed = first.join([dataclasses.replace(second, closed=True)])
    assert closed is not None and closed.closed


def test_losses_that_only_some_samples_have_are_not_known():
    first, second = (stored_pair(Way(packed_text=True, seed=seed)).key.held for seed in (0, 1))
    joined = first.join([dataclasses.replace(second, losses=second.losses[:1])])
    assert joined is not None and [name for name, _ in joined.losses] == ["vision"]


@pytest.mark.parametrize("other", ["bits", "blocks", "rotation", "segments"])
def test_what_is_stored_otherwise_does_not_join(other):
    plain = stored_pair(Way())
    held = {
        "bits": lambda: stored_pair(Way(bits=8)).value.held,
        "blocks": lambda: grouped(Way(), Partial()).value.held,
        "rotation": lambda: stored_pair(Way(angles="rows")).key.held,
        "segments": lambda: stored_pair(Way(packed_text=True)).value.held,
    }[other]()
    assert plain.value.held.join([held]) is None and held.join([plain.value.held]) is None


def test_relative_loss_is_that_of_the_worst_sample():
    loss = Loss(torch.tensor([4.0, 9.0, 0.0]).double(), torch.tensor([1.0, 0.3, 0.0]).double())
    assert loss.relative == 0.5
    assert Loss(torch.empty(0).double(), torch.empty(0).double()).relative == 0.0


def test_stacked_fills_up_by_zeros():
    out = stacked([torch.ones(1, 2, 3), torch.ones(2, 4, 1)])
    assert out.shape == (3, 4, 3)
    assert out[0].sum() == 6 and out[1:].sum() == 8 and out[0, 2:].eq(0).all() and out[1:, :, 1:].eq(0).all()
