"""What enters a cache is compressed, what is packed is attended to; all else stays right, dense and reported."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from attnpack_fx import AttnpackWarning, PackedTensor, PackPolicy, attnpack_backend, modality
from attnpack_fx.passes import pipeline
from tests.decoder import close
from tests.packing_inputs import FULL, VISION_ONLY, packed_pair, vision_mask
from tests.passes.capture import capture, operations

B, H, T, D = 2, 2, 12, 8


def tokens(count: int = 1, heads: int = H, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of `count` new tokens."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn((B, heads, count, D), generator=generator),
        torch.randn((B, H, count, D), generator=generator),
        torch.randn((B, H, count, D), generator=generator),
    )


def names(state) -> list[str]:
    return [name.removesuffix(".default") for name in operations(state)]


def rewritten(function, *arguments, policy: PackPolicy = FULL):
    """The graph after all passes: the state, its operations, and its only report."""
    state = capture(function, *arguments, policy=policy)
    pipeline.run(state)
    return state, names(state), state.reports


def run(function, *arguments, policy: PackPolicy = FULL):
    """Strict: a rewrite that fails does not hide behind the fallback."""
    options = {"policy": replace(policy, strict=True)}
    with torch.no_grad():
        return torch.compile(function, backend=attnpack_backend, options=options, fullgraph=True)(*arguments)


def assert_right(function, *arguments, policy: PackPolicy = FULL) -> list:
    """Compiled on packed arguments equals eager on dense ones."""
    dense = tree_map(lambda item: item.dense() if isinstance(item, PackedTensor) else item, arguments)
    expected = function(*dense)
    actual = run(function, *arguments, policy=policy)
    assert len(actual) == len(expected)
    for left, right in zip(actual, expected, strict=True):
        close(left.dense() if isinstance(left, PackedTensor) else left, right, 2e-5)
    return actual


def step(past_key, past_value, query, key, value, mask=None):
    key = torch.cat([past_key, key], dim=2)
    value = torch.cat([past_value, value], dim=2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask), key, value


# ---- a packed past -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FULL, VISION_ONLY])
def test_a_packed_past_is_appended_to_and_attended_to(policy, without_inductor):
    key, value, *_ = packed_pair(policy)
    state, ops, reports = rewritten(step, key, value, *tokens())
    assert (ops.count("append_"), ops.count("attention")) == (1, 1)
    assert not {"cat", "scaled_dot_product_attention", "decompress"} & set(ops)
    assert [report.action for report in reports] == ["packed"]
    assert not state.packed.keys() & state.inputs.keys()

    _, grown_key, grown_value = assert_right(step, key, value, *tokens())
    assert isinstance(grown_key, PackedTensor) and isinstance(grown_value, PackedTensor)
    assert grown_key.placement is key.placement
    assert key.shape[2] == T and grown_key.shape[2] == T + 1


def test_the_count_of_changed_sites_is_returned():
    key, value, *_ = packed_pair()
    state = capture(step, key, value, *tokens())
    assert pipeline.run(state)["pack_cache"] == 1


def test_the_cache_content_after_inductor_equals_eager(fresh_dynamo):
    """Through the real compiler, over steps that write in place and one that must copy."""
    key, value, dense_key, dense_value = packed_pair(VISION_ONLY)
    compiled = torch.compile(step, backend=attnpack_backend, options={"policy": VISION_ONLY})
    for number in range(4):
        query, new_key, new_value = tokens(seed=number)
        fork = key
        expected, dense_key, dense_value = step(dense_key, dense_value, query, new_key, new_value)
        with torch.no_grad():
            out, key, value = compiled(key, value, query, new_key, new_value)
            assert isinstance(key, PackedTensor)
            close(out, expected)
            close(key.dense(), dense_key)
            close(value.dense(), dense_value)
            close(fork.dense(), dense_key[:, :, :-1])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3, T + 3, dtype=torch.bool).tril(T),
        torch.ones(1, 1, 3, T + 3, dtype=torch.bool).tril(T),
        torch.zeros(B, 1, 3, T + 3).masked_fill(~torch.ones(3, T + 3, dtype=torch.bool).tril(T), -1e30),
        torch.randn(B, H, 3, T + 3),
    ],
    ids=["bool 2-D", "bool", "additive", "additive per head"],
)
def test_masks_over_a_packed_past(mask, without_inductor):
    key, value, *_ = packed_pair(VISION_ONLY)
    _, ops, _ = rewritten(step, key, value, *tokens(3), mask)
    assert ops.count("attention") == 1 and "scaled_dot_product_attention" not in ops
    assert_right(step, key, value, *tokens(3), mask)


def gqa(past_key, past_value, query, key, value):
    key, value = torch.cat([past_key, key], dim=-2), torch.cat([past_value, value], dim=-2)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.3), key, value


def materialised(past_key, past_value, query, key, value):
    key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    many = [
        item[:, :, None].expand(B, H, 2, item.shape[2], D).reshape(B, 2 * H, item.shape[2], D) for item in (key, value)
    ]
    return F.scaled_dot_product_attention(query, *many), key, value


def eager(past_key, past_value, query, key, value):
    key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    weights = torch.matmul(query, key.repeat_interleave(2, dim=1).transpose(2, 3)) * 0.4
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value.repeat_interleave(2, dim=1)), key, value


@pytest.mark.parametrize("function", [gqa, materialised, eager])
def test_grouped_queries_over_a_packed_past(function, without_inductor):
    key, value, *_ = packed_pair(VISION_ONLY)
    arguments = (key, value, *tokens(heads=2 * H))
    _, ops, _ = rewritten(function, *arguments)
    assert (ops.count("append_"), ops.count("attention")) == (1, 1)
    assert not {"cat", "scaled_dot_product_attention", "softmax", "expand", "repeat_interleave"} & set(ops)
    assert_right(function, *arguments)


def keyword_cat(past_key, past_value, query, key, value):
    key, value = torch.cat(tensors=[past_key, key], dim=2), torch.concat([past_value, value], axis=-2)
    return F.scaled_dot_product_attention(query, key, value), key, value


def test_a_cat_by_keyword_is_an_append(without_inductor):
    key, value, *_ = packed_pair(VISION_ONLY)
    _, ops, _ = rewritten(keyword_cat, key, value, *tokens())
    assert (ops.count("append_"), ops.count("attention")) == (1, 1)
    assert_right(keyword_cat, key, value, *tokens())


def test_one_packed_sample_read_by_several_queries(without_inductor):
    """SDPA broadcasts over the batch."""

    def function(past_key, past_value, query):
        return (F.scaled_dot_product_attention(query, past_key, past_value),)

    key, value, *_ = packed_pair(VISION_ONLY, batch=1)
    assert_right(function, key, value, tokens()[0])


@pytest.mark.parametrize("shape", [(1, T + 1), (1, 1, 1, T + 1), (B, 1, 1, 1), (1, H, 1, T + 1)])
def test_masks_that_broadcast(shape, without_inductor):
    key, value, *_ = packed_pair(VISION_ONLY)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_right(step, key, value, *tokens(), mask)


def test_values_that_grow_otherwise_than_keys_are_right(without_inductor):
    """Keys packed, values dense: nothing to attend to packed."""

    def function(past_key, past_value, query, key, value):
        return step(past_key, past_value, query, key, value)

    key, _, _, dense_value = packed_pair(VISION_ONLY)
    assert_right(function, key, dense_value, *tokens())


def test_keys_used_as_values_are_right(without_inductor):
    def function(past, query, new):
        grown = torch.cat([past, new], dim=2)
        return F.scaled_dot_product_attention(query, grown, grown), grown

    key, *_ = packed_pair(VISION_ONLY)
    query, new, _ = tokens()
    assert_right(function, key, query, new)


def test_a_packed_past_in_half_precision(without_inductor):
    key, value, *_ = packed_pair(VISION_ONLY, dtype=torch.bfloat16)
    arguments = [item.bfloat16() for item in tokens()]
    out, *_ = run(step, key, value, *arguments)
    expected, *_ = step(key.dense(), value.dense(), *arguments)
    assert out.dtype == torch.bfloat16
    close(out.float(), expected.float(), 0.02)


def test_a_packed_cache_that_is_only_read_is_attended_to(without_inductor):
    def function(past_key, past_value, query):
        return (F.scaled_dot_product_attention(query, past_key, past_value),)

    key, value, *_ = packed_pair(VISION_ONLY)
    _, ops, _ = rewritten(function, key, value, tokens()[0])
    assert ops.count("attention") == 1
    assert not {"append_", "decompress", "scaled_dot_product_attention"} & set(ops)
    assert_right(function, key, value, tokens()[0])


def test_is_causal_over_a_packed_past_is_decompressed(without_inductor):
    def function(past_key, past_value, query, key, value):
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True), key, value

    key, value, *_ = packed_pair(VISION_ONLY)
    _, ops, (report,) = rewritten(function, key, value, *tokens(3))
    assert "decompress" in ops and "attention" not in ops
    assert report.action == "dense" and "is_causal" in report.reason
    with pytest.warns(AttnpackWarning, match="is_causal"):
        _, grown, _ = assert_right(function, key, value, *tokens(3))
    assert isinstance(grown, PackedTensor)


def test_an_unknown_consumer_gets_the_dense_form(without_inductor):
    def function(past_key, past_value, query, key, value):
        out, key, value = step(past_key, past_value, query, key, value)
        return out, key, value, key.norm(dim=-1), past_key.sum(2)

    key, value, *_ = packed_pair(VISION_ONLY)
    _, ops, _ = rewritten(function, key, value, *tokens())
    assert ops.count("attention") == 1 and ops.count("decompress") == 2
    assert_right(function, key, value, *tokens())


@pytest.mark.parametrize("sinks", [False, True])
def test_softcapped_attention_over_a_packed_past_is_packed(sinks, without_inductor):
    more = torch.linspace(-1, 1, 4)

    def function(past_key, past_value, query, key, value):
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        scores = torch.tanh(query @ key.transpose(2, 3) / 5.0) * 5.0
        if not sinks:
            return scores.softmax(-1) @ value, key, value
        column = more[: query.shape[1]].reshape(1, -1, 1, 1).expand(*query.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value, key, value

    key, value, *_ = packed_pair(VISION_ONLY)
    _, ops, _ = rewritten(function, key, value, *tokens())
    assert ops.count("attention") == 1 and ops.count("decompress") == 0
    assert_right(function, key, value, *tokens())


def test_an_unknown_attention_over_a_packed_past_is_right_and_announced(without_inductor):
    def function(past_key, past_value, query, key, value):
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        return (query @ key.transpose(2, 3)).sin().softmax(-1) @ value, key, value

    key, value, *_ = packed_pair(VISION_ONLY)
    with pytest.warns(AttnpackWarning, match="decompress"):
        assert_right(function, key, value, *tokens())


def test_two_cats_of_the_same_packed_past(without_inductor):
    def function(past_key, past_value, query, key, value):
        out, first_key, first_value = step(past_key, past_value, query, key, value)
        other, second_key, second_value = step(past_key, past_value, query, -key, -value)
        return out, other, first_key, first_value, second_key, second_value

    key, value, dense_key, _ = packed_pair(VISION_ONLY)
    assert_right(function, key, value, *tokens())
    close(key.dense(), dense_key)


def test_a_cat_along_another_dimension_is_decompressed(without_inductor):
    def function(past_key, other):
        return torch.cat([past_key, other], dim=0), torch.cat([other, past_key], dim=2)

    key, *_, dense, _ = packed_pair(VISION_ONLY)
    _, ops, _ = rewritten(function, key, dense + 1)
    assert "append_" not in ops and "decompress" in ops
    assert_right(function, key, dense + 1)


def test_a_packed_value_handed_through_is_right(without_inductor):
    key, *_ = packed_pair(VISION_ONLY)
    assert_right(lambda past: (past, past.sum()), key)


# ---- a dense or empty past ---------------------------------------------------------------------------------


def dense_past() -> tuple[Tensor, Tensor]:
    *_, key, value = packed_pair()
    return key, value


def test_a_dense_past_leaves_packed(without_inductor):
    _, ops, (report,) = rewritten(step, *dense_past(), *tokens())
    assert (ops.count("plan"), ops.count("compress"), ops.count("take_rows")) == (1, 2, 2)
    assert (ops.count("cat"), ops.count("scaled_dot_product_attention")) == (2, 1)  # this call's attention stays exact
    assert report.action == "compressed"
    assert report.key_rank == {"text": H * D}
    _, key, value = assert_right(step, *dense_past(), *tokens())
    assert isinstance(key, PackedTensor) and key.placement is value.placement
    assert key.ranks["text"] <= H * D


def test_an_empty_past_leaves_packed(without_inductor):
    """transformers starts from a one-dimensional empty tensor."""

    def prefill(query, key, value):
        empty = torch.tensor([])
        key, value = torch.cat([empty, key], dim=-2), torch.cat([empty, value], dim=-2)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True), key, value

    _, _, (report,) = rewritten(prefill, *tokens(T))
    assert report.action == "compressed"
    _, key, value = assert_right(prefill, *tokens(T))
    assert isinstance(key, PackedTensor) and isinstance(value, PackedTensor)


def test_vision_tokens_are_packed_and_text_stays_dense(without_inductor):
    def prefill(x, mask, features, weight):
        x = x.masked_scatter(mask[..., None], features)
        query, key, value = (item.view(B, T, H, D).transpose(1, 2) for item in (x @ weight).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True), key, value

    mask = vision_mask(T, 2, 6, batch=B)
    arguments = (torch.randn(B, T, 5), mask, torch.randn(B * 6, 5), torch.randn(5, 3 * H * D))
    _, key, value = assert_right(prefill, *arguments, policy=VISION_ONLY)
    assert key.tokens == value.tokens == {"vision": 6, "dense": T - 6}


def test_layers_share_one_plan(without_inductor):
    def two_layers(keys, values, query, key, value):
        out, key_0, value_0 = step(keys[0], values[0], query, key, value)
        out, key_1, value_1 = step(keys[1], values[1], out, key, value)
        return out, key_0, value_0, key_1, value_1

    key, value = dense_past()
    arguments = ([key, key + 1], [value, value - 1], *tokens())
    _, ops, reports = rewritten(two_layers, *arguments)
    assert ops.count("plan") == 1 and ops.count("compress") == 4
    assert [report.action for report in reports] == ["compressed", "compressed"]
    _, key_0, _, key_1, _ = assert_right(two_layers, *arguments)
    assert key_0.placement is key_1.placement


def test_padding_is_read_from_the_mask_and_not_stored(without_inductor):
    def prefill(query, key, value, mask):
        key, value = key.clone(), value.clone()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask), key, value

    real = torch.ones(B, T, dtype=torch.bool)
    real[0, :3] = False
    mask = real[:, None, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
    query, key, value = tokens(T)
    key[0, :, :3] = value[0, :, :3] = 1e4  # would drown the rest in the factors
    out, packed, _ = run(prefill, query, key, value, mask)
    close(out[:, :, 3:], prefill(query, key, value, mask)[0][:, :, 3:])
    assert packed.placement.ragged
    close(packed.dense()[1], key[1])
    close(packed.dense()[0, :, 3:], key[0, :, 3:])
    assert not packed.dense()[0, :, :3].any()


def test_ranks_of_a_pair_are_those_of_keys_and_of_values(without_inductor):
    policy = PackPolicy(vision_rank=None, text_rank=(3, 2))
    key, value = (torch.randn(1, H, 64, D) for _ in range(2))
    new = [item[:1] for item in tokens()]
    _, packed_key, packed_value = run(step, key, value, *new, policy=policy)
    assert (packed_key.ranks, packed_value.ranks) == ({"text": 3}, {"text": 2})


def test_non_finite_keys_are_refused(without_inductor):
    key, value = dense_past()
    key[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN|Inf|finite"):
        run(step, key, value, *tokens())


# ---- left dense, with a reason -----------------------------------------------------------------------------


def sliding(past_key, past_value, query, key, value):
    out, key, value = step(past_key, past_value, query, key, value)
    return out, key[:, :, -4:], value[:, :, -4:]


def static(past_key, past_value, query, key, value):
    position = torch.tensor([T - 1])
    past_key = past_key.index_copy(2, position, key)
    past_value = past_value.index_copy(2, position, value)
    return F.scaled_dot_product_attention(query, past_key, past_value), past_key, past_value


def static_argument(past_key, past_value, query, key, value):
    position = torch.tensor([T - 1])
    past_key.index_copy_(2, position, key)
    past_value.index_copy_(2, position, value)
    return (F.scaled_dot_product_attention(query, past_key, past_value),)


def cross(past_key, past_value, query, key, value):
    key, value = past_key * 2.0, past_value * 2.0
    return F.scaled_dot_product_attention(query, key, value), key, value


def only_read(past_key, past_value, query, key, value):
    return (F.scaled_dot_product_attention(query, past_key, past_value),)


def uncached(past_key, past_value, query, key, value):
    return (F.scaled_dot_product_attention(query, key * 2.0, value * 2.0),)


def uncached_grown(past_key, past_value, query, key, value):
    return step(past_key, past_value, query, key, value)[:1]


def test_the_newest_tokens_of_a_sliding_window_are_packed(without_inductor):
    """Also where the slice stands behind attention."""

    def prompt(query, key, value):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out, key[:, :, -4:], value[:, :, -4:]

    query, key, value = (torch.randn(2, 4, 9, 8) for _ in range(3))
    _, ops, (report,) = rewritten(prompt, query, key, value)
    assert report.action == "compressed" and ops.count("compress") == 2


REASONS = [
    (sliding, "dense", "sliding window: its cache holds tokens of an earlier call"),
    (static, "dense", "static cache"),
    (static_argument, "dense", "static cache"),
    (cross, "dense", "cross-attention"),
    (only_read, "dense", "only read"),
    (uncached, "uncached", "not kept"),
    (uncached_grown, "dense", "not the keys kept"),
]


@pytest.mark.parametrize(("function", "action", "reason"), REASONS, ids=[item[0].__name__ for item in REASONS])
def test_a_site_that_is_left_says_why(function, action, reason, without_inductor):
    _, ops, (report,) = rewritten(function, *dense_past(), *tokens())
    assert (report.action, report.kind) == (action, "sdpa")
    assert reason in report.reason
    assert "scaled_dot_product_attention" in ops
    assert not {"plan", "compress", "append_", "attention", "decompress"} & set(ops)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = run(function, *dense_past(), *tokens())
    for left, right in zip(actual, function(*dense_past(), *tokens()), strict=True):
        assert type(left) is Tensor
        close(left, right)
    said = [str(item.message) for item in caught if issubclass(item.category, AttnpackWarning)]
    assert len(said) == (action == "dense")
    assert all(reason in message for message in said)


def test_flex_attention_is_left_with_its_reason():
    from torch.nn.attention.flex_attention import flex_attention

    def function(past_key, past_value, query, key, value):
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        return flex_attention(query, key, value), key, value

    _, _, (report,) = rewritten(function, *dense_past(), *tokens())
    assert report.action == "dense" and "flex_attention" in report.reason


def test_an_obstacle_is_the_reason(without_inductor):
    def function(past_key, past_value, query, key, value):
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.5), key, value

    _, _, (report,) = rewritten(function, *dense_past(), *tokens())
    assert (report.action, report.reason) == ("dense", "attention dropout is active")


def test_text_without_a_rank_stays_dense_until_a_modality_is_stated(without_inductor):
    state, _, (report,) = rewritten(step, *dense_past(), *tokens(), policy=VISION_ONLY)
    assert report.action == "dense" and "text_rank" in report.reason
    assert state.candidates == [(1, 2, None)]
    compiled = partial(run, step, *dense_past(), *tokens(), policy=VISION_ONLY)
    with pytest.warns(AttnpackWarning, match="no vision tokens"):
        _, key, _ = compiled()
    assert type(key) is Tensor
    with modality(vision_mask(T, 2, 6)):
        _, key, _ = compiled()
    assert isinstance(key, PackedTensor) and key.tokens == {"vision": 6, "dense": T - 6 + 1}


def test_a_rank_above_what_the_heads_have_is_refused():
    with pytest.raises(ValueError, match=r"text_rank=17 exceeds H \* D = 16"):
        rewritten(step, *dense_past(), *tokens(), policy=PackPolicy(text_rank=17))
