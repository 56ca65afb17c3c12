"""What queries attend to, against the float64 reference."""

import importlib
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference

from ..inputs import DTYPES, SEEDS, relative_error

attnpack = torch.ops.attnpack
#: The module, whose name in the package is the function's.
MODULE = importlib.import_module("attnpack_fx.kernels.aten.observe")
MASKS = ("none", "causal", "bool", "two-dimensional", "additive", "lowest number", "of every head", "one column")


@dataclass(frozen=True)
class Prompt:
    """Everything that decides the inputs; padding: tokens of the first sample that are none, left or right."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 2
    group: int = 2
    tokens: int = 9
    past: int = 0
    mask: str = "bool"
    padding: int = 2
    side: str = "left"
    given: bool = True


def arguments(case: Prompt) -> tuple:
    """`query, key, mask, scale, is_causal, real`; queries of padding are NaN where `real` names them."""
    random = torch.Generator().manual_seed(case.seed)
    heads, queries = case.heads * case.group, case.tokens - case.past

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    query, key = draw(case.batch, heads, queries, 8), draw(case.batch, case.heads, case.tokens, 8)
    real = torch.ones((case.batch, case.tokens), dtype=torch.bool)
    real[0, : case.padding] = False
    if case.side == "right":
        real = real.flip(1)
    if case.given:
        query = query.masked_fill(~real[:, None, case.past :, None], torch.nan)
    sight = torch.ones((queries, case.tokens), dtype=torch.bool).tril(case.past)
    seen = sight & real[:, None, None]
    mask = None
    if case.mask == "two-dimensional":
        mask = sight
    elif case.mask == "one column":
        mask = real[:, None, case.past :, None]
    elif case.mask == "of every head":
        mask = seen & (torch.rand((case.batch, heads, queries, case.tokens), generator=random) < 0.7)
    elif case.mask == "bool":
        mask = seen
    elif case.mask in ("additive", "lowest number"):
        low = -torch.inf if case.mask == "additive" else torch.finfo(case.dtype).min
        mask = draw(case.batch, 1, queries, case.tokens).to(case.dtype).masked_fill(~seen, low)
    scale, is_causal = 0.4, case.mask == "causal"
    return query.to(case.dtype), key.to(case.dtype), mask, scale, is_causal, real if case.given else None


CASES = st.builds(
    Prompt,
    seed=SEEDS,
    dtype=DTYPES,
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    tokens=st.integers(4, 20),
    past=st.integers(0, 3),
    mask=st.sampled_from(MASKS),
    padding=st.integers(0, 4),
    side=st.sampled_from(["left", "right"]),
    given=st.booleans(),
).map(lambda case: case if case.mask != "causal" else Prompt(**{**vars(case), "past": 0}))


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(MODULE, "SCORE_BYTES", 4 * 60)


@settings(deadline=None, max_examples=60)
@given(case=CASES, statistic=st.sampled_from(["sum", "last"]), window=st.sampled_from([0, 1, 3, 50]))
def test_sums_and_last_rows(case, statistic, window):
    *inputs, real = arguments(case)
    actual = attnpack.observe(*inputs, statistic, window, real)
    expected = reference.observe(*inputs, statistic, window, real)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape == (case.batch, case.heads, case.tokens)
    # Half precision too: what is rounded is the input alone.
    assert relative_error(actual, expected) < 1e-5


@settings(deadline=None, max_examples=40)
@given(case=CASES, cap=st.sampled_from([0.0, 0.5]), samples=st.sampled_from([0, 1, None]))
def test_soft_caps_and_sinks(case, cap, samples):
    *inputs, real = arguments(case)
    heads, batch = case.heads * case.group, case.batch if samples is None else samples
    sinks = torch.linspace(-1, 1, batch * heads).view(batch, heads) if batch else None
    for statistic in ("sum", "last"):
        actual = attnpack.observe(*inputs, statistic, 3, real, cap, sinks)
        assert relative_error(actual, reference.observe(*inputs, statistic, 3, real, cap, sinks)) < 1e-5
    rows = attnpack.observe_newest(*inputs, False, False, cap, sinks)
    plain = attnpack.observe(*inputs, "sum", 0, None, cap, sinks)
    torch.testing.assert_close(rows.sum(2), plain, atol=1e-5, rtol=1e-5, equal_nan=True)


@settings(deadline=None, max_examples=60)
@given(case=CASES, window=st.sampled_from([0, 1, 3, 50]))
def test_pivotal_counts(case, window):
    *inputs, real = arguments(case)
    actual = attnpack.observe(*inputs, "pivotal", window, real)
    weights, sight = reference.observed(*inputs, real)
    for sample in range(case.batch):
        rows = [row for row in range(weights.shape[2]) if sight[sample, 0, row]][-window:]
        found = weights[sample, :, rows] * sight[sample, :, rows, None]
        # Weights of 1 / t within rounding may count or not.
        least, most = ((found >= 1 + margin).sum(1) for margin in (1e-5, -1e-5))
        assert (least <= actual[sample]).all() and (actual[sample] <= most).all()
    exact = reference.observe(*inputs, "pivotal", window, real)
    assert (actual - exact).abs().sum() <= 0.05 * max(exact.sum(), 20)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("statistic", ["sum", "last", "pivotal", "pivotal together"])
@pytest.mark.parametrize("given", [True, False])
def test_tiles_make_no_difference(mask, statistic, given):
    *inputs, real = arguments(Prompt(seed=1, mask=mask, given=given, tokens=17))
    for window in (0, 4):
        actual = attnpack.observe(*inputs, statistic, window, real)
        assert relative_error(actual, reference.observe(*inputs, statistic, window, real)) < 1e-5


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.usefixtures("tiles")
def test_the_newest_queries_each_by_itself(mask, many, monkeypatch):
    """What all but some of them observed is the sum of all less theirs; the last row is the newest's."""
    *inputs, _ = arguments(Prompt(seed=2, mask=mask, padding=0 if mask == "causal" else 2, given=False, tokens=17))
    newest = 30 if many else 4
    rows = MODULE.observe_newest(*inputs, False, False, newest)
    assert rows.shape == (2, 2, min(newest, 17), 17)
    assert relative_error(rows[:, :, -1], attnpack.observe(*inputs, "last", 0, None)) < 1e-5
    assert relative_error(rows[:, :, -3:].sum(2), attnpack.observe(*inputs, "sum", 3, None)) < 1e-5
    together = MODULE.observe_newest(*inputs, False, True, newest)
    assert relative_error(together, rows.mean(1, keepdim=True)) < 1e-5
    for statistic, apart in (("pivotal", False), ("pivotal together", True)):
        counts = MODULE.observe_newest(*inputs, True, apart, newest)
        assert (
            relative_error(counts[:, :, -3:].sum(2).expand(2, 2, 17), attnpack.observe(*inputs, statistic, 3, None))
            < 1e-5
        )


def test_no_tile_is_larger_than_asked_for(monkeypatch):
    limit, sizes = 4 * 2 * 4 * 40 * 3, []
    monkeypatch.setattr(torch, "bmm", lambda a, b: recorded(sizes, a, b))
    monkeypatch.setattr(MODULE, "SCORE_BYTES", limit)
    *inputs, real = arguments(Prompt(tokens=40, mask="causal", padding=0))
    attnpack.observe(*inputs, "sum", 0, real)
    assert len(sizes) == 2 * math.ceil(40 / 3) and max(sizes) * 4 <= limit


def recorded(sizes, a, b):
    out = a @ b
    sizes.append(out.numel())
    return out


def test_every_counting_query_spends_one_unit_of_attention():
    *inputs, real = arguments(Prompt(mask="bool", padding=3, tokens=12))
    total = attnpack.observe(*inputs, "sum", 0, real).sum(-1)
    assert torch.allclose(total, torch.tensor([[9.0], [12.0]]).expand(2, 2))
    assert torch.allclose(attnpack.observe(*inputs, "sum", 5, real).sum(-1), torch.tensor(5.0))
    assert torch.allclose(attnpack.observe(*inputs, "last", 0, real).sum(-1), torch.tensor(1.0))


def test_uniform_attention_finds_every_token_in_sight_pivotal():
    query, key = torch.zeros(1, 2, 8, 4), torch.randn(1, 1, 8, 4)
    counts = attnpack.observe(query, key, None, 1.0, True, "pivotal", 0, None)
    assert counts[0, 0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]


def test_weights_are_those_of_scaled_dot_product_attention():
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    eye = torch.eye(6).expand(1, 2, 6, 6)
    attended = F.scaled_dot_product_attention(query, key, eye, is_causal=True, enable_gqa=True)
    expected = attended.unflatten(1, (2, 2)).mean(2).sum(2)
    assert torch.allclose(attnpack.observe(query, key, None, 8**-0.5, True, "sum", 0, None), expected, atol=1e-6)


@pytest.mark.parametrize(("queries", "tokens"), [(0, 5), (0, 0)])
@pytest.mark.parametrize("statistic", ["sum", "last", "pivotal", "pivotal together"])
def test_nothing_to_observe(queries, tokens, statistic):
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 2, tokens, 8)
    out = attnpack.observe(query, key, None, 1.0, False, statistic, 3, None)
    assert torch.equal(out, torch.zeros(2, 2, tokens))


def test_a_sample_of_padding_alone_scores_nothing():
    *inputs, _ = arguments(Prompt(padding=0))
    real = torch.tensor([[False] * 9, [True] * 9])
    for statistic in ("sum", "last", "pivotal", "pivotal together"):
        out = attnpack.observe(*inputs, statistic, 4, real)
        assert out[0].abs().sum() == 0 and out[1].sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statistic": "mean"}, "statistic is 'mean', expected one of"),
        ({"window": -1}, "window is -1, expected"),
        ({"is_causal": True}, "is_causal with 3 queries of 5 keys: give"),
        ({"is_causal": True, "mask": torch.ones(3, 5, dtype=torch.bool)}, "is_causal with a mask: give"),
        ({"key": torch.randn(1, 1, 2, 8)}, "3 queries and 2 keys"),
    ],
)
def test_what_cannot_be_observed(changes, message):
    given = {
        "query": torch.randn(1, 2, 3, 8),
        "key": torch.randn(1, 1, 5, 8),
        "mask": None,
        "scale": 1.0,
        "is_causal": False,
        "statistic": "sum",
        "window": 0,
        "real": None,
    }
    with pytest.raises(ValueError, match=message):
        attnpack.observe(**given | changes)


@pytest.mark.filterwarnings("error:attnpack")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_prefill_that_is_observed_has_the_gradient_it_had(compiled):
    query, key = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8, requires_grad=True)

    def attend(query, key, observed):
        out = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        return out, attnpack.observe(query, key, None, 0.3, True, "sum", 0, None) if observed else None

    def gradients(function, observed):
        out, seen = function(query, key, observed)
        assert seen is None or not seen.requires_grad
        return torch.autograd.grad(out.square().sum(), (query, key))

    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    for actual, expected in zip(gradients(run, True), gradients(attend, False), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("statistic", ["sum", "last", "pivotal", "pivotal together"])
def test_operator(dtype, mask, statistic):
    *inputs, real = arguments(Prompt(dtype=dtype, mask=mask, given=mask != "additive"))
    torch.library.opcheck(attnpack.observe.default, (*inputs, statistic, 3, real))
