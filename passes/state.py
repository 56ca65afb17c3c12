"""What the passes share: the graph being rewritten, what its inputs and outputs mean, and what was decided at each
site.

The graph keeps Dynamo's placeholders; packed values enter it as placeholders of their parts, made the first time a
pass asks. Each
placeholder has an input spec and each output an output spec: together they tell the runtime how to call the compiled
graph.
"""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from attnpack_fx.kernels.parts import (
    SPARE_ROWS,
    Angles,
    Block,
    Form,
    PackedParts,
    Rows,
    Segment,
    block_of,
    tensor_names,
)
from attnpack_fx.passes.method import Method
from attnpack_fx.passes.storage import Columns, LayerPlan, Stored

Modality = Literal["vision", "text"]
VISION: Modality = "vision"
TEXT: Modality = "text"


class Policy(Protocol):
    """What the passes ask of a policy."""

    @property
    def fold_every(self) -> int | None: ...

    @property
    def passes(self) -> tuple[Method, ...]: ...

    @property
    def partial(self) -> object | None: ...

    @property
    def bases(self) -> str: ...

    @property
    def basis_tolerance(self) -> float: ...

    def layer(
        self,
        number: int | None,
        count: int | None,
        key_width: int,
        value_width: int,
        *,
        vision: bool = True,
        rotary: bool = True,
    ) -> LayerPlan: ...

    def skips(self, number: int | None, count: int | None) -> bool: ...

    def lossless(self, modality: Modality) -> bool: ...

    def basis(self, number: int | None, modality: Modality, kind: str) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class Size:
    """A size known at compile time as an expression over sizes of the graph's inputs."""

    expression: sympy.Expr
    symbols: tuple[tuple[sympy.Symbol, int, int | None], ...]  # symbol, argument, dimension (None: the argument itself)

    def evaluate(self, arguments: Sequence[Any]) -> int:
        if not self.symbols:
            return int(self.expression)
        values = {
            symbol: int(arguments[position] if dim is None else arguments[position].shape[dim])
            for symbol, position, dim in self.symbols
        }
        return int(self.expression.subs(values))


# ---- how each placeholder of the rewritten graph is fed
# ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """Dynamo's argument `position`, as it is."""

    position: int


@dataclass(frozen=True)
class Part:
    """Part `name` of the packed argument `position`."""

    position: int
    name: str


@dataclass(frozen=True)
class PaddedLength:
    """Length of the tail of the packed argument `position` before anything is appended, plus `SPARE_ROWS` (an int)."""

    position: int


@dataclass(frozen=True)
class Room:
    """Tail rows of the packed argument `position` with room for `count` more tokens, and `SPARE_ROWS` beyond."""

    position: int
    count: Size


@dataclass(frozen=True)
class ModalitySaid:
    """Int8 `[batch, tokens]`, what is said of tokens beside what this graph shows: 1 vision, -1 none, 0 nothing.

    Stated by the caller, or known of the call otherwise.
    """

    batch: Size
    tokens: Size


@dataclass(frozen=True)
class Constant:
    """A tensor of the policy's, always the same; name tells it from others."""

    name: str
    tensor: torch.Tensor = field(compare=False)


InputSpec = Argument | Part | PaddedLength | Room | ModalitySaid | Constant

# ---- what each of Dynamo's outputs becomes
# -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """Output `index` of the rewritten graph."""

    index: int


@dataclass(frozen=True)
class Grown:
    """The packed argument `position` with `count` tokens appended.

    weights: the output that says how much this call attended to each slot; angles: `(cos, sin)` outputs of the new
    tokens, for keys that may be packed later as they were before rotary embedding; window: None, or how many of the
    newest tokens stay.
    """

    position: int
    count: Size
    weights: int | None = None
    angles: tuple[int, int] | None = None
    window: int | None = None


@dataclass(frozen=True)
class Factors:
    """Outputs that are the factors of one segment.

    owner: which basis each sample has, where they may share; given: the model's basis, which comes before the outputs.
    """

    coefficient: int
    basis: int
    owner: int | None = None
    given: torch.Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Packed:
    """A new packed value, from outputs of the rewritten graph.

    modalities, columns: of its segments, and how each is stored; factors: outputs of each (`Factors`);
    indices: the index of each segment, then of the dense prompt tokens; slot, tail: the others.
    squares: sum of squares of every token, `[B, T]`, where something asks how much a truncation dropped.
    angles: `(cos, sin)` outputs, of keys stored before rotary embedding; interleaved: as in `Angles`.
    vision: the output that says which tokens are vision tokens, bool `[B or 1, T]`, where anything asks.
    heads: the number of KV heads where each keeps tokens of its own, else 0.
    window: None, or how many of the newest tokens stay.
    """

    modalities: tuple[Modality, ...]
    columns: tuple[Columns, ...]
    factors: tuple[Factors, ...]
    indices: tuple[int, ...]
    slot: int
    tail: int
    squares: int | None = None
    angles: tuple[int, int] | None = None
    interleaved: bool = False
    vision: int | None = None
    heads: int = 0
    window: int | None = None


OutputSpec = Plain | Grown | Packed


@dataclass
class PackedInput:
    """A placeholder of Dynamo's graph that holds a packed value.

    form: what is fixed about it; parts: its tensors by name (`index`, `slot`, `coefficient_<n>`, ...) as fakes; tail:
    a fake of no rows; length: how many it has, padded by `SPARE_ROWS`.
    """

    node: Node
    position: int
    form: Form
    parts: dict[str, Any]
    tail: Any
    length: Any


@dataclass(frozen=True)
class Layer:
    """Outputs that are keys and values of one attention layer, both packed.

    key, value: among Dynamo's outputs; number: of the decoder layer, where the graph shows it.
    text: how it stores text, where tokens are folded into it.
    count: how many tokens were appended; None where the layer has just been packed.
    skipped: whether the policy leaves the layer alone.
    scores: of a layer just packed, the output that says what its attention observed, fp32 `[B, H, T]`, or
        `[2, B, H, T]` as for vision tokens and for others; observed: the output that says at which position each was,
        int64 `[B, T]`; None: they are in order. newest: the output that says what each of the newest queries observed,
        fp32 `[B, H or 1, n, T]`.
    """

    key: int
    value: int
    number: int | None
    text: Stored | None = None
    count: Size | None = None
    skipped: bool = False
    scores: int | None = None
    observed: int | None = None
    newest: int | None = None


@dataclass
class Site:
    """One attention in the graph.

    query, key, value: as attention reads them, key and value with KV heads repeated or not (`grouped`).
    kind: how it is written: `"sdpa"`, `"eager"`, `"flex_attention"`.
    padding: of a mask with other parts, the one that hides padding. folded: whether `node` is `[B * H, T, D]`.
    kept, window: of a sliding window, the slices of key and value that enter the cache, and of how many of the newest
        tokens they are; else None.
    cap: of soft-capped scores, else 0. sinks: None, or a score per query head that takes part in softmax, `[1, Hq]`.
    obstacle: why it cannot be rewritten whatever its cache, or None.
    """

    node: Node
    kind: str
    query: Node
    key: Node
    value: Node
    mask: Node | None = None
    padding: Node | None = None
    scale: float | None = None
    cap: float = 0.0
    sinks: Node | None = None
    is_causal: bool = False
    kept: tuple[Node, Node] | None = None
    window: int | None = None
    folded: bool = False
    obstacle: str | None = None

    @property
    def cached(self) -> tuple[Node, Node]:
        """Key and value as they enter the cache."""
        return self.kept or (self.key, self.value)


@dataclass
class SiteReport:
    """What became of one attention site.

    key_space: of what is compressed: `"rotated"` or `"unrotated"`.
    action: `"packed"` (reads a packed past), `"compressed"` (its cache leaves packed), `"dense"` (left as it was),
    `"uncached"` (keeps no cache, as in a vision encoder). Of kind `"tokens"`, for a method that prunes tokens at a
    layer: `"pruned"`, or `"unpruned"`. reason: why not, or what of it stays dense.
    """

    layer: str
    kind: str
    action: Literal["packed", "compressed", "dense", "uncached", "pruned", "unpruned"]
    reason: str = ""
    causal: bool = False
    key_rank: dict[str, int] = field(default_factory=dict)
    value_rank: dict[str, int] = field(default_factory=dict)
    key_space: str = ""


@dataclass(frozen=True)
class Pruned:
    """Decoder layers that see fewer tokens than the prompt has.

    first_layer: the first of them, from 0. rows: int64 `[B, T']`, the logical prompt positions of the rows that they
    see, in ascending order, filled up at the end of a sample with -1; padding is not among them.
    hidden: `[B, T', C]`, what enters the first layer; how many rows stay depends on the data, so graphs are cut behind.

    Nodes of these layers keep the `example_value` Dynamo traced, with all tokens.
    """

    first_layer: int
    rows: Node
    hidden: Node


@dataclass
class GraphState:
    """The graph and everything known about it; passes read and update it in place.

    windows: outputs that are keys and values of a layer with a sliding window, both grown.
    modality_given: whether anything is known of vision tokens beside what the graph shows. in_decoder: whether decoder
    layers of the same call stand in front of it. traced: what Dynamo's graph returns, each as it was there.
    unknown: softmax of what looks like attention -> why it is not known.
    """

    graph: Graph
    policy: Policy
    packed: dict[Node, PackedInput]
    inputs: dict[Node, InputSpec]
    examples: dict[Node, Any]
    wanted: set[Node] = field(default_factory=set)
    modality_given: bool = False
    in_decoder: bool = False
    carries: bool = False
    pairs: list[tuple[int, int]] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    windows: list[tuple[int, int]] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    unknown: dict[Node, str] = field(default_factory=dict)
    pruned: list[Pruned] = field(default_factory=list)
    reports: list[SiteReport] = field(default_factory=list)
    modality: Node | None = None
    traced: list[Any] = field(default_factory=list)
    outputs: list[OutputSpec] = field(default_factory=list)
    candidates: list[tuple[int, int, int | None]] = field(default_factory=list)
    shown: int | None = None

    @property
    def arguments(self) -> set[Node]:
        """Dynamo's own plain placeholders."""
        return {node for node, spec in self.inputs.items() if isinstance(spec, Argument) and node not in self.packed}

    @property
    def output(self) -> Node:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def results(self) -> list[Any]:
        """What the graph returns, in order."""
        return list(self.output.args[0])  # type: ignore[arg-type]

    def add_input(self, spec: InputSpec, example: Any, name: str) -> Node:
        """The placeholder fed by `spec`, made if it does not exist yet."""
        for node, known in self.inputs.items():
            if known == spec:
                return node
        last = next(reversed(self.inputs))
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["example_value"] = example
        self.inputs[node] = spec
        self.examples[node] = example
        return node

    def constant(self, given: Constant) -> Node:
        """The placeholder of a tensor of the policy's."""
        modes = (example.fake_mode for example in self.examples.values() if isinstance(example, FakeTensor))
        mode = next(modes, None)
        example = given.tensor if mode is None else mode.from_tensor(given.tensor, static_shapes=True)
        return self.add_input(given, example, f"attnpack_{given.name}")

    def part(self, packed: PackedInput, name: str) -> Node:
        """The placeholder of one part: `index`, `slot`, `cos`, `coefficient_<n>`, `basis_<n>`, ..."""
        return self.add_input(Part(packed.position, name), packed.parts[name], f"{packed.node.name}_{name}")

    def described(self, packed: PackedInput, tail: Node, length: Node, slot: bool = False) -> PackedParts[Node]:
        """A packed input as operators take it, with this tail; slot: whether they ask for it."""
        form, numbers = packed.form, itertools.count()

        def part(name: str) -> Node:
            return self.part(packed, name)

        def block(kind: int) -> Block[Node] | Rows[Node]:
            number = next(numbers)
            return block_of(kind, {name: part(f"{name}_{number}") for name in tensor_names(kind)})

        segments = tuple(Segment(tuple(map(block, kinds))) for kinds in form.kinds)
        angles: Angles[Node] | None = None
        if form.angles is not None:
            axes = part("axes") if form.angles.axes else None
            angles = Angles(part("cos"), part("sin"), axes, form.angles.interleaved)
        index = part("index")
        return PackedParts(segments, tail, length, index, part("slot") if slot else None, angles, form.ragged)

    def length(self, packed: PackedInput) -> Node:
        """A node holding how many tail rows of a packed input hold tokens."""
        padded = self.add_input(PaddedLength(packed.position), packed.length, f"{packed.node.name}_length")
        with self.graph.inserting_before(self.first_computation()):
            return self.graph.call_function(operator.sub, (padded, SPARE_ROWS))

    def room(self, packed: PackedInput, tokens: int | torch.SymInt, count: Size) -> Node:
        """The placeholder of a packed input's tail rows, with room for `tokens` more."""
        template, padded = packed.tail, packed.length
        example = template.new_empty((padded + tokens, *template.shape[1:]))
        return self.add_input(Room(packed.position, count), example, f"{packed.node.name}_tail")

    def first_computation(self) -> Node:
        return next(node for node in self.graph.nodes if node.op != "placeholder")

    def size(self, value: int | torch.SymInt) -> Size | None:
        """`value` as an expression the runtime can evaluate before the call, or None."""
        if isinstance(value, int):
            return Size(sympy.Integer(value), ())
        expression = value.node.expr
        found = []
        for symbol in sorted(expression.free_symbols, key=str):
            origin = self._origin(symbol)
            if origin is None:
                return None
            found.append((symbol, *origin))
        return Size(expression, tuple(found))

    def _origin(self, symbol: sympy.Symbol) -> tuple[int, int | None] | None:
        for node, spec in self.inputs.items():
            if not isinstance(spec, Argument):
                continue
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                return spec.position, None
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                        return spec.position, dim
        return None


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """Shape of a node's value as Dynamo traced it, or None when it is not a tensor."""
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are one expression; asks nothing of the shape environment, so adds no guard."""
    expressions = [size.node.expr if isinstance(size, torch.SymInt) else size for size in (left, right)]
    return bool(expressions[0] == expressions[1])
