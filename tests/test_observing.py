"""What attention remembers equals what float64 attention of the dense model gives every token."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx import AVL, H2O, PackedTensor, PackPolicy, Partial, Scissorhands
from attnpack_fx.kernels import ops, ops_newest
from attnpack_fx.observing import observe
from attnpack_fx.passes.method import Method, Observation
from attnpack_fx.step_cost import attention_arguments
from tests.decoder import IMAGE, Decoder, next_ids, prompt
from tests.layer_inputs import GROUP, Mirror, mirrored
from tests.stored_inputs import DIM, HEADS, Way

STEPS = 3


def weights(model: Decoder, ids: Tensor, features: Tensor) -> list[list[Tensor]]:
    """Attention weights float64 `[B, Hq, Tq, T]` of every call and layer: the prompt, then single steps."""
    queries: list[list[Tensor]] = []
    hooks = [layer.query.register_forward_hook(lambda *a: queries[-1].append(a[2])) for layer in model.layers]
    calls, cache, given = [], None, (ids, features)
    for step in range(1 + STEPS):
        queries.append([])
        _, cache = model(*given, cache)
        found = []
        for query, (key, _) in zip(queries[-1], cache, strict=True):
            dim, new, total = key.shape[3], query.shape[1], key.shape[2]
            q = query.double().unflatten(2, (-1, dim)).transpose(1, 2)
            k = key.double().repeat_interleave(q.shape[1] // key.shape[1], 1)
            seen = torch.ones(new, total, dtype=torch.bool).tril(total - new)
            found.append((q @ k.mT * dim**-0.5).masked_fill(~seen, float("-inf")).softmax(-1))
        calls.append(found)
        given = next_ids(1, ids.shape[0], step), None
    for hook in hooks:
        hook.remove()
    return calls


def expected(calls: list[Tensor], asked: Observation, kv_heads: int, apart: bool, vision: Tensor) -> Tensor:
    """From the weights of one layer, what is remembered of every token `[B', T]`; vision bool `[T]`."""
    batch, _, _, total = calls[-1].shape
    of: dict[str, Tensor] = {
        kind: torch.zeros((batch, kv_heads if apart else 1, total), dtype=torch.float64)
        for kind in ("sum", "last", "pivotal")
    }
    for number, each in enumerate(calls):
        groups = each.unflatten(1, (kv_heads if apart else 1, -1)).mean(2)  # [B, H, Tq, T]
        queries, tokens = groups.shape[2:]
        first = 0 if number or asked.window is None else max(0, queries - asked.window)
        sight = torch.arange(tokens - queries + 1, tokens + 1)[:, None]
        of["sum"][..., :tokens] += groups[:, :, first:].sum(2)
        of["pivotal"][..., :tokens] += (groups >= 1 / sight)[:, :, first:].sum(2)
        of["last"] = torch.zeros_like(of["last"])
        of["last"][..., :tokens] = groups[:, :, -1]
    kinds = of[asked.kind], of[asked.text or asked.kind]
    return torch.where(vision, *kinds).flatten(0, 1)


METHODS = {
    "h2o": H2O(1.0),
    "h2o, together": H2O(1.0, heads="together"),
    "scissorhands": Scissorhands(1.0, window=5),
    "scissorhands, together": Scissorhands(1.0, window=5, heads="together"),
    "avl": AVL(kept=1.0, core=1.0),
}


@pytest.mark.parametrize("rank", [None, "full"])
@pytest.mark.parametrize("name", list(METHODS))
def test_scores_after_prefill_and_steps(name, rank, without_inductor):
    method: Method = METHODS[name]
    asked = method.observes
    assert asked is not None
    model = Decoder(layers=2)
    ids, features = prompt(batch=2)
    calls = weights(model, ids, features)
    compiled = torch.compile(model, backend="attnpack", options={"policy": policy_of(method, rank)})
    _, cache = compiled(ids, features)
    for step in range(STEPS + 1):
        for layer, (key, _) in enumerate(cache):
            assert isinstance(key, PackedTensor) and key.importance is not None
            apart = rank is None and "together" not in name and name != "avl"
            assert bool(key.held.heads) == apart
            vision = torch.zeros(key.shape[2], dtype=torch.bool)
            vision[: ids.shape[1]] = ids[0] == IMAGE
            wanted = expected([each[layer] for each in calls[: step + 1]], asked, 2, apart, vision)
            found = torch.zeros_like(wanted).scatter_(1, key.positions, key.importance.double())
            if "scissorhands" in name:
                assert (found != wanted).double().mean() < 0.02  # weights of exactly 1 / t may round either way
            else:
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        if step < STEPS:
            _, cache = compiled(next_ids(1, 2, step), cache=cache)


def policy_of(method: Method, rank: str | None) -> PackPolicy:
    return PackPolicy(vision_rank=rank, passes=(method,), strict=True)


def step(mirror: Mirror, queries: int = 1) -> Tensor:
    """A decode step: its observed weights reach the layer; float64 weights `[B', queries, T]` are returned."""
    mirror.append(queries)
    mirror.layer.key = mirror.layer.key.attended(mirror.layer.key.importance[:, : -queries or None])
    key, value, heads = mirror.layer.key, mirror.layer.value, mirror.heads
    query = torch.randn((mirror.key.shape[0], HEADS * GROUP, queries, DIM), generator=mirror.random)
    asked = query.unflatten(1, (heads, -1)).flatten(0, 1) if heads else query
    weighing = ops.attention_weights if queries == 1 else ops_newest.attention_each
    _, seen = weighing(*attention_arguments(asked, key.parts, value.parts))
    mirror.layer = replace(mirror.layer, observed=seen, added=queries)
    scores = query.double() @ mirror.dense("key").double().repeat_interleave(GROUP, 1).mT * DIM**-0.5
    kept = mirror.rows(mirror.kept).expand(-1, HEADS, -1).repeat_interleave(GROUP, 1)[:, :, None]
    dense = scores.masked_fill(~kept, float("-inf")).softmax(-1)
    return dense.unflatten(1, (heads or 1, -1)).mean(2).flatten(0, 1)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(
        [
            ({"padding": 2}, {}),
            ({"padding": 1, "packed_text": True}, {}),
            ({"angles": "rows"}, {}),
            ({"padding": 2}, {"factors": False, "apart": True}),
        ]
    ),
    method=st.sampled_from([H2O(1.0), Scissorhands(1.0), AVL(kept=1.0, core=1.0)]),
    queries=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_step_updates_what_is_known_of_the_tokens_that_are_left(kind, method, queries, seed):
    way, how = kind
    mirror, asked = mirrored(Way(seed=seed, **way), **how), method.observes
    assert asked is not None
    policy = PackPolicy(vision_rank=None if "factors" in how else 4, passes=(method,))
    mirror.append(2)
    mirror.evict(0.7)
    old = torch.cat([mirror.score.double(), mirror.score.new_zeros((len(mirror.score), queries))], 1)
    seen = step(mirror, queries)
    mirror.layer = replace(mirror.layer, number=0)
    observe(mirror.layer, policy)
    stored = mirror.kept.sum(1)[:, None]
    # No mask hides later tokens here, but that many were in sight of each.
    sight = stored[:, None] - torch.arange(queries - 1, -1, -1)[:, None]
    after = {
        "sum": old + seen.sum(1),
        "last": seen[:, -1],
        "pivotal": old + (seen * sight >= 1).sum(1),
    }
    expected = torch.where(mirror.vision, after[asked.kind], after[asked.text or asked.kind])
    positions = mirror.layer.key.positions
    found = torch.zeros_like(expected).scatter_add_(1, positions.clamp(min=0), mirror.layer.key.importance.double())
    wrong = ((found - expected).abs() > 1e-4) & mirror.kept
    assert wrong.double().mean() <= (0.02 if asked.kind == "pivotal" else 0)
    assert not mirror.layer.key.importance[positions < 0].any()


def test_nothing_is_remembered_where_nothing_was_asked():
    mirror = mirrored(Way())
    before = mirror.layer.key
    observe(mirror.layer, PackPolicy(vision_rank=4))
    assert mirror.layer.key is before


def test_the_average_that_falls_off():
    """AttentionPack's importance: `I <- w^Tq I + (1 - w^Tq) mean A`, of the first segment."""
    mirror = mirrored(Way())
    first = mirror.layer.key.held.counts[0]
    old = mirror.layer.key.importance[:, :first]
    mirror.layer.key = mirror.layer.key.attended(old)
    seen = torch.rand((2, mirror.layer.slots), generator=mirror.random)
    mirror.layer = replace(mirror.layer, observed=seen, added=2, prefill=False)
    observe(mirror.layer, PackPolicy(vision_rank=4, partial=Partial(momentum=0.5)))
    torch.testing.assert_close(mirror.layer.key.importance, 0.25 * old + 0.75 * seen[:, :first])
