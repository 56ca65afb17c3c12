"""Vision tokens read with as many columns as they are attended to."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from attnpack_fx import Columns, PackedTensor, PackPolicy, Partial, Stored, cache_bytes, pack
from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.folding import fold
from attnpack_fx.held import rank_of
from attnpack_fx.kernels import ops, reference
from attnpack_fx.maintenance import maintain
from attnpack_fx.regrouping import is_due, regroup
from attnpack_fx.step_cost import attention_arguments
from tests.decoder import Decoder, close, next_ids, prompt
from tests.packing_inputs import assert_stands_for, dense_pair
from tests.stored_inputs import DIM, HEADS, WIDTH, Way, grouped, in_blocks, rotary, stored_pair, with_importance

PARTIALS = st.builds(
    lambda cuts, keys: Partial(shares=tuple(1 / len(cuts) for _ in cuts), fractions=tuple(cuts), keys=keys),
    st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0]), max_size=2).map(lambda cuts: [1.0, *sorted(cuts)[::-1]]),
    st.booleans(),
)


def blocks_of(packed: PackedTensor) -> list[Tensor]:
    """Of every block of the vision segment, what it adds to every token: float64 `[B, H, N, D]`."""
    parts = []
    for block in packed.segments[0].blocks:
        coefficient, basis = block.coefficient.double(), block.basis.double()
        if block.bits:
            scale = block.scale.double()
            coefficient = reference.decoded(block.coefficient, rank_of(block), block.bits) * scale[:, 0, None]
            basis = reference.decoded(block.basis, DIM, block.bits) * scale[:, 1, None, :, None]
        parts.append(coefficient[:, None] @ basis)
    return parts


def truncated(packed: PackedTensor, order: Tensor, partial: Partial) -> Tensor:
    """Vision tokens `[B, H, N, D]`, each with the columns of its group; order: theirs by importance, `[B, N]`."""
    parts, ranks = blocks_of(packed), [rank_of(block) for block in packed.segments[0].blocks]
    tokens, limits = order.shape[1], partial.columns(sum(ranks))
    ends = [round(sum(partial.shares[: number + 1]) * tokens) for number in range(len(limits))]
    out = torch.zeros_like(parts[0])
    for sample in range(out.shape[0]):
        for place, token in enumerate(order[sample].tolist()):
            group = next(number for number, end in enumerate(ends) if place < end)
            start = 0
            for part, rank in zip(parts, ranks, strict=True):
                if start < limits[group]:
                    out[sample, :, token] += part[sample, :, token]
                start += rank
    return out


@given(
    partial=PARTIALS,
    seed=st.integers(0, 2**16),
    angles=st.sampled_from(["none", "rows", "tables"]),
    padding=st.integers(0, 2),
    bits=st.sampled_from([0, 0, 8, 2]),
    rank=st.sampled_from([1, 3, WIDTH]),
    times=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
def test_tokens_are_read_with_the_columns_of_their_group(partial, seed, angles, padding, bits, rank, times):
    way = Way(seed=seed, vision=36, angles=angles, padding=padding, rank=rank)
    pair = stored_pair(way)
    in_blocks(pair, partial, bits)
    whole = pair.key, pair.value
    for number in range(times):  # what an earlier grouping left out comes back
        importance = with_importance(pair, seed + number)
        inverse = pair.key.index[:, : way.vision] - way.padding - 2
        by_token = torch.zeros_like(importance).scatter_(1, inverse, importance)
        pair.key, pair.value = regroup(pair.key, pair.value, partial)
    order = by_token.argsort(dim=1, descending=True, stable=True)
    vision = ~pair.is_text
    expected = []
    for packed, before, is_key in ((pair.key, whole[0], True), (pair.value, whole[1], False)):
        cut = partial if partial.keys or not is_key else Partial(shares=(1,), fractions=(1,))
        tokens = truncated(before, order, cut)
        if is_key and angles != "none":
            cos, sin = rotary(way, way.tokens)
            tokens = reference.rotate(tokens, cos[:, vision], sin[:, vision], False)
        dense = before.dense().double()
        dense[:, :, vision] = tokens
        expected.append(dense)
        assert_stands_for(packed, dense.float(), tolerance=1e-4)
    assert pair.key.placement is pair.value.placement
    assert torch.equal(pair.key.importance, by_token.gather(1, order))
    # And attention on it.
    query = torch.randn((2, 2 * HEADS, 3, DIM), generator=torch.Generator().manual_seed(seed))
    real = (pair.key.slot >= 0)[:, None, None]
    attended = F.scaled_dot_product_attention(query.double(), *expected, attn_mask=real, enable_gqa=True)
    out, _ = ops.attention_weights(*attention_arguments(query, pair.key.parts, pair.value.parts))
    torch.testing.assert_close(out.double(), attended, atol=2e-4, rtol=2e-4)


def test_groups_follow_attention_that_moves():
    partial = Partial(shares=(0.25, 0.75), fractions=(1, 0.25), momentum=0.5, regroup_every=4)
    policy = PackPolicy(partial=partial)
    pair = stored_pair(Way(batch=2))
    in_blocks(pair, partial)
    pair.key = pair.key.attended(torch.zeros(2, 9))
    importance = torch.zeros(2, 9, dtype=torch.float64)
    for step in range(30):
        wanted = 4 if step < 14 else 9
        query = 6 * pair.dense_key[:, :, wanted, None]
        pair.append(1)
        _, weights = ops.attention_weights(*attention_arguments(query, pair.key.parts, pair.value.parts))
        place = pair.key.index[:, :9] - 2
        importance = 0.5 * importance + 0.5 * torch.zeros(2, 9).scatter_(1, place, weights[:, :9])
        assert pair.key.importance is not None
        pair.key = pair.key.attended(0.5 * pair.key.importance + 0.5 * weights[:, :9])
        layer = CachedLayer(0, pair.key, pair.value, added=1, prefill=False)
        maintain([layer], policy)
        pair.key, pair.value = layer.key, layer.value
        place = pair.key.index[:, :9] - 2
        torch.testing.assert_close(pair.key.importance.double(), importance.gather(1, place))
        assert pair.value.segments[0].blocks[1].coefficient.shape[1] == 2
        if step in (0, 13) or step >= 14 + 5:
            assert (pair.key.index[:, 0] == wanted).all(), step
            token = pair.value.dense()[:, :, wanted], pair.dense_value[:, :, wanted]
            torch.testing.assert_close(*token, atol=1e-4, rtol=1e-4)
    assert_stands_for(pair.key, pair.dense_key, tolerance=1e-4)


def test_sorted_at_once_then_every_so_many_tokens():
    partial = Partial(regroup_every=4)
    pair = stored_pair(Way())
    in_blocks(pair, partial)
    assert not is_due(pair.key, pair.value, 1, partial)  # no importance
    with_importance(pair, 0)
    assert is_due(pair.key, pair.value, 1, partial)
    pair.key, pair.value = regroup(pair.key, pair.value, partial)
    dues = []
    for count in (1, 1, 1, 1, 3, 2, 9):
        pair.append(count)
        dues.append((pair.key.shape[2], is_due(pair.key, pair.value, count, partial)))
    expected = [(15, False), (16, True), (17, False), (18, False), (21, True), (23, False), (32, True)]
    assert dues == expected


@pytest.mark.parametrize("partial", [Partial(fractions=(1, 1)), Partial(keys=True)], ids=["all columns", "one column"])
def test_what_cannot_be_cut_is_never_sorted(partial):
    pair = stored_pair(Way(rank=1 if partial.keys else WIDTH))
    in_blocks(pair, partial)
    with_importance(pair, 0)
    assert len(pair.key.segments[0].blocks) == 1 and not is_due(pair.key, pair.value, 1, partial)


def test_keys_alone_may_have_columns_to_cut():
    """Values of a single column leave nothing out, and say nothing of whether keys are grouped already."""
    partial = Partial(keys=True, store=True)
    pair, low = stored_pair(Way()), stored_pair(Way(rank=1))
    pair.value = low.value
    in_blocks(pair, partial)
    with_importance(pair, 0)
    assert is_due(pair.key, pair.value, 1, partial)
    pair.key, pair.value = regroup(pair.key, pair.value, partial)
    assert not is_due(pair.key, pair.value, 16, partial)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("keys", [False, True])
def test_what_is_not_stored_is_freed_for_good(keys, bits):
    partial = Partial(shares=(0.25, 0.25, 0.5), fractions=(1, 0.5, 0.25), keys=keys, store=True)
    way = Way(vision=16)
    pair, before = stored_pair(way), stored_pair(way)
    for each in (pair, before):
        in_blocks(each, partial, bits)
        with_importance(each, 0)
    pair.key, pair.value = regroup(pair.key, pair.value, partial)
    # Columns 1-4 of all tokens, 5-8 of half of them, 9-16 of a quarter; two samples.
    dropped = 2 * (4 * 8 + 8 * 12) * (2 if keys else 1)
    freed = dropped * bits // 8 if bits else dropped * 4
    assert cache_bytes([pair.key, pair.value]) == cache_bytes([before.key, before.value]) - freed
    assert pair.value.held.reserve == () and [each.coefficient.shape[1] for each in pair.value.held.blocks] == [
        16,
        8,
        4,
    ]
    for count in (1, 16, 40):
        pair.append(count)
        assert not is_due(pair.key, pair.value, count, partial)


def test_what_is_in_reserve_takes_as_many_bytes_as_before():
    partial = Partial(keys=True)
    pair = stored_pair(Way())
    in_blocks(pair, partial)
    with_importance(pair, 0)
    total = cache_bytes([pair.key, pair.value])
    pair.key, pair.value = regroup(pair.key, pair.value, partial)
    assert cache_bytes([pair.key, pair.value]) == total


def test_columns_come_back_from_reserve_after_operations_on_the_cache():
    partial = Partial(keys=True)
    pair, direct = grouped(Way(), partial, seed=1), grouped(Way(), partial, seed=2)
    rows = torch.tensor([1, 0])
    pair.key, pair.value = (packed.index_select(0, rows).clone() for packed in (pair.key, pair.value))
    place = pair.key.index[:, :9] - 2
    importance = torch.rand((2, 9), generator=torch.Generator().manual_seed(2))[rows].gather(1, place)
    key, value = regroup(pair.key.attended(importance), pair.value, partial)
    assert_stands_for(key, direct.key.dense()[rows], tolerance=1e-6)
    assert_stands_for(value, direct.value.dense()[rows], tolerance=1e-6)


def test_filler_never_takes_the_place_of_a_token():
    key, value = dense_pair(batch=2, tokens=24, heads=2, dim=8)
    modality = torch.zeros((2, 24), dtype=torch.bool)
    modality[0, 5:8], modality[1, 4:20] = True, True
    policy = PackPolicy(vision_rank="full", partial=Partial(keys=True))
    packed = pack(key, value, policy, modality=modality)
    assert packed[0].placement.ragged and packed[0].importance.shape == (2, 16)
    # Nothing was ever attended to: only filler ranks behind.
    grouped_pair = regroup(*packed, policy.partial)
    assert grouped_pair[0].index[0, :16].tolist() == [5, 6, 7] + [-1] * 13
    for made, dense in zip(grouped_pair, (key, value), strict=True):
        torch.testing.assert_close(made.dense()[0], dense[0], atol=1e-4, rtol=1e-4)


def test_tokens_that_were_cropped_rank_last():
    pair = stored_pair(Way())
    in_blocks(pair, Partial())
    with_importance(pair, 0)
    key, value = (packed[..., :6, :] for packed in (pair.key, pair.value))
    key, value = regroup(key, value, Partial())
    assert sorted(key.index[0, :4].tolist()) == [2, 3, 4, 5] and (key.index[:, 4:9] == -1).all()
    assert_stands_for(key, pair.dense_key[:, :, :6], tolerance=1e-4)


def test_fewer_columns_than_planned():
    """The plan says 16 of 64; nine tokens have but nine columns, which fall into the first block."""
    partial = Partial(shares=(0.25, 0.25, 0.5), fractions=(1, 0.5, 0.25))
    key, value = dense_pair(tokens=14, heads=4, dim=16)
    modality = torch.zeros((1, 14), dtype=torch.bool)
    modality[:, 2:11] = True
    policy = PackPolicy(vision_rank="full", partial=partial)
    packed_key, packed_value = pack(key, value, policy, modality=modality)
    assert [rank_of(block) for block in packed_value.segments[0].blocks] == [9]
    assert not is_due(packed_key, packed_value, 1, partial)
    assert_stands_for(packed_value, value)


def test_rounding_of_a_fraction_takes_no_column_more():
    """0.07 * 100 is a little above 7 in floating point."""
    key, value = dense_pair(batch=1, tokens=122, heads=10, dim=10)
    modality = torch.arange(122)[None] < 120
    policy = PackPolicy(vision_rank="full", partial=Partial(fractions=(1, 0.07)))
    made = regroup(*pack(key, value, policy, modality=modality), policy.partial)[1]
    assert [(rank_of(block), block.coefficient.shape[1]) for block in made.held.blocks] == [(7, 120), (93, 30)]


def test_folds_and_groups_together():
    pair = grouped(Way(angles="tables", vision=36), Partial())
    vision = pair.value.dense()[:, :, ~pair.is_text]
    for seed in range(3):
        pair.append(5)
        stored = Stored(Columns(((WIDTH, 0),)), Columns(((WIDTH, 0),)))
        pair.key, pair.value = fold(pair.key, pair.value, 5, stored, None)
        if seed == 1:
            pair.key, pair.value = regroup(pair.key, pair.value, Partial())
    text = pair.is_text
    assert_stands_for(pair.key, pair.dense_key, tolerance=1e-4)
    out = pair.value.dense()
    torch.testing.assert_close(out[:, :, text], pair.dense_value[:, :, text], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[:, :, ~text], vision)


# ---- compiled ------------------------------------------------------------------------------------------------------


def compiled(model: Decoder, **options: Any) -> Any:
    given = {"vision_rank": "full", "text_rank": None, "strict": True} | options
    return torch.compile(model, backend="attnpack", options=given)


class Recorded:
    """Attention weights of an eager model, averaged over heads and queries: float64 `[B, T]` of every layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attend = F.scaled_dot_product_attention
        self.patch = monkeypatch

    def __call__(self, model: Decoder, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        weights = []

        def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, enable_gqa: bool) -> Tensor:
            keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
            scores = (query.double() @ keys.mT * query.shape[3] ** -0.5).masked_fill(~attn_mask, -torch.inf)
            weights.append(scores.softmax(-1).mean((1, 2)))
            return self.attend(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa)

        with self.patch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attend)
            return model(*args, **kwargs), weights


@pytest.mark.parametrize("momentum", [0.25, 0.0])
def test_importance_is_the_moving_average_of_dense_attention(momentum, without_inductor, monkeypatch):
    model, record = Decoder(layers=2), Recorded(monkeypatch)
    partial = Partial(fractions=(1, 1), momentum=momentum)
    step, plain = compiled(model, partial=partial), compiled(model)
    ids, features = prompt(batch=2)
    _, dense = model(ids, features)
    (_, cache), (_, unweighed) = step(ids, features), plain(ids, features)
    expected = [torch.zeros(2, 10, dtype=torch.float64) for _ in cache]
    for number, count in enumerate([1, 1, 3, 1, 7, 2, 1]):
        new = next_ids(count, batch=2, seed=number)
        (_, dense), weights = record(model, new, cache=dense)
        (logits, cache), (same, unweighed) = step(new, cache=cache), plain(new, cache=unweighed)
        assert torch.equal(logits, same)  # all columns of all tokens: as if there were no groups
        kept = momentum**count
        expected = [kept * old + (1 - kept) * now[:, 2:12] for old, now in zip(expected, weights, strict=True)]
        for (key, value), importance in zip(cache, expected, strict=True):
            assert value.importance is None
            torch.testing.assert_close(key.importance.double(), importance, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keys", [False, True])
def test_a_compiled_model_reads_what_the_groups_leave(keys, without_inductor):
    model = Decoder(layers=2)
    step = compiled(model, partial=Partial(keys=keys, regroup_every=3))
    ids, features = prompt(vision=16, batch=2)
    _, cache = step(ids, features)
    counters.clear()
    graphs = []
    for number in range(14):
        new, orders = next_ids(batch=2, seed=number), [key.index for key, _ in cache]
        # Eager, packed values mean their dense form.
        expected, _ = model(new, cache=cache)
        logits, cache = step(new, cache=cache)
        close(logits, expected)
        graphs.append(counters["stats"]["unique_graphs"])
        for (key, value), order in zip(cache, orders, strict=True):
            assert [block.coefficient.shape[1] for block in value.held.blocks] == [16, 4]
            assert [block.coefficient.shape[1] for block in key.held.blocks] == ([16, 4] if keys else [16])
            if key.shape[2] % 3 == 0 or number == 0:
                assert (key.importance.diff(dim=1) <= 0).all()
            else:
                assert torch.equal(key.index, order)
    assert graphs[-1] == graphs[3]
