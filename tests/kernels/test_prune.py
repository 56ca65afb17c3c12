import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from attnpack_fx.kernels import ops_prune, reference_prune

attnpack = torch.ops.attnpack

BATCH = 2


@st.composite
def prompts(draw: st.DrawFn) -> dict[str, Tensor | float | None]:
    """Queries, keys, hidden states, vision tokens and a mask; the second sample is padded where there is a mask."""
    tokens, heads, group, dim = draw(st.integers(3, 12)), draw(st.integers(1, 2)), draw(st.integers(1, 2)), 4
    torch.manual_seed(draw(st.integers(0, 999)))
    vision = torch.rand(BATCH, tokens) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    mask: Tensor | None = None
    kind = draw(st.sampled_from(["none", "bool", "additive", "plain"]))
    if kind != "none":
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if mask is not None and kind != "plain":
        padded, right = draw(st.integers(0, tokens - 2)), draw(st.booleans())
        real = torch.ones(BATCH, tokens, dtype=torch.bool)
        real[1, : 0 if right else padded] = False
        real[1, tokens - padded if right else tokens :] = False
        mask = mask & real[:, None, None]
        if kind == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return {
        "query": torch.randn(BATCH, heads * group, tokens, dim),
        "key": torch.randn(BATCH, heads, tokens, dim),
        "hidden": torch.randn(BATCH, tokens, 6),
        "vision": vision,
        "mask": mask,
        "scale": draw(st.sampled_from([0.5, 1.3])),
    }


def rows_of(rows: Tensor) -> list[list[int]]:
    """Positions of every sample; filler must stand at the end."""
    found = []
    for row in rows.tolist():
        count = sum(position >= 0 for position in row)
        assert all(position == -1 for position in row[count:])
        found.append(row[:count])
    assert max(map(len, found)) == rows.shape[1]
    return found


@settings(max_examples=40, deadline=None)
@given(made=prompts())
def test_last_row_scores(made):
    arguments = made["query"], made["key"], made["mask"], made["scale"]
    expected = reference_prune.last_row_scores(*arguments)
    torch.testing.assert_close(attnpack.last_row_scores(*arguments).double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(made=prompts(), share=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), ties=st.booleans())
def test_kept_rows(made, share, ties):
    scores = torch.rand(made["vision"].shape)
    scores = (3 * scores).round() if ties else scores
    rows = attnpack.kept_rows(scores, made["vision"], made["mask"], share)
    assert rows_of(rows) == reference_prune.kept_rows(scores, made["vision"], made["mask"], share)


def test_the_last_token_stays():
    vision = torch.tensor([[False, True, True, True], [False, True, True, False]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()[:, None, None]  # the second is padded at its end
    assert rows_of(attnpack.kept_rows(torch.zeros(2, 4), vision, mask, 0.0)) == [[0, 3], [0, 2]]


@settings(max_examples=40, deadline=None)
@given(made=prompts(), window=st.integers(1, 5))
def test_pooling_averages_groups(made, window):
    hidden = made["hidden"]
    rows, group = attnpack.pooled_rows(made["vision"], made["mask"], window)
    merged = attnpack.merge_tokens(hidden, rows, group, torch.ones(group.shape))
    for sample, groups in enumerate(reference_prune.pooled_groups(made["vision"], made["mask"], window)):
        assert rows_of(rows)[sample] == [members[0] for members in groups]
        expected = torch.stack([hidden[sample, members].double().mean(0) for members in groups])
        torch.testing.assert_close(merged[sample, : len(groups)].double(), expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(made=prompts(), strongest=st.sampled_from([0.1, 0.6, 1.0]))
def test_bidirectional_scores(made, strongest):
    arguments = made["query"], made["key"], made["vision"], made["mask"], made["scale"], strongest
    attention, raw = attnpack.bidirectional_scores(*arguments)
    expected_attention, expected_raw = reference_prune.bidirectional_scores(*arguments)
    torch.testing.assert_close(attention.double(), expected_attention, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(raw.double(), expected_raw, atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(made=prompts(), most=st.integers(0, 12), threshold=st.sampled_from([-1.0, 0.0, 0.4, 1.0]))
def test_merged_rows(made, most, threshold):
    hidden, vision, mask = made["hidden"], made["vision"], made["mask"]
    attention, raw = torch.rand(vision.shape), torch.randn(vision.shape)
    rows, group, weight = attnpack.merged_rows(hidden, attention, raw, vision, mask, most, threshold)
    expected = reference_prune.merged_rows(hidden, attention, raw, vision, mask, most, threshold)
    assert rows_of(rows) == [positions for positions, _ in expected]
    for sample, (_, owner) in enumerate(expected):
        assert {t: into for t, into in enumerate(group[sample].tolist()) if into >= 0} == owner
        seen = reference_prune.prunable(vision, mask, sample, BATCH)
        for t, strength in reference_prune.normalised(raw[sample].tolist(), seen).items():
            assert float(weight[sample, t]) == pytest.approx(strength, abs=1e-5)
    merged = attnpack.merge_tokens(hidden, rows, group, weight)
    torch.testing.assert_close(merged.double(), reference_prune.merge_tokens(hidden, rows, group, weight))


def test_similar_tokens_are_merged_by_weight_and_another_is_salvaged():
    hidden = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [5.0, 5.0]]])
    vision = torch.tensor([[True, True, True, False]])
    attention, raw = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[4.0, 2.0, 0.0, 0.0]])
    rows, group, weight = attnpack.merged_rows(hidden, attention, raw, vision, None, 2, 0.9)
    assert rows.tolist() == [[0, 2, 3]]
    assert group.tolist() == [[0, 0, 2, 3]]
    merged = attnpack.merge_tokens(hidden, rows, group, weight)
    expected = (hidden[0, 0] + 0.5 * hidden[0, 1]) / 1.5
    torch.testing.assert_close(merged[0, 0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged[0, 1:], hidden[0, 2:])


ROWS = torch.tensor([[0, 2, 3, 5], [1, 4, -1, -1]])


def test_filler_copies_the_last_row_and_writes_nowhere():
    x = torch.randn(2, 6, 3)
    part = attnpack.gather_tokens(x, ROWS, 1)
    assert torch.equal(part[0], x[0, [0, 2, 3, 5]])
    assert torch.equal(part[1], x[1, [1, 4, 4, 4]])
    back = attnpack.scatter_tokens(x, ROWS, part + 1)
    expected = x.clone()
    expected[0, [0, 2, 3, 5]] += 1
    expected[1, [1, 4]] += 1
    assert torch.equal(back, expected)


def test_one_table_serves_all_samples_and_any_dimension_may_hold_the_tokens():
    table = torch.randn(1, 3, 6, 2)
    out = attnpack.gather_tokens(table, ROWS, 2)
    assert torch.equal(out[0], table[0][:, [0, 2, 3, 5]])
    assert torch.equal(out[1], table[0][:, [1, 4, 4, 4]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_nobody_attends_to_filler(dtype):
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    if dtype != torch.bool:
        mask = torch.zeros(6, 6).masked_fill(~mask, torch.finfo(dtype).min)
    out = attnpack.gather_mask(mask, ROWS)
    allowed = out if dtype == torch.bool else out == 0
    assert out.shape == (2, 1, 4, 4)
    assert torch.equal(allowed[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert not allowed[1, 0, :, 2:].any()
    assert allowed[1, 0, 1:, :2].all()
    padding = attnpack.gather_mask(torch.ones(2, 1, 1, 6, dtype=torch.bool), ROWS)
    assert padding.tolist() == [[[[True] * 4]], [[[True, True, False, False]]]]


def test_random_scores_are_those_of_the_seed():
    like = torch.zeros(2, 50)
    first, again, other = (attnpack.random_scores(like, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.unique().numel() > 90


@pytest.mark.parametrize("mask", [None, torch.ones(7, 7, dtype=torch.bool).tril(), torch.zeros(2, 1, 7, 7)])
def test_schemas_and_shapes(mask):
    query, key, hidden = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 7, 6)
    vision = torch.tensor(
        [[False, True, True, True, True, False, False], [False, True, True, False, False, False, False]]
    )
    scores = torch.rand(2, 7)
    rows = attnpack.kept_rows(scores, vision, mask, 0.5)
    opcheck(attnpack.last_row_scores.default, (query, key, mask, 0.3))
    opcheck(attnpack.kept_rows.default, (scores, vision, mask, 0.5))
    opcheck(attnpack.pooled_rows.default, (vision, mask, 2))
    opcheck(attnpack.bidirectional_scores.default, (query, key, vision, mask, 0.3, 1.0))
    opcheck(attnpack.merged_rows.default, (hidden, scores, scores, vision, mask, 3, 0.2))
    opcheck(attnpack.gather_tokens.default, (hidden, rows, 1))
    opcheck(attnpack.gather_tokens.default, (query[:1], rows, 2))
    opcheck(attnpack.scatter_tokens.default, (hidden, rows, attnpack.gather_tokens(hidden, rows, 1)))
    opcheck(attnpack.random_scores.default, (scores, 1))
    group = attnpack.pooled_rows(vision, mask, 2)
    opcheck(attnpack.merge_tokens.default, (hidden, *group, torch.ones(2, 7)))
    if mask is not None:
        opcheck(attnpack.gather_mask.default, (mask, rows))


@pytest.mark.parametrize("operator", ["gather_tokens", "scatter_tokens", "merge_tokens"])
def test_a_gradient_is_refused(operator):
    x = torch.randn(2, 6, 3, requires_grad=True)
    calls = {
        "gather_tokens": lambda: ops_prune.gather_tokens(x, ROWS, 1),
        "scatter_tokens": lambda: ops_prune.scatter_tokens(x, ROWS, torch.randn(2, 4, 3)),
        "merge_tokens": lambda: ops_prune.merge_tokens(x, ROWS, torch.zeros(2, 6).long(), torch.ones(2, 6)),
    }
    with pytest.raises(RuntimeError, match="not differentiable"):
        calls[operator]().sum().backward()
