"""The torch.compile backend: copy Dynamo's graph, rewrite its attention, compile the rest with Inductor.

Only plain tensors reach Inductor. Packed arguments are described to the passes by their parts; `Runtime` takes them
apart before each
call and puts packed results together after it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch.fx import Graph, GraphModule, Node

from attnpack_fx import caller, modality
from attnpack_fx.call import Call
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes import pipeline
from attnpack_fx.passes.patterns import layer_number
from attnpack_fx.passes.split_graph import split_graph
from attnpack_fx.passes.state import Argument, GraphState, PackedInput, SiteReport
from attnpack_fx.policy import PackPolicy, PolicyError
from attnpack_fx.runtime import Runtime
from attnpack_fx.split_call import SplitCall
from attnpack_fx.warning import warn

log = logging.getLogger(__name__)

_SIZES = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def attnpack_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    observer: Callable[[list[SiteReport]], None] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend=attnpack_backend, options={...})`, or by name: `backend="attnpack"`.

    mode: as for Inductor. options: fields of `PackPolicy`, or one under `"policy"`; any other key is Inductor's.
    observer: called with the report of every attention site of each graph compiled.

    A bad option raises ValueError from the first call of the compiled function. A rewrite that fails leaves the graph
    untouched and is
    logged, unless the policy is strict.
    """
    try:
        policy, patches = PackPolicy.from_options(options, mode)
        return _compile(gm, example_inputs, policy, patches, observer)
    except (PolicyError, NotImplementedError) as error:
        # Raised here, Dynamo would wrap it; raised by the compiled function, the caller gets it as it is.
        return _raiser(error)


def _compile(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    policy: PackPolicy,
    patches: dict[str, Any],
    observer: Callable[[list[SiteReport]], None] | None,
) -> Callable[..., Any]:
    try:
        state = _state_of(gm, example_inputs, policy)
        counts = pipeline.run(state)
        log.debug("passes: %s", counts)
        compiled = _compiled(gm, state, policy, patches)
    except (PolicyError, RestartAnalysis, SkipFrame):
        raise  # the caller's mistake, or Dynamo's own way of asking for another trace
    except Exception as error:
        _give_up(error, policy, "this graph stays dense, the rewrite failed")
        state = _state_of(gm, example_inputs, policy)
        pipeline.run_fallback(state)
        compiled = _inductor(_module(gm, state.graph), [state.examples[node] for node in state.inputs], patches)
    _announce(state.reports)
    if observer is not None:
        observer(state.reports)
    return Runtime(compiled, state, policy)


def _state_of(gm: GraphModule, example_inputs: Sequence[Any], policy: PackPolicy) -> GraphState:
    """A copy of Dynamo's graph, which reads its own after the backend returns, with packed inputs described."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    results = graph.graph_copy(gm.graph, copies)
    graph.output(results)
    returned: Any = results
    traced = [each.meta.get("example_value") if isinstance(each, Node) else each for each in returned]
    reason = getattr(gm, "compile_subgraph_reason", None)
    call = Call.of(example_inputs)
    state = GraphState(
        graph=graph,
        policy=policy,
        packed={},
        inputs={},
        examples={},
        modality_given=modality.stated() is not None or call.vision() is not None,
        in_decoder=call.in_decoder,
        traced=traced,
        carries=bool(getattr(reason, "graph_break", False)),
    )
    # Dynamo removed what is dead: what nobody reads now is wanted for its effect, except sizes and comparisons of them.
    state.wanted = {
        node
        for node in graph.nodes
        if not node.users
        and node.op not in ("placeholder", "output")
        and not isinstance(node.meta.get("example_value"), _SIZES)
    }
    originals = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for position, (original, example) in enumerate(zip(originals, example_inputs, strict=True)):
        node = copies[original]
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
        state.inputs[node] = Argument(position)
        state.examples[node] = example
        fake = node.meta.get("example_value")
        if isinstance(fake, PackedTensor):
            state.packed[node] = PackedInput(
                node, position, fake.form, _parts(fake), tail=fake.rows, length=fake.sizes.shape[1]
            )
    return state


def _parts(fake: PackedTensor) -> dict[str, Tensor]:
    """What a graph may take of a packed value, by name."""
    index = fake.index
    return fake.held.named | {"slot": index.new_empty((index.shape[0], fake.placement.tokens))}


def _module(gm: GraphModule, graph: Graph) -> GraphModule:
    """The rewritten graph as a module that keeps what AOTAutograd reads from Dynamo's: which inputs are parameters."""
    module = GraphModule(gm, graph)
    module.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        module._param_name_to_source = gm._param_name_to_source
    for node in graph.nodes:
        if node.op == "placeholder" and not hasattr(node, "_dynamo_source"):
            node._dynamo_source = None
    return module


def _inductor(module: GraphModule, examples: list[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    early = torch.__version__ < (2, 12)  # type: ignore[operator]  # a TorchVersion, which compares with tuples
    if early and all(each.device.type == "cpu" for each in examples if isinstance(each, Tensor)):
        # Inductor may check the bounds of an index before it has computed it: https://github.com/pytorch/pytorch/pull/180212
        patches = {"assert_indirect_indexing": False} | patches
    compiled: Callable[..., Any] = compile_fx(module, examples, config_patches=patches or None)  # type: ignore[assignment]
    return compiled


def _compiled(gm: GraphModule, state: GraphState, policy: PackPolicy, patches: dict[str, Any]) -> Callable[..., Any]:
    """The rewritten graph, compiled; in two parts where the number of tokens of later layers depends on the data."""
    examples = [state.examples[node] for node in state.inputs]
    if not state.pruned:
        return _inductor(_module(gm, state.graph), examples, patches)
    (pruned,) = state.pruned
    split = split_graph(state.graph, pruned.hidden)
    first, second = _module(gm, split.first), GraphModule(gm, split.second)

    def compiler(module: GraphModule, given: list[Any]) -> Callable[..., Any]:
        return _inductor(module, given, patches)

    def failed(error: Exception) -> None:
        _give_up(error, policy, "the layers behind pruned tokens run uncompiled")

    return SplitCall(split, compiler(first, examples), second, (pruned.rows, pruned.hidden), compiler, failed)


def _give_up(error: Exception, policy: PackPolicy, consequence: str) -> None:
    """Say what a failure leads to; where the policy is strict, raise it instead."""
    if policy.strict:
        raise error
    log.warning("%s: %r", consequence, error, exc_info=error)
    warn(f"{consequence}: {error!r}")


def _raiser(error: Exception) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise error

    return refuse


def _announce(reports: list[SiteReport]) -> None:
    """Say what stays dense, once per reason; encoders, which have no cache to pack, only in the log."""
    _announce_limit(reports)
    for report in reports:
        log.info("%s (%s): %s %s", report.layer, report.kind, report.action, report.reason)
    for report in reports:
        if report.action == "unpruned":
            warn(f"no tokens are pruned in front of {report.layer}: {report.reason}")
    for reason in sorted({report.reason for report in reports if report.action == "packed" and report.reason}):
        warn(reason)
    rewritten = sum(report.action in ("packed", "compressed") for report in reports)
    dense = [
        report for report in reports if report.action == "dense" or (report.action == "uncached" and report.causal)
    ]
    if not dense:
        return
    reasons = "; ".join(sorted({report.reason for report in dense}))
    if rewritten:
        warn(f"{len(dense)} attention sites stay dense: {reasons}")
    else:
        warn(f"no attention site of this graph was rewritten: {reasons}")


def _announce_limit(reports: list[SiteReport]) -> None:
    """Say that later layers will be dense where each is compiled by itself, and there are more than Dynamo compiles."""
    if not any(report.action == "compressed" and layer_number(report.layer) is None for report in reports):
        return
    count, limit = caller.layer_count(), torch._dynamo.config.recompile_limit
    if count is not None and count > limit:
        warn(
            f"the {count} layers of this model are compiled one by one, and Dynamo compiles a function {limit} times: "
            f"the others run uncompiled, their cache dense; set torch._dynamo.config.recompile_limit to {2 * count + 1}"
        )
