"""What writes into a tensor is known to, however it is spelled; what only reads is not taken for it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from attnpack_fx.passes.cleanup import drop_dead
from attnpack_fx.passes.find_rotary import RotaryFinder
from attnpack_fx.passes.in_place import writes, written
from tests.passes.capture import capture, capture_graphs, operations

X = torch.arange(12.0).reshape(3, 4) + 1


@torch.library.custom_op("attnpack_tests::scale", mutates_args=("target",))
def scale(factor: float, target: torch.Tensor, other: torch.Tensor) -> None:
    target.mul_(factor).add_(other)


AUGMENTED = {
    name: getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
} | {name: getattr(operator, name) for name in ("iand", "ior", "ixor", "ilshift", "irshift", "iconcat", "setitem")}
ADD, MUL = torch.ops.aten.add, torch.ops.aten.mul_
#: Calls with x and y that write into x alone: what is called, by method name or as a function, and its arguments.
WRITES = {
    **{name: lambda g, x, y, f=f: g.call_function(f, (x, y)) for name, f in AUGMENTED.items()},
    "method": lambda g, x, y: g.call_method("add_", (x, y)),
    "method of operators": lambda g, x, y: g.call_method("__imod__", (x, y)),
    "method of items": lambda g, x, y: g.call_method("__setitem__", (x, 0, y)),
    "function": lambda g, x, y: g.call_function(torch.relu_, (x,)),
    "function by keyword": lambda g, x, y: g.call_function(torch.relu_, (), {"input": x}),
    "foreach": lambda g, x, y: g.call_function(torch._foreach_add_, ([x], [y])),
    "inplace by keyword": lambda g, x, y: g.call_function(F.silu, (x,), {"inplace": True}),
    "inplace by position": lambda g, x, y: g.call_function(F.relu, (x, True)),
    "inplace far behind": lambda g, x, y: g.call_function(F.dropout, (x, 0.5, True, True)),
    "inplace and all by keyword": lambda g, x, y: g.call_function(F.relu, (), {"input": x, "inplace": True}),
    "out": lambda g, x, y: g.call_function(torch.add, (y, y), {"out": x}),
    "several outs": lambda g, x, y: g.call_function(torch.sort, (y,), {"out": (x, x)}),
    "overload": lambda g, x, y: g.call_function(MUL.Tensor, (x, y)),
    "overload with out": lambda g, x, y: g.call_function(ADD.out, (y, y), {"out": x}),
    "packet": lambda g, x, y: g.call_function(MUL, (x, y)),
    "packet with out": lambda g, x, y: g.call_function(ADD, (y, y), {"out": x}),
    "own operator": lambda g, x, y: g.call_function(torch.ops.attnpack_tests.scale, (2.0, x, y)),
    "collective": lambda g, x, y: g.call_function(torch.ops.c10d.allreduce_.default, ([x], None, None, None, True)),
}
READS = {
    "operator": lambda g, x, y: g.call_function(operator.mod, (x, y)),
    "index": lambda g, x, y: g.call_function(operator.index, (x,)),
    "invert": lambda g, x, y: g.call_function(operator.invert, (x,)),
    "method": lambda g, x, y: g.call_method("add", (x, y)),
    "method of operators": lambda g, x, y: g.call_method("__add__", (x, y)),
    "function": lambda g, x, y: g.call_function(torch.relu, (x,)),
    "no inplace": lambda g, x, y: g.call_function(F.relu, (x, False)),
    "no inplace by default": lambda g, x, y: g.call_function(F.dropout, (x, 0.5, True)),
    "no out": lambda g, x, y: g.call_function(torch.add, (x, y), {"out": None}),
    "overload": lambda g, x, y: g.call_function(ADD.Tensor, (x, y)),
    "packet": lambda g, x, y: g.call_function(ADD, (x, y)),
}


def call(make) -> tuple[Node, Node]:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    return make(graph, x, y), x


@pytest.mark.parametrize("way", WRITES)
def test_what_writes_says_into_what(way):
    node, x = call(WRITES[way])
    assert writes(node)
    assert set(written(node)) == {x}


@pytest.mark.parametrize("way", READS)
def test_what_reads_writes_nothing(way):
    node, _ = call(READS[way])
    assert not writes(node) and written(node) == []


# ---- what the passes make of it


def modulo(x):
    x %= 3
    return x


def power(x):
    x **= 2
    return x


def shifted(x):
    x <<= 1
    return x


EFFECTS = {
    "imod": modulo,
    "ipow": power,
    "ilshift": shifted,
    "relu": lambda x: F.relu(x, True),
    "out": lambda x: torch.add(x, 1, out=x),
    "add_": lambda x: x.add_(1),
    "packet": lambda x: torch.ops.aten.mul_(x, 2),
}


@pytest.mark.parametrize("effect", EFFECTS)
def test_a_write_outlives_what_read_its_result(effect):
    x = torch.arange(-3, 9)
    state = capture(lambda x: (EFFECTS[effect](x).neg(), x * 2), x.clone())
    before = operations(state)
    # As a rewrite does: nobody asks for what was computed of the written tensor, only for the effect.
    state.output.args = ((next(iter(state.inputs)),),)
    drop_dead(state)
    assert operations(state) == before[:1]
    (left,) = torch.fx.GraphModule({}, state.graph)(x.clone())
    written_to = x.clone()
    EFFECTS[effect](written_to)
    assert torch.equal(left, written_to)


def half_turn(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


ROTATED = {
    "imod": lambda x, other: operator.imod(x, 2.0),
    "ipow": lambda x, other: operator.ipow(x, 2),
    "relu": lambda x, other: F.relu(x, True),
    "by keyword": lambda x, other: F.relu(input=x, inplace=True),
    "out": lambda x, other: torch.add(other, 1, out=x),
    "add_": lambda x, other: x.add_(1),
    "packet": lambda x, other: torch.ops.aten.mul_(x, 2),
}


@pytest.mark.parametrize("effect", ROTATED)
def test_keys_written_after_their_rotation_are_not_taken_for_rotated_ones(effect):
    def keys(k, cos, sin):
        key = k * cos[:, None] + half_turn(k) * sin[:, None]
        ROTATED[effect](key, k)
        return key

    k, (cos, sin) = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    (graph,) = capture_graphs(keys, k, cos, sin)
    (key,) = graph.state.results
    assert RotaryFinder(graph.state.graph).rotation_of(key) is None
