"""Rotary embedding of packed keys, judged by the dense keys they then stand for."""

import dataclasses
import io

import pytest
import torch

from attnpack_fx.angles import SharedAngles
from attnpack_fx.containers import restored, saved
from attnpack_fx.kernels.rotary import per_slot
from tests.packing_inputs import assert_stands_for
from tests.stored_inputs import DIM, Pair, Way, rotary, stored_pair

WAYS = {
    "rows": Way(angles="rows"),
    "rows, interleaved": Way(angles="rows", interleaved=True),
    "rows of each sample": Way(angles="rows", padding=3),
    "rows of vision and text": Way(angles="rows", packed_text=True),
    "tables": Way(angles="tables", vision=36),
    "tables, interleaved": Way(angles="tables", vision=36, interleaved=True),
    "tables of each sample": Way(angles="tables", vision=36, padding=3),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def angles_of(pair: Pair) -> SharedAngles:
    assert pair.key.held.angles is not None
    return pair.key.held.angles


@every_way
def test_keys_before_rotary_embedding_stand_for_those_after_it(way):
    pair = stored_pair(way)
    assert_stands_for(pair.key, pair.dense_key)
    angles = angles_of(pair)
    assert (angles.packed.axes is not None) == (way.angles == "tables")
    assert angles.packed.cos.shape[0] == (way.batch if way.padding else 1)
    if way.angles == "tables":
        assert angles.packed.cos.shape[1] <= 36 // 2
    unrotated = dataclasses.replace(pair.key.held, angles=None)
    assert not torch.allclose(type(pair.key)(unrotated, pair.key.lease).dense(), pair.dense_key, atol=0.1)


@every_way
def test_the_tail_keeps_its_angles(way):
    pair = stored_pair(way)
    for count in (1, 3, 2):
        pair.append(count)
    cos, sin = angles_of(pair).tail_rows()
    expected = rotary(way, pair.dense_key.shape[2])
    # Tail rows: the text that is not packed, filler aside, then what was appended.
    for found, wanted in zip((cos, sin), expected, strict=True):
        assert found.shape[1] == pair.key.lease.length
        torch.testing.assert_close(found[-1, -6:].double(), wanted[-1, -6:], atol=1e-6, rtol=0)
        if not way.packed_text:
            kept = pair.key.index[-1, pair.key.held.packed :]
            torch.testing.assert_close(found[-1, :-6].double(), wanted[-1, kept], atol=1e-6, rtol=0)


@every_way
def test_operations_on_the_batch(way):
    pair = stored_pair(way)
    pair.append(2)
    for rows in ([1], [0], [1, 0, 1]):
        chosen = torch.tensor(rows)
        selected = pair.key.index_select(0, chosen)
        assert_stands_for(selected, pair.dense_key[chosen])
        # What the samples share stays one row.
        assert (selected.held.angles.packed.cos.shape[0] == 1) == (not way.padding or len(rows) == 1)
        assert selected.held.angles.tail_rows()[0].shape[1] == pair.key.lease.length


@every_way
def test_crop(way):
    pair = stored_pair(way)
    pair.append(4)
    for tokens in (way.tokens + 3, way.tokens, way.tokens - 1, way.padding + 5):
        cropped = pair.key[..., :tokens, :]
        assert_stands_for(cropped, pair.dense_key[:, :, :tokens])
        assert cropped.held.angles.tail_rows()[0].shape[1] == cropped.lease.length


@every_way
def test_state_round_trip(way):
    pair = stored_pair(way)
    pair.append(2)
    file = io.BytesIO()
    torch.save(saved(angles_of(pair)), file)
    file.seek(0)
    loaded = restored(torch.load(file, weights_only=True))
    assert_stands_for(pair.key.turned(loaded), pair.dense_key)
    assert all(map(torch.equal, loaded.tail_rows(), angles_of(pair).tail_rows()))


def test_without_a_tail():
    angles = dataclasses.replace(angles_of(stored_pair(Way(angles="rows"))), tail=None)
    new = torch.ones(1, 1, DIM)
    assert angles.appended(new, new) is angles and angles.cropped(1) is angles
    assert restored(saved(angles)).tail is None
    assert angles.select(torch.tensor([0])).tail is None


@every_way
def test_join(way):
    other = dataclasses.replace(way, seed=5, padding=1)
    pairs = [stored_pair(dataclasses.replace(way, text=way.text + 1)), stored_pair(other)]
    if way.padding:
        pairs[0] = stored_pair(way)
        pairs[1] = stored_pair(dataclasses.replace(way, seed=5))
    joined = torch.cat([pair.key for pair in pairs])
    assert_stands_for(joined, torch.cat([pair.dense_key for pair in pairs]))
    assert_stands_for(joined[1:3], torch.cat([pair.dense_key for pair in pairs])[1:3])


@every_way
def test_to_another_device_and_back(way):
    angles = angles_of(stored_pair(way))
    assert angles.to(torch.device("cpu")) is angles
    moved = angles.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    assert angles.to(torch.device("meta")) is moved


@every_way
@pytest.mark.parametrize("whole", [True, False])
def test_reordered(way, whole):
    angles = angles_of(stored_pair(way))
    slots = way.vision if whole else 4
    order = torch.stack([torch.randperm(way.vision)[:slots] for _ in range(way.batch)])
    chosen = angles.reordered(order)
    assert chosen.tail is angles.tail
    before = per_slot(angles.packed, 0, way.vision)
    after = per_slot(chosen.packed, 0, slots)
    for old, new in zip(before, after, strict=True):
        expected = old.expand(way.batch, -1, -1).gather(1, order[:, :, None].expand(-1, -1, DIM // 2))
        assert torch.equal(new.expand(way.batch, -1, -1), expected)


@every_way
def test_folded_rows_come_behind_the_packed_ones(way):
    pair = stored_pair(way)
    pair.append(6)
    angles = angles_of(pair)
    cos, sin = angles.tail_rows()
    packed = pair.key.held.packed
    for count in (1, 4):
        folded = angles.folded(count)
        old = per_slot(angles.packed, 0, packed)
        new = per_slot(folded.packed, 0, packed + count)
        for before, after, tail in zip(old, new, (cos, sin), strict=True):
            assert torch.equal(after[:, :packed], before.expand(after.shape[0], -1, -1))
            assert torch.equal(after[:, packed:], tail[:, :count].expand(after.shape[0], -1, -1))
        assert torch.equal(folded.tail_rows()[0], cos[:, count:])
    # Again, onto what is folded.
    twice, once = angles.folded(2).folded(3), angles.folded(5)
    rows = [per_slot(each.packed, 0, packed + 5) for each in (twice, once)]
    assert all(map(torch.equal, *rows))


@pytest.mark.parametrize(
    "derive",
    [
        lambda angles, given: angles.select(given),
        lambda angles, given: angles.appended(given, given),
        lambda angles, given: angles.folded(2),
        lambda angles, given: angles.cropped(2),
    ],
)
def test_layers_share_what_is_derived(derive):
    angles, given = angles_of(stored_pair(Way(angles="rows"))), torch.tensor([1, 0])
    if "appended" in derive.__code__.co_names:
        given = torch.ones(1, 1, DIM)
    assert derive(angles, given) is derive(angles, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_angles_of_any_dtype(dtype):
    cos, sin = (each.to(dtype) for each in rotary(Way(angles="tables", vision=36), 41))
    angles = SharedAngles.of_prompt(cos, sin, torch.arange(2, 38)[None], 36, False, keep_tail=False)
    assert angles.tail is None and angles.packed.cos.dtype == dtype
    found = per_slot(angles.packed, 0, 36)
    assert torch.equal(found[0], cos[:, 2:38]) and torch.equal(found[1], sin[:, 2:38])


def test_tokens_appended_without_their_angles_are_never_folded_with_those_of_others():
    pair = stored_pair(Way(angles="rows"))
    grown = torch.cat([pair.key, torch.randn(2, 2, 3, DIM)], dim=2)
    assert grown.held.angles.tail is None
    # The rows before them, and other handles, keep theirs.
    assert angles_of(pair).tail is not None
    assert_stands_for(grown[..., :-3, :], pair.dense_key)


@pytest.mark.parametrize("folded", [0, 2])
def test_samples_with_the_same_angles_share_one_copy(folded):
    """M-RoPE gives every sample rows of its own, also where all prompts are laid out alike."""
    generator = torch.Generator().manual_seed(0)
    cos, sin = (torch.rand(1, 9, 8, generator=generator) for _ in range(2))
    index = torch.arange(9).repeat(3, 1)
    one = SharedAngles.of_prompt(cos, sin, index, 6, False, keep_tail=True)
    own = SharedAngles.of_prompt(*(each.repeat(3, 1, 1) for each in (cos, sin)), index, 6, False, keep_tail=True)
    for each in (one, own):
        found = each.folded(folded) if folded else each
        assert found.packed.cos.shape[0] == found.packed.sin.shape[0] == 1
        for rows, expected in zip((found.packed.cos, found.packed.sin), (cos, sin), strict=True):
            torch.testing.assert_close(rows[0], expected[0, : 6 + folded])
    other = torch.cat([cos, cos, cos + 1])
    apart = SharedAngles.of_prompt(other, sin.repeat(3, 1, 1), index, 6, False, keep_tail=True)
    assert apart.packed.cos.shape[0] == 3 and torch.equal(apart.packed.cos, other[:, :6])
