"""What attention does while a dense model generates, seen through Dynamo: cached keys and values, and who reads them.

The graphs run as they are, op by op; a call behind every attention that keeps a cache hands its operands over. Sites
are found by the passes that rewrite them, so that what is seen here is what the backend would pack.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from attnpack_fx.angles import SharedAngles
from attnpack_fx.compiling import called_through
from attnpack_fx.kernels.rotary import rotate
from attnpack_fx.modality import fit, stated
from attnpack_fx.passes.find_attention import find_attention, scale_of
from attnpack_fx.passes.find_modality import find_modality
from attnpack_fx.passes.find_rotary import RotaryFinder, Rotation
from attnpack_fx.passes.patterns import argument, cat_along_tokens, is_call, layer_number, layer_of
from attnpack_fx.passes.state import GraphState, Site, same_size, shape_of
from attnpack_fx.policy import PackPolicy

#: Between attention and its output projection: heads side by side, and nothing else.
_LAYOUTS = ("transpose", "swapaxes", "permute", "contiguous", "reshape", "view", "flatten", "to", "type", "getitem")
#: Samples of many lengths make as many graphs before Dynamo takes sizes as variable.
_GRAPHS = 64
#: Queries of the prompt that are kept, at most: the last ones.
_QUESTION = 32
#: Why a layer that could be packed cannot be planned for.
UNNUMBERED = "the number of the layer is not known from the graph"


@dataclass(frozen=True)
class Angles:
    """Rotary embedding of a prompt: cos, sin `[B or 1, P, E / 2]`; interleaved as in `kernels.parts.Angles`."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def unrotated(self, key: Tensor) -> Tensor:
        """Keys `[B, H, P, D]` as they were before rotary embedding, in their dtype."""
        cos, sin = self.cos[:, None].float(), self.sin[:, None].float()
        length = cos.square() + sin.square()
        return rotate(key.float(), cos / length, -sin / length, self.interleaved).to(key.dtype)

    def packed(self, index: Tensor, packed: int) -> SharedAngles:
        """As a packed cache holds them, for the first `packed` slots of `index` `[B, N]`."""
        return SharedAngles.of_prompt(self.cos, self.sin, index, packed, self.interleaved, keep_tail=False)


@dataclass(frozen=True)
class Read:
    """Queries of one call, `[B, Hq, k, D]`, which read the first `tokens` tokens of the cache.

    mask: as attention takes it, `[B or 1, Hq or 1, k, tokens]`, bool or added to the scores; or None.
    """

    query: Tensor
    tokens: int
    mask: Tensor | None


@dataclass
class Observed:
    """One decoder layer while one batch of prompts was answered.

    key, value: `[B, H, T, D]`, prompt and all later tokens, keys as they are attended to.
    prompt: tokens of the prompt, P; real: bool `[B or 1, P]`, False for padding, or None; vision: bool `[B or 1, P]`,
        or None where nothing says which tokens are vision tokens.
    angles: of the prompt, where the rotary embedding is recognised.
    out: `[Hq * D, C]`, what multiplies the attention output next, or None where that is no linear map.
    scale: of the scores; reads: one for every decode step.
    question: the prompt's tokens behind its last vision token, or None. They read exact keys and values, but another
        turn of the conversation asks as they do, and reads the packed cache.
    """

    key: Tensor
    value: Tensor
    prompt: int
    real: Tensor | None
    vision: Tensor | None
    angles: Angles | None
    out: Tensor | None
    scale: float
    reads: list[Read] = field(default_factory=list)
    question: Read | None = None


class Observer:
    """Runs a model through Dynamo and keeps what its attention layers did during the last call, by layer number.

    layers: what was seen since `begin`; count: decoder layers that graphs show; vision: of the current prompt.
    """

    def __init__(self) -> None:
        self.layers: dict[int, Observed] = {}
        self.count = 0
        self.obstacles: set[str] = set()
        self.vision: Tensor | None = None
        self._angles: list[tuple[Tensor, Angles]] = []

    def begin(self) -> None:
        """Forget the last call."""
        self.layers, self.vision, self._angles = {}, None, []

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Let calls of `model` be seen; it is left as it was found."""
        with called_through(model, self._backend), torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            yield

    def _backend(self, gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        # A copy: Dynamo reads its own graph after the backend returns.
        graph = Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        state = GraphState(graph, PackPolicy(), {}, {}, {})
        find_attention(state)
        find_modality(state)
        if state.modality is not None:
            self._insert(state, _behind(state.modality, graph), self._see_vision, state.modality)
        rotary = RotaryFinder(graph)
        results = set(state.results)
        for site in state.sites:
            if site.key in results:
                self._watch(state, site, rotary, site.value in results)
        graph.lint()
        return GraphModule(gm, graph).forward

    def _watch(self, state: GraphState, site: Site, rotary: RotaryFinder, kept: bool) -> None:
        layer = layer_of(site.node)
        number = layer_number(layer)
        if number is not None:
            self.count = max(self.count, number + 1)
        obstacle = site.obstacle or _obstacle(site, kept)
        if obstacle is None and number is None:
            obstacle = UNNUMBERED
        if obstacle is not None:
            self.obstacles.add(f"{layer}: {obstacle}")
            return
        *past, new = cat_along_tokens(site.key) or [site.key]
        first = all(shape_of(piece) == (0,) for piece in past)
        rotation = rotary.rotation_of(new) if first else None
        weight, transposed = _output_projection(site)
        angles = (None, None) if rotation is None else (rotation.cos, rotation.sin)
        see = self._reader(number, scale_of(site), rotation, transposed)
        operands = site.query, site.key, site.value, site.mask, *angles, weight
        last = max((item for item in (site.node, *operands) if isinstance(item, Node)), key=_order(state.graph))
        self._insert(state, _behind(last, state.graph), see, *operands)

    def _insert(self, state: GraphState, after: Node, function: Callable[..., None], *arguments: Any) -> None:
        # A plain function of its own: generated code cannot name a bound method.
        def see(*values: Any) -> None:
            function(*values)

        with state.graph.inserting_after(after):
            state.graph.call_function(see, arguments)

    def _see_vision(self, mask: Tensor) -> None:
        if self.vision is None:
            self.vision = mask.detach().clone()

    def _shared(self, cos: Tensor, sin: Tensor, interleaved: bool) -> Angles:
        """One object for all layers that turn their keys alike."""
        for known, angles in self._angles:
            if known is cos:
                return angles
        angles = Angles(cos.detach(), sin.detach(), interleaved)
        self._angles.append((cos, angles))
        return angles

    def _reader(
        self, number: int | None, scale: float, rotation: Rotation | None, transposed: bool
    ) -> Callable[..., None]:
        assert number is not None

        def see(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cos: Any, sin: Any, out: Any) -> None:
            seen = self.layers.get(number)
            if mask is not None and mask.dim() == 2:
                mask = mask[None, None]
            if seen is not None:
                seen.key, seen.value = key.detach(), value.detach()
                seen.reads.append(Read(query.detach(), key.shape[2], None if mask is None else mask.detach()))
                return
            vision = stated() if self.vision is None else self.vision
            if vision is not None:
                vision = fit(vision, key.shape[0], key.shape[2], key.device, newest=False)
            angles = None if rotation is None else self._shared(cos, sin, rotation.interleaved)
            weight = None if out is None else out.detach().mT if transposed else out.detach()
            self.layers[number] = Observed(
                *(key.detach(), value.detach(), key.shape[2], _real(mask), vision, angles, weight, scale),
                question=_question(query.detach(), mask, vision),
            )

        return see


def _obstacle(site: Site, kept: bool) -> str | None:
    """Why the backend would not pack what this site keeps."""
    if not kept:
        return "the keys are kept, and the values are not"
    new = (cat_along_tokens(site.key) or [site.key])[-1]
    query, key = shape_of(site.query), shape_of(new)
    if query is None or key is None or not same_size(query[2], key[2]):
        return "cross-attention: the keys are not those of the queries' own tokens"
    if not site.key.meta["example_value"].dtype.is_floating_point:
        return "the cache is not floating point"
    if site.cap or site.sinks is not None:
        return "its scores are soft-capped or have sinks, which the errors of calibration do not know"
    return None


def _output_projection(site: Site) -> tuple[Node | None, bool]:
    """The weight that multiplies the heads' outputs side by side, and whether it is `[C, Hq * D]`; or None."""
    query, value = shape_of(site.query), shape_of(site.value)
    assert query is not None and value is not None
    node, swaps = site.node, 0
    while True:
        readers = [user for user in node.users if not is_call(user, "size")]
        if len(readers) != 1:
            return None, False
        (reader,) = readers
        if is_call(reader, "linear", "addmm"):
            linear = is_call(reader, "linear")
            source, weight = (argument(reader, place + (not linear), "") for place in (0, 1))
            fits = source is node and isinstance(weight, Node) and swaps == 1
            width = (shape_of(node) or (0,))[-1]
            return (weight, linear) if fits and width == query[1] * value[3] else (None, False)
        if not is_call(reader, *_LAYOUTS):
            return None, False
        swaps += is_call(reader, "transpose", "swapaxes", "permute")
        node = reader


def _question(query: Tensor, mask: Tensor | None, vision: Tensor | None) -> Read | None:
    """Those of a prompt's queries `[B, Hq, P, D]` that come after the vision tokens of every sample."""
    tokens = query.shape[2]
    if vision is None or not vision.any() or (mask is not None and mask.shape[2] != tokens):
        return None
    start = max(int(vision.any(0).nonzero()[-1]) + 1, tokens - _QUESTION)
    if start == tokens:
        return None
    if mask is None:
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    return Read(query[:, :, start:], tokens, mask.detach()[:, :, start:, :tokens])


def _real(mask: Tensor | None) -> Tensor | None:
    """Bool `[B or 1, T]`: tokens some query may attend to. What none may is padding."""
    if mask is None:
        return None
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.any(2).any(1)


def _order(graph: Graph) -> Callable[[Node], int]:
    places = {node: place for place, node in enumerate(graph.nodes)}
    return places.__getitem__


def _behind(node: Node, graph: Graph) -> Node:
    """Where to insert what reads `node`: placeholders stay together."""
    return node if node.op != "placeholder" else [each for each in graph.nodes if each.op == "placeholder"][-1]
