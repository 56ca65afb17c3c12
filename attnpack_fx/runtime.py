"""Calls a rewritten, compiled graph: packed arguments are taken apart before it, packed results put together after
it.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnpack_fx import caller, modality
from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.call import Call
from attnpack_fx.collecting import Collector
from attnpack_fx.kernels.parts import SPARE_ROWS
from attnpack_fx.maintenance import maintain
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.packing import pack
from attnpack_fx.passes.state import (
    Argument,
    Constant,
    GraphState,
    Grown,
    InputSpec,
    Layer,
    ModalitySaid,
    OutputSpec,
    PaddedLength,
    Part,
    Plain,
    Room,
)
from attnpack_fx.placement import Placement
from attnpack_fx.policy import PackPolicy
from attnpack_fx.regrouping import weighed
from attnpack_fx.shared import Alike, lasting
from attnpack_fx.taking_back import provisional, remember
from attnpack_fx.windows import compacted

log = logging.getLogger(__name__)


class Runtime:
    """What Dynamo calls in place of the graph it captured. Holds no state between calls."""

    def __init__(self, compiled: Callable[..., Sequence[Any]], state: GraphState, policy: PackPolicy) -> None:
        self._compiled = compiled
        self._policy = policy
        self._feeders = [_feeder(spec) for spec in state.inputs.values()]
        self._outputs: list[OutputSpec] = state.outputs
        self._pairs = state.pairs
        self._windows = state.windows
        #: The keys of a layer without a window, which show all the tokens that a mask is about.
        windowed = _windowed(state)
        self._whole = next((key for key, _ in state.pairs if key not in windowed), None)
        self._layers = state.layers if policy.partial or policy.fold_every or policy.passes else []
        self._candidates = state.candidates
        self._shown = state.shown
        self._reports = state.reports
        self._first = _FakeCall(state) if _first_call_is_fake() else None

    def __call__(self, *arguments: Any) -> list[Any]:
        if self._first is not None:
            first, self._first = self._first, None
            if any(isinstance(each, FakeTensor) for each in arguments):
                return first.results(self._compiled)
        for key, value in self._pairs:
            _check_pair(arguments[key], arguments[value])
            arguments[key].taken_back = arguments[value].taken_back = None  # what it holds stays
        if self._whole is not None:
            _check_mask(arguments[self._whole].placement)
        call = Call.of(arguments)
        grown: dict[int, PackedTensor] = {}
        flat = [feed(arguments, grown, call) for feed in self._feeders]
        results = self._compiled(*flat)
        if self._shown is not None:
            call.saw(results[self._shown])
        call.reports += self._reports
        call.alike.next_graph()
        collector = Collector(results, grown, self._policy, call.alike)
        with lasting():
            outputs = [collector.collect(spec) for spec in self._outputs]
            for key, value in self._windows:
                outputs[key], outputs[value] = compacted(outputs[key], outputs[value])
        self._maintain(arguments, results, outputs)
        self._unite(outputs, call.alike)
        self._pack_candidates(outputs, call)
        call.travel(outputs)
        return outputs

    def _maintain(self, arguments: Sequence[Any], results: Sequence[Any], outputs: list[Any]) -> None:
        """Let the policy's methods act on the layers that this call has packed or grown."""
        layers = []
        for spec in self._layers:
            key, value = outputs[spec.key], outputs[spec.value]
            grown = self._outputs[spec.key]
            newest = None
            if spec.count is not None:
                added = spec.count.evaluate(arguments)
                weights = grown.weights if isinstance(grown, Grown) else None
                observed = None if weights is None else results[weights]
            else:
                key, added = weighed(key, self._policy), key.shape[2]
                observed, newest = _observed(results, spec, key), _newest(results, spec, key)
            prefill = spec.count is None
            known = spec.skipped, spec.text, observed, newest
            layers.append(CachedLayer(spec.number, key, value, added, prefill, *known))
        called = provisional(layers, self._policy)
        maintain(layers, self._policy)
        remember(called, layers)
        for spec, layer in zip(self._layers, layers, strict=True):
            outputs[spec.key], outputs[spec.value] = layer.key, layer.value

    def _unite(self, outputs: list[Any], alike: Alike) -> None:
        """Let layers of several graphs of a prompt hold one table of angles after methods have acted, too."""
        for spec in self._layers:
            key = outputs[spec.key]
            angles = key.held.angles if spec.count is None else None
            known = None if angles is None else alike.one(angles, earlier=True)
            if known is not angles:
                outputs[spec.key] = key.turned(known)
                outputs[spec.key].taken_back = key.taken_back

    def _pack_candidates(self, outputs: list[Any], call: Call) -> None:
        """Pack what this graph was compiled to leave dense, where vision tokens are known of after all."""
        known = call.vision() if self._candidates else None
        if not self._candidates or (modality.stated() is None and known is None):
            return
        for key, value, layer in self._candidates:
            batch, _, tokens, _ = outputs[key].shape
            vision = modality.said(known, batch, tokens, outputs[key].device) > 0
            packed = pack(outputs[key], outputs[value], self._policy, modality=vision, layer=layer)
            outputs[key], outputs[value] = packed


def _windowed(state: GraphState) -> set[int]:
    """Arguments that are packed keys or values of a layer with a sliding window."""
    outputs = (state.outputs[number] for pair in state.windows for number in pair)
    return {spec.position for spec in outputs if isinstance(spec, Grown)}


def _first_call_is_fake() -> bool:
    """Whether what is being compiled is called with fake tensors first: that of DistributedDataParallel's buckets is,
    to learn the strides of what one hands to the next.
    """
    context = torch._guards.TracingContext.try_get()
    return context is not None and context.fakify_first_call


class _FakeCall:
    """The first call of a bucket: the compiled graph with the inputs it was compiled for, packed results dense."""

    def __init__(self, state: GraphState) -> None:
        self._inputs = [state.examples[node] for node in state.inputs]
        self._dense = state.traced
        self._outputs = state.outputs

    def results(self, compiled: Callable[..., Sequence[Any]]) -> list[Any]:
        made = compiled(*self._inputs)
        pairs = zip(self._outputs, self._dense, strict=True)
        return [made[spec.index] if isinstance(spec, Plain) else _empty(dense) for spec, dense in pairs]


def _empty(like: Tensor) -> Tensor:
    """One as large, of the mode that is active: keys and values are returned, no other bucket takes them."""
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in like.shape]
    return torch.empty(sizes, dtype=like.dtype, device=like.device)


def _observed(results: Sequence[Any], spec: Layer, key: PackedTensor) -> Tensor | None:
    """What prefill observed, `[1 or 2, B', T]` in logical order: of every head, or their mean."""
    if spec.scores is None:
        return None
    scores: Tensor = results[spec.scores]
    scores = _in_order(scores if scores.dim() == 4 else scores[None], 1, results, spec, key)
    return scores.flatten(1, 2) if key.held.heads else scores.mean(2)


def _newest(results: Sequence[Any], spec: Layer, key: PackedTensor) -> Tensor | None:
    """What each of its newest queries did, `[B', n, T]`."""
    return None if spec.newest is None else _in_order(results[spec.newest], 0, results, spec, key).flatten(0, 1)


def _in_order(scores: Tensor, samples: int, results: Sequence[Any], spec: Layer, key: PackedTensor) -> Tensor:
    """Of all logical positions, from four dims whose last one counts what a pruned prompt left; samples: which dim."""
    if spec.observed is None:
        return scores
    rows: Tensor = results[spec.observed]
    rows = rows.view(*(-1 if dim == samples else 1 for dim in range(3)), rows.shape[1])
    # Filler goes to an extra last column, which is cut off.
    whole = scores.new_zeros((*scores.shape[:3], key.shape[2] + 1))
    return whole.scatter(3, (rows % whole.shape[3]).expand_as(scores), scores)[..., :-1]


def _feeder(spec: InputSpec) -> Callable[[Sequence[Any], dict[int, PackedTensor], Call], Any]:
    """How one input of the compiled graph is found among Dynamo's arguments and the packed values grown for this
    call.
    """
    match spec:
        case Argument(position):
            return lambda arguments, grown, call: arguments[position]
        case Part(position, "slot"):
            return lambda arguments, grown, call: arguments[position].slot
        case Part(position, name):
            return lambda arguments, grown, call: arguments[position].held.named[name]
        case PaddedLength(position):
            return lambda arguments, grown, call: arguments[position].lease.length + SPARE_ROWS
        case Room(position, count):

            def room(arguments: Sequence[Any], grown: dict[int, PackedTensor], call: Call) -> Tensor:
                grown[position] = arguments[position].grow(count.evaluate(arguments))
                return grown[position].lease.visible()

            return room
        case Constant(tensor=tensor):
            return lambda arguments, grown, call: tensor
        case ModalitySaid(batch, tokens):

            def said(arguments: Sequence[Any], grown: dict[int, PackedTensor], call: Call) -> Tensor:
                device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
                return modality.said(call.vision(), batch.evaluate(arguments), tokens.evaluate(arguments), device)

            return said


def _check_pair(key: PackedTensor, value: PackedTensor) -> None:
    if key.slots != value.slots or not key.placement.same_as(value.placement):
        raise RuntimeError(
            f"keys {key} and values {value} of one layer do not hold the same tokens in the same places; "
            "pass both from the same cache, and reorder, crop or select both alike"
        )


_SHOWN = (
    "attention_mask: got {} zeros among the {} tokens of the prompt, expected as many as at prefill, since tokens that "
    "are masked there are padding, of which nothing is kept; give later calls the prompt's mask, and mask at prefill "
    "only what no later call reads"
)


def _check_mask(placement: Placement) -> None:
    """Raise where a mask shows a token that was padding when the prompt was packed: none of it is kept."""
    if not placement.most_missing:
        return
    mask, samples = caller.attention_mask(), len(placement.index)
    if mask is None or not len(mask) or samples % len(mask) or mask.shape[1] < placement.tokens:
        return
    hidden = (mask[:, : placement.tokens] == 0).sum(1)
    shown = (hidden.repeat_interleave(samples // len(mask)) < placement.missing.to(mask.device)).any()
    if mask.is_cuda:  # the host does not wait for the answer
        torch._assert_async(~shown, _SHOWN.format("fewer", placement.tokens))
    elif shown:
        raise RuntimeError(_SHOWN.format(hidden.tolist(), placement.tokens))
