"""Compile a graph in which the data decide how many tokens later layers see: as two, one after the other.

In one graph that number would be a size nobody knows while compiling. Every operation that asks about it, attention
among them, then fails or is compiled for the worst case. So the graph is cut where the tokens have been chosen: for the
second part the number is a size of its inputs, and Dynamo compiles and guards it like that of any prompt.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnpack_fx.passes.split_graph import Place, Split, is_number

Compiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]


class SplitCall:
    """Calls the first part, then the second, which is compiled when it is called first.

    first: compiled; second: as a module, which `compiler` compiles.
    counted: the nodes of the whole graph whose dimension 1 is the number of tokens that stay.
    failed: called with the error where the second part cannot be compiled; if it returns, that part runs as it is.
    """

    def __init__(
        self,
        split: Split,
        first: Callable[..., Any],
        second: GraphModule,
        counted: Sequence[Node],
        compiler: Compiler,
        failed: Callable[[Exception], None],
    ) -> None:
        self._first, self._module = first, second
        self._crossing = [(place, _varying(node, counted)) for place, node in split.crossing]
        self._results = split.results
        self._compiler, self._failed = compiler, failed

    def __call__(self, *arguments: Any) -> list[Any]:
        made = {"argument": arguments, "first": self._first(*arguments)}

        def at(place: Place) -> Any:
            return made[place[0]][place[1]]

        made["second"] = self._call_second([_marked(at(place), dims) for place, dims in self._crossing])
        return [at(place) for place in self._results]

    @cached_property
    def _second(self) -> Callable[..., Any]:
        # Dynamo never traces code that FX generates while Dynamo compiles, as it did this module's: so once more.
        self._module.recompile()
        return torch.compile(self._module, backend=self._compiler, fullgraph=True)

    def _call_second(self, arguments: list[Any]) -> Any:
        # Plans of what to pack return as many places as there are tokens of a kind, which data decide too.
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            try:
                return self._second(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._failed(error)
                self._second = self._module
                return self._second(*arguments)


def _varying(node: Node, counted: Sequence[Node]) -> tuple[int, ...]:
    """The dimensions of a crossing value that differ from call to call."""
    value = node.meta.get("example_value")
    if is_number(node):
        return (1,)
    dims = {1} if node in counted else set()
    if isinstance(value, Tensor):
        dims |= {dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
    return tuple(sorted(dims))


def _marked(value: Any, dims: tuple[int, ...]) -> Any:
    """The value with its varying dimensions marked, so that another length compiles nothing anew."""
    if not dims:
        return value
    # A tensor of its own: marks on what the caller holds would be seen by all that he compiles.
    value = value.detach() if isinstance(value, Tensor) else torch.empty((0, value), dtype=torch.uint8)
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(value, dim)
    return value
