import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.method import Stage
from attnpack_fx.passes.minicache import MiniCache

SEEDS = st.integers(0, 2**16)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
#: Rounding of a unit row.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 5e-3}


def layers(seed, batch=2, tokens=9, heads=3, dim=8, filler=0, dtype=torch.float64):
    """Rows of two layers at all angles, some equal, some with a zero row in one layer; filler rows are zero."""
    random = torch.Generator().manual_seed(seed)
    lower = torch.randn((batch, tokens, heads, dim), generator=random, dtype=torch.float64)
    noise = torch.randn(lower.shape, generator=random, dtype=torch.float64)
    mixed = torch.rand((batch, tokens, 1, 1), generator=random, dtype=torch.float64)
    upper = 3 * (mixed * lower + (1 - mixed) * noise)
    upper[:, ::5] = 2 * lower[:, ::5]
    upper[:, 1::7, 0] = 0
    for x in (lower, upper):
        x[0, tokens - filler :] = 0
    return lower.to(dtype), upper.to(dtype)


def angles(lower, upper):
    """Of every row that both layers have: `[b][t]` lists, by head, None without."""
    found = []
    for one, other in zip(lower.double().flatten(0, 2), upper.double().flatten(0, 2), strict=True):
        lengths = float(one.norm()) * float(other.norm())
        found.append(math.acos(max(-1.0, min(1.0, float(one @ other) / lengths))) if lengths else None)
    batch, tokens, heads, _ = lower.shape
    rows = [found[start : start + heads] for start in range(0, len(found), heads)]
    return [rows[b * tokens : (b + 1) * tokens] for b in range(batch)]


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, t=st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]), filler=st.integers(0, 4), dtype=DTYPES)
def test_directions_and_lengths(seed, t, filler, dtype):
    lower, upper = layers(seed, filler=filler, dtype=dtype)
    merged = MiniCache(t=t).merge(lower, upper)
    assert merged.direction.dtype == dtype and merged.direction.shape == lower.shape
    for norm, rows in ((merged.lower_norm, lower), (merged.upper_norm, upper)):
        assert norm.dtype == torch.float32
        assert torch.allclose(norm.double(), rows.double().norm(dim=-1), rtol=1e-6)
    for b, sample in enumerate(angles(lower, upper)):
        for token, heads in enumerate(sample):
            for head, angle in enumerate(heads):
                u, v = (x[b, token, head].double() for x in (lower, upper))
                u, v = u / u.norm().clamp(min=1e-300), v / v.norm().clamp(min=1e-300)
                if angle is None:
                    expected = u + v
                elif angle < 1e-4:
                    expected = (1 - t) * u + t * v
                else:
                    expected = (math.sin((1 - t) * angle) * u + math.sin(t * angle) * v) / math.sin(angle)
                error = (merged.direction[b, token, head].double() - expected).norm()
                assert error <= TOLERANCE[dtype], (angle, error)


@settings(deadline=None, max_examples=80)
@given(
    seed=SEEDS,
    gamma=st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]),
    retention=st.sampled_from(["distinct", "literal"]),
    heads=st.integers(1, 4),
    filler=st.integers(0, 4),
)
def test_who_is_retained(seed, gamma, retention, heads, filler):
    lower, upper = layers(seed, heads=heads, filler=filler)
    actual = MiniCache(gamma=gamma, retention=retention).merge(lower, upper).retained
    for b, sample in enumerate(angles(lower, upper)):
        distance = {}
        for token, rows in enumerate(sample):
            known = [angle for angle in rows if angle is not None]
            if known:
                distance[token] = sum(known) / len(known)
        least, most = min(distance.values()), max(distance.values())
        for token in range(lower.shape[1]):
            if token not in distance or gamma == 0:
                assert not actual[b, token]
                continue
            if gamma == 1:
                assert actual[b, token]
                continue
            far = distance[token] - (most - gamma * (most - least))
            near = least + gamma * (most - least) - distance[token]
            margin = far if retention == "distinct" else near
            assert abs(margin) < 1e-6 or bool(actual[b, token]) == (margin > 0)


def test_the_two_readings_retain_opposite_tokens():
    lower, upper = layers(0, batch=1, tokens=40)
    distance = torch.tensor([sum(a for a in rows if a is not None) for rows in angles(lower, upper)[0]])
    distinct, literal = (MiniCache(retention=name).merge(lower, upper).retained[0] for name in ("distinct", "literal"))
    assert 0 < distinct.sum() < 10 and 0 < literal.sum() < 20
    assert distance[distinct].min() > distance[literal].max()


def test_keeping_what_differs_most_loses_less():
    lower, upper = layers(3, batch=1, tokens=60)

    def lost(retention):
        merged = MiniCache(gamma=0.3, retention=retention).merge(lower, upper)
        missed = 0.0
        for rows, norm in ((lower, merged.lower_norm), (upper, merged.upper_norm)):
            missed += float((rows - norm[..., None] * merged.direction)[~merged.retained].square().sum())
        return missed

    assert lost("distinct") < 0.7 * lost("literal")


def test_equal_directions_are_merged_without_loss():
    lower = torch.randn(2, 5, 2, 8)
    merged = MiniCache().merge(lower, 2.5 * lower)
    assert torch.allclose(merged.lower_norm[..., None] * merged.direction, lower, atol=1e-6)
    assert torch.allclose(merged.upper_norm[..., None] * merged.direction, 2.5 * lower, atol=1e-6)


@pytest.mark.parametrize(("t", "sign"), [(0.4, 1), (0.5, 1), (0.6, -1)])
def test_opposite_rows_take_the_nearer_layer(t, sign):
    lower = torch.randn(1, 3, 2, 8)
    merged = MiniCache(t=t).merge(lower, -lower)
    assert torch.allclose(merged.direction, sign * torch.nn.functional.normalize(lower, dim=-1), atol=1e-6)


def test_a_sample_is_merged_as_if_alone():
    lower, upper = layers(1, batch=3, filler=3)
    together = MiniCache(gamma=0.3).merge(lower, upper)
    for b in range(3):
        alone = MiniCache(gamma=0.3).merge(lower[b : b + 1], upper[b : b + 1])
        assert torch.equal(alone.direction[0], together.direction[b])
        assert torch.equal(alone.retained[0], together.retained[b])


def test_rotary_embedding_may_come_before_or_after():
    lower, upper = layers(2, batch=1)
    turn = torch.linalg.qr(torch.randn(9, 1, 8, 8, dtype=torch.float64)).Q
    lower_turned, upper_turned = ((x[..., None, :] @ turn).squeeze(-2) for x in (lower, upper))
    before, after = MiniCache().merge(lower, upper), MiniCache().merge(lower_turned, upper_turned)
    assert torch.allclose((before.direction[..., None, :] @ turn).squeeze(-2), after.direction, atol=1e-7)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    lower, upper = layers(0, tokens=tokens)
    merged = MiniCache().merge(lower, upper)
    assert merged.direction.shape == lower.shape and merged.retained.shape == (2, tokens)


def test_which_layers_are_pairs():
    assert MiniCache().pairs(32) == [(lower, lower + 1) for lower in range(16, 32, 2)]
    assert MiniCache().pairs(5) == [(3, 4)]
    assert MiniCache().pairs(7) == [(4, 5)]
    assert MiniCache(first=0).pairs(4) == [(0, 1), (2, 3)]
    assert MiniCache(first=1).pairs(32) == MiniCache().pairs(1) == MiniCache().pairs(2) == []


def test_what_is_due():
    rule = MiniCache(residual=16)
    assert [rule.due(rows, True) for rows in (0, 5, 100)] == [0, 5, 100]
    assert [rule.due(rows, False) for rows in (0, 15, 16, 31, 40)] == [0, 0, 16, 16, 32]


def test_what_it_is():
    assert MiniCache.stages == {Stage.MERGE} and MiniCache().observes is None
    assert MiniCache() == MiniCache(0.5, 0.5, 0.05, "distinct", 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first": 1.5}, r"MiniCache\(first=1.5\): expected a number in \[0, 1\]"),
        ({"t": -0.1}, r"MiniCache\(t=-0.1\): expected a number in \[0, 1\]"),
        ({"gamma": float("nan")}, r"MiniCache\(gamma=nan\): expected a number in \[0, 1\]"),
        ({"retention": "all"}, r"MiniCache\(retention='all'\): expected one of 'distinct', 'literal'"),
        ({"residual": 0}, r"MiniCache\(residual=0\): expected a whole number of at least 1"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        MiniCache(**fields)
