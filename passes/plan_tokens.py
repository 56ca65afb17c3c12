"""Which tokens of a cache are vision, text and padding, as graph nodes: `attnpack::plan`, once for all layers that
agree.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops, ops_prune  # noqa: F401  (register torch.ops.attnpack)
from attnpack_fx.passes.state import (
    TEXT,
    VISION,
    GraphState,
    Modality,
    ModalitySaid,
    Policy,
    Site,
    same_size,
    shape_of,
)
from attnpack_fx.passes.storage import Columns, Stored, both


class TokenPlanner:
    """Makes `attnpack::plan` once for all layers that place their tokens alike."""

    def __init__(self, state: GraphState) -> None:
        self.state = state
        self._plans: dict[Any, list[Node]] = {}
        self._real: dict[Node, Node] = {}
        self._places: dict[Node, Node] = {}
        self._sources: dict[tuple[Node, Node], Node] = {}
        self._by_position: dict[tuple[Node, Node], Node] = {}
        self._newest: dict[tuple[Node, int], Node] = {}
        self._modality: Node | None = None

    @property
    def may_know(self) -> bool:
        """Whether a modality is known, or may be said beside the call."""
        return self.state.modality is not None or self.state.modality_given

    def modality(self, key: Node) -> Node | None:
        """Bool `[B, T]` over all of `key`'s tokens, or None where no modality is known."""
        if self._modality is None:
            shown, said = self._shown(key), self._said(key)
            self._modality = shown if said is None else self._decided(shown, said)
        return self._modality

    def _shown(self, key: Node) -> Node | None:
        """The mask that this graph shows."""
        state, shape, mask = self.state, shape_of(key), self.state.modality
        assert shape is not None
        if mask is None or same_size(shape_of(mask)[1], shape[2]):  # type: ignore[index]
            return mask
        # It covers this call's tokens, the newest; older ones are text.
        with state.graph.inserting_after(key if _follows(state, key, mask) else mask):
            all_tokens = state.graph.call_method("size", (key, 2))
        with state.graph.inserting_after(all_tokens):
            seen = state.graph.call_method("size", (mask, 1))
        with state.graph.inserting_after(seen):
            older = state.graph.call_function(operator.sub, (all_tokens, seen))
        with state.graph.inserting_after(older):
            return state.graph.call_function(torch.nn.functional.pad, (mask, (older, 0)))

    def _said(self, key: Node) -> Node | None:
        """What is said beside it, where anything may be: a caller may state a mask at any call."""
        state, shape = self.state, shape_of(key)
        assert shape is not None
        if not self.may_know:
            return None
        batch, tokens = state.size(shape[0]), state.size(shape[2])
        if batch is None or tokens is None:
            return None
        example = key.meta["example_value"].new_empty((shape[0], shape[2]), dtype=torch.int8)
        return state.add_input(ModalitySaid(batch, tokens), example, "attnpack_modality")

    def _decided(self, shown: Node | None, said: Node) -> Node:
        """What is said, and where nothing is, what is shown."""
        graph = self.state.graph
        with graph.inserting_before(self.state.first_computation() if shown is None else shown.next):
            vision = graph.call_function(operator.gt, (said, 0))
            if shown is not None:
                open_ = graph.call_function(operator.eq, (said, 0))
                vision = graph.call_function(operator.or_, (vision, graph.call_function(operator.and_, (shown, open_))))
        return vision

    def rows_of(self, layer: int | None) -> Node | None:
        """Logical positions of the rows a layer sees, int64 `[B, T']`; None where it sees all."""
        rows = None
        for pruned in self.state.pruned:
            if layer is not None and layer >= pruned.first_layer:
                rows = pruned.rows
        return rows

    def plan(
        self, site: Site, key: Node, modality: Node | None, gains: dict[Modality, list[int]], rows: Node | None = None
    ) -> list[Node]:
        """Nodes `(vision index, text index, dense index, slot)`, inserted at the current point.

        rows: of `rows_of`; tokens that are not among them get no slot.
        """
        graph = self.state.graph
        # Vision tokens that are not packed go where others go.
        modality = modality if VISION in gains else None
        hiding = site.padding or site.mask
        real, like = (None if hiding is None else self._real_tokens(hiding)), key
        if rows is not None:
            real, like = self._real_of(rows)
        elif real is not None:
            real = self.newest(real, site.window)
        shape = shape_of(key)
        assert shape is not None
        device = key.meta["example_value"].device
        known = (modality, real, rows, str(shape[0]), str(shape[2]), device, repr(gains))
        if known not in self._plans:
            arguments = (modality, real, like, TEXT in gains, gains.get(VISION, []), gains.get(TEXT, []))
            plan = graph.call_function(torch.ops.attnpack.plan.default, arguments)
            self._plans[known] = [graph.call_function(operator.getitem, (plan, item)) for item in range(4)]
        return self._plans[known]

    def sources(self, indices: list[Node], rows: Node | None) -> list[Node]:
        """Where the tokens of `indices` stand among the rows that a layer sees."""
        if rows is None:
            return indices
        graph, places = self.state.graph, self._places_of(rows)
        found = []
        for index in indices:
            if (index, rows) not in self._sources:
                held = graph.call_method("gather", (places, 1, graph.call_method("clamp", (index,), {"min": 0})))
                filler = graph.call_function(operator.lt, (index, 0))
                self._sources[index, rows] = graph.call_method("masked_fill", (held, filler, -1))
            found.append(self._sources[index, rows])
        return found

    def by_position(self, of_rows: Node, rows: Node | None) -> Node:
        """What a layer has for every row, `[B or 1, T', ...]`, for every logical position; anything where none is.

        The same node for all layers that have the same: a cache then holds one copy, as of cos and sin.
        """
        if rows is None:
            return of_rows
        if (of_rows, rows) not in self._by_position:
            # One operator: where shapes are traced, nothing of it asks how many rows there are.
            arguments = (of_rows, self._places_of(rows), 1)
            made = self.state.graph.call_function(torch.ops.attnpack.gather_tokens.default, arguments)
            self._by_position[of_rows, rows] = made
        return self._by_position[of_rows, rows]

    def newest(self, of_tokens: Node, window: int | None) -> Node:
        """What a layer has for every token, `[B or 1, T, ...]`, of those that enter its cache; one node for all
        layers.
        """
        if window is None:
            return of_tokens
        if (of_tokens, window) not in self._newest:
            every = slice(None, None, None)
            made = self.state.graph.call_function(operator.getitem, (of_tokens, (every, slice(-window, None, None))))
            self._newest[of_tokens, window] = made
        return self._newest[of_tokens, window]

    def _real_of(self, rows: Node) -> tuple[Node, Node]:
        """Which tokens have a row and are no padding, bool `[B, T]`, and a tensor `[B, H, T, D]` with all tokens."""
        graph, whole = self.state.graph, self._whole()
        seen = graph.call_function(operator.ge, (self._places_of(rows), 0))
        if (hiding := whole.padding or whole.mask) is not None:
            seen = graph.call_function(operator.and_, (seen, self._real_tokens(hiding)))
        return seen, whole.key

    def _places_of(self, rows: Node) -> Node:
        """The row of every logical position, int64 `[B, T]`, -1 where there is none."""
        if rows not in self._places:
            graph, key = self.state.graph, self._whole().key
            batch, tokens = (graph.call_method("size", (key, dim)) for dim in (0, 2))
            more = graph.call_function(operator.add, (tokens, 1))
            count = graph.call_method("size", (rows, 1))
            device = self._whole().key.meta["example_value"].device
            number = graph.call_function(torch.arange, (count,), {"device": device})
            number = graph.call_method("expand_as", (number, rows))
            none = graph.call_method("new_full", (rows, (batch, more), -1))
            # Filler writes to the extra last column, which is cut off.
            column = graph.call_method("remainder", (rows, more))
            held = graph.call_method("scatter", (none, 1, column, number))
            self._places[rows] = graph.call_method("narrow", (held, 1, 0, tokens))
        return self._places[rows]

    def _whole(self) -> Site:
        """A site that sees all tokens: pruning leaves the first layer alone."""
        return next(site for site in self.state.sites if site.key in self.state.results)

    def _real_tokens(self, mask: Node) -> Node:
        """Bool `[B, T]`: tokens some query may attend to. What none may is padding."""
        if mask not in self._real:
            graph, value = self.state.graph, mask.meta["example_value"]
            allowed = mask
            if value.dtype != torch.bool:
                allowed = graph.call_function(operator.gt, (mask, torch.finfo(value.dtype).min / 2))
            if value.dim() == 2:
                self._real[mask] = graph.call_function(torch.any, (allowed, 0, True))
            else:
                over_queries = graph.call_function(torch.any, (allowed, 2))
                self._real[mask] = graph.call_function(torch.any, (over_queries, 1))
        return self._real[mask]


def _follows(state: GraphState, later: Node, earlier: Node) -> bool:
    for node in state.graph.nodes:
        if node is earlier:
            return True
        if node is later:
            return False
    return False


def gain(policy: Policy, name: Modality, how: Stored, widths: tuple[int, int], turning: int = 0) -> list[int]:
    """When to pack tokens of a modality, as `attnpack::plan` takes it; empty means always.

    widths: `H * D` of keys and of values; turning: numbers of cos and sin a token, this layer's share of them.
    """
    if policy.lossless(name) or (name == TEXT and policy.fold_every is not None):
        return []  # folds need a segment to fold into
    if policy.bases not in ("sample", "batch"):
        return []  # the model's bases take no memory of their own
    return [_words(how.key), _words(how.value), *widths, turning]


def _words(columns: Columns) -> int:
    """The rank that takes as much memory with nothing quantised to fewer than 16 bits."""
    return sum(
        math.ceil(count * sum(min(each, 8) or 16 for each in both(bits)) / 32)
        for count, bits in columns.blocks
        if isinstance(count, int)
    )


def asks_for_loss(policy: Policy, stored: Iterable[Stored]) -> bool:
    """Whether it matters how much truncation drops: for folds, which keep a bound, and ranks chosen by energy."""
    energies = [columns.energy for how in stored for columns in (how.key, how.value)]
    return policy.fold_every is not None or any(energy is not None for energy in energies)


def share_basis(policy: Policy, name: Modality) -> bool:
    """Whether samples may share a basis for tokens of a modality: folds give each sample one of its own."""
    return policy.bases != "sample" and not (name == TEXT and policy.fold_every is not None)
