"""Attention written out: from the product of queries and keys to softmax, and from there to that with the values.

What stands between the first product and softmax is a scale, a soft cap, terms that are added, masks and biases as
those of ALiBi, and sinks. Where there are several terms, they are put together to one, which packed attention adds as
it would add a mask.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from attnpack_fx.passes.patterns import argument, is_call, through_no_ops, value_of
from attnpack_fx.passes.state import shape_of

PRODUCTS = ("matmul", "bmm")
_VIEWS = ("view", "reshape")
_CASTS = ("dropout", "to", "type", "type_as", "float", "contiguous")

#: What one step makes of the mask so far (None: nothing is added yet).
_Step = Callable[["_Mask"], None]


@dataclass(frozen=True)
class Written:
    """Attention as it was found.

    query, key, value: `[B, H, T, D]`, key and value with heads repeated or not. mask: what is added to the scaled
    scores; padding: the part of it that hides tokens from all heads, where it has other parts, True or 0 for what is
    seen. output: the product with the values; folded: it is `[B * H, T, D]`. weights: what softmax made, as it is
    multiplied; dropout: is active. cap, sinks: as in `state.Site`.
    """

    query: Node
    key: Node
    value: Node
    scale: float
    mask: Node | None
    padding: Node | None
    output: Node
    folded: bool
    weights: Node
    dropout: bool
    cap: float
    sinks: Node | None


def written_out(softmax: Node) -> Written | None:
    """What a softmax is the middle of; None where it is none of attention's, or something else is computed there."""
    sinks, start = _without_sinks(softmax)
    found, consumed = _scores(start), _weights_consumer(softmax, sinks is not None)
    dim = argument(softmax, 1, "dim")
    if found is None or consumed is None or dim not in (-1, len(shape_of(softmax) or ()) - 1):
        return None
    product, steps = found
    weights, output, dropout = consumed
    mask = _Mask(softmax)
    if is_call(product, "baddbmm"):
        query, transposed = argument(product, 1, "batch1"), argument(product, 2, "batch2")
        alpha, beta = (number_of(product.kwargs.get(name, 1)) for name in ("alpha", "beta"))
        if alpha is None or beta is None:
            return None
    else:
        query, transposed = product.args[:2]
    # The scale may stand before the product: on the query, as in GPT-NeoX.
    if is_call(query, "mul") and (number := number_of(query.args[1])) is not None:
        mask.scale, query = number, query.args[0]
    key = _untransposed(transposed)
    query, key, value = (_with_heads(each) for each in (query, key, output.args[1]))
    shapes = [shape_of(each) if isinstance(each, Node) else None for each in (query, key, value)]
    if not all(shape is not None and len(shape) == 4 for shape in shapes):
        return None
    mask.heads = shapes[0][1]  # type: ignore[index]
    if is_call(product, "baddbmm"):
        mask.scale *= alpha  # type: ignore[operator]
        mask.add(mask.scaled(product.args[0], beta))  # type: ignore[arg-type]
    for step in steps:
        step(mask)
    if mask.cap is not None and not mask.cap > 0:
        return None
    scale = mask.scale if mask.cap is None else mask.scale * mask.cap
    folded, cap = len(shape_of(output) or ()) == 3, mask.cap or 0.0
    given = None if sinks is None else mask.flat(sinks)
    return Written(query, key, value, scale, mask.terms, mask.padding, output, folded, weights, dropout, cap, given)


def number_of(value: Any) -> float | None:
    """A number of the model's, which under `dynamic=True` is an input of the graph: the graph is then for this one."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, torch.SymFloat):
        return float(value) if value.node.expr.is_Atom else None  # not what is computed from sizes
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# ---- from softmax up to the product ------------------------------------------------------------------------


def _without_sinks(softmax: Node) -> tuple[Node | None, Any]:
    """Sinks `[1, Hq, 1, 1]` that take part in a softmax, and the scores beside them; without, what softmax is given."""
    node = argument(softmax, 0, "input")
    start = node
    if is_call(node, "sub", "isub") and len(node.args) == 2 and _largest_of(node.args[1]) is node.args[0]:
        node = node.args[0]  # which changes no weight
    pieces = argument(node, 0, "tensors") if is_call(node, "cat", "concat") else None
    if not isinstance(pieces, list | tuple) or len(pieces) != 2 or argument(node, 1, "dim", 0) not in (-1, 3):
        return None, start
    scores, sinks = pieces
    source = sinks.args[0] if is_call(sinks, "expand") else sinks
    shapes = shape_of(scores), shape_of(sinks), shape_of(source)
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return None, start
    heads = shapes[0][1]  # type: ignore[index]
    one = isinstance(heads, int) and shapes[2] == (1, heads, 1, 1)
    return (source, scores) if one else (None, start)


def _largest_of(node: Any) -> Any:
    """What a node is the largest of, along its last dimension."""
    if is_call(node, "getitem", "getattr") and node.args[1] in (0, "values"):
        node = node.args[0]
    if not is_call(node, "max", "amax") or argument(node, 1, "dim") not in (-1, 3):
        return None
    return node.args[0] if argument(node, 2, "keepdim", False) else None


def _scores(start: Any) -> tuple[Node, list[_Step]] | None:
    """The product of queries and keys, and what is done to it, in order; None where that is not known."""
    steps: list[_Step] = []
    node: Any = start
    while isinstance(node, Node) and not is_call(node, *PRODUCTS, "baddbmm"):
        found = _step(node)
        if found is None:
            return None
        node, step = found
        if step is not None:
            steps.insert(0, step)
    return (node, steps) if isinstance(node, Node) else None


def _step(node: Node) -> tuple[Any, _Step | None] | None:
    """What one operation on the scores is done to, and what it does to scale and mask."""
    args, plain = node.args, not node.kwargs
    if is_call(node, *_VIEWS, "to", "float", "type", "contiguous"):
        return args[0], None
    if len(args) == 2 and plain and is_call(node, "mul", "imul", "truediv", "div", "itruediv", "add", "iadd", "max"):
        left, right = args
        if is_call(node, "mul", "add") and not _leads_to_product(left):
            left, right = right, left
        number = number_of(right)
        if is_call(node, "mul", "imul") and number is not None:
            return left, lambda mask: mask.multiply(number)
        if is_call(node, "truediv", "div", "itruediv") and number:
            return left, lambda mask: mask.multiply(1 / number)
        if is_call(node, "add", "iadd") and isinstance(right, Node):
            return left, lambda mask: mask.add(right)
        if is_call(node, "max") and is_call(right, "full"):
            return left, None  # the least number there is: nothing is raised that softmax would see
    if is_call(node, "tanh", "tanh_") and len(args) == 1:
        return args[0], lambda mask: mask.bound()
    if is_call(node, "masked_fill", "masked_fill_") and len(args) == 3 and isinstance(args[1], Node):
        hidden, filler = args[1], args[2]
        return args[0], lambda mask: mask.fill(mask.inverted(hidden), filler)
    if is_call(node, "where") and len(args) == 3 and isinstance(args[0], Node):
        seen, filler = args[0], args[2]
        return args[1], lambda mask: mask.fill(seen, filler)
    return None


def _leads_to_product(node: Any) -> bool:
    """Whether a product goes into a node by nothing but steps that are known."""
    while isinstance(node, Node) and not is_call(node, *PRODUCTS, "baddbmm"):
        found = _step(node)
        node = found[0] if found is not None else None
    return isinstance(node, Node)


def _untransposed(node: Any) -> Node | None:
    if is_call(node, "transpose"):
        dims = {argument(node, 1, "dim0"), argument(node, 2, "dim1")}
        last = len(shape_of(node) or ()) - 1
        return through_no_ops(node.args[0]) if dims in ({last - 1, last}, {-1, -2}) else None
    return through_no_ops(node.args[0]) if is_call(node, "getattr") and node.args[1] == "mT" else None


def _with_heads(node: Any) -> Any:
    """`[B, H, T, D]` below `[B * H, T, D]`; the node itself where heads are no part of the batch."""
    node = through_no_ops(node)
    value = value_of(node)
    if value is None or value.dim() != 3 or not is_call(node, *_VIEWS):
        return node
    source = through_no_ops(node.args[0])
    before = value_of(source)
    if before is None or before.dim() != 4 or not isinstance(before.shape[3], int):
        return node
    return source if before.shape[3] == value.shape[2] and before.shape[2] == value.shape[1] else node


# ---- from softmax down to the values -----------------------------------------------------------------------


def _weights_consumer(softmax: Node, sinks: bool) -> tuple[Node, Node, bool] | None:
    """The attention weights as they are multiplied with the values, that product, and whether dropout stands
    between. sinks: whether softmax makes a weight more, which is then left out.
    """
    weights, dropout = softmax, False
    if sinks:
        readers = [user for user in softmax.users if _leaves_out_the_last(user)]
        if len(readers) != 1 or len(softmax.users) != 1:
            return None
        weights = readers[0]
    while True:
        products = [user for user in weights.users if is_call(user, *PRODUCTS) and user.args[0] is weights]
        if products:
            return weights, products[0], dropout
        steps = [user for user in weights.users if is_call(user, *_CASTS, *_VIEWS)]
        if len(steps) != 1:
            return None
        weights = steps[0]
        if is_call(weights, "dropout"):
            dropout |= bool(argument(weights, 2, "training", True)) and argument(weights, 1, "p", 0.5) != 0.0


def _leaves_out_the_last(node: Node) -> bool:
    """Whether a node is `[..., :-1]` of another, of four dims."""
    key = node.args[1] if is_call(node, "getitem") else None
    if not isinstance(key, tuple) or not (Ellipsis in key or len(key) == 4):
        return False
    return key[-1] == slice(None, -1, None) and all(each in (Ellipsis, slice(None, None, None)) for each in key[:-1])


# ---- one mask of all terms ---------------------------------------------------------------------------------


@dataclass
class _Mask:
    """Scale, cap and mask while the steps between product and softmax are taken in turn; new nodes stand before it.

    cap: None before `tanh`; behind it what the bounded scores are multiplied with, and scale goes inside. Not above 0,
    or NaN, where it is no cap.
    """

    softmax: Node
    scale: float = 1.0
    cap: float | None = None
    heads: int = 1
    padding: Node | None = None
    terms: Node | None = None

    def bound(self) -> None:
        once = self.cap is None and self.terms is None
        self.cap = 1.0 if once else math.nan

    def multiply(self, number: float) -> None:
        if self.cap is None:
            self.scale *= number
        else:
            self.cap *= number
        if self.terms is not None:
            self.terms = self.scaled(self.terms, number)

    def add(self, term: Node) -> None:
        term = self._wide(term)
        if self.terms is None:
            self.terms = term
        else:
            self._hides(term)
            self.terms = self._call(torch.add, self.terms, term)

    def fill(self, seen: Node, filler: Any) -> None:
        """Where not seen, scores are the filler, beside which no score counts."""
        seen = self._wide(seen)
        self._hides(seen)
        value = value_of(self.softmax)
        assert value is not None
        nothing = self.terms if self.terms is not None else self._call(torch.zeros_like, seen, dtype=value.dtype)
        self.terms = self._call(torch.where, seen, nothing, filler)

    def flat(self, sinks: Node) -> Node:
        """`[1, Hq]` of `[1, Hq, 1, 1]`."""
        return self._call(torch.flatten, sinks, 1)

    def inverted(self, mask: Node) -> Node:
        return self._call(operator.invert, mask)

    def scaled(self, term: Node, number: float) -> Node:
        return term if number == 1 else self._call(torch.mul, term, number)

    def _hides(self, term: Node) -> None:
        """Of terms that are the same for all heads, the last counts: what hides padding comes after biases."""
        shape = shape_of(term)
        if shape is not None and (len(shape) == 2 or shape[1] == 1):
            self.padding = term

    def _wide(self, term: Node) -> Node:
        """A term with a dimension for samples and one for heads."""
        value = value_of(term)
        assert value is not None
        if value.dim() != 3:
            return term
        whole = isinstance(value.shape[0], int) and value.shape[0] in (1, self.heads)
        return self._call(torch.unsqueeze, term, 0) if whole else self._call(torch.unflatten, term, 0, (-1, self.heads))

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Node:
        graph: Graph = self.softmax.graph
        with graph.inserting_before(self.softmax):
            node = graph.call_function(function, arguments, options)
        values = [value_of(each) if isinstance(each, Node) else each for each in arguments]
        mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        with mode:
            node.meta["example_value"] = function(*values, **options)
        node.meta["nn_module_stack"] = self.softmax.meta.get("nn_module_stack", {})
        return node
