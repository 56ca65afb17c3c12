import math

import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.token_spans import Span, regrouped


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[list[int]], list[list[int]], int]:
    """Number of tokens, sizes where -1 stands for it, and two ways to group the sizes into dimensions."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    place = draw(st.integers(0, len(sizes)))
    sizes.insert(place, -1)

    def grouping() -> list[list[int]]:
        groups: list[list[int]] = [[]]
        for size in sizes:
            if groups[-1] and draw(st.booleans()):
                groups.append([])
            groups[-1].append(size)
        return groups

    return sizes, grouping(), grouping(), draw(st.integers(2, 12))


def shape(groups: list[list[int]], tokens: int) -> list[int]:
    return [math.prod(tokens if size == -1 else size for size in group) for group in groups]


def spans(groups: list[list[int]]) -> tuple[Span | None, ...]:
    return tuple(
        Span(sympy.Integer(math.prod(group[: group.index(-1)])), sympy.Integer(math.prod(group[group.index(-1) + 1 :])))
        if -1 in group
        else None
        for group in groups
    )


@settings(max_examples=200, deadline=None)
@given(made=views())
def test_a_view_moves_tokens_where_it_moves_their_entries(made):
    """Also where the number of tokens equals another size. Asserted on real data: every entry knows its token."""
    sizes, before, after, tokens = made
    old, new = (list(map(sympy.Integer, shape(groups, tokens))) for groups in (before, after))
    found = regrouped(spans(before), old, new, sympy.Integer(tokens))
    assert found is not None
    place = sizes.index(-1)
    flat = torch.arange(tokens).view([tokens if number == place else 1 for number in range(len(sizes))])
    entries = flat.expand([tokens if size == -1 else size for size in sizes]).reshape([int(size) for size in new])
    (dim,) = (number for number, span in enumerate(found) if span is not None)
    span = found[dim]
    along = torch.arange(int(new[dim])) // int(span.after) % tokens
    assert int(span.before) * tokens * int(span.after) == new[dim]
    assert torch.equal(
        entries, along.view([-1 if number == dim else 1 for number in range(len(new))]).expand_as(entries)
    )


def test_symbolic_sizes():
    batch, tokens = sympy.symbols("b t", positive=True, integer=True)
    width = sympy.Integer(24)
    flat = regrouped((None, Span(), None), [batch, tokens, width], [batch * tokens, width], tokens)
    assert flat == (Span(batch), None)
    assert regrouped(flat, [batch * tokens, width], [batch, tokens, 4, 6], tokens) == (None, Span(), None, None)


def test_tokens_split_over_two_dimensions_are_lost():
    sizes, split = ([sympy.Integer(size) for size in shape] for shape in ((1, 6, 4), (1, 2, 3, 4)))
    assert regrouped((None, Span(), None), sizes, split, sympy.Integer(6)) is None
