"""PackedTensor behaves as the dense tensor it stands for, and stays packed where a cache needs it to."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx import PackedTensor, PackPolicy, Partial, cache_bytes, pack
from tests.packing_inputs import FULL, VISION_ONLY, assert_stands_for, dense_pair, packed_pair, vision_mask
from tests.stored_inputs import Way, grouped, stored_pair


@pytest.mark.parametrize("policy", [FULL, VISION_ONLY])
def test_packs_losslessly_at_full_rank(policy):
    key, value, dense_key, dense_value = packed_pair(policy)
    assert_stands_for(key, dense_key)
    assert_stands_for(value, dense_value)
    assert key.placement is value.placement


def test_tokens_and_ranks_are_reported():
    key, *_ = packed_pair(PackPolicy(vision_rank=(3, 2)), tokens=40, dim=16)
    assert key.tokens == {"vision": 6, "dense": 34}
    assert key.ranks == {"vision": 3}
    assert "vision (2, 6) at rank 3" in repr(key)


def test_padding_is_not_stored():
    dense, _ = dense_pair(batch=2, tokens=10)
    real = torch.ones((2, 10), dtype=torch.bool)
    real[0, :3] = False
    key, _ = pack(dense, dense, FULL, real=real)
    assert key.placement.ragged
    expected = dense.clone()
    expected[0, :, :3] = 0
    assert_stands_for(key, expected)


def test_a_sample_of_nothing_but_padding():
    dense, _ = dense_pair(batch=2, tokens=6)
    real = torch.tensor([[False] * 6, [True] * 6])
    key, _ = pack(dense, dense, FULL, real=real)
    expected = dense.clone()
    expected[0] = 0
    assert_stands_for(key, expected)


def test_vision_tokens_stay_dense_where_packing_saves_nothing():
    dense, _ = dense_pair(tokens=12, dim=4, heads=1)
    key, _ = pack(dense, dense, PackPolicy(vision_rank=(4, 4)), modality=vision_mask(12, 2, 6))
    assert key.tokens == {"dense": 12}
    assert_stands_for(key, dense)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_tokens_are_refused(bad):
    dense, _ = dense_pair(tokens=12)
    dense[0, 0, 3, 0] = bad
    with pytest.raises(ValueError, match=r"NaN|Inf|finite"):
        pack(dense, dense, FULL)


# ---- against a dense mirror
# --------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("crop"), st.integers(1, 14)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        st.tuples(st.just("index"), st.lists(st.integers(-1, 0), min_size=1, max_size=2)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("clone"), st.none()),
        st.tuples(st.just("detach"), st.none()),
        st.tuples(st.just("fork"), st.integers(1, 3)),
        st.tuples(st.just("to"), st.none()),
        st.tuples(st.just("deepcopy"), st.none()),
        st.tuples(st.just("pickle"), st.none()),
        st.tuples(st.just("samples"), st.integers(0, 1)),
    ),
    max_size=6,
)


def apply(step, tensor, new):
    name, argument = step
    match name:
        case "append":
            return torch.cat([tensor, new[:, :, :argument]], dim=-2)
        case "crop":
            return tensor[..., : -min(argument, tensor.shape[2] - 1), :]
        case "select":
            return tensor.index_select(0, torch.tensor([item % tensor.shape[0] for item in argument]))
        case "index":
            return tensor[torch.tensor(argument), ...]
        case "repeat":
            return tensor.repeat_interleave(argument, dim=0)
        case "clone":
            return tensor.clone()
        case "detach":
            return tensor.detach()
        case "to":
            return tensor.to(torch.float64).to(torch.float32)
        case "deepcopy":
            return copy.deepcopy(tensor)
        case "pickle":
            return pickle.loads(pickle.dumps(tensor))
        case "samples":
            return tensor[argument % tensor.shape[0] :]
        case "fork":
            torch.cat([tensor, new[:, :, :argument] + 1.0], dim=2)
            return tensor
    raise AssertionError(name)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, policy=st.sampled_from([FULL, VISION_ONLY]), ragged=st.booleans())
def test_any_sequence_of_cache_operations_equals_the_dense_cache(steps, policy, ragged):
    dense, _ = dense_pair(tokens=12)
    real = torch.ones((2, 12), dtype=torch.bool)
    if ragged:
        real[0, :2] = False
        dense[0, :, :2] = 0
    packed, _ = pack(dense, dense, policy, modality=vision_mask(12, 3, 5), real=real)
    generator = torch.Generator().manual_seed(1)
    history = []
    for step in steps:
        new = torch.randn((dense.shape[0], 2, 20, 8), generator=generator)
        history.append((packed, dense))
        packed, dense = apply(step, packed, new), apply(step, dense, new)
        assert isinstance(packed, PackedTensor), step
    for earlier, expected in [*history, (packed, dense)]:
        assert_stands_for(earlier, expected)


STORED = {
    "before rotary embedding": lambda: stored_pair(Way(angles="rows", padding=2)),
    "rotary axes": lambda: stored_pair(Way(angles="tables", vision=36, packed_text=True, interleaved=True)),
    "rotary axes of each sample": lambda: stored_pair(Way(angles="tables", vision=36, padding=2)),
    "8 bits": lambda: stored_pair(Way(bits=8, packed_text=True)),
    "2 bits, before rotary embedding": lambda: stored_pair(Way(bits=2, angles="rows", padding=1)),
    "groups": lambda: grouped(Way(padding=1), Partial(keys=True)),
    "groups, before rotary embedding": lambda: grouped(Way(angles="tables", vision=36), Partial(keys=True)),
    "groups, stored": lambda: grouped(Way(), Partial(shares=(0.2, 0.3, 0.5), fractions=(1, 0.5, 0.25), store=True)),
    "groups, 4 bits": lambda: grouped(Way(), Partial(keys=True), bits=4),
}


@pytest.mark.parametrize("way", STORED)
@settings(max_examples=15, deadline=None)
@given(steps=STEPS, values=st.booleans())
def test_any_sequence_of_cache_operations_on_every_way_to_store(way, steps, values):
    pair = STORED[way]()
    packed = pair.value if values else pair.key
    dense = packed.dense()
    generator = torch.Generator().manual_seed(1)
    history = []
    for step in steps:
        new = torch.randn((dense.shape[0], 2, 20, 8), generator=generator)
        history.append((packed, dense))
        packed, dense = apply(step, packed, new), apply(step, dense, new)
        assert isinstance(packed, PackedTensor), step
    for earlier, expected in [*history, (packed, dense)]:
        assert_stands_for(earlier, expected)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("way", STORED)
def test_every_way_to_store_saves_and_loads_with_weights_only(way, zipped):
    pair = STORED[way]()
    pair.append(2)
    file = io.BytesIO()
    torch.save([pair.key, pair.value], file, _use_new_zipfile_serialization=zipped)
    file.seek(0)
    for loaded, saved in zip(torch.load(file, weights_only=True), (pair.key, pair.value), strict=True):
        assert_stands_for(loaded, saved.dense())
        assert loaded.form == saved.form and loaded.ranks == saved.ranks
        assert [each.shape for each in loaded.held.reserve] == [each.shape for each in saved.held.reserve]
        assert (loaded.importance is None) == (saved.importance is None)


@pytest.mark.parametrize("way", STORED)
def test_every_way_to_store_joins_packed_or_dense(way):
    first, second = STORED[way](), STORED[way]()
    for one, other in ((first.key, second.key), (first.value, second.value)):
        joined = torch.cat([one, other])
        torch.testing.assert_close(
            joined.dense() if isinstance(joined, PackedTensor) else joined, torch.cat([one.dense(), other.dense()])
        )
        plain = one.held.forms[0].kinds == ((0,),) * len(one.modalities)
        assert isinstance(joined, PackedTensor) == plain


@pytest.mark.parametrize("way", STORED)
def test_a_copy_shares_no_memory_with_the_original_but_what_is_never_written(way):
    pair = STORED[way]()
    expected, other = pair.key.dense(), pair.key.clone()
    for block in pair.key.held.blocks:
        for part in (block.coefficient, block.basis, block.scale):
            if part is not None:
                part.zero_()
    assert_stands_for(other, expected)


def test_reset_of_quantised_and_grouped_caches():
    pair = grouped(Way(), Partial(keys=True), bits=2)
    for packed in (pair.key, pair.value, stored_pair(Way(bits=8)).key, stored_pair(Way(angles="rows")).key):
        assert_stands_for(packed.zero_(), torch.zeros(packed.shape))


def test_two_continuations_of_one_cache_do_not_see_each_other():
    key, _, dense, _ = packed_pair()
    first, second = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    left = torch.cat([key, first], dim=2)
    right = torch.cat([key, second], dim=2)
    assert_stands_for(left, torch.cat([dense, first], dim=2))
    assert_stands_for(right, torch.cat([dense, second], dim=2))
    assert_stands_for(key, dense)


def test_appending_is_in_place_while_nobody_else_reads():
    key, *_ = packed_pair()
    key = torch.cat([key, torch.randn(2, 2, 1, 8)], dim=2)
    before = key.lease.buffer
    key = torch.cat([key, torch.randn(2, 2, 1, 8)], dim=2)
    assert key.lease.buffer is before


def test_cropping_and_appending_reuses_the_rows():
    key, _, dense, _ = packed_pair()
    key = torch.cat([key, torch.randn(2, 2, 3, 8)], dim=2)
    buffer = key.lease.buffer
    key = key[..., :-3, :]
    new = torch.randn(2, 2, 2, 8)
    key = torch.cat([key, new], dim=2)
    assert key.lease.buffer is buffer
    assert_stands_for(key, torch.cat([dense, new], dim=2))


def test_layers_share_one_placement_after_reordering():
    key, value, *_ = packed_pair()
    order = torch.tensor([1, 0])
    assert key.index_select(0, order).placement is value.index_select(0, order).placement


def test_a_reordering_tensor_changed_in_place_is_not_mistaken_for_the_old():
    dense, _ = dense_pair(tokens=8)
    real = torch.ones((2, 8), dtype=torch.bool)
    real[0, :3] = False
    key, _ = pack(dense, dense, FULL, real=real)
    order = torch.tensor([0, 1])
    key.index_select(0, order)
    order.copy_(torch.tensor([1, 0]))
    assert_stands_for(key.index_select(0, order), key.dense()[order])


# ---- everything else
# ---------------------------------------------------------------------------------------------------------------


def test_an_unknown_operation_decompresses_and_is_right():
    key, _, dense, _ = packed_pair()
    query = torch.randn(2, 2, 1, 8)
    result = query @ key.transpose(-1, -2)
    assert not isinstance(result, PackedTensor)
    torch.testing.assert_close(result, query @ dense.transpose(-1, -2), atol=1e-4, rtol=1e-4)


def test_the_shape_interface_of_a_cache():
    key, *_ = packed_pair()
    assert key.shape[-2] == 12 and key.numel() == 2 * 2 * 12 * 8 and key.dim() == 4
    assert key.dtype == torch.float32 and key.device.type == "cpu" and not key.requires_grad


def test_appending_to_nothing_keeps_it_packed():
    key, _, dense, _ = packed_pair()
    assert_stands_for(torch.cat([torch.tensor([]), key], dim=-2), dense)


def test_reset_zeroes_this_cache_and_no_fork():
    key, _, dense, _ = packed_pair()
    fork = key.detach()
    assert key.zero_() is key
    assert_stands_for(key, torch.zeros_like(dense))
    assert_stands_for(fork, dense)


def test_writing_through_is_refused():
    key, *_ = packed_pair()
    with pytest.raises(NotImplementedError, match="dense"):
        key[0] = 1.0
    with pytest.raises(NotImplementedError, match="in-place"):
        key.mul_(2.0)


def test_half_precision_round_trip():
    key, _, dense, _ = packed_pair()
    half = key.to(torch.bfloat16)
    assert isinstance(half, PackedTensor) and half.dtype == torch.bfloat16
    torch.testing.assert_close(half.dense().float(), dense, atol=0.1, rtol=0.1)


def test_deepcopy_is_independent():
    key, _, dense, _ = packed_pair()
    other = copy.deepcopy(key)
    key.zero_()
    assert_stands_for(other, dense)


def test_saves_and_loads_with_weights_only():
    key, _, dense, _ = packed_pair()
    key = torch.cat([key, torch.zeros(2, 2, 1, 8)], dim=2)
    file = io.BytesIO()
    torch.save(key, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_stands_for(loaded, torch.cat([dense, torch.zeros(2, 2, 1, 8)], dim=2))
    assert loaded.modalities == ("vision",)


def test_bytes_are_those_of_factors_and_rows():
    key, value, *_ = packed_pair(PackPolicy(vision_rank=2), tokens=40, dim=16)
    factors = sum(
        (block.coefficient.numel() + block.basis.numel()) * 4 for packed in (key, value) for block in packed.held.blocks
    )
    rows = 2 * 34 * 2 * 2 * 16 * 4
    indices = key.index.numel() * 8
    assert cache_bytes([(key, value)]) == factors + rows + indices


# ---- several caches in one batch -----------------------------------------------------------------------------------


def parts_of_a_batch(policy, appended=2):
    """Caches of other vision tokens each, one of them with padding, and the dense caches they stand for."""
    packed, dense = [], []
    for number, (start, count, batch) in enumerate([(2, 6, 2), (0, 9, 1), (5, 3, 3)]):
        key, value = dense_pair(batch=batch, seed=number)
        pair = pack(key, value, policy, modality=vision_mask(12, start, count))
        new = torch.randn(batch, 2, appended, 8)
        packed.append([tensor.append(new) for tensor in pair])
        dense.append([torch.cat([tensor.dense(), new], dim=2) for tensor in pair])
    return packed, dense


@pytest.mark.parametrize("policy", [FULL, VISION_ONLY, PackPolicy(vision_rank=(2, 3), text_rank=None)])
def test_samples_of_several_caches_join_in_one_batch(policy):
    packed, dense = parts_of_a_batch(policy)
    keys, values = (torch.cat(each) for each in zip(*packed, strict=True))
    for joined, expected in zip((keys, values), zip(*dense, strict=True), strict=True):
        assert isinstance(joined, PackedTensor)
        assert_stands_for(joined, torch.cat(expected))
        new = torch.randn(6, 2, 1, 8)
        assert_stands_for(torch.cat([joined, new], dim=2), torch.cat([torch.cat(expected), new], dim=2))
        assert_stands_for(joined[2:4], torch.cat(expected)[2:4])
    # All layers share where tokens stand.
    assert keys.placement is values.placement and keys.placement.ragged


def test_attention_over_joined_caches(without_inductor):
    packed, dense = parts_of_a_batch(VISION_ONLY)

    def step(past_key, past_value, query, new):
        key, value = torch.cat([past_key, new], dim=2), torch.cat([past_value, new], dim=2)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    inputs = torch.randn(6, 2, 1, 8), torch.randn(6, 2, 1, 8)
    compiled = torch.compile(step, backend="attnpack")
    with torch.no_grad():
        out = compiled(*(torch.cat(each) for each in zip(*packed, strict=True)), *inputs)
        expected = step(*(torch.cat(each) for each in zip(*dense, strict=True)), *inputs)
    assert torch.allclose(out, expected, atol=1e-5)


def test_equal_caches_join_without_filler():
    key, _, dense, _ = packed_pair()
    joined = torch.cat([key, key.clone()], dim=0)
    assert_stands_for(joined, torch.cat([dense, dense]))
    assert not joined.placement.ragged


@pytest.mark.parametrize("other", ["dense", "longer prompt", "other segments", "other dtype"])
def test_caches_that_do_not_fit_together_join_dense(other):
    key, _, dense, _ = packed_pair()
    if other == "dense":
        second, second_dense = dense, dense
    elif other == "longer prompt":
        second, _, second_dense, _ = packed_pair(tokens=13)
        new = torch.randn(2, 2, 1, 8)
        key, dense = key.append(new), torch.cat([dense, new], dim=2)
    elif other == "other segments":
        second, _, second_dense, _ = packed_pair(FULL)
    else:
        second, second_dense = key.to(torch.float64), dense.double()
    joined = torch.cat([key, second])
    assert not isinstance(joined, PackedTensor)
    assert torch.allclose(joined.double(), torch.cat([dense, second_dense]).double(), atol=1e-5)
