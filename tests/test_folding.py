"""Folds of the dense tail into the packed text: what they lose is bounded, and nothing else changes."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from attnpack_fx import Columns, PackedTensor, PackPolicy, Stored, cache_bytes
from attnpack_fx.folding import due, fold
from attnpack_fx.held import Loss
from tests.decoder import IMAGE, Cache, Decoder, close, next_ids, prompt
from tests.packing_inputs import assert_stands_for
from tests.stored_inputs import HEADS, WIDTH, Pair, Way, stored_pair

#: Rounding of fp32, and of the loss at prefill, which is a difference of squares.
ROUNDING = 1e-3


def stored(rank: int) -> Stored:
    return Stored(Columns(((rank, 0),)), Columns(((rank, 0),)))


def text_loss(packed: PackedTensor) -> Loss:
    return dict(packed.held.losses)["text"]


def folded(pair: Pair, count: int, rank: int, most: float | None = None) -> None:
    pair.key, pair.value = fold(pair.key, pair.value, count, stored(rank), most)


def check(pair: Pair) -> None:
    """Every token is where it was; text is as far from the exact rows as the bound says, at most."""
    text = pair.is_text
    for packed, dense in ((pair.key, pair.dense_key), (pair.value, pair.dense_value)):
        out, appended = packed.dense(), packed.lease.length - packed.held.kept
        assert out.shape == dense.shape
        assert torch.equal(out[:, :, out.shape[2] - appended :], dense[:, :, out.shape[2] - appended :])
        if pair.way.rank >= WIDTH:
            torch.testing.assert_close(out[:, :, ~text], dense[:, :, ~text], atol=1e-4, rtol=1e-4)
        if "text" not in packed.modalities:
            torch.testing.assert_close(out[:, :, text], dense[:, :, text])
            continue
        error = (out - dense)[:, :, text].double().square().sum((1, 2, 3)).sqrt() / pair.way.scale
        loss = text_loss(packed)
        assert (error <= loss.bound + ROUNDING * loss.squares.sqrt()).all(), (error, loss)
        # The squares are those of all that is packed.
        packed_text = text.clone()
        packed_text[out.shape[2] - appended :] = False
        kept = packed.index[:, packed.held.packed :]
        if packed.held.kept:
            assert not pair.way.packed_text
        total = dense[:, :, packed_text].double().square().sum((1, 2, 3))
        for sample, row in enumerate(kept.tolist()):
            total[sample] -= dense[sample, :, [place for place in row if place >= 0]].double().square().sum()
        scale = pair.way.scale**2 if packed is pair.key and pair.way.angles != "none" else 1.0
        torch.testing.assert_close(loss.squares, total / scale, rtol=1e-4, atol=1e-4)


WAYS = st.builds(
    Way,
    seed=st.integers(0, 2**16),
    batch=st.integers(2, 3),
    vision=st.sampled_from([0, 36]),
    text=st.integers(2, 9),
    packed_text=st.booleans(),
    padding=st.integers(0, 2),
    angles=st.sampled_from(["none", "rows", "tables"]),
    interleaved=st.booleans(),
    decay=st.sampled_from([0.4, 0.7, 1.0]),
)


@given(
    way=WAYS,
    rank=st.integers(1, WIDTH),
    steps=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 12)), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_folds_stays_within_its_bound(way, rank, steps):
    pair = stored_pair(dataclasses.replace(way, rank=rank if way.packed_text else WIDTH))
    bounds = {"key": 0.0, "value": 0.0}
    for appended, count in steps:
        pair.append(appended) if appended else None
        folded(pair, min(count, pair.key.lease.length), rank)
        check(pair)
        for name, before in bounds.items():
            packed = getattr(pair, name)
            assert "text" in packed.modalities and packed.ranks["text"] <= rank and not packed.held.closed
            bounds[name] = float(text_loss(packed).bound.min())
            assert bounds[name] >= before
    assert pair.key.placement.same_as(pair.value.placement)


@pytest.mark.parametrize("packed_text", [True, False])
@pytest.mark.parametrize("angles", ["none", "rows", "tables"])
def test_two_thousand_tokens_at_full_rank(angles, packed_text):
    pair = stored_pair(Way(angles=angles, vision=36, packed_text=packed_text, padding=2))
    for _ in range(125):
        pair.append(16)
        folded(pair, 16, WIDTH)
    check(pair)
    for packed, dense in ((pair.key, pair.dense_key), (pair.value, pair.dense_value)):
        assert packed.shape[2] == pair.way.tokens + 2000
        assert_stands_for(packed, dense, tolerance=2e-4)
        assert text_loss(packed).relative < ROUNDING


@pytest.mark.parametrize("angles", ["rows", "tables"])
def test_attention_scaled_by_rotary_embedding(angles):
    pair = stored_pair(Way(angles=angles, vision=36, scale=1.3))
    for _ in range(3):
        pair.append(4)
        folded(pair, 4, WIDTH)
    check(pair)
    assert_stands_for(pair.key, pair.dense_key, tolerance=1e-4)


def test_due():
    policy = PackPolicy(text_rank=4, fold_every=8, recent=4)
    pair = stored_pair(Way())
    counts = []
    for _ in range(4):
        counts.append((pair.key.lease.length, due(pair.key, policy)))
        pair.append(5)
    assert counts == [(5, 0), (10, 0), (15, 8), (20, 16)]
    assert due(pair.key, PackPolicy()) == 0
    closed = PackedTensor(dataclasses.replace(pair.key.held, closed=True), pair.key.lease)
    assert due(closed, policy) == 0


@pytest.mark.parametrize("angles", ["none", "rows"])
def test_the_bound_stops_folds_and_nothing_is_lost(angles):
    pair = stored_pair(Way(packed_text=True, angles=angles, rank=6))
    most, folds = text_loss(pair.key).relative + 0.4, 0
    while not pair.key.held.closed:
        pair.append(3)
        before = pair.key.dense(), pair.value.dense()
        folded(pair, 3, 6, most)
        folds += 1
    assert folds > 1 and pair.value.held.closed
    assert torch.equal(pair.key.dense(), before[0]) and torch.equal(pair.value.dense(), before[1])
    assert max(text_loss(pair.key).relative, text_loss(pair.value).relative) <= most
    policy = PackPolicy(text_rank=6, fold_every=1, recent=0)
    for _ in range(4):
        pair.append(2)
        assert due(pair.key, policy) == due(pair.value, policy) == 0
    check(pair)


def test_a_fold_that_only_the_values_would_break_leaves_keys_as_they_are():
    pair = stored_pair(Way(packed_text=True))
    pair.append(20)
    pair.key, pair.value = fold(pair.key, pair.value, 20, Stored(stored(WIDTH).key, stored(2).value), 0.1)
    assert pair.key.held.closed and pair.value.held.closed and pair.key.lease.length == 20
    check(pair)


def test_of_text_packed_without_a_loss_no_bound_is_known():
    pair = stored_pair(Way(packed_text=True))
    pair.append(3)
    for name in ("key", "value"):
        packed = getattr(pair, name)
        setattr(pair, name, PackedTensor(dataclasses.replace(packed.held, losses=()), packed.lease))
    key, _ = fold(pair.key, pair.value, 3, stored(4), None)
    assert text_loss(key).bound.isposinf().all() and key.lease.length == 0
    folded(pair, 3, 4, most=10.0)
    assert pair.key.held.closed and pair.key.lease.length == 3


def test_rows_of_unknown_angles_are_not_folded():
    pair = stored_pair(Way(angles="rows"))
    new = torch.randn(2, HEADS, 3, WIDTH // HEADS)
    pair.key, pair.value = (torch.cat([packed, new], 2) for packed in (pair.key, pair.value))
    before = pair.key.dense()
    folded(pair, 3, WIDTH)
    assert pair.key.held.closed and pair.value.held.closed and torch.equal(pair.key.dense(), before)


@pytest.mark.parametrize("angles", ["none", "rows"])
def test_what_a_crop_left_behind_is_not_folded(angles):
    pair = stored_pair(Way(angles=angles, text=8))
    tokens = pair.way.tokens - 3
    for name in ("key", "value"):
        setattr(pair, name, getattr(pair, name)[..., :tokens, :])
        setattr(pair, f"dense_{name}", getattr(pair, f"dense_{name}")[:, :, :tokens])
    folded(pair, 8, 5)
    assert_stands_for(pair.key, pair.dense_key, tolerance=1e-4)
    # Five tokens in five columns: nothing is dropped.
    assert text_loss(pair.key).relative < ROUNDING
    total = pair.dense_key[:, :, pair.is_text[:tokens]].double().square().sum((1, 2, 3))
    torch.testing.assert_close(text_loss(pair.key).squares, total)


def test_forks_and_batches_of_folded_caches():
    pair = stored_pair(Way(angles="tables", vision=36, padding=1))
    pair.append(6)
    left, right = dataclasses.replace(pair), dataclasses.replace(pair)
    folded(left, 4, WIDTH)
    left.append(2)
    folded(right, 9, WIDTH)
    for each in (pair, left, right):
        assert_stands_for(each.key, each.dense_key, tolerance=1e-4)
        assert_stands_for(each.key[1:], each.dense_key[1:], tolerance=1e-4)
    joined = torch.cat([left.value, left.value.index_select(0, torch.tensor([1]))])
    assert_stands_for(joined, torch.cat([left.dense_value, left.dense_value[1:]]), tolerance=1e-4)
    key, value = fold(joined, joined, 3, stored(WIDTH), 0.01)
    assert_stands_for(key, joined.dense(), tolerance=1e-4)
    assert text_loss(value).bound.shape == (3,)


# ---- compiled ------------------------------------------------------------------------------------------------------

OPTIONS = {"vision_rank": "full", "text_rank": "full", "fold_every": 16, "recent": 32, "strict": True}


def compiled(model: Decoder, **options: Any) -> Any:
    return torch.compile(model, backend="attnpack", options=OPTIONS | options)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def follow(model: Decoder, step: Any, ids: Tensor, features: Tensor, tokens: int) -> tuple[Cache, list[int], list[int]]:
    """Decode greedily beside the dense model; the packed cache, how many graphs and folded tokens after each step."""
    expected, dense = model(ids, features)
    logits, cache = step(ids, features)
    made, packed = [], []
    for _ in range(tokens):
        new = expected[:, -1:].argmax(-1)
        assert torch.equal(new, logits[:, -1:].argmax(-1))
        expected, dense = model(new, cache=dense)
        logits, cache = step(new, cache=cache)
        close(logits, expected, 1e-3)
        made.append(graphs())
        packed.append(cache[0][0].tokens.get("text", 0))
    return cache, made, packed


@pytest.mark.parametrize("text", [6, 0], ids=["text in the prompt", "vision alone"])
def test_folds_make_no_graphs(text, either_way):
    model, width = Decoder(layers=2), 24
    ids, features = prompt(text=6, vision=10)
    if not text:
        ids, features = torch.full((1, 10), IMAGE), torch.randn(10, width, generator=torch.Generator().manual_seed(0))
    counters.clear()
    cache, made, packed = follow(model, compiled(model), ids, features, 150)
    first = next(step for step, count in enumerate(packed) if count > text)
    assert first == 47 and packed[-1] == text + 16 * ((150 - 32) // 16)
    # A segment of text is new where the prompt had none.
    assert made[-1] - made[first] <= (0 if text else 1)
    assert made[first] == made[5]
    assert {key.lease.length for key, _ in cache} == {150 - (packed[-1] - text)}


def test_memory_follows_the_closed_form(either_way):
    model, rank, tokens = Decoder(layers=2, kv_heads=2, dim=8), 4, 100
    ids, features = prompt(text=6, vision=10)
    step = compiled(model, vision_rank=4, text_rank=rank)
    with torch.no_grad():
        _, cache = step(ids, features)
        for number in range(tokens):
            _, cache = step(next_ids(seed=number), cache=cache)
    folded_tokens, width = 16 * ((tokens - 32) // 16), 16
    rows = tokens - folded_tokens
    capacity = max(key.lease.buffer.capacity for key, _ in cache)
    assert rows < 32 + 16 and capacity <= 48 + 16 + 2
    factors = rank * (10 + width) + rank * (6 + folded_tokens + width)
    losses = 2 * 2 * 8
    placement = 8 * (2 * 16 + 2 * folded_tokens)  # this decoder makes a mask, and so a placement, for every layer
    assert cache_bytes(cache) <= 4 * (4 * (factors + capacity * width) + losses) + 2 * placement
    assert all(key.placement is value.placement for key, value in cache)


def test_two_continuations_of_one_cache(either_way):
    model = Decoder(layers=2)
    step = compiled(model, fold_every=4, recent=4)
    ids, features = prompt()
    _, dense = model(ids, features)
    _, cache = step(ids, features)
    for number in range(7):
        (_, dense), (_, cache) = (
            run(next_ids(seed=number), cache=held) for run, held in ((model, dense), (step, cache))
        )
    forks = [(dense, cache), (dense, cache)]
    for number in range(9):
        for which, (expected_cache, held) in enumerate(forks):
            new = next_ids(seed=50 * which + number)
            expected, expected_cache = model(new, cache=expected_cache)
            logits, held = step(new, cache=held)
            close(logits, expected, 1e-3)
            forks[which] = expected_cache, held
    # What both continue still stands for what it stood for.
    close(cache[0][0].dense(), dense[0][0])


def test_several_new_tokens_at_once(either_way):
    model = Decoder(layers=1)
    step = compiled(model, fold_every=4, recent=2)
    ids, features = prompt(batch=2)
    _, dense = model(ids, features)
    _, cache = step(ids, features)
    for number, count in enumerate([1, 9, 1, 5, 30, 2]):
        new = next_ids(count, batch=2, seed=number)
        expected, dense = model(new, cache=dense)
        logits, cache = step(new, cache=cache)
        close(logits, expected, 1e-3)
        assert cache[0][0].lease.length < 6
