"""Attention is found in every form the supported models write it, and nothing else is."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnpack_fx.passes.find_attention import find_attention, scale_of
from tests.passes.capture import capture

Q = torch.randn(2, 4, 3, 8)
K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
K2, V2 = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
BOOL_MASK = torch.ones(2, 1, 3, 5, dtype=torch.bool)
ADDITIVE_MASK = torch.zeros(2, 1, 3, 5)


def sites_of(function, *arguments):
    state = capture(function, *arguments)
    count = find_attention(state)
    assert count == len(state.sites)
    return state.sites


def the_site(function, *arguments):
    (site,) = sites_of(function, *arguments)
    return site


def operands(site):
    """Which arguments of the function the site reads as query, key, value and mask."""
    nodes = [site.query, site.key, site.value, *([] if site.mask is None else [site.mask])]
    return "".join(node.name.removeprefix("l_").rstrip("_") if node.op == "placeholder" else "?" for node in nodes)


def repeat_kv(x, groups=2):
    batch, heads, tokens, dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, groups, tokens, dim).reshape(batch, heads * groups, tokens, dim)


def test_functional_sdpa():
    site = the_site(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), Q, K, V)
    assert (site.kind, site.obstacle, site.mask, site.is_causal) == ("sdpa", None, None, False)
    assert operands(site) == "qkv"


def test_sdpa_by_keyword():
    site = the_site(lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v), Q, K, V)
    assert operands(site) == "qkv"


def test_the_scale_is_the_default_unless_written():
    assert scale_of(the_site(F.scaled_dot_product_attention, Q, K, V)) == pytest.approx(1 / math.sqrt(8))
    written = the_site(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.7), Q, K, V)
    assert scale_of(written) == 0.7


def test_causal_sdpa():
    assert the_site(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), Q, K, V).is_causal


@pytest.mark.parametrize("mask", [BOOL_MASK, ADDITIVE_MASK, BOOL_MASK[0, 0]])
def test_masked_sdpa(mask):
    site = the_site(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), Q, K, V, mask)
    assert site.obstacle is None
    assert operands(site) == "qkvm"


def test_a_mask_of_another_rank_is_an_obstacle():
    site = the_site(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), Q, K, V, BOOL_MASK[:1, 0])
    assert "mask" in site.obstacle


def test_grouped_sdpa():
    site = the_site(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), Q, K2, V2)
    assert site.obstacle is None
    assert operands(site) == "qkv"


@pytest.mark.parametrize("repeat", [repeat_kv, lambda x: x.repeat_interleave(2, dim=1)])
def test_sdpa_on_repeated_kv_heads(repeat):
    site = the_site(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), Q, K2, V2)
    assert site.obstacle is None
    assert operands(site) == "qkv"


def test_active_dropout_is_an_obstacle():
    site = the_site(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), Q, K, V)
    assert site.obstacle == "attention dropout is active"


def test_three_dimensional_attention_is_an_obstacle():
    site = the_site(F.scaled_dot_product_attention, Q[0], K[0], V[0])
    assert "[batch, heads, tokens, dim]" in site.obstacle


def test_two_attentions_are_two_sites():
    sites = sites_of(
        lambda q, k, v: F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), k, v), Q, K, V
    )
    assert len(sites) == 2


# ---- the eager form ----------------------------------------------------------------------------------------


def scale_after(q, k, v, m):
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.5
    return torch.matmul(F.softmax(weights + m, dim=-1), v)


def scale_before(q, k, v, m):
    weights = torch.matmul(q * 0.5, k.transpose(-1, -2))
    return torch.matmul((weights + m).softmax(-1), v)


def scale_divided(q, k, v, m):
    weights = q @ k.mT / 2.0
    return (weights + m).softmax(dim=-1) @ v


def softmax_in_float32(q, k, v, m):
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.5
    weights = F.softmax(weights + m, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def inactive_dropout(q, k, v, m):
    weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.5 + m, dim=-1)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def in_place_mask(q, k, v, m):
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.5
    weights += m
    return torch.matmul(F.softmax(weights, dim=-1), v)


EAGER = [scale_after, scale_before, scale_divided, softmax_in_float32, inactive_dropout, in_place_mask]


@pytest.mark.parametrize("function", EAGER)
def test_the_eager_form(function):
    site = the_site(function, Q, K, V, ADDITIVE_MASK)
    assert (site.kind, site.obstacle) == ("eager", None)
    assert scale_of(site) == 0.5
    assert operands(site) == "qkvm"
    assert site.node.meta["example_value"].shape == (2, 4, 3, 8)


def test_the_eager_form_in_half_precision():
    half = [tensor.bfloat16() for tensor in (Q, K, V, ADDITIVE_MASK)]
    site = the_site(softmax_in_float32, *half)
    assert (site.kind, site.obstacle) == ("eager", None)


def test_the_eager_form_without_scale_or_mask():
    site = the_site(lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-1) @ v, Q, K, V)
    assert site.mask is None
    assert scale_of(site) == 1.0


def test_the_eager_form_on_repeated_kv_heads():
    site = the_site(lambda q, k, v, m: scale_after(q, repeat_kv(k), repeat_kv(v), m), Q, K2, V2, ADDITIVE_MASK)
    assert operands(site) == "qkvm"


def test_active_dropout_in_the_eager_form_is_an_obstacle():
    def function(q, k, v):
        weights = F.dropout(F.softmax(q @ k.transpose(2, 3), dim=-1), p=0.1, training=True)
        return weights @ v

    assert "dropout" in the_site(function, Q, K, V).obstacle


def test_returned_weights_are_an_obstacle():
    def function(q, k, v):
        weights = F.softmax(q @ k.transpose(2, 3), dim=-1)
        return weights @ v, weights

    assert "output_attentions" in the_site(function, Q, K, V).obstacle


def test_weights_returned_through_a_cast_are_an_obstacle():
    def function(q, k, v):
        weights = F.softmax(q @ k.transpose(2, 3), dim=-1, dtype=torch.float32).to(q.dtype)
        return weights @ v, weights

    assert "output_attentions" in the_site(function, Q, K, V).obstacle


@pytest.mark.parametrize(
    ("add", "mask"),
    [
        (lambda scores, mask: torch.add(scores, mask, alpha=2.0), ADDITIVE_MASK),
        (lambda scores, mask: scores + mask, BOOL_MASK),  # adds 0 or 1: not what a bool mask means to SDPA
        (lambda scores, mask: scores + mask, BOOL_MASK.long()),
    ],
)
def test_an_addition_that_is_no_additive_mask_is_not_taken_for_one(add, mask):
    sites = sites_of(lambda q, k, v, m: add(q @ k.transpose(2, 3), m).softmax(-1) @ v, Q, K, V, mask)
    assert all(site.obstacle is not None for site in sites)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-2) @ v,
        lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-1).square() @ v,
        lambda q, k, v: q.softmax(-1) @ k.transpose(2, 3) @ v,
        lambda q, k, v: (q @ k.transpose(2, 3)).sigmoid() @ v,
    ],
)
def test_what_only_resembles_attention_is_no_match(function):
    assert not sites_of(function, Q, K, V)


def test_flex_attention_is_recognised_and_says_what_to_do():
    from torch.nn.attention.flex_attention import flex_attention

    site = the_site(lambda q, k, v: flex_attention(q, k, v), Q, K, V)
    assert site.kind == "flex_attention"
    assert "attn_implementation='sdpa'" in site.obstacle
    assert operands(site) == "qkv"
