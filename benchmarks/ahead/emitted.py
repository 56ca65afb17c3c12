"""What Inductor would write for a CUDA device, of every graph that reaches the backend while a model runs on a CPU."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from attnpack_fx import PackedTensor, PackPolicy, backend
from attnpack_fx.passes import pipeline
from benchmarks.ahead.pretend import pretending


@dataclass
class Emitted:
    """What is written while a model runs.

    wrappers: Python source of every graph's wrapper, in order. kernels: name and source of every kernel in them, each
    once. reports: what the backend did, of every graph.
    """

    wrappers: list[str] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    reports: list[list[Any]] = field(default_factory=list)


@contextlib.contextmanager
def recorded() -> Iterator[Emitted]:
    """Record what Inductor would write for a GPU of graphs that the backend compiles in here.

    The graphs themselves run op by op on the CPU. Errors of the compilation for a GPU are raised.
    """
    found = Emitted()
    inductor, compile_for_cpu = backend._inductor, backend._compile

    def compile_twice(
        gm: GraphModule, examples: Sequence[Any], policy: PackPolicy, patches: dict[str, Any], observer: Any
    ) -> Callable[..., Any]:
        moved, mode = _on_cuda(gm)
        given = [node.meta["example_value"] for node in moved.graph.nodes if node.op == "placeholder"]
        with tracing(TracingContext(mode)), pretending(), _writing(found):
            state = backend._state_of(moved, given, policy)
            pipeline.run(state)
            found.reports.append(state.reports)
            with mock.patch.object(backend, "_inductor", inductor):
                backend._compiled(moved, state, policy, patches)
        return compile_for_cpu(gm, examples, policy, patches, observer)

    with (
        mock.patch.object(backend, "_inductor", lambda module, examples, patches: module),
        mock.patch.object(backend, "_compile", compile_twice),
    ):
        yield found


@contextlib.contextmanager
def _writing(found: Emitted) -> Iterator[None]:
    def kernel(_: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Callable[..., None]:
        found.kernels.setdefault(source, name)
        return lambda *_, **__: None

    with (
        mock.patch.object(AsyncCompile, "triton", kernel),
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(found.wrappers.append)),
    ):
        yield


def _on_cuda(gm: GraphModule) -> tuple[GraphModule, FakeTensorMode]:
    """A copy of Dynamo's graph whose values are fake tensors on a CUDA device, and their mode."""
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    mode: FakeTensorMode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, copies))
    for original, node in copies.items():
        if "example_value" in node.meta:
            node.meta["example_value"] = _moved(node.meta["example_value"], mode)
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
        if node.target is torch.tensor:  # makes a real one on the device, where there is none
            node.target = _tensor
        node.args, node.kwargs = map_aggregate(node.args, _device), map_aggregate(node.kwargs, _device)
    made = GraphModule(gm, graph)
    made.meta.update(gm.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(made, name, getattr(gm, name))
    return made, mode


def _tensor(values: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    if isinstance(values, list | tuple):
        rows = [_tensor(each, dtype, device) for each in values]
        return torch.stack(rows) if rows else torch.full((0,), 0.0, dtype=dtype, device=device)
    return torch.full((), values, dtype=dtype, device=device)


def _device(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cpu":
        return torch.device("cuda", 0)
    return "cuda" if isinstance(value, str) and value == "cpu" else value


def _moved(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, PackedTensor):
        names, context = value.__tensor_flatten__()
        inner = {name: _moved(getattr(value, name), mode) for name in names}
        return PackedTensor.__tensor_unflatten__(inner, context, value.shape, value.stride())
    if isinstance(value, Tensor):
        with mode:
            made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
        return nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, mode) for each in value)
    if isinstance(value, Mapping):
        return type(value)({name: _moved(each, mode) for name, each in value.items()})  # type: ignore[call-arg]
    return value
