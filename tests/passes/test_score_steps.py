"""Attention written out in any known form is softmax(scale q k^T + mask) v of the parts found in it."""

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from attnpack_fx.kernels.reference import attended, capped
from attnpack_fx.passes.find_attention import find_attention, scale_of
from tests.passes.capture import capture

B, H, TQ, T, D = 2, 4, 3, 5, 8
LEAST = torch.finfo(torch.float32).min
SEEN = torch.ones(B, 1, TQ, T, dtype=torch.bool).tril(T - TQ)
SEEN[1, :, :, 0] = False  # padding
ADDED = torch.zeros(B, 1, TQ, T).masked_fill(~SEEN, LEAST)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, H, TQ, D), "k": (B, H, T, D), "v": (B, H, T, D), "bias": (1, H, 1, T)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def folded(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(B * H, -1, x.shape[-1])


def bloom(q, k, v, bias):
    bias = bias.expand(B, -1, -1, -1).reshape(B * H, 1, T)
    scores = bias.baddbmm(batch1=folded(q), batch2=folded(k).transpose(-1, -2), beta=1.0, alpha=0.3)
    weights = (scores.view(B, H, TQ, -1) + ADDED).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(B * H, TQ, -1), folded(v))


def bloom_with_beta(q, k, v, bias):
    bias = bias.expand(B, -1, -1, -1).reshape(B * H, 1, T)
    scores = torch.baddbmm(bias, folded(q), folded(k).transpose(1, 2), beta=0.5, alpha=0.3)
    return torch.bmm((scores.view(B, H, TQ, -1) + ADDED).softmax(-1).view(B * H, TQ, -1), folded(v))


def mpt(q, k, v, bias):
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.3 + bias[0]
    scores = scores.masked_fill(~SEEN, LEAST)
    return torch.matmul(torch.nn.functional.softmax(scores.float(), dim=-1).to(v.dtype), v)


def gpt_neo(q, k, v, bias):
    scores = torch.where(SEEN, torch.matmul(q, k.transpose(-1, -2)), torch.tensor(LEAST))
    return torch.matmul(torch.nn.functional.softmax(scores + ADDED, dim=-1), v)


def xglm(q, k, v, bias):
    scores = torch.bmm(folded(q * 0.3), folded(k).transpose(1, 2)).view(B, H, TQ, T) + ADDED
    scores = torch.max(scores, torch.full((), LEAST)).view(B * H, TQ, T)
    return torch.bmm(torch.nn.functional.softmax(scores, dim=-1), folded(v))


def added_before_the_scale(q, k, v, bias):
    return ((q @ k.transpose(2, 3) + bias) * 0.5 + ADDED).softmax(-1) @ v


def bias_first(q, k, v, bias):
    return (bias + q @ k.mT / 2 + ADDED).softmax(-1) @ v


def masked_alone(q, k, v, bias):
    return (q @ k.mT).masked_fill(~SEEN, float("-inf")).softmax(-1) @ v


def gemma2(q, k, v, bias):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = torch.tanh(scores / 1.5) * 1.5 + ADDED
    return torch.matmul(torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def gpt_oss(q, k, v, bias):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + ADDED
    sinks = bias[0, :, 0, 0].reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    joined = torch.cat([scores, sinks], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return torch.matmul(torch.nn.functional.softmax(joined, dim=-1)[..., :-1], v)


def capped_beside_a_bias_and_sinks(q, k, v, bias):
    scores = (q @ k.mT).div(2).tanh().mul(4) + bias + ADDED
    return torch.cat([scores, bias[:, :, :, :1].expand(B, H, TQ, 1)], -1).softmax(-1)[:, :, :, :-1] @ v


FORMS = [
    bloom,
    bloom_with_beta,
    mpt,
    gpt_neo,
    xglm,
    added_before_the_scale,
    bias_first,
    masked_alone,
    gemma2,
    gpt_oss,
    capped_beside_a_bias_and_sinks,
]


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_are_those_of_what_is_computed(form):
    given = inputs()
    state = capture(form, *given.values())
    assert find_attention(state) == 1
    (site,) = state.sites
    assert site.obstacle is None and site.folded == (len(site.node.meta["example_value"].shape) == 3)
    state.graph.erase_node(state.output)
    state.graph.output([site.query, site.key, site.value, site.mask, site.padding, site.sinks])
    query, key, value, mask, padding, sinks = GraphModule({}, state.graph)(*_in_order(state, given))
    weights = attended(capped(scale_of(site) * query.double() @ key.mT.double(), site.cap) + mask, sinks).float()
    expected = form(**given)
    torch.testing.assert_close((weights @ value).reshape(expected.shape), expected)
    # What hides padding is the same for all heads, or there is nothing but it.
    hides = mask if padding is None else padding
    assert hides.shape[1] == 1
    seen = hides if hides.dtype == torch.bool else hides > LEAST / 2
    assert torch.equal(seen.any(2)[:, 0], SEEN.any(2)[:, 0])


def _in_order(state: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Arguments of the graph, in its order: those of the function, and the masks it closes over."""
    found = []
    for node in state.graph.nodes:
        if node.op == "placeholder":
            name = node.name.removeprefix("l_").strip("_")
            found.append(given[name] if name in given else {"g_seen": SEEN, "g_added": ADDED}[name])
    return found


@pytest.mark.parametrize(
    "form",
    [
        lambda q, k, v, bias: (torch.tanh(q @ k.mT / 30 + bias) * 30).softmax(-1) @ v,
        lambda q, k, v, bias: (torch.tanh(q @ k.mT) * -30).softmax(-1) @ v,
        lambda q, k, v, bias: (torch.tanh(torch.tanh(q @ k.mT) * 2) * -30).softmax(-1) @ v,
        lambda q, k, v, bias: torch.cat([q @ k.mT, q[:, :, :, :1]], -1).softmax(-1)[..., :-1] @ v,
        lambda q, k, v, bias: torch.cat([q @ k.mT, bias[:, :, :, :1].expand(B, H, TQ, 1)], -1).softmax(-1)[..., 1:] @ v,
        lambda q, k, v, bias: (
            torch.cat([q @ k.mT, bias[:, :, :, :2].expand(B, H, TQ, 2)], -1).softmax(-1)[..., :-2] @ v
        ),
        lambda q, k, v, bias: torch.max(q @ k.mT, bias).softmax(-1) @ v,
        lambda q, k, v, bias: (q @ k.mT * bias).softmax(-1) @ v,
        lambda q, k, v, bias: torch.add(q @ k.mT, bias, alpha=2.0).softmax(-1) @ v,
    ],
    ids=[
        "capped with a bias",
        "capped at less than nothing",
        "capped twice",
        "a sink of every query",
        "a sink that is kept",
        "two sinks",
        "maximum",
        "weighed",
        "add with alpha",
    ],
)
def test_what_is_no_scale_and_mask_is_not_taken_for_one(form):
    state = capture(form, *inputs().values())
    assert find_attention(state) == 0
    assert len(state.unknown) == 1
