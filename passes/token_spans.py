"""Where tokens are in the dimensions of a tensor, and what stands for their new number until a rewrite is written."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node


@dataclass(frozen=True)
class Tokens:
    """The new number of tokens, times the batch size if `batched`, times `factor`."""

    factor: int = 1
    batched: bool = False


@dataclass(frozen=True)
class Gathered:
    """`node`, leading dimensions of one added up to `rank`, with its tokens in `dims` gathered."""

    node: Node
    dims: tuple[int, ...]
    rank: int


@dataclass(frozen=True)
class GatheredMask:
    """The attention mask `node`, its rows and columns gathered; None: that of filler alone, `[B, 1, 1, T']`."""

    node: Node | None


@dataclass(frozen=True)
class Span:
    """A dimension of `before * T * after` entries, tokens in between."""

    before: sympy.Expr = sympy.S.One
    after: sympy.Expr = sympy.S.One


Spans = tuple[Span | None, ...]


class Lost(Exception):  # noqa: N818  (says why; it is no error)
    """Why the tokens cannot be followed."""


def regrouped(spans: Spans, before: list[sympy.Expr], after: list[sympy.Expr], tokens: sympy.Expr) -> Spans | None:
    """Where the tokens are after a view from sizes `before` to `after`; None where a dimension splits them.

    A dimension that follows entries of number `p` (the product of all sizes before it, and of `before` within it) holds
    tokens in the result if its own prefix product divides `p`, and `p * tokens` divides the next.
    """
    found: list[Span | None] = [None] * len(after)
    prefix = sympy.S.One
    for size, span in zip(before, spans, strict=True):
        if span is not None:
            start, reached = prefix * span.before, sympy.Integer(1)
            for number, length in enumerate(after):
                if _divides(reached, start) and _divides(start * tokens, reached * length):
                    if found[number] is not None:
                        return None
                    found[number] = Span(start / reached, reached * length / (start * tokens))
                    break
                reached *= length
            else:
                return None
        prefix *= size
    return tuple(found)


def _divides(divisor: sympy.Expr, number: sympy.Expr) -> bool:
    return bool(sympy.fraction(sympy.cancel(number / divisor))[1] == 1)


def expression(size: Any) -> sympy.Expr:
    """A size, fixed or symbolic, as an expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def expressions(sizes: Iterable[Any]) -> list[sympy.Expr]:
    return [expression(size) for size in sizes]


def hint(size: Any) -> int:
    """A size as a number: of the call that was traced."""
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            raise Lost(f"a size depends on the data ({size})")
        return int(size.node.hint)
    return int(size)
