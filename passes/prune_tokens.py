"""Let fewer tokens flow through the decoder layers from one on, at prefill.

The hidden states that enter the layer lose rows, as the policy's method says; sizes, rotary angles and masks that later
layers read follow; behind the last layer the rows go back among all, where a row that was left out holds what it held
when it was.
"""

import itertools
import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from attnpack_fx.kernels import ops_prune  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.passes.find_attention import scale_of
from attnpack_fx.passes.follow_tokens import Followed, follow
from attnpack_fx.passes.layer_boundary import Boundary, find_boundary, prompt_sites
from attnpack_fx.passes.patterns import value_of
from attnpack_fx.passes.plan_tokens import TokenPlanner
from attnpack_fx.passes.split_graph import splits_region
from attnpack_fx.passes.state import GraphState, Pruned, SiteReport, shape_of
from attnpack_fx.passes.token_pruning import Prompt, TokenPruning
from attnpack_fx.passes.token_spans import Gathered, GatheredMask, Tokens


def prune_tokens(state: GraphState) -> int:
    """Rewrite a prefill graph for the policy's method that prunes tokens; reports what became of it; returns 0 or 1."""
    method = next((each for each in state.policy.passes if isinstance(each, TokenPruning)), None)
    if method is None or not prompt_sites(state):
        return 0
    decided = decide(state, method)
    if isinstance(decided, str):
        state.reports.append(SiteReport(f"layer {method.layer}", "tokens", "unpruned", decided))
        return 0
    _Writer(state, *decided).write(method)
    state.reports.append(SiteReport(f"layer {method.layer}", "tokens", "pruned", method.name))
    return 1


def decide(state: GraphState, method: TokenPruning) -> tuple[Boundary, Followed] | str:
    """Where to prune and what must follow, or why nothing is pruned. Changes nothing."""
    if state.carries:
        return "the model breaks into several graphs, and no single one holds all its layers"
    if state.modality is None and not state.modality_given:
        return "no vision tokens are known here; state them with attnpack_fx.modality(mask)"
    boundary = find_boundary(state, prompt_sites(state), method.layer)
    if isinstance(boundary, str):
        return boundary
    if boundary.before.obstacle is not None:
        return boundary.before.obstacle
    if boundary.before.cap or boundary.before.sinks is not None:
        return "pruning knows no soft caps of scores and no attention sinks, which this model has"
    if splits_region(list(itertools.takewhile(lambda node: node is not boundary.nodes[0], state.graph.nodes))):
        return "the decoder layers stand in an autocast region of the model's own"
    followed = follow(state, boundary)
    return followed if isinstance(followed, str) else (boundary, followed)


class _Writer:
    """Writes what was decided into the graph."""

    def __init__(self, state: GraphState, boundary: Boundary, followed: Followed) -> None:
        self.state, self.graph = state, state.graph
        self.boundary, self.followed = boundary, followed
        self._made: dict[Any, Node] = {}

    def write(self, method: TokenPruning) -> None:
        boundary, graph, before = self.boundary, self.graph, self.boundary.before
        shape = shape_of(boundary.hidden)
        assert shape is not None
        self.batch = shape[0]
        vision = TokenPlanner(self.state).modality(before.key)
        assert vision is not None
        first = boundary.nodes[0]
        with graph.inserting_before(first):
            prompt = Prompt(graph, boundary.hidden, before.query, before.key, before.mask, scale_of(before), vision)
            self.rows, hidden = method.prune(prompt)
            hidden.meta["example_value"] = value_of(boundary.hidden)
            self.count = graph.call_method("size", (self.rows, 1))
        self.state.pruned.append(Pruned(method.layer, self.rows, hidden))
        for node in boundary.nodes:
            if node in self.followed.arguments:
                with graph.inserting_before(node):
                    args, kwargs = self.followed.arguments[node]
                    node.args, node.kwargs = map_aggregate(args, self._placed), map_aggregate(kwargs, self._placed)
        for site in boundary.sites:
            if site.mask is not None:
                site.mask = self._made.get(GatheredMask(site.mask), site.mask)
        for node in boundary.nodes:
            node.replace_input_with(boundary.hidden, hidden)
        for node, readers in self.followed.exits.items():
            with graph.inserting_after(boundary.nodes[-1]):
                arguments = (boundary.hidden, self.rows, node)
                whole = graph.call_function(torch.ops.attnpack.scatter_tokens.default, arguments)
            whole.meta["example_value"] = value_of(node)
            for reader in readers:
                reader.replace_input_with(node, whole)

    def _placed(self, item: Any) -> Any:
        """The node that stands for a marker, made at the current place the first time."""
        if not isinstance(item, Tokens | Gathered | GatheredMask):
            return item
        if item == Tokens():
            return self.count
        if item not in self._made:
            self._made[item] = self._make(item)
        return self._made[item]

    def _make(self, marker: Tokens | Gathered | GatheredMask) -> Node:
        graph = self.graph
        match marker:
            case Tokens(factor, batched):
                size = self.count
                if batched:
                    size = graph.call_function(operator.mul, (graph.call_method("size", (self.rows, 0)), size))
                return size if factor == 1 else graph.call_function(operator.mul, (size, factor))
            case GatheredMask(None):
                real = graph.call_function(operator.ge, (self.rows, 0))
                return graph.call_function(operator.getitem, (real, (slice(None), None, None)))
            case GatheredMask(node):
                assert node is not None
                made = graph.call_function(torch.ops.attnpack.gather_mask.default, (node, self.rows))
                value = value_of(node)
                assert value is not None
                value = value if value.dim() == 4 else value[None, None]
                made.meta["example_value"] = value.expand(self.batch, *value.shape[1:])
                return made
            case Gathered(node, dims, rank):
                value = value_of(node)
                assert value is not None
                made = node
                added = rank - value.dim()
                for _ in range(added):
                    made, value = graph.call_method("unsqueeze", (made, 0)), value[None]
                for dim in dims:
                    arguments = (made, self.rows, dim + added)
                    made = graph.call_function(torch.ops.attnpack.gather_tokens.default, arguments)
                value = value.expand(self.batch, *value.shape[1:])
                made.meta["example_value"] = value
                return made
